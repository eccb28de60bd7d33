"""Several machines: here two agents of torchrun on one host, which find each other by a c10d rendezvous."""

import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from test_training import config

import clha
from records import InputError, read_records, write_jsonl


@pytest.fixture(scope="module")
def data(world: Path) -> Path:
    """Records with rewards."""
    records = [r | {"rewards": [1.0, -1.0]} for r in read_records(world / "train.jsonl")[:64]]
    write_jsonl(world / "machines.jsonl", records)
    return world / "machines.jsonl"


def two_agents(world: Path, data: Path, out: Path, *flags: str) -> list[str]:
    """Trains four steps of eight queries, an agent and a process a "machine"; what each agent printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = "-m torch.distributed.run --nnodes 2 --nproc_per_node 1 --rdzv_backend c10d --rdzv_id test "
    launch += f"--rdzv_endpoint 127.0.0.1:{port} --local_addr 127.0.0.1 clha.py --model {world / 'init'} "
    launch += f"--train_data {data} --output_dir {out} --max_steps 4 --batch_size 8 --pack_tokens 400 "
    command = [sys.executable, *launch.split(), "--learning_rate", "1e-5", "--checkpoint_every", "2", *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    agents = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(2)]
    printed = [agent.communicate(timeout=200) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], printed
    return [stdout for stdout, _ in printed]


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The weights that a run ended with."""
    return load_file(run / "final" / "model.safetensors")


def assert_alike(run: Path, other: Path) -> None:
    """The same weights but for rounding."""
    expected = weights(other)
    for name, weight in weights(run).items():
        torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=0)


def test_two_machines_give_the_weights_of_one_process(world: Path, data: Path, tmp_path: Path) -> None:
    printed = two_agents(world, data, tmp_path / "two", "--replicate", "2")
    assert sum("steps of 8 queries" in text for text in printed) == 1  # only the first process of all speaks
    clha.train(config(world, data, tmp_path / "one", max_steps=4))
    assert_alike(tmp_path / "two", tmp_path / "one")
    before = load_file(world / "init" / "model.safetensors")
    assert max((weights(tmp_path / "one")[name] - before[name]).abs().max() for name in before) > 3e-5
    # One process goes on from the checkpoint of the two, in which each weight and moment is there once.
    middle = tmp_path / "one_goes_on" / "checkpoints" / "step-2"
    shutil.copytree(tmp_path / "two" / "checkpoints" / "step-2", middle)
    clha.train(config(world, data, tmp_path / "one_goes_on", max_steps=4))
    assert_alike(tmp_path / "one_goes_on", tmp_path / "one")


def test_copies_that_do_not_divide_the_processes_are_refused(world: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--replicate 2: must divide the 1 processes"):
        clha.train(config(world, data, tmp_path / "run", replicate=2))
    assert not (tmp_path / "run").exists()
