"""Wrong input ends in one line that says what and where, exit code 2, and nothing half-written."""

import gzip
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from conftest import ROOT
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForSequenceClassification, LlamaTokenizer, PreTrainedTokenizerFast

import checkpoint
import clha
import evaluate
import prepare_data
import reward
import rlhf
import study
from program import load_tokenizer
from program import run as run_program

PROGRAMS: dict[str, Callable[[], None]] = {
    "clha.py": lambda: clha.train(clha.parse_args(sys.argv[1:])),
    "checkpoint.py": checkpoint.main,
    "reward.py": reward.main,
    "prepare_data.py": prepare_data.main,
    "evaluate.py": evaluate.main,
    "study.py": study.main,
    "rlhf.py": lambda: rlhf.train(rlhf.parse_args(sys.argv[1:])),
}

PROMPT = [{"role": "user", "content": "How?"}]
GOOD = {"prompt": PROMPT, "responses": ["So.", "No."], "rewards": [0.5, -1.0]}
UNSCORED = {name: value for name, value in GOOD.items() if name != "rewards"}
ROW = {"prefix": ["<|prompter|>How?", "<|assistant|>"], "suffix": ["So.", "No."], "reward": [1, 2]}
REPLY = {"id": "a", "subset": "s", "prompt": PROMPT, "response": "So.", "reference": "So.", "reward": 50.0}
KEY = {"sheet": "sheet-1", "models": ["a", "b"], "items": {"1": {"id": "a", "subset": "s", "left": "a"}}}
ANSWERS = {"sheet": "sheet-1", "annotator": "Ann", "answers": {"1": "left"}}

GZIPPED = "clha.py --model {model} --train_data {gz} --output_dir {out}"
CLHA = "clha.py --model {model} --train_data {file} --output_dir {out} --batch_size 1"
TRAIN = "reward.py train --model {model} --data {file} --out {out}"
SCORE = "reward.py score --model {rm} --data {file} --out {out}"
AUGMENT = "prepare_data.py augment --data {file} --out {out}"
RELEASE = "prepare_data.py release --source {file} --out {out}"
HH = "prepare_data.py hh --source {raw} --out {out}"
TOY = "prepare_data.py toy --out {out}"
EVALUATE = "evaluate.py --model {model} --data {file} --reward_model {rm} --out {out}"
RESPONSES = "evaluate.py --responses {file} --data {file} --reward_model {rm} --out {out}"
TALLY = "evaluate.py tally {sheet}/answers.json --key {sheet}/key.json"
RESUME = (
    "clha.py --model {stock}/model --train_data {stock}/data.jsonl --output_dir {run} --batch_size 4 "
    "--max_steps 3 --resume_anyway max_steps"
)
CONVERT = "checkpoint.py {run}/checkpoints/latest --out {out}"


def model(program: str, name: str) -> str:
    """A command of `program`, above, on the model (or the run, the folder of raw files) of this name."""
    return re.sub("{(model|rm|run|raw|sheet)}", f"{{{name}}}", program)


def drop_weight(path: Path) -> None:
    """Takes one tensor out of a file of weights."""
    weights = load_file(path)
    weights.pop("model.layers.0.mlp.up_proj.weight")
    save_file(weights, path, {"format": "pt"})


def drop_bos(path: Path) -> None:
    """A LLaMA tokenizer whose tokenizer.json forgot BOS."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4, "▁a": 5}
    LlamaTokenizer(vocab=vocabulary, merges=[("▁", "a")]).save_pretrained(path.parent)


def drop_eos(path: Path) -> None:
    """A tokenizer without special tokens."""
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())).save_pretrained(path.parent)


OWN_CODE = {
    "config.json": {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}},
    "mine.py": "1 / 0",
}
PICKLE = {"model.safetensors": None, "pytorch_model.bin": pickle.dumps(print, 2)}
RAW = json.dumps({name: f"\n\nHuman: How?\n\nAssistant: {name}" for name in ("chosen", "rejected")})

# What {name} in a command is: a copy of a folder that `stock` makes, with changes of its files. A change is
# new content, a number (its first bytes), a dict (changes of its JSON), None (the file goes) or a function.
SPOILT: dict[str, tuple[str, dict[str, Any]]] = {
    "no_config": ("model", {"config.json": None}),
    "torn_config": ("model", {"config.json": 100}),
    "list_config": ("model", {"config.json": "[]"}),
    "other_type": ("model", {"config.json": {"model_type": "mine"}}),
    "a_text_as_size": ("model", {"config.json": {"hidden_size": "wide"}}),
    "own_code": ("model", OWN_CODE),
    "other_shape": ("model", {"config.json": {"hidden_size": 48, "head_dim": 12}}),
    "no_weights": ("model", {"model.safetensors": None}),
    "cut_weights": ("model", {"model.safetensors": 5000}),
    "empty_weights": ("model", {"model.safetensors": 0}),
    "missing_weight": ("model", {"model.safetensors": drop_weight}),
    "pickle": ("model", PICKLE),
    "few_tokens": ("model", {"config.json": {"vocab_size": 100}}),
    "no_tokenizer": ("model", {"tokenizer.json": None, "tokenizer_config.json": None}),
    "torn_tokenizer": ("model", {"tokenizer.json": 1000}),
    "other_tokenizer": ("model", {"tokenizer.json": '{"version": "9", "model": {"type": "X"}}'}),
    "sentencepiece": ("model", {"tokenizer.json": None, "tokenizer.model": "\n"}),
    "no_bos": ("model", {"tokenizer.json": drop_bos}),
    "no_eos": ("model", {"tokenizer.json": drop_eos}),
    "no_head": ("model", {"config.json": {"num_labels": 1}}),
    "rm_two_outputs": ("rm", {"config.json": {"num_labels": 2}}),
    "rm_cut": ("rm", {"model.safetensors": 5000}),
    "rm_pickle": ("rm", PICKLE),
    "rm_missing_weight": ("rm", {"model.safetensors": drop_weight}),
    "rm_own_code": ("rm", OWN_CODE),
    "rm_torn_tokenizer": ("rm", {"tokenizer.json": 1000}),
    "rm_chat": ("rm", {"chat_template.jinja": "{{ raise_exception('roles must alternate') }}"}),
    "rm_torn_chat": ("rm", {"chat_template.jinja": "{% if %}"}),
    "rm_sentencepiece": ("rm", {"tokenizer.json": None, "tokenizer.model": "\n"}),
    "no_run": ("run", {"checkpoints/step-2/run.json": None}),
    "empty_run": ("run", {"checkpoints/step-2/run.json": "{}"}),
    "torn_run": ("run", {"checkpoints/step-2/run.json": 100}),
    "no_shard": ("run", {"checkpoints/step-2/*.safetensors": None}),
    "cut_shard": ("run", {"checkpoints/step-2/*.safetensors": 100000}),
    "model_gone": ("run", {"checkpoints/step-2/run.json": {"config": {"model": "gone"}}}),
    "finished": ("run", {"final/config.json": "{}"}),
    "raw_not_texts": ("empty", {"harmless-base/test.jsonl": '{"chosen": "So.", "rejected": 1}'}),
    "raw_torn": ("empty", {"harmless-base/test.jsonl.gz": gzip.compress(b"{}" * 99)[:-9]}),
    "raw_few": ("empty", {"harmless-base/test.jsonl": RAW}),
    "release_folder": ("empty", {"train/a.json": "{}"}),
    "torn_scores": ("eval", {"scores.json": 50}),
    "list_scores": ("eval", {"scores.json": "[]"}),
    "no_total": ("eval", {"scores.json": '{"s": {}}'}),
    "scores_of_texts": ("eval", {"scores.json": {"Total": {"n": 1, "char_bleu": "high"}}}),
    "gold_of_text": ("eval", {"responses.jsonl": json.dumps(REPLY | {"gold": "high"})}),
    "torn_key": ("sheet", {"key.json": 50}),
    "key_of_one": ("sheet", {"key.json": {"models": ["a"]}}),
    "key_without_left": ("sheet", {"key.json": {"items": {"1": {}}}}),
    "key_of_another_model": ("sheet", {"key.json": {"items": {"1": {"subset": "s", "left": "c"}}}}),
    "half_a_character": ("sheet", {"key.json": {"models": ["a", "\ud800"]}}),
    "deep_answers": ("sheet", {"answers.json": "[" * 100000}),
    "list_answers": ("sheet", {"answers.json": {"answers": ["left"]}}),
    "an_answer_list": ("sheet", {"answers.json": {"answers": {"1": ["left"]}}}),
    "latin_1": ("sheet", {"answers.csv": "sheet,item,answer\nsheet-1,1,\xe9".encode("latin-1")}),
}

# (command, what {file} holds, what the line says)
CASES = [
    # Files
    (CLHA, None, "data.jsonl: no such file"),
    (EVALUATE, None, "data.jsonl: no such file"),
    (CLHA, "", "data.jsonl: no records in it"),
    ("clha.py --model {model} --train_data {empty} --output_dir {out}", "", "empty: no such file"),
    (CLHA, "{'a': 1}", "data.jsonl, line 1: not JSON"),
    (CLHA, [GOOD, GOOD, '{"prompt": [{"role'], "data.jsonl, line 3: not JSON"),
    (EVALUATE, "[]", "line 1: not a JSON object"),
    (CLHA, "\ufeff{}", "line 1: not JSON (Unexpected UTF-8 BOM"),
    (CLHA, b"\xff\xfe{\x00}\x00", "data.jsonl, after line 0: not readable as UTF-8"),
    (GZIPPED, gzip.compress(b"{}" * 999)[:-9], "data.jsonl.gz, after line 0: not readable"),
    (GZIPPED, gzip.compress(b"{}" * 999)[:15] + b"?" * 30, "data.jsonl.gz, after line 0: not readable"),
    (GZIPPED, GOOD, "data.jsonl.gz, after line 0: not readable as UTF-8 text (Not a gzipped file"),
    (SCORE, '{"prompt": ' + "[" * 100000, "data.jsonl, line 1: not JSON of a record"),
    (SCORE, '{"rewards": ' + "9" * 5000 + "}", "data.jsonl, line 1: not JSON of a record"),
    (SCORE, '{"prompt": "\\ud800"}', "data.jsonl, line 1: has half a character"),
    # Records
    (SCORE, GOOD | {"prompt": "How?"}, '"prompt" must be a list of {"role": one of system, user, assistant'),
    (EVALUATE, GOOD | {"subset": ["a"]}, 'line 1: "subset" and "id" must be texts'),
    (SCORE, GOOD | {"id": 5}, 'line 1: "subset" and "id" must be texts'),
    (SCORE, GOOD | {"prompt": []}, '"prompt" must be a list of'),
    (SCORE, GOOD | {"prompt": [{"role": "human", "content": "How?"}]}, '"prompt" must be a list of'),
    (SCORE, GOOD | {"prompt": [{"role": ["user"], "content": "How?"}]}, '"prompt" must be a list of'),
    (SCORE, GOOD | {"prompt": [{"role": "user", "content": None}]}, '"prompt" must be a list of'),
    (CLHA, GOOD | {"responses": ["So."]}, 'data.jsonl, line 1: "responses" must be a list of two or more'),
    (CLHA, GOOD | {"responses": "So."}, '"responses" must be a list of two or more'),
    (CLHA, GOOD | {"responses": ["So.", 1]}, "an empty reply"),
    (CLHA, GOOD | {"responses": ["So.", " \n"]}, "an empty reply"),
    (CLHA, [GOOD, GOOD | {"rewards": [1.0]}], 'line 2: "rewards" must be a list of 2 numbers'),
    (CLHA, GOOD | {"rewards": {"0": 1}}, "a list of 2 numbers"),
    (CLHA, GOOD | {"rewards": [float("nan"), 1.0]}, "finite numbers, not [nan, 1.0]"),
    (CLHA, GOOD | {"rewards": [10**100, 1.0]}, "finite numbers"),
    (CLHA, GOOD | {"rewards": ["1", "2"]}, "finite numbers, not ['1', '2']"),
    (CLHA, GOOD | {"rewards": [True, False]}, "finite numbers, not [True, False]"),
    (CLHA, UNSCORED, 'no "rewards" yet; `python reward.py score` adds them'),
    (CLHA + " --sft_target chosen", GOOD, 'no "chosen" yet'),
    (TRAIN, GOOD, 'no "chosen" yet'),
    (TRAIN, GOOD | {"chosen": 2}, '"chosen" must be the index of a reply, 0 to 1, not 2'),
    (TRAIN, GOOD | {"chosen": "0"}, '"chosen" must be the index of a reply, 0 to 1'),
    (TRAIN, GOOD | {"chosen": 1}, "too few records"),
    (CLHA + " --objective coh --ranking given", UNSCORED, 'no "rewards" yet'),
    (CLHA + " --dev_data {out}", GOOD, "out: no such file"),
    (AUGMENT + " --extra {file}", GOOD | {"id": "a"}, 'data.jsonl, line 1: needs "response"'),
    (AUGMENT + " --extra {file}", [GOOD | {"id": "a"}] * 2, 'each record needs an "id" of its own'),
    (RESPONSES, GOOD, 'data.jsonl, line 1: needs "id"'),
    (RESPONSES, [GOOD | {"id": "a", "response": "So."}] * 2, "line 2: a second reply to a"),
    # HH-RLHF and the authors' files
    ("prepare_data.py hh --source nowhere --out {out}", "", "nowhere: no such folder, and not a hub name"),
    ("prepare_data.py hh --source {empty} --out {out}", "", "has none of HH-RLHF's files"),
    (
        model(HH, "raw_not_texts"),
        "",
        "raw_not_texts, harmless-base/test, line 1: no texts chosen and rejected",
    ),
    (model(HH, "raw_torn"), "", "harmless-base/test.jsonl.gz, after line 0: not readable"),
    (model(HH, "raw_few"), "", "--dev_items 280: only 1 test queries to draw from"),
    ("prepare_data.py release --source {empty} --out {out}", "", "no such file, nor a folder"),
    ("prepare_data.py release --source {release_folder} --out {out}", "", "train/a.json, line 1: not a row"),
    (RELEASE, {"prefix": 1}, "data.jsonl, line 1: not a row of this format"),
    (RELEASE, ROW | {"prefix": ["How?"]}, "not end in <|assistant|>"),
    (RELEASE, ROW | {"suffix": "So."}, '"suffix" is not a list of texts'),
    (RELEASE, ROW | {"reward": [1]}, 'data.jsonl, line 1: "rewards" must be a list of 2 numbers'),
    (RELEASE, ROW | {"reward": [1, None], "meta": None}, '"rewards" must be finite numbers'),
    (RELEASE, ROW | {"sft_index": "0", "meta": []}, '"chosen" must be the index of a reply'),
    ("study.py real --out {out} --source {empty}", "", "no such file, nor a folder"),
    ("study.py real --out {out} --source {file}", ROW, "has 1 different queries; the study needs 1,000"),
    # Flags of clha.py
    ("clha.py --model {model}", "", "required: --train_data, --output_dir (see --help)"),
    (CLHA + " --temperature 1", GOOD, "unrecognized arguments: --temperature 1 (see --help)"),
    (CLHA + " --recipe paper", GOOD, "invalid choice: 'paper' (choose from"),
    (CLHA + " --objective ppo", GOOD, "invalid choice: 'ppo'"),
    (CLHA + " --margin wide", GOOD, "--margin: invalid float value: 'wide'"),
    (CLHA + " --margin -1", GOOD, "--margin -1.0: must be a finite number of 0"),
    (CLHA + " --learning_rate nan", GOOD, "--learning_rate nan: must be a finite number of 0 or more"),
    (CLHA + " --learning_rate inf", GOOD, "--learning_rate inf: must be a finite number"),
    (CLHA + " --learning_rate -1", GOOD, "--learning_rate -1.0: must be a finite number"),
    (CLHA + " --alpha nan", GOOD, "--alpha nan: must be a finite number"),
    (CLHA + " --seed -1", GOOD, "--seed -1: must be 0 or more"),
    (CLHA + f" --seed {2**64}", GOOD, f"--seed {2**64}: must be 0 or more, and less than 2**32"),
    (CLHA + " --seed " + "9" * 5000, GOOD, "--seed: invalid int value"),
    (CLHA + " --epochs -1", GOOD, "--epochs -1.0: must be a finite number of 0"),
    (CLHA + " --epochs 0.1", GOOD, "--epochs 0.1: too few for a step"),
    (CLHA + " --batch_size 0", GOOD, "--batch_size 0: must be 1 or more"),
    (CLHA + " --replicate 0", GOOD, "--replicate 0: must be 1 or more"),
    (CLHA + " --replicate 2", GOOD, "--replicate 2: must divide the 1 processes"),
    (CLHA + " --attention flex", GOOD, "--attention flex: can't be used without a GPU; sdpa can"),
    (CLHA + " --attention fast", GOOD, "invalid choice: 'fast'"),
    (CLHA + " --compile", GOOD, "--compile: needs flex_attention, not used without a GPU"),
    (CLHA + " --activation_checkpointing half", GOOD, "invalid choice: 'half'"),
    (CLHA + " --token_cache {file}", GOOD, "data.jsonl: is a file; it must be a folder"),
    (CLHA + " --token_cache {file}/x", GOOD, "data.jsonl is a file; nothing can be put below it"),
    (CLHA + " --batch_size 2", GOOD, "--batch_size 2: must be 1 to 1 (queries)"),
    (CLHA + " --pack_tokens -5", GOOD, "--pack_tokens -5: must be 0 or more"),
    (CLHA + " --max_length 1", GOOD, "--max_length 1: must be 2 or more"),
    (CLHA + " --max_prompt_length 512", GOOD, "--max_prompt_length 512: must be less than --max_length"),
    (CLHA + " --keep_checkpoints 0", GOOD, "--keep_checkpoints 0: must be 1 or more"),
    (CLHA + " --objective sft --margin 1", GOOD, "--objective sft: has no use for margin"),
    (CLHA + " --objective dpo --beta 0", GOOD, "--beta 0: must be above 0"),
    (CLHA + " --reward_model {rm}", GOOD, "--reward_model: needs --dev_data"),
    (CLHA + " --output_dir {file}", GOOD, "data.jsonl: is a file; it must be a folder"),
    (CLHA + " --output_dir {file}/x", GOOD, "data.jsonl is a file; nothing can be put below it"),
    (CLHA + " --learning_rate 1e300", GOOD, "--learning_rate 1e+300: must be a finite number of 0 or more"),
    # Flags of reward.py
    ("reward.py", "", "required: command"),
    (SCORE + " --what", GOOD, "unrecognized arguments: --what"),
    (SCORE + " --pack_tokens -5", GOOD, "--pack_tokens -5: must be 0 or more"),
    (SCORE + " --max_length 1", GOOD, "--max_length 1: must be 2 or more"),
    (SCORE + " --out {empty}", GOOD, "empty: is a folder; it must be a file"),
    (SCORE + " --out {file}/x.jsonl", GOOD, "data.jsonl is a file; nothing can be put below it"),
    (SCORE + " --plot {out}/gaps.xyz", GOOD, "gaps.xyz: the name must end in one of "),
    (SCORE + " --plot {file}/gaps.png", GOOD, "data.jsonl is a file; nothing can be put below it"),
    (TRAIN + " --out {empty}", GOOD, "empty: exists already; choose another --out"),
    (TRAIN + " --out {file}/x", GOOD, "data.jsonl is a file; nothing can be put below it"),
    (TRAIN + " --batch_size 0", GOOD, "--batch_size 0: must be 1 or more"),
    (TRAIN + " --epochs -1", GOOD, "--epochs -1.0: must be a finite number of 0 or more"),
    (TRAIN + " --norm_penalty nan", GOOD, "--norm_penalty nan: must be a finite number of 0 or more"),
    (TRAIN + f" --seed {2**64}", GOOD, f"--seed {2**64}: must be 0 or more, and less than 2**32"),
    # Flags of prepare_data.py
    ("prepare_data.py", "", "required: command"),
    ("prepare_data.py csv", "", "invalid choice: 'csv'"),
    (model(HH, "raw_few") + " --dev_items -1", "", "--dev_items -1: must be 0 or more"),
    (model(HH, "raw_few") + " --out {file}", "", "data.jsonl: is a file; it must be a folder"),
    (RELEASE + " --seed -1", ROW, "--seed -1: must be 0 or more"),
    (TOY + " --out {empty}", "", "empty: exists already; choose another --out"),
    (TOY + " --out {file}/world", "", "data.jsonl is a file; nothing can be put below it"),
    (TOY + " --length 1", "", "--length 1: must be 2 to 8 replies"),
    (TOY + " --length two", "", "invalid int value: 'two'"),
    (TOY + " --label_noise 20", "", "--label_noise 20.0: must be a share"),
    (TOY + " --label_noise nan", "", "--label_noise nan: must be a finite number"),
    (TOY + " --queries 0", "", "--queries 0: must be 1 or more"),
    (AUGMENT, GOOD, "either --model, to sample replies, or --extra"),
    (AUGMENT + " --model {model} --extra {file}", GOOD, "either --model, to sample replies, or --extra"),
    (AUGMENT + " --model {model} --replies 0", GOOD, "--replies 0: must be 1 or more"),
    (AUGMENT + " --model {model} --temperature 0", GOOD, "--temperature 0.0: must be above 0"),
    (AUGMENT + " --model {model} --temperature inf", GOOD, "--temperature inf: must be a finite number"),
    (AUGMENT + " --extra {file} --out {empty}", GOOD, "empty: exists already"),
    # Flags of evaluate.py, study.py and rlhf.py
    ("evaluate.py --model {model} --data {file}", GOOD, "required: --reward_model, --out"),
    (EVALUATE + " --beams", GOOD, "unrecognized arguments: --beams"),
    (EVALUATE + " --batch_size 0", GOOD, "--batch_size 0: must be 1 or more"),
    (EVALUATE + " --max_new_tokens 0", GOOD, "--max_new_tokens 0: must be 1 or more"),
    (EVALUATE + " --max_prompt_length 0", GOOD, "--max_prompt_length 0: must be 2 or more"),
    (EVALUATE + " --model {model} {model}/", GOOD, "have one name"),
    (EVALUATE + " --out {file}", GOOD, "data.jsonl: is a file; it must be a folder"),
    (EVALUATE + " --plot steps.xyz", GOOD, "--plot steps.xyz: the name must end in one of "),
    (RESPONSES + " --model {model}", GOOD, "--model or --responses, not both"),
    ("study.py", "", "required: command"),
    ("study.py toy --seeds one", "", "invalid int value: 'one'"),
    (f"study.py toy --out {{out}} --seeds {2**64}", "", "must be 0 or more, and less than 2**32"),
    ("study.py toy --out {out} --seeds 0 -1", "", "--seeds -1: must be 0 or more"),
    ("study.py toy --out {file}", "", "data.jsonl: is a file; it must be a folder"),
    ("study.py real --out {out}", "", "required: --source"),
    ("study.py report --out {empty}", "", "no finished runs in it"),
    ("rlhf.py --model {model}", "", "required: --train_data"),
    # Models
    (model(CLHA, "empty"), GOOD, "empty: not a Hugging Face model folder (no config.json in it)"),
    (model(EVALUATE, "empty"), GOOD, "empty: not a Hugging Face model folder"),
    (CLHA + " --model nowhere", GOOD, "nowhere: no such model folder, and not a hub name like owner/name"),
    (CLHA + " --model ./no/where", GOOD, "./no/where: no such model folder"),
    (CLHA + " --model {file}", GOOD, "data.jsonl: no such model folder"),
    (TRAIN + " --model nowhere", GOOD, "nowhere: no such model folder"),
    (AUGMENT + " --model nowhere", GOOD, "nowhere: no such model folder"),
    (EVALUATE + " --model {model} {no_config}", GOOD, "no_config: not a Hugging Face model folder"),
    (CLHA + " --model {torn_config}", GOOD, "torn_config: can't be loaded"),
    (CLHA + " --model {list_config}", GOOD, "list_config: can't be loaded"),
    (CLHA + " --model {other_type}", GOOD, "other_type: can't be loaded"),
    (CLHA + " --model {a_text_as_size}", GOOD, "a_text_as_size: can't be loaded"),
    (CLHA + " --model {own_code}", GOOD, "own_code: needs code of its own, and no folder's code is run"),
    (CLHA + " --model {no_weights}", GOOD, "no_weights: can't be loaded"),
    (CLHA + " --model {cut_weights}", GOOD, "cut_weights: can't be loaded"),
    (EVALUATE + " --model {empty_weights}", GOOD, "empty_weights: can't be loaded"),
    (CLHA + " --model {other_shape}", GOOD, "other_shape: its weights have other shapes than its config"),
    (CLHA + " --model {missing_weight}", GOOD, "missing_weight: has no weights for model.layers.0.mlp"),
    (EVALUATE + " --model {missing_weight}", GOOD, "missing_weight: has no weights for model.layers.0.mlp"),
    (TRAIN + " --model {missing_weight}", GOOD | {"chosen": 0}, "not a whole language model"),
    (CLHA + " --model {pickle}", GOOD, "pickle: its weights are a pickle that may hold code"),
    # Tokenizers
    (CLHA + " --model {no_eos}", GOOD, "no_eos: the tokenizer has no EOS token"),
    (CLHA + " --model {no_bos}", GOOD, "no_bos: the LLaMA tokenizer drops BOS"),
    (CLHA + " --model {few_tokens}", GOOD, "few_tokens: the tokenizer has 768 tokens, the model 100"),
    (CLHA + " --model {no_tokenizer}", GOOD, "no_tokenizer: can't be loaded"),
    (CLHA + " --model {torn_tokenizer}", GOOD, "torn_tokenizer: can't be loaded"),
    (EVALUATE + " --model {other_tokenizer}", GOOD, "other_tokenizer: can't be loaded"),
    (CLHA + " --model {sentencepiece}", GOOD, "tokenizer.model alone gives wrong ids"),
    # Reward models
    (SCORE + " --model {empty}", GOOD, "not a Hugging Face model folder"),
    (SCORE + " --model {model}", GOOD, "has 2 outputs; a reward model has one"),
    (SCORE + " --model {no_head}", GOOD, "no_head: has no weights for score.weight"),
    (SCORE + " --model {rm_two_outputs}", GOOD, "rm_two_outputs: its weights have other shapes"),
    (SCORE + " --model {rm_missing_weight}", GOOD, "no weights for model.layers.0.mlp.up_proj.weight"),
    (EVALUATE + " --reward_model {rm_cut}", GOOD, "rm_cut: can't be loaded"),
    (EVALUATE + " --reward_model {rm_pickle}", GOOD, "rm_pickle: its weights are a pickle"),
    (SCORE + " --model {rm_own_code}", GOOD, "rm_own_code: needs code of its own"),
    (SCORE + " --model {rm_torn_tokenizer}", GOOD, "rm_torn_tokenizer: can't be loaded"),
    (SCORE + " --model {rm_chat}", GOOD, "rm_chat: its chat template takes no [{'role': 'user',"),
    (SCORE + " --model {rm_torn_chat}", GOOD, "rm_torn_chat: its chat template takes no"),
    (SCORE + " --model {rm_sentencepiece}", GOOD, "tokenizer.model alone gives wrong ids"),
    (CLHA + " --dev_data {file} --reward_model {model}", GOOD, "has 2 outputs"),
    (CLHA + " --dev_data {file} --reward_model nowhere", GOOD, "nowhere: no such model folder"),
    # Checkpoints
    (CONVERT + " --out {empty}", "", "empty: exists already"),
    (CONVERT + " --what", "", "unrecognized arguments: --what"),
    ("checkpoint.py {model} --out {out}", "", "model/run.json: not readable as JSON"),
    (model(CONVERT, "no_run"), "", "run.json: not readable as JSON"),
    (model(CONVERT, "torn_run"), "", "run.json: not readable as JSON"),
    (model(CONVERT, "model_gone"), "", "gone: no such model folder"),
    (model(CONVERT, "no_shard"), "", "a damaged checkpoint"),
    (model(CONVERT, "cut_shard"), "", "a damaged checkpoint"),
    (RESUME + " --margin 1", "", "step-2: is of another configuration (margin 0.3 -> 1.0)"),
    (RESUME + " --resume never", "", "holds an unfinished run (step-2); --resume auto goes on with it"),
    (model(RESUME, "empty_run"), "", "run.json: not the state of a checkpoint, with step, tokens"),
    (model(RESUME, "torn_run"), "", "step-2/run.json: not readable as JSON"),
    (model(RESUME, "no_shard"), "", "step-2: a damaged checkpoint"),
    (model(RESUME, "cut_shard"), "", "step-2: a damaged checkpoint"),
    (model(RESUME, "finished"), "", "finished: holds a finished run (final/); choose another --output_dir"),
    # Evaluations and sheets
    ("evaluate.py table {empty}", "", "empty: no scores.json in it"),
    ("evaluate.py table {file}", "", "data.jsonl: no scores.json in it"),
    ("evaluate.py table {eval} {torn_scores}", "", "scores.json: not readable as JSON"),
    ("evaluate.py table {list_scores}", "", "scores.json: not the scores of an evaluation, with Total"),
    ("evaluate.py table --total {no_total}", "", "scores.json: not the scores of an evaluation, with Total"),
    ("evaluate.py table {scores_of_texts}", "", "scores.json: not the scores of an evaluation"),
    ("evaluate.py sheets {eval} {empty} --out {out}", "", "empty: no responses.jsonl in it"),
    ("evaluate.py sheets {eval} {eval} --out {file}/x", "", "data.jsonl is a file; nothing can be put"),
    ("evaluate.py compare {eval} {gold_of_text} --out {out}", "", "line 1: no reply of an evaluation"),
    ("evaluate.py compare {eval} {eval} --cases -1", "", "--cases -1: must be 0 or more"),
    (TALLY + " --out {empty}", "", "empty: exists already"),
    (TALLY + " --plot {out}.xyz", "", "out.xyz: the name must end in one of "),
    (TALLY + " --plot figure3", "", "--plot figure3: the name must end in one of "),
    (TALLY + " --key {out}", "", "out: not readable as JSON"),
    (model(TALLY, "torn_key"), "", "key.json: not readable as JSON"),
    (model(TALLY, "key_of_one"), "", 'key.json: "models" must be the names of two models'),
    (model(TALLY, "key_without_left"), "", 'key.json, item 1: needs "subset", a text, and "left"'),
    (model(TALLY, "key_of_another_model"), "", 'key.json, item 1: needs "subset"'),
    (model(TALLY, "half_a_character"), "", "key.json: not readable as JSON"),
    (model(TALLY, "deep_answers"), "", "answers.json: not readable as JSON"),
    (model(TALLY, "list_answers"), "", "answers.json: not a file of answers, with sheet, annotator, answers"),
    (model(TALLY, "an_answer_list"), "", "answers.json, item 1: ['left'] is none of left, right, tie"),
    (
        "evaluate.py tally {latin_1}/answers.csv --key {sheet}/key.json",
        "",
        "answers.csv: not readable as CSV",
    ),
]


@pytest.fixture(scope="session")
def stock(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good folders, to be spoilt: a model, a reward model, a run of two steps, an evaluation, a sheet."""
    folder = tmp_path_factory.mktemp("stock")
    (folder / "empty").mkdir()
    shutil.copytree(world / "init", folder / "model")
    head = AutoModelForSequenceClassification.from_pretrained(world / "init", num_labels=1)
    head.save_pretrained(folder / "rm")
    load_tokenizer(str(world / "init")).save_pretrained(folder / "rm")
    (folder / "data.jsonl").write_text(f"{json.dumps(GOOD)}\n" * 4)
    paths = (str(folder / name) for name in ("model", "data.jsonl", "run"))
    clha.train(clha.Config(*paths, max_steps=2, batch_size=4, checkpoint_every=1))
    dist.destroy_process_group()
    shutil.rmtree(folder / "run" / "final")
    summary = evaluate.summarise([REPLY | {"char_bleu": 100.0}])
    files = {"eval/scores.json": summary, "eval/responses.jsonl": REPLY}
    for name, value in (files | {"sheet/key.json": KEY, "sheet/answers.json": ANSWERS}).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(value))
    return folder


def spoil(path: Path, change: Any) -> None:
    """Changes a file, or makes it; SPOILT says how."""
    if callable(change):
        change(path)
    elif change is None:
        path.unlink()
    elif isinstance(change, dict):
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes()[:change] if isinstance(change, int) else change
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def fill(command: str, content: Any, folder: Path, stock: Path) -> list[str]:
    """The words of a command, with its files made in a folder."""
    paths = {"out": folder / "out", "file": folder / "data.jsonl", "gz": folder / "data.jsonl.gz"}
    paths["stock"] = stock
    for name in set(re.findall(r"{(\w+)}", command)) - paths.keys():
        base, changes = SPOILT.get(name, (name, {}))
        paths[name] = shutil.copytree(stock / base, folder / name, symlinks=True)
        for place, change in changes.items():
            spoil(next(paths[name].glob(place), paths[name] / place), change)
    if content is not None:
        lines = content if isinstance(content, list) else [content] * bool(content)
        lines = (line if isinstance(line, str | bytes) else json.dumps(line) for line in lines)
        text = b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines)
        paths["gz" if "{gz}" in command else "file"].write_bytes(text)
    return [word.format(**paths) for word in command.split()]


def listing(folder: Path) -> dict[Path, int]:
    """All that is below a folder, and when the files were written; but not the lock of a run, nor what was
    tokenised: that is whole, and the next start finds it."""
    tokens = {*folder.rglob("tokens/*.arrow"), *folder.rglob("tokens")}
    hidden = tokens | {path.parent for path in tokens if len(list(path.parent.iterdir())) == 1}
    shown = (path for path in folder.rglob("*") if path.name != ".lock" and path not in hidden)
    return {path: 0 if path.is_dir() else path.lstat().st_mtime_ns for path in shown}


@pytest.mark.parametrize(("command", "content", "message"), CASES, ids=range(len(CASES)))
def test_one_line_and_exit_code_2(
    command: str, content: Any, message: str, stock: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    program, *arguments = fill(command, content, tmp_path, stock)
    before = listing(tmp_path)
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    with pytest.raises(SystemExit) as end:
        run_program(PROGRAMS[program])
    printed = capsys.readouterr().err
    assert end.value.code == 2
    assert message in printed and printed.startswith(f"{program}: ") and printed.count("\n") == 1
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("command", "content"),
    [
        (CLHA, UNSCORED),
        (model(SCORE, "cut_weights"), GOOD),
        (EVALUATE, "{"),
        (RELEASE, "{}"),
        (model(CONVERT, "torn_run"), ""),
        ("study.py toy --out {file}", ""),
    ],
)
def test_the_real_programs_end_the_same_way(command: str, content: Any, stock: Path, tmp_path: Path) -> None:
    words = fill(command, content, tmp_path, stock)
    before = listing(tmp_path)
    result = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f"{words[0]}: {tmp_path}") or "line 1" in last
    assert listing(tmp_path) == before


# (variables, command of run.sh, what the line says)
RUN_SH = [
    ("", "tidy", "tidy: no such command; there are setup, tiny, study, test, and none for all"),
    ("NPROC=x", "", "NPROC=x: must be a number of processes"),
    ("NPROC=0", "", "NPROC=0: must be"),
    ("RESTARTS=-1", "", "RESTARTS=-1: must be a number, 0 or more"),
    ("RECIPE=paper", "", "RECIPE=paper: must be release or default"),
    ("MODEL=llama", "", "MODEL=llama: must be a folder, or a hub name like owner/name"),
    ("MODEL=./no/where", "", "MODEL=./no/where: must be a folder"),
    ("HH={out}", "", "out: must be a folder, or a hub name like owner/name"),
    ("RM_TRAIN=rm", "", "RM_TRAIN=rm: must be a folder"),
    ("RM_EVAL={file}", "", "data.jsonl: must be a folder, or a hub name"),
    ("OUT={file}", "", "data.jsonl: must be a folder"),
    ("OUT={file}/x", "tiny", "data.jsonl/x: must be a folder"),
    ("PYTHON=nothing", "", "PYTHON=nothing: must be a Python that has the packages of requirements.txt"),
    ("PYTHON={bare}", "tiny", "bare: must be a Python that has the packages"),
    ("SCALE=half", "tiny", "SCALE=half: must be a percentage of the steps, 2 or more"),
    ("SCALE=1", "tiny", "SCALE=1: must be a percentage of the steps, 2 or more"),
    ("SEEDS=one", "study", "SEEDS=one: must be numbers"),
    ("SEEDS=0,1", "study", "SEEDS=0,1: must be numbers"),
    ("HH={out}", "study", "out: must be a folder of the authors' files"),
    ("OUT={file}", "study", "data.jsonl: must be a folder"),
]


@pytest.mark.parametrize(("variable", "command", "message"), RUN_SH)
def test_run_sh_checks_its_variables_before_any_work(
    variable: str, command: str, message: str, tmp_path: Path
) -> None:
    names = {name: tmp_path / name for name in ("out", "bare")} | {"file": tmp_path / "data.jsonl"}
    names["file"].touch()
    names["bare"].write_text("#!/bin/sh\nexit 1\n")
    names["bare"].chmod(0o755)
    given = {"PYTHON": sys.executable, "OUT": str(tmp_path / "out")}
    given |= dict([variable.format(**names).split("=")] if variable else [])
    words = ["bash", "run.sh", *command.split()]
    streams = {"capture_output": True, "text": True, "timeout": 60}
    result = subprocess.run(words, cwd=ROOT, env=os.environ | given, **streams)
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1
    assert result.stderr.startswith("run.sh: ") and message in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "program",
    [
        *PROGRAMS,
        "prepare_data.py hh",
        "prepare_data.py release",
        "prepare_data.py toy",
        "prepare_data.py augment",
        "reward.py train",
        "reward.py score",
        "evaluate.py table",
        "evaluate.py sheets",
        "evaluate.py tally",
        "evaluate.py compare",
        "study.py toy",
        "study.py real",
        "study.py report",
    ],
)
def test_help_teaches(
    program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *command = program.split()
    monkeypatch.setattr(sys, "argv", [name, *command, "--help"])
    with pytest.raises(SystemExit) as end:
        PROGRAMS[name]()
    printed = capsys.readouterr().out
    assert end.value.code == 0 and printed.startswith("usage: ")
    assert command or f"python {name}" in printed  # an example to copy
