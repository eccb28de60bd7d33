"""Wrong input ends in one line that says what and where, exit code 2, and nothing half-written."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import clha
import evaluate
import prepare_data
import reward
import rlhf
import study
from program import run as run_program

PROGRAMS: dict[str, Callable[[], None]] = {
    "clha.py": lambda: clha.train(clha.parse_args(sys.argv[1:])),
    "reward.py": reward.main,
    "prepare_data.py": prepare_data.main,
    "evaluate.py": evaluate.main,
    "study.py": study.main,
    "rlhf.py": lambda: rlhf.train(rlhf.parse_args(sys.argv[1:])),
}

GOOD = {"prompt": [{"role": "user", "content": "How?"}], "responses": ["So.", "No."], "rewards": [0.5, -1.0]}
UNSCORED = {name: value for name, value in GOOD.items() if name != "rewards"}
CLHA = "clha.py --model {model} --train_data {file} --output_dir {out}"
SCORE = "reward.py score --model {model} --data {file} --out {out}"
AUGMENT = "prepare_data.py augment --data {file} --out {out}"
RESPONSES = "evaluate.py --responses {file} --data {file} --reward_model {model} --out {out}"
EVALUATE = "evaluate.py --model {model} --data {file} --reward_model {model} --out {out}"

# (command, what {file} holds, what the line says)
CASES = [
    ("clha.py --model {model}", "", "required: --train_data"),
    (CLHA + " --temperature 1", GOOD, "unrecognized arguments: --temperature 1 (see --help)"),
    (CLHA + " --reduction sum", GOOD, "invalid choice: 'sum'"),
    (CLHA + " --recipe paper", GOOD, "invalid choice: 'paper'"),
    (CLHA + " --margin wide", GOOD, "invalid float value: 'wide'"),
    (CLHA, None, "data.jsonl: no such file"),
    (CLHA, "", "data.jsonl: no records in it"),
    (CLHA, "{'a': 1}", "data.jsonl, line 1: not JSON"),
    (CLHA, GOOD | {"responses": ["So."]}, 'data.jsonl, line 1: "responses" must be a list of two or more'),
    (CLHA, GOOD | {"rewards": [1.0]}, "a list of 2 numbers"),
    (CLHA, GOOD | {"rewards": [float("nan"), 1.0]}, "finite numbers"),
    (CLHA, GOOD | {"responses": ["So.", ""]}, "an empty reply"),
    (CLHA, UNSCORED, 'no "rewards" yet'),
    (CLHA + " --sft_target chosen", GOOD, 'no "chosen" yet'),
    (CLHA, GOOD, "--batch_size 128: must be 1 to 1"),
    (CLHA + " --dev_data {out}", GOOD, "no such file"),
    (
        "clha.py --model {empty} --train_data {file} --output_dir {out}",
        GOOD,
        "not a Hugging Face model folder",
    ),
    ("clha.py --model nowhere --train_data {file} --output_dir {out}", GOOD, "nowhere: no such model folder"),
    ("clha.py --model {no_eos} --train_data {file} --output_dir {out}", GOOD, "no EOS token"),
    (
        "clha.py --model {no_weights} --train_data {file} --output_dir {out} --batch_size 1",
        GOOD,
        "can't be loaded",
    ),
    ("reward.py", "", "required: command"),
    (SCORE, GOOD, "has 2 outputs; a reward model has one"),
    (SCORE, None, "data.jsonl: no such file"),
    (SCORE, {"prompt": "How?", "responses": []}, 'line 1: "prompt" must be a list'),
    ("reward.py score --model {empty} --data {file} --out {out}", GOOD, "not a Hugging Face model folder"),
    (SCORE + " --what", GOOD, "unrecognized arguments: --what"),
    ("reward.py train --model {model} --data {file} --out {out}", GOOD, 'no "chosen" yet'),
    ("reward.py train --model {model} --data {file} --out {out}", GOOD | {"chosen": 1}, "too few records"),
    ("reward.py train --model nowhere --data {file} --out {out}", GOOD, "nowhere: no such model folder"),
    ("evaluate.py --model {model} --data {file}", GOOD, "required: --reward_model, --out"),
    (EVALUATE, None, "data.jsonl: no such file"),
    (EVALUATE, "[]", "line 1: not a JSON object"),
    (EVALUATE + " --beams", GOOD, "unrecognized arguments: --beams"),
    (
        "evaluate.py --model {empty} --data {file} --reward_model {model} --out {out}",
        GOOD,
        "not a Hugging Face model",
    ),
    (
        "evaluate.py --model {model} {model}/ --data {file} --reward_model {model} --out {out}",
        GOOD,
        "have one name",
    ),
    ("evaluate.py table {empty}", "", "no scores.json"),
    ("prepare_data.py", "", "required: command"),
    ("prepare_data.py csv", "", "invalid choice: 'csv'"),
    ("prepare_data.py hh --source nowhere --out {out}", "", "nowhere: no such folder"),
    ("prepare_data.py hh --source {empty} --out {out}", "", "has none of HH-RLHF's files"),
    ("prepare_data.py release --source {empty} --out {out}", "", "no such file, nor a folder"),
    (
        "prepare_data.py release --source {file} --out {out}",
        {"prefix": 1},
        "line 1: not a row of this format",
    ),
    ("prepare_data.py toy --out {empty}", "", "exists already"),
    ("prepare_data.py toy --out {out} --length 1", "", "--length 1: must be 2 to 8 replies"),
    ("prepare_data.py toy --out {out} --label_noise 20", "", "--label_noise 20.0: must be a share"),
    ("prepare_data.py toy --out {out} --queries 0", "", "--queries 0: must be 1 or more"),
    (CLHA + " --batch_size 1 --epochs 0.1", GOOD, "no steps to take"),
    (CLHA + " --batch_size 1 --eval_every 0", GOOD, "--eval_every"),
    (CLHA + " --max_prompt_length 512", GOOD, "--max_prompt_length 512: must be"),
    ("prepare_data.py toy --out {out} --length two", "", "invalid int value: 'two'"),
    (CLHA + " --objective ppo", GOOD, "invalid choice: 'ppo'"),
    (CLHA + " --objective coh --no_rescore --ranking given", UNSCORED, 'no "rewards" yet'),
    (AUGMENT, GOOD, "either --model, to sample replies, or --extra"),
    (AUGMENT + " --model {model} --extra {file}", GOOD, "either --model, to sample replies, or --extra"),
    (AUGMENT + " --model nowhere", GOOD, "nowhere: no such model folder"),
    (AUGMENT + " --model {model} --replies 0", GOOD, "must be 1 or more, --temperature above 0"),
    (AUGMENT + " --extra {file}", GOOD | {"id": "a"}, 'data.jsonl, line 1: needs "response"'),
    (AUGMENT + " --extra {file}", GOOD, 'each record needs an "id" of its own'),
    (CLHA + " --objective sft --margin 1", GOOD, "--objective sft: has no use for margin"),
    (CLHA + " --objective dpo --beta 0", GOOD, "--beta 0: must be above 0"),
    (EVALUATE + " --batch_size 0", GOOD, "--batch_size and --max_new_tokens must be 1 or more"),
    ("rlhf.py --model {model}", "", "required: --train_data"),
    ("prepare_data.py augment --data {file} --extra {file} --out {empty}", GOOD, "exists already"),
    (RESPONSES, GOOD, 'data.jsonl, line 1: needs "id"'),
    (RESPONSES, GOOD | {"id": "a", "response": "So."}, "has 2 outputs"),
    (RESPONSES + " --model {model}", GOOD, "--model or --responses, not both"),
    ("study.py", "", "required: command"),
    ("study.py toy --seeds one", "", "invalid int value: 'one'"),
    ("study.py real --out {out}", "", "required: --source"),
    ("study.py real --out {out} --source {empty}", "", "no such file, nor a folder"),
    ("study.py report --out {empty}", "", "no finished runs in it"),
]


def fill(command: str, content: object, folder: Path, world: Path) -> list[str]:
    """The words of a command, with its files made in a folder."""
    paths = {name: folder / name for name in ("empty", "out", "no_eos", "no_weights")}
    paths |= {"file": folder / "data.jsonl", "model": world / "init"}
    paths["empty"].mkdir()
    if content is not None:
        text = content if isinstance(content, str) else json.dumps(content)
        paths["file"].write_text(text + "\n" * bool(text))
    if "{no_eos}" in command:
        (paths["no_eos"]).mkdir()
        (paths["no_eos"] / "config.json").write_text("{}")
        empty = Tokenizer(models.BPE())
        PreTrainedTokenizerFast(tokenizer_object=empty).save_pretrained(paths["no_eos"])
    if "{no_weights}" in command:
        paths["no_weights"].mkdir()
        for path in (world / "init").iterdir():
            if path.suffix != ".safetensors":
                (paths["no_weights"] / path.name).write_bytes(path.read_bytes())
    return [word.format(**paths) for word in command.split()]


@pytest.mark.parametrize(("command", "content", "message"), CASES)
def test_one_line_and_exit_code_2(
    command: str,
    content: object,
    message: str,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    program, *arguments = fill(command, content, tmp_path, world)
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    with pytest.raises(SystemExit) as end:
        run_program(PROGRAMS[program])
    printed = capsys.readouterr().err
    assert end.value.code == 2
    assert message in printed and printed.startswith(f"{program}: ") and printed.count("\n") == 1
    assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize(
    ("command", "content"),
    [
        (CLHA, UNSCORED),
        (SCORE, GOOD),
        (EVALUATE, "{"),
        ("prepare_data.py release --source {file} --out {out}", "{}"),
    ],
)
def test_the_real_programs_end_the_same_way(
    command: str, content: object, world: Path, tmp_path: Path
) -> None:
    words = fill(command, content, tmp_path, world)
    result = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert (
        last.startswith(f"{words[0]}: {tmp_path}")
        or last.startswith(f"{words[0]}: {world}")
        or "line 1" in last
    )
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
