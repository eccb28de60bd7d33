"""Checkpoints: a run that is stopped, killed or out of disk ends with the weights of one that was not."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT

import checkpoint
import clha
from records import read_records, write_jsonl

SMALL = {"max_steps": 12, "batch_size": 4, "learning_rate": 1e-3, "pack_tokens": 400}


@pytest.fixture(autouse=True)
def leave_the_group() -> Iterator[None]:
    """Ends the process group that `clha.train` makes in this process."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def data(world: Path) -> Path:
    """Training records of the toy world with rewards."""
    generator = torch.Generator().manual_seed(0)
    records = read_records(world / "train.jsonl")[:48]
    for record in records:
        record["rewards"] = torch.randn(len(record["responses"]), generator=generator).tolist()
    write_jsonl(world / "checkpoint.jsonl", records)
    return world / "checkpoint.jsonl"


@pytest.fixture(scope="module")
def start(world: Path) -> Path:
    """The tiny LLaMA with dropout, so that the random states matter."""
    folder = world / "dropout"
    shutil.copytree(world / "init", folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"attention_dropout": 0.2}))
    return folder


def config(start: Path, data: Path, out: Path, **more: Any) -> clha.Config:
    """Twelve steps of four queries."""
    return clha.Config(str(start), str(data), str(out), **SMALL | more)


def launch(start: Path, data: Path, out: Path, *flags: str, processes: int = 1, restarts: int = 0) -> Any:
    """Starts clha.py as a user does."""
    settings = SMALL | {"model": start, "train_data": data, "output_dir": out}
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--max_restarts={restarts}"]
    command = [sys.executable, *([*torchrun, f"--nproc_per_node={processes}"] if processes > 1 else [])]
    command += ["clha.py", *(word for name, value in settings.items() for word in (f"--{name}", value))]
    words = list(map(str, [*command, *flags]))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, cwd=ROOT, start_new_session=True, **pipes)


def wait_for_step(process: Any, out: Path, step: int) -> None:
    """Waits until a run has logged a step."""
    for _ in range(1200):
        log = out / "metrics.jsonl"
        if log.exists() and log.read_bytes().count(b"\n") >= step:
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    raise AssertionError("no such step in a minute")


def weights(folder: Path) -> bytes:
    """The bytes of the weights that a run ended with."""
    return (folder / "final" / "model.safetensors").read_bytes()


def steps(out: Path) -> list[int]:
    """The steps in metrics.jsonl."""
    return [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def stop_after(out: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a run in this process get a SIGTERM in this step."""
    end_step = checkpoint.Run.end_step

    def interrupted(self: checkpoint.Run, at: int, *arguments: Any, **more: Any) -> None:
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)
        end_step(self, at, *arguments, **more)

    monkeypatch.setattr(checkpoint.Run, "end_step", interrupted)


@pytest.fixture(scope="module")
def whole(start: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves that was never stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    clha.train(config(start, data, out))
    dist.destroy_process_group()
    return out


def test_dropout_is_part_of_this_test(whole: Path, start: Path, data: Path, tmp_path: Path) -> None:
    clha.train(config(start, data, tmp_path, seed=43))
    clha.train(config(start, data, tmp_path / "again"))
    assert weights(tmp_path / "again") == weights(whole) != weights(tmp_path)


@pytest.mark.parametrize("settings", [{}, {"lr_schedule": "cosine", "warmup_steps": 3}])
def test_a_stopped_run_goes_on_to_the_same_bits(
    start: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    clha.train(config(start, data, tmp_path / "whole", **settings))
    run = config(start, data, tmp_path / "run", **settings)
    for step in (3, 4, 9):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
            stop_after(tmp_path / "run", step, patch)
            clha.train(run)
        assert end.value.code == 128 + signal.SIGTERM
        assert (tmp_path / "run" / "checkpoints" / "latest").resolve().name == f"step-{step}"
    clha.train(run)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert steps(tmp_path / "run") == list(range(1, 13))
    logs = ((tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("run", "whole"))
    for ours, theirs in zip(*logs, strict=True):
        ours, theirs = (json.loads(text) | {"tokens_per_second": 0} for text in (ours, theirs))
        assert ours == theirs
