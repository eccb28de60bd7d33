#!/usr/bin/env bash
# CLHA from a fresh machine to a table.
#
#   bash run.sh setup    .venv with the pinned packages (the others call it themselves)
#   bash run.sh tiny     the whole method on the toy world: data, models, training, table, pictures
#                        (SCALE=40 takes 40 percent of the steps)
#   bash run.sh study    the study of RESULTS.md on the toy world, as OUT/RESULTS.md. Takes hours, and resumes where
#                        it was stopped (OUT=out/study). SEEDS="0 1" is a quick one without RLHF and
#                        most ablations, as tuned in docs/study
#   bash run.sh test     the tests
#   bash run.sh          the paper's experiment, with these variables:
#
#     MODEL=huggyllama/llama-7b    the language model: a Hugging Face folder or a hub name
#     HH=Anthropic/hh-rlhf         the data: the hub, a folder of raw HH-RLHF, or of the authors' data.zip
#     RM_TRAIN=..., RM_EVAL=...    the reward models (default: Open-Assistant's, as in the paper)
#     NPROC=8                      processes, one per GPU
#     RESTARTS=3                   how often torchrun restarts them when one has died
#     OBJECTIVE=released           the loss as released, or clha: ours, with its own margin and reward gap
#     OUT=out/hh                   where everything goes; a stage whose output exists is skipped
#     TRAIN_FLAGS=, EVAL_FLAGS=    further flags for training and for generation, such as "--max_steps 20"
#
# PYTHON=python3 uses an environment of your own instead of .venv. Relative paths start where
# you call it; the default OUT is here.
set -euo pipefail
shopt -s nullglob
caller=$PWD
cd "$(dirname "$0")"
if [ "$caller" != "$PWD" ]; then  # relative paths are the caller's
    for name in MODEL HH RM_TRAIN RM_EVAL PYTHON; do
        [ -e "$caller/${!name:-/}" ] && [ -n "${!name:-}" ] && printf -v "$name" %s "$caller/${!name}"
    done
    [[ ${OUT:-/} = /* ]] || OUT=$caller/$OUT
fi
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}  # threads that spin while they wait starve a busy machine

die() { echo "run.sh: $*" >&2; exit 2; }

# need NAME PATTERN MEANING: ends the program if the variable is not what the pattern says.
need() { [[ ${!1:-} =~ ^($2)$ ]] || die "$1=${!1}: must be $3"; }

# need_model NAME...: a folder, or what may be on the hub.
need_model() {
    local name
    for name; do
        [ -d "${!name}" ] || need "$name" '[^/.~][^/]*/[^/]+' "a folder, or a hub name like owner/name"
    done
}

# need_out: the folder for everything that is written can be made.
need_out() { mkdir -p -- "$OUT" 2> /dev/null || die "OUT=$OUT: must be a folder"; }

setup() {
    if [ -n "${PYTHON:-}" ]; then
        "$PYTHON" -c 'from importlib.util import find_spec as f; assert f("torch") and f("transformers")' 2> /dev/null ||
            die "PYTHON=$PYTHON: must be a Python that has the packages of requirements.txt"
        return
    fi
    PYTHON=.venv/bin/python
    cmp -s requirements.txt .venv/installed.txt && return 0
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "needs python3 of version 3.11 or later"
    echo "setup: installing the packages of requirements.txt into .venv"
    python3 -m venv .venv
    .venv/bin/python -m pip install --quiet -r requirements.txt
    cp requirements.txt .venv/installed.txt
}

# stage OUTPUT COMMAND...: runs a command unless its output exists; programs write outputs whole.
stage() {
    local output=$1 start=$SECONDS
    shift
    if [ -e "$output" ]; then
        echo "== have $output"
    else
        echo "== $*"
        "$@"
        echo "   took $((SECONDS - start)) s"
    fi
}

# percent N: N scaled by SCALE.
percent() { echo $(($1 * SCALE / 100)); }

tiny() {
    OUT=${OUT:-out/tiny} SCALE=${SCALE:-100}
    need SCALE '[2-9]|[1-9][0-9]{1,4}' "a percentage of the steps, 2 or more"
    setup
    need_out
    local out=$OUT started=$SECONDS name epochs
    local data=$out/data base=$out/base/final
    local small=(--batch_size 64 --pack_tokens 4096 --activation_checkpointing none)
    local sft=(-m study.baselines --objective sft --max_grad_norm 20 "${small[@]}")  # its loss is a sum over tokens
    epochs=$(printf '%d.%02d' $((SCALE / 100)) $((SCALE % 100)))
    local rm=(--learning_rate 7e-4 --batch_size 32 --pack_tokens 4096 --epochs "$epochs")
    stage "$data" "$PYTHON" -m study.toy make --out "$data"
    for name in pretrain train; do  # what people chose, as rewards: for plain imitation
        stage "$out/$name.labels.jsonl" "$PYTHON" -m study.baselines labels --data "$data/$name.jsonl" \
            --out "$out/$name.labels.jsonl"
    done
    stage "$base" "$PYTHON" "${sft[@]}" --model "$data/init" --train_data "$out/pretrain.labels.jsonl" \
        --output_dir "$out/base" --learning_rate 2e-3 --max_steps "$(percent 280)" --lr_schedule cosine
    stage "$out/rm_train" "$PYTHON" reward.py train --model "$base" --data "$data/rm_train.jsonl" \
        --out "$out/rm_train" "${rm[@]}" --seed 1
    stage "$out/rm_eval" "$PYTHON" reward.py train --model "$base" --data "$data/rm_eval.jsonl" \
        --out "$out/rm_eval" "${rm[@]}" --seed 2
    stage "$out/train.jsonl" "$PYTHON" reward.py score --model "$out/rm_train" --data "$data/train.jsonl" \
        --out "$out/train.jsonl" --plot "$out/gaps.png"
    stage "$out/dev.jsonl" "$PYTHON" reward.py score --model "$out/rm_train" --data "$data/dev.jsonl" \
        --out "$out/dev.jsonl"
    stage "$out/sft/final" "$PYTHON" "${sft[@]}" --model "$base" --train_data "$out/train.labels.jsonl" \
        --output_dir "$out/sft" --learning_rate 5e-4 --max_steps "$(percent 80)"
    stage "$out/clha/final" "$PYTHON" clha.py --model "$base" --train_data "$out/train.jsonl" \
        --output_dir "$out/clha" "${small[@]}" --learning_rate 5e-4 --max_steps "$(percent 80)" \
        --dev_data "$out/dev.jsonl" --eval_every 20 --save_every 10
    stage "$out/responses/clha.jsonl" "$PYTHON" evaluate.py generate --model "$out"/{base,sft,clha}/final \
        --data "$data/test.jsonl" --out "$out/responses"
    stage "$out/gold/clha.jsonl" "$PYTHON" -m study.toy gold --responses "$out"/responses/{base,sft,clha}.jsonl \
        --data "$data/test.jsonl" --out "$out/gold"
    stage "$out/eval/clha/scores.json" "$PYTHON" evaluate.py score --responses "$out"/gold/{base,sft,clha}.jsonl \
        --data "$data/test.jsonl" --reward_model "$out/rm_eval" --out "$out/eval"
    # How the dev responses change over training
    stage "$out/steps/responses/base.jsonl" "$PYTHON" evaluate.py generate --model "$out"/clha/step-* "$base" \
        --data "$data/dev.jsonl" --out "$out/steps/responses"
    stage "$out/steps/gold/base.jsonl" "$PYTHON" -m study.toy gold \
        --responses "$out"/steps/responses/{step-*,base}.jsonl --data "$data/dev.jsonl" --out "$out/steps/gold"
    stage "$out/steps/eval/base/scores.json" "$PYTHON" evaluate.py score --responses "$out"/steps/gold/{step-*,base}.jsonl \
        --data "$data/dev.jsonl" --reward_model "$out/rm_eval" --out "$out/steps/eval"
    stage "$out/reward.png" "$PYTHON" evaluate.py table --total "$out"/steps/eval/* --plot "$out/reward.png"
    "$PYTHON" evaluate.py table --total "$out"/eval/{base,sft,clha} | tee "$out/table.md"
    echo "$((SECONDS - started)) s; the table is in $out/table.md, the pictures are $out/reward.png and $out/gaps.png"
}

study() {
    OUT=${OUT:-out/study}
    local out=$OUT seeds=()
    need SEEDS '[0-9 ]*' "numbers, with blanks between them"
    setup
    need_out
    read -ra seeds <<< "${SEEDS:-}"
    if [ ${#seeds[@]} = 0 ]; then
        echo "study: tunes every method, then compares them on 20 seeds; SEEDS=\"0 1\" is a quick one"
        "$PYTHON" -m study.run tune --out "$out"
        "$PYTHON" -m study.run compare --out "$out" --tuning "$out/tuning.jsonl"
        "$PYTHON" -m study.run vary --out "$out" --tuning "$out/tuning.jsonl"
    else
        "$PYTHON" -m study.run compare --out "$out" --seeds "${seeds[@]}" --methods \
            base CLHA "CLHA w/o gate" "CLHA w/o filter" PRO "gated SFT" SFT RRHF DPO "CPO, hinge" ODPO LiPO-lambda \
            SimPO CoH "CLHA as released"
    fi
    "$PYTHON" -m study.report --rows "$out"
}

tests() {
    setup
    "$PYTHON" -m ruff check .
    "$PYTHON" -m ruff format --check --quiet .
    "$PYTHON" -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder
}

full() {
    MODEL=${MODEL:-huggyllama/llama-7b} HH=${HH:-Anthropic/hh-rlhf} OUT=${OUT:-out/hh}
    NPROC=${NPROC:-8} RESTARTS=${RESTARTS:-3} OBJECTIVE=${OBJECTIVE:-released}
    RM_TRAIN=${RM_TRAIN:-OpenAssistant/oasst-rm-2.1-pythia-1.4b-epoch-2.5}
    RM_EVAL=${RM_EVAL:-OpenAssistant/oasst-rm-2-pythia-6.9b-epoch-1}
    need NPROC '[1-9][0-9]*' "a number of processes"
    need RESTARTS '[0-9]+' "a number, 0 or more"
    need OBJECTIVE 'released|clha' "released or clha"
    need_model MODEL HH RM_TRAIN RM_EVAL
    [[ "${TRAIN_FLAGS:-}" != *lora_rank* ]] || die "TRAIN_FLAGS: adapters must be merged by hand; leave --lora_rank out"
    setup
    need_out
    local launch=("$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$NPROC" --max_restarts "$RESTARTS")
    local out=$OUT data=$OUT/data hh=$HH part path format=hh best responses objective=(clha.py)
    generate() {  # MODEL DATA OUTPUT
        # shellcheck disable=SC2086  # the flags are meant to be split
        stage "$3" "${launch[@]}" evaluate.py generate --model "$1" --data "$2" --out "$3" ${EVAL_FLAGS:-}
    }
    # Raw HH-RLHF has a folder for each subset; the authors' data.zip has not.
    [ -d "$hh" ] && ! compgen -G "$hh/*-base" > /dev/null && format=release
    stage "$data" "$PYTHON" prepare_data.py "$format" --source "$hh" --out "$data"
    for part in train dev test; do
        [ -e "$data/$part.jsonl" ] ||
            die "$data: lacks $part.jsonl; remove it if it was left unfinished, else $hh has no $part data"
    done
    for part in train dev; do
        if [ $format = release ]; then  # scored by the authors
            stage "$out/$part.jsonl" ln -s "data/$part.jsonl" "$out/$part.jsonl"
        else
            stage "$out/$part.jsonl" "${launch[@]}" reward.py score --model "$RM_TRAIN" \
                --data "$data/$part.jsonl" --out "$out/$part.jsonl" --plot "$out/gaps-$part.png"
        fi
        # The released loss trusts the file's order; the authors' preprocessing sorts by reward.
        stage "$out/$part.ranked.jsonl" "$PYTHON" -m study.baselines ranked --data "$out/$part.jsonl" \
            --out "$out/$part.ranked.jsonl"
    done
    [ "$OBJECTIVE" = clha ] || objective=(-m study.baselines --objective "$OBJECTIVE")
    # shellcheck disable=SC2086  # the flags are meant to be split
    stage "$out/train/final" "${launch[@]}" "${objective[@]}" --model "$MODEL" \
        --train_data "$out/train.ranked.jsonl" --dev_data "$out/dev.ranked.jsonl" --output_dir "$out/train" \
        --save_every 600 ${TRAIN_FLAGS:-}
    # The release keeps the checkpoint whose greedy responses to the dev prompts have the highest mean reward.
    for path in "$out"/train/{step-*,final}; do
        generate "$path" "$out/dev.jsonl" "$out/dev/$(basename "$path").jsonl"
    done
    responses=("$out"/dev/*.jsonl)
    stage "$out/dev/eval/$(basename "${responses[-1]}" .jsonl)/scores.json" "${launch[@]}" evaluate.py score \
        --responses "${responses[@]}" --data "$out/dev.jsonl" --reward_model "$RM_TRAIN" --out "$out/dev/eval"
    best=$("$PYTHON" evaluate.py best "$out"/dev/eval/*)
    best=$(basename "$best")
    echo "== the best checkpoint by dev reward: $best"
    generate "$MODEL" "$data/test.jsonl" "$out/test/base.jsonl"
    generate "$out/train/$best" "$data/test.jsonl" "$out/test/clha.jsonl"
    stage "$out/eval/clha/scores.json" "${launch[@]}" evaluate.py score --responses "$out"/test/{base,clha}.jsonl \
        --data "$data/test.jsonl" --reward_model "$RM_EVAL" --out "$out/eval"
    "$PYTHON" evaluate.py table "$out"/eval/{base,clha} | tee "$out/table.md"
}

case ${1:-full} in
    setup) setup ;;
    tiny) tiny ;;
    study) study ;;
    test) tests ;;
    full) full ;;
    *) die "$1: no such command; there are setup, tiny, study, test, and none for the whole experiment" ;;
esac
