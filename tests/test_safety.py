"""What a run must not do: run code of a model, write elsewhere, or take from the hub without a word."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from safetensors.torch import load_file

import clha
import reward
from records import InputError, read_records, write_jsonl


class Trap:
    """What leaves a file behind as soon as it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def pickled(world: Path, folder: Path, weights: Any) -> Path:
    """A model folder with a pickle where the weights are."""
    shutil.copytree(world / "init", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    if isinstance(weights, dict):
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(weights))
    return folder


def load(path: Path) -> Any:
    """The model of a folder, as training loads it."""
    clha.init_process()
    try:
        return clha.load_model(str(path), torch.device("cpu"), torch.float32, checkpointing="none")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("loader", [load, lambda path: reward.load_reward_model(str(path))])
def test_a_pickle_is_not_executed(world: Path, tmp_path: Path, loader: Any) -> None:
    weights = load_file(world / "init" / "model.safetensors") | {"trap": Trap(tmp_path / "sprung")}
    with pytest.raises(InputError, match="a pickle that may hold code, and is not opened"):
        loader(pickled(world, tmp_path / "dict", weights))
    with pytest.raises(InputError, match="a pickle that may hold code, and is not opened"):
        loader(pickled(world, tmp_path / "plain", Trap(tmp_path / "sprung")))
    assert not (tmp_path / "sprung").exists()


def test_a_pickle_of_weights_alone_is_loaded(world: Path, tmp_path: Path) -> None:
    weights = load_file(world / "init" / "model.safetensors")
    model = load(
        pickled(world, tmp_path / "model", weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    )
    name, weight = next(iter(weights.items()))
    assert torch.equal(model.state_dict()[name].full_tensor(), weight)


def test_code_that_comes_with_a_model_is_not_run(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "init", tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "config.json").read_text())
    names = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    other = settings | {"model_type": "mine", "auto_map": names}
    (tmp_path / "model" / "config.json").write_text(json.dumps(other))
    (tmp_path / "model" / "mine.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')")
    with pytest.raises(InputError, match="needs code of its own"):
        load(tmp_path / "model")
    assert not (tmp_path / "sprung").exists()


def test_nothing_is_written_outside_the_output_folder(world: Path, tmp_path: Path) -> None:
    for name in ("home", "here", "input"):
        (tmp_path / name).mkdir()
    records = [r | {"rewards": [1.0, -1.0]} for r in read_records(world / "train.jsonl")[:16]]
    write_jsonl(tmp_path / "input" / "data.jsonl", records)
    shutil.copytree(world / "init", tmp_path / "input" / "model")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    flags = {"model": "input/model", "train_data": "input/data.jsonl", "output_dir": "out"}
    words = [word for name, path in flags.items() for word in (f"--{name}", str(tmp_path / path))]
    environment = os.environ | {"HOME": str(tmp_path / "home"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [
        sys.executable,
        ROOT / "clha.py",
        *words,
        "--batch_size",
        "8",
        "--max_steps",
        "2",
        "--deterministic",
    ]
    result = subprocess.run(
        list(map(str, command)), cwd=tmp_path / "here", env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert {path for path in after if after[path] != before.get(path)} <= {
        tmp_path / "out",
        *(tmp_path / "out").rglob("*"),
    } | {tmp_path}


def test_what_is_taken_from_the_hub_is_said(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="nobody/nothing: can't be loaded"):
        clha.load_tokenizer("nobody/nothing")
    assert (
        "nobody/nothing: no such folder here, so it is taken from the Hugging Face hub"
        in capsys.readouterr().err
    )
    for name in ("nothing", "./nobody/nothing", "a/b/c"):
        with pytest.raises(InputError, match="no such model folder, and not a hub name"):
            clha.load_tokenizer(name)
    assert capsys.readouterr().err == ""
