"""Wrong input ends in one line that says where and what, with exit code 2, before anything is written."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch
from conftest import ROOT, config
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    GptOssConfig,
    LlamaTokenizer,
    MambaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

import clha
import evaluate
import prepare_data
import reward
from study import baselines, people, toy

PROMPT = [{"role": "user", "content": "How?"}]
GOOD = {"prompt": PROMPT, "responses": ["So.", "No."], "rewards": [0.5, -1.0]}
LINE = json.dumps(GOOD).encode() + b"\n"


@pytest.fixture
def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[Callable[[], Any]], str]:
    """Runs a program that must end with one line and exit code 2, and gives that line."""

    def run(program: Callable[[], Any]) -> str:
        monkeypatch.setattr(sys, "argv", ["program.py", *sys.argv[1:]])
        with pytest.raises(SystemExit) as end:
            clha.run(program)
        printed = capsys.readouterr()
        assert end.value.code == 2 and printed.out == ""
        assert printed.err.startswith("program.py: ") and printed.err.count("\n") == 1
        return printed.err

    return run


# ------------------------------------------------------------------------------------------------------------
# Files of records


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.jsonl", LINE + b"{'a': 1}\n", "data.jsonl, line 2: not JSON lines in UTF-8"),
        ("data.jsonl", b" \n\n", "data.jsonl: no records in it"),
        ("data.jsonl", LINE + LINE[:20], "data.jsonl, line 2: not JSON lines"),
        (
            "data.jsonl",
            LINE + b"[1]\n",
            "line 2: not JSON lines in UTF-8 (not a JSON object: [1]",
        ),
        (
            "data.jsonl",
            LINE + b'{"id": "\\ud800"}\n',
            "line 2: not JSON lines in UTF-8 ('utf-8' codec can't encode",
        ),
        (
            "data.jsonl",
            b'{"a": ' + b"[" * 100_000,
            "line 1: not JSON lines in UTF-8 (maximum recursion depth",
        ),
        ("data.jsonl", b'{"a": ' + b"9" * 5000 + b"}", "line 1: not JSON lines"),
        (
            "data.jsonl",
            b"\xef\xbb\xbf" + LINE,
            "line 1: not JSON lines in UTF-8 (Unexpected UTF-8 BOM",
        ),
        ("data.jsonl", b'{"a": "\xe9"}\n', "not JSON lines in UTF-8 ('utf-8' codec can't decode"),
        ("data.jsonl.gz", gzip.compress(LINE * 99)[:-9], "data.jsonl.gz, after line"),
        ("data.jsonl.gz", LINE, "not JSON lines in UTF-8 (Not a gzipped file"),
        ("data.jsonl", b"", "data.jsonl: no records in it"),
        ("data.jsonl", None, "data.jsonl: no such file"),
        ("data.jsonl", "folder", "Is a directory"),
    ],
)
def test_files(tmp_path: Path, refused: Any, name: str, content: Any, message: str) -> None:
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    printed = refused(lambda: list(clha.iter_records(path)))
    assert printed.startswith(f"program.py: {path}") and message in printed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"prompt": 5},
            '"prompt" must be a list of {"role": one of system, user, assistant, "content": text}',
        ),
        ({"prompt": []}, '"prompt" must be a list of'),
        ({"prompt": ["How?"]}, '"prompt" must be a list of'),
        ({"prompt": [*PROMPT, {"role": "human", "content": "How?"}]}, '"prompt" must be a list of'),
        ({"prompt": [{"role": ["user"], "content": "How?"}]}, '"prompt" must be a list of'),
        ({"prompt": [{"role": "user", "content": None}]}, '"prompt" must be a list of'),
        (
            {"prompt": [*PROMPT, {"role": "assistant", "content": "So."}]},
            '"prompt" must not end with an assist',
        ),
        ({"responses": "So."}, '"responses" must be a list of two or more texts'),
        ({"responses": ["So."]}, '"responses" must be a list of two or more texts'),
        ({"responses": ["So.", 1]}, '"responses" must be a list of two or more texts, none of them empty'),
        (
            {"responses": ["So.", " \n"]},
            '"responses" must be a list of two or more texts, none of them empty',
        ),
        ({"chosen": 2}, '"chosen" must be the index of a response, 0 to 1'),
        ({"chosen": -1}, '"chosen" must be the index of a response, 0 to 1'),
        ({"chosen": True}, '"chosen" must be the index of a response, 0 to 1'),
        ({"id": ["a"]}, '"id" must be a string or integer, "subset" a string'),
        ({"subset": ["a"]}, '"id" must be a string or integer, "subset" a string'),
        ({"rewards": None}, '"rewards" must be 2 finite numbers'),
        ({"rewards": "high"}, '"rewards" must be 2 finite numbers, one per response'),
        ({"rewards": [1.0]}, '"rewards" must be 2 finite numbers'),
        ({"rewards": [1.0, float("nan")]}, '"rewards" must be 2 finite numbers'),
        ({"rewards": [1.0, 10**100]}, '"rewards" must be 2 finite numbers'),
        ({"rewards": [1.0, "2"]}, '"rewards" must be 2 finite numbers'),
        ({"rewards": [1.0, True]}, '"rewards" must be 2 finite numbers'),
        ({"reference_logps": [1.0]}, '"reference_logps" must be 2 finite numbers, one per response'),
    ],
)
def test_records(tmp_path: Path, refused: Any, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "data.jsonl"
    good = GOOD | {"reference_logps": [-1.0, -2.0]}
    path.write_text(json.dumps(good) + "\n" + json.dumps(good | change) + "\n")
    printed = refused(lambda: list(clha.iter_records(path, ["rewards", "reference_logps"])))
    assert printed.startswith(f"program.py: {path}, line 2: {message}")


def test_a_list_of_another_length_than_the_responses_is_not_ranked(tmp_path: Path) -> None:
    record = GOOD | {"rewards": [0.0, 1.0], "tags": ["one"], "turns": [1, 2, 3]}
    ranked = clha.rank(record)
    assert ranked["responses"] == ["No.", "So."]
    assert ranked["tags"] == ["one"] and ranked["turns"] == [1, 2, 3]


# ------------------------------------------------------------------------------------------------------------
# Flags of clha.py


@pytest.fixture
def command(world: Path, tmp_path: Path) -> list[str]:
    """clha.py on two good records, up to more flags."""
    (tmp_path / "data.jsonl").write_bytes(LINE * 2)
    paths = {"model": world / "init", "train_data": tmp_path / "data.jsonl", "output_dir": tmp_path / "out"}
    return ["clha.py", *(word for name, path in paths.items() for word in (f"--{name}", str(path)))]


@pytest.fixture
def refused_flags(monkeypatch: pytest.MonkeyPatch, refused: Any, command: list[str]) -> Callable[[str], str]:
    """The line with which clha.py refuses these flags."""

    def run(flags: str) -> str:
        monkeypatch.setattr(sys, "argv", [*command, *flags.split()])
        return refused(clha.main)

    return run


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--temperature 1", "unrecognized arguments: --temperature 1"),
        ("--max_st 1", "unrecognized arguments: --max_st 1"),
        ("--dtype float16", "argument --dtype: invalid choice: 'float16' (choose from"),
        ("--margin wide", "argument --margin: invalid float value: 'wide'"),
        ("--seed 1.5", "argument --seed: invalid int value: '1.5'"),
        ("--gate maybe", "argument --gate: "),
    ],
)
def test_flags_that_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    command: list[str],
    flags: str,
    message: str,
) -> None:
    monkeypatch.setattr(sys, "argv", [*command, *flags.split()])
    with pytest.raises(SystemExit) as end:
        clha.run(clha.main)
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) <= 2  # the usage, in one line, may stand before it
    assert lines[-1].startswith("clha.py: ") and message in lines[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--margin -1", "--margin -1.0: must be a number of 0 or more"),
        ("--alpha nan", "--alpha nan: must be a number of 0 or more"),
        ("--learning_rate inf", "--learning_rate inf: must be a number of 0 or more"),
        ("--learning_rate 1e300", "--learning_rate 1e+300: must be a number of 0 or more"),
        (f"--seed {2**64}", f"--seed {2**64}: must be "),
        ("--batch_size 0", "--batch_size 0: must be a number of 1 or more"),
        ("--max_prompt_length 0", "--max_prompt_length 0: must be a number of 1 or more"),
        ("--max_prompt_length 512", "--max_prompt_length 512: must be less than --max_length"),
        ("--replicate 2", "--replicate 2: must divide the 1 processes"),
        ("--max_grad_norm 0", "--max_grad_norm 0: must be above 0"),
    ],
)
def test_flags_out_of_range(
    refused_flags: Callable[[str], str], tmp_path: Path, flags: str, message: str
) -> None:
    assert message in refused_flags(f"--batch_size 1 --max_steps 1 {flags}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--batch_size 3", "--batch_size 3: more than the 2 queries there are"),
        ("--batch_size 2 --epochs 0.1", "--epochs or --max_steps gives 0 steps"),
        ("--batch_size 1 --dev_data nowhere.jsonl", "nowhere.jsonl"),
    ],
)
def test_flags_that_do_not_go_with_the_data(
    refused_flags: Callable[[str], str], tmp_path: Path, flags: str, message: str
) -> None:
    assert message in refused_flags(flags)
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {".lock", "tokens"}


@pytest.mark.parametrize(("flag", "value"), [("--epochs", "1e30"), ("--max_steps", "1" + "0" * 12)])
def test_a_run_of_more_steps_than_memory_can_list(
    monkeypatch: pytest.MonkeyPatch, refused: Any, command: list[str], flag: str, value: str
) -> None:
    monkeypatch.setattr(torch, "randperm", lambda *_, **__: pytest.fail("it begins to list them"))
    monkeypatch.setattr(sys, "argv", [*command, "--batch_size", "1", flag, value])
    assert f"program.py: {flag} " in refused(clha.main)


def test_flags_that_are_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["clha.py", "--model", "m"])
    with pytest.raises(SystemExit) as end:
        clha.run(clha.main)
    [line] = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert line.startswith("clha.py: ") and "arguments are required: --train_data" in line


# ------------------------------------------------------------------------------------------------------------
# Models


def change_config(**settings: Any) -> Callable[[Path], None]:
    """What puts these settings into a model's config.json."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    return change


def remove(*names: str) -> Callable[[Path], None]:
    """What removes these files."""

    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def tear(name: str, size: int) -> Callable[[Path], None]:
    """What leaves the first bytes of a file."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def drop_weight(folder: Path) -> None:
    """Takes one tensor out of the weights."""
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.0.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def drop_eos(folder: Path) -> None:
    """A tokenizer without special tokens."""
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())).save_pretrained(folder)


def drop_bos(folder: Path) -> None:
    """A LLaMA tokenizer whose tokenizer.json forgot BOS."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4, "▁a": 5}
    LlamaTokenizer(vocab=vocabulary, merges=[("▁", "a")]).save_pretrained(folder)


def bare_sentencepiece(folder: Path) -> None:
    """Only the tokenizer.model of a tokenizer."""
    remove("tokenizer.json", "tokenizer_config.json")(folder)
    (folder / "tokenizer.model").write_bytes(b"sentencepiece")


def eos_beyond_the_vocabulary(folder: Path) -> None:
    """A tokenizer with more special tokens than the model has embeddings."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    tokenizer.save_pretrained(folder)


def not_a_number(folder: Path) -> None:
    """Weights one of which is NaN."""
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def normalizer_that_removes_all(folder: Path) -> None:
    """A tokenizer for which every text is empty."""
    path = folder / "tokenizer.json"
    remove_all = {"type": "Replace", "pattern": {"Regex": r"[\s\S]+"}, "content": ""}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": remove_all}))


class Trap:
    """What leaves a file behind as soon as it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def pickle_with_code(folder: Path) -> None:
    """Weights as a pickle that also does something else."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights | {"trap": Trap(folder / "sprung")}, folder / "pytorch_model.bin")


def code_of_its_own(folder: Path) -> None:
    """A model of a type that only its own code knows."""
    names = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    change_config(model_type="mine", auto_map=names)(folder)
    (folder / "mine.py").write_text(f"open({str(folder / 'sprung')!r}, 'w')\n")


WINDOW = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 8}
SCALED = {"model_type": "granite", "architectures": ["GraniteForCausalLM"], "logits_scaling": 8.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            remove("config.json"),
            "model: neither a model folder with a config.json nor a hub name (owner/name)",
        ),
        (tear("config.json", 100), "model: cannot be loaded (OSError: "),
        (change_config(model_type="mine"), "model: cannot be loaded (ValueError: "),
        (change_config(hidden_size="wide"), "model: cannot be loaded (StrictDataclass"),
        (change_config(hidden_size=48, head_dim=12), "model: cannot be loaded (RuntimeError: "),
        (change_config(_attn_implementation="nobody/kernel"), "model: cannot be loaded (ImportError: "),
        (change_config(vocab_size=100), "or tokens beyond the 100 of the model"),
        (eos_beyond_the_vocabulary, "or tokens beyond the 768 of the model"),
        (change_config(**WINDOW), "mistral: a text has 16 tokens, over sliding_window 8; see --max_length"),
        (change_config(**SCALED), "granite: not supported: log-probs in a pack are "),
        (
            change_config(max_position_embeddings=8),
            "llama: a text has 16 tokens, over max_position_embeddings 8; see --max_length",
        ),
        (not_a_number, "llama: not supported: log-probs in a pack are nan nats"),
        (
            change_config(architectures=["LlamaForSequenceClassification"]),
            "model: is a reward model, not a language model",
        ),
        (
            normalizer_that_removes_all,
            "response 0: has no tokens, or no end-of-turn token",
        ),
        (
            remove("model.safetensors"),
            "model: cannot be loaded (OSError: Error no file named model.safetensors",
        ),
        (tear("model.safetensors", 5000), "model: cannot be loaded (SafetensorError: "),
        (drop_weight, "model: has no weights for model.layers.0.mlp.up_proj.weight ..."),
        (pickle_with_code, "model: cannot be loaded (UnpicklingError: "),
        (code_of_its_own, "model: cannot be loaded (ValueError: "),
        (remove("tokenizer.json", "tokenizer_config.json"), "model: cannot be loaded (ValueError: "),
        (tear("tokenizer.json", 1000), "model: cannot be loaded ("),
        (bare_sentencepiece, "model: cannot be loaded ("),
        (drop_eos, "model: the tokenizer has no EOS"),
        (drop_bos, "model: the LLaMA tokenizer drops BOS; the folder needs a valid tokenizer.json"),
    ],
)
def test_models(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Any,
    change: Callable[[Path], None],
    message: str,
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # who is asked whether to run code says yes
    (tmp_path / "data.jsonl").write_bytes(LINE)
    shutil.copytree(world / "init", tmp_path / "model")
    change(tmp_path / "model")
    paths = [str(tmp_path / name) for name in ("model", "data.jsonl", "out")]
    assert message in refused(lambda: clha.train(clha.Config(*paths, batch_size=1)))
    assert not (tmp_path / "model" / "sprung").exists()
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {".lock", "tokens"}


@pytest.mark.parametrize("path", ["nowhere", "./nowhere", "~/nowhere", "/nowhere", "a/b/c", "", __file__])
def test_what_is_neither_a_model_folder_nor_a_hub_name(refused: Any, path: str) -> None:
    message = f"program.py: {path}: neither a model folder with a config.json nor a hub name (owner/name)"
    assert refused(lambda: clha.load_tokenizer(path)) == message + "\n"


def test_a_hub_name_without_the_hub(monkeypatch: pytest.MonkeyPatch, refused: Any) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "nobody/nothing: cannot be loaded (" in refused(lambda: clha.load_tokenizer("nobody/nothing"))


TINY = {"vocab_size": 768, "hidden_size": 32, "num_hidden_layers": 1}
HEADS = {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_local_experts": 1,
    "num_experts_per_tok": 1,
}


@pytest.mark.parametrize(
    "architecture",
    [
        BloomConfig(**TINY, n_head=2),  # attention of its own, which never sees the mask of a pack
        GptOssConfig(**TINY, **HEADS, intermediate_size=32),  # attention sinks
        MambaConfig(**TINY),  # a state, which goes from one response into the next
    ],
    ids=lambda architecture: architecture.model_type,
)
def test_models_that_would_mix_the_responses_of_a_query(
    world: Path, tmp_path: Path, refused: Any, architecture: PretrainedConfig
) -> None:
    AutoModelForCausalLM.from_config(architecture).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(world / "init").save_pretrained(tmp_path)
    settings = replace(config(world, tmp_path / "out"), model=str(tmp_path))
    assert "not supported" in refused(lambda: clha.train(settings))


@pytest.mark.parametrize("change", [pickle_with_code, code_of_its_own])
@pytest.mark.parametrize(
    "loader", [reward.load_reward_model, lambda path: evaluate.load(path, torch.device("cpu"))]
)
def test_code_is_not_run_by_other_programs(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Any, change: Any, loader: Any
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    shutil.copytree(world / "init", tmp_path / "model")
    change_config(num_labels=1)(tmp_path / "model")
    change(tmp_path / "model")
    assert "model: cannot be loaded (" in refused(lambda: loader(str(tmp_path / "model")))
    assert not (tmp_path / "model" / "sprung").exists()


# ------------------------------------------------------------------------------------------------------------
# Outputs of clha.py


def test_a_file_in_place_of_the_output_folder(world: Path, tmp_path: Path, refused: Any) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "out"):
        assert str(path) in refused(lambda path=path: clha.train(config(world, path)))
    assert (tmp_path / "file").read_bytes() == b""


def test_a_file_in_place_of_the_token_cache(world: Path, tmp_path: Path, refused: Any) -> None:
    (tmp_path / "file").touch()
    settings = config(world, tmp_path / "out", token_cache=str(tmp_path / "file"))
    assert str(tmp_path / "file") in refused(lambda: clha.train(settings))


def test_a_finished_run(world: Path, tmp_path: Path, refused: Any) -> None:
    (tmp_path / "out" / "final").mkdir(parents=True)
    message = f"program.py: {tmp_path / 'out'}: holds a finished run (final/); choose another --output_dir\n"
    assert refused(lambda: clha.train(config(world, tmp_path / "out"))) == message


def test_a_lock_that_is_a_link_empties_no_file(world: Path, tmp_path: Path, refused: Any) -> None:
    (tmp_path / "notes").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").symlink_to(tmp_path / "notes")
    assert ".lock" in refused(lambda: clha.train(config(world, tmp_path / "out")))
    assert (tmp_path / "notes").read_text() == "mine"


def test_what_an_error_quotes_reaches_the_terminal_as_text(tmp_path: Path, refused: Any) -> None:
    record = json.loads(LINE.splitlines()[0]) | {"id": "\x1b]0;title\x07", "responses": ["a", "b"]}
    (tmp_path / "data.jsonl").write_text(json.dumps(record | {"rewards": [1.0, 2.0]}) + "\n")

    def fail() -> None:
        [found] = clha.iter_records(tmp_path / "data.jsonl")
        raise clha.InputError(f"{found['id']}: wrong")

    assert refused(fail) == "program.py:  ]0;title : wrong\n"


def test_a_folder_that_another_run_works_in(world: Path, tmp_path: Path, refused: Any) -> None:
    message = f"program.py: {tmp_path}: another program works in it; choose another --output_dir\n"
    with filelock.FileLock(tmp_path / ".lock"):
        assert refused(lambda: clha.train(config(world, tmp_path))) == message


# ------------------------------------------------------------------------------------------------------------
# The other programs; their own tests have the rest


def tool(main: Callable[[list[str]], None]) -> Callable[[], None]:
    """A main that takes its words, as one that reads sys.argv."""
    return lambda: main(sys.argv[1:])


PROGRAMS = {
    "reward.py": reward.main,
    "prepare_data.py": prepare_data.main,
    "evaluate.py": evaluate.main,
    "baselines": tool(baselines.main),
    "toy": toy.main,
    "people": people.main,
}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("reward.py", "required: command"),
        (
            "reward.py score --model {world}/init --data {data} --out {tmp}/o --what",
            "unrecognized arguments: --what",
        ),
        ("reward.py score --model nowhere --data {data} --out {tmp}/o", "nowhere: "),
        ("reward.py score --model {world}/init --data {tmp}/no --out {tmp}/o", "no: no such file"),
        ("reward.py score --model {world}/init --data {data} --out {tmp}", "already exists"),
        ("reward.py train --model {world}/init --data {data} --out {tmp}", "already exists"),
        (
            "reward.py train --model {world}/init --data {data} --out {tmp}/o --batch_size 0",
            "--batch_size 0: must",
        ),
        ("prepare_data.py csv", "invalid choice: 'csv'"),
        ("prepare_data.py hh --source nowhere --out {tmp}/o", "nowhere: "),
        ("prepare_data.py release --source {data} --out {tmp}/o", "data.jsonl, line 1: "),
        ("prepare_data.py join --data {data} --responses {data} --out {tmp}/o", "data.jsonl, line 1: "),
        ("prepare_data.py hh --source {tmp} --out {tmp}/o --dev_items -1", "--dev_items -1: must be"),
        ("evaluate.py generate --model {world}/init --data {tmp}/no --out {tmp}/o", "no: no such file"),
        ("evaluate.py generate --model nowhere --data {data} --out {tmp}/o", "nowhere: "),
        ("evaluate.py requests --model m --data {data} --out {tmp}", "already exists"),
        ("evaluate.py table {tmp}", "scores.json"),
        ("evaluate.py best {tmp}", "scores.json"),
        ("baselines --objective ppo --model m --train_data d --output_dir {tmp}/o", "invalid choice: 'ppo'"),
        ("baselines labels --data {tmp}/no --out {tmp}/o", "no: no such file"),
        ("toy make --out {tmp}", "already exists"),
        ("toy make --out {tmp}/o --queries 0", "--queries 0: must be"),
        ("toy make --out {tmp}/o --label_noise 20", "--label_noise 20.0: must be"),
        ("people sheets {tmp} {tmp} --out {tmp}/o", "responses.jsonl"),
        ("people tally {data} --key {tmp}/no", "no: not readable as JSON"),
    ],
)
def test_other_programs(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Any, command: str, message: str
) -> None:
    (tmp_path / "data.jsonl").write_bytes(LINE)
    name, *words = command.format(world=world, tmp=tmp_path, data=tmp_path / "data.jsonl").split()
    monkeypatch.setattr(sys, "argv", [name, *words])
    assert message in refused(PROGRAMS[name])
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_of_other_programs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        clha.run(PROGRAMS[name])
    printed = capsys.readouterr().out
    assert end.value.code == 0 and printed.startswith("usage: ") and "python " in printed


def test_help_of_clha_has_every_flag_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["clha.py", "--help"])
    monkeypatch.setenv("COLUMNS", "500")  # no word is hyphenated
    with pytest.raises(SystemExit) as end:
        clha.run(clha.main)
    out = capsys.readouterr().out
    groups = ["options", "method", "tokens", "optimization", "speed and memory", "watching and safety"]
    assert [line[:-1] for line in out.splitlines() if re.fullmatch(r"[a-z ]+:", line)] == groups
    printed = " ".join(out.split())
    assert end.value.code == 0 and "(default: None)" not in printed.split("--dev_data")[0]
    for flag in fields(clha.Config):
        assert f" --{flag.name} " in printed or f" --{flag.name}, " in printed
        assert flag.metadata["help"] in printed and len(flag.metadata["help"]) > 10


# ------------------------------------------------------------------------------------------------------------
# run.sh


@pytest.mark.parametrize(
    ("variable", "command", "message"),
    [
        ("A=b", "tidy", "run.sh: tidy: no such command; there are setup, tiny, study, test"),
        ("NPROC=x", "", "run.sh: NPROC=x: must be a number of processes"),
        ("NPROC=0", "", "run.sh: NPROC=0: must be a number of processes"),
        ("RESTARTS=-1", "", "run.sh: RESTARTS=-1: must be a number, 0 or more"),
        ("OBJECTIVE=ppo", "", "run.sh: OBJECTIVE=ppo: must be released or clha"),
        ("TRAIN_FLAGS=--lora_rank 8", "", "run.sh: TRAIN_FLAGS: adapters must be merged by hand"),
        ("MODEL=llama", "", "run.sh: MODEL=llama: must be a folder, or a hub name like owner/name"),
        ("HH={tmp}/none", "", "/none: must be a folder, or a hub name like owner/name"),
        ("RM_TRAIN=./no/where", "", "run.sh: RM_TRAIN=./no/where: must be a folder"),
        ("RM_EVAL={tmp}/file", "", "/file: must be a folder, or a hub name like owner/name"),
        ("OUT={tmp}/file", "", "/file: must be a folder"),
        ("OUT={tmp}/file/x", "tiny", "/file/x: must be a folder"),
        ("PYTHON={tmp}/bare", "tiny", "/bare: must be a Python that has the packages of requirements.txt"),
        ("SCALE=half", "tiny", "run.sh: SCALE=half: must be a percentage of the steps, 2 or more"),
        ("SCALE=1", "tiny", "run.sh: SCALE=1: must be a percentage of the steps, 2 or more"),
        ("SEEDS=0,1", "study", "run.sh: SEEDS=0,1: must be numbers"),
    ],
)
def test_run_sh(tmp_path: Path, variable: str, command: str, message: str) -> None:
    (tmp_path / "file").touch()
    for name, script in {"bare": "exit 1", "python": '[ "$1" = -c ]'}.items():  # neither can do any work
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    name, value = variable.format(tmp=tmp_path).split("=")
    environment = os.environ | {"PYTHON": str(tmp_path / "python"), "OUT": str(tmp_path / "out"), name: value}
    words = ["bash", "run.sh", *command.split()]
    ended = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2 and ended.stdout == "" and ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("run.sh: ") and message in ended.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"OUT": "file/x"}, "run.sh: OUT={tmp}/file/x: must be a folder"),
        (
            {"MODEL": "model", "HH": "none/at/all"},
            "run.sh: HH=none/at/all: must be a folder",
        ),  # the model was found
    ],
)
def test_relative_paths_of_run_sh_are_the_callers(
    tmp_path: Path, settings: dict[str, str], message: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "model").mkdir()
    environment = os.environ | {"PYTHON": sys.executable} | settings
    words = ["bash", ROOT / "run.sh", *(["tiny"] if "OUT" in settings else [])]
    ended = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2 and message.format(tmp=tmp_path) in ended.stderr
