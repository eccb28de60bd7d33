"""run.sbatch: its flags are real, and what it starts trains, stops and resumes. Slurm itself is not here:
stand-ins for its two commands run the one task on this machine."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch.distributed.elastic.utils.distributed import get_free_port

import clha
import reward

SRUN = 'while [[ $1 == -* ]]; do shift; done\nexec "$@"\n'
SCONTROL = 'case $1 in show) echo localhost ;; *) echo "$*" >> "$LOG" ;; esac\n'

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.mark.parametrize("script", ["run.sh", "run.sbatch", "bench/slurm.sh"])
def test_the_scripts_are_sound_shell(script: str) -> None:
    subprocess.run(["bash", "-n", script], cwd=ROOT, check=True)
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    found = subprocess.run(["shellcheck", script], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_every_flag_for_clha_is_one() -> None:
    known = set(re.findall(r"--\w+", reward.Parser(clha.Config).format_help()))
    text = (ROOT / "run.sbatch").read_text().replace("\\\n", " ")
    [command] = re.findall(r"clha\.py (--model .*)", text)
    [example] = re.findall(r'such as "(--.*)"', text)
    flags = set(re.findall(r"--\w+", f"{command} {example}"))
    assert len(flags) == 6
    assert flags <= known


@pytest.fixture
def start(world: Path, tmp_path: Path) -> Start:
    """Starts run.sbatch as Slurm would, as a job of one machine with one process; more variables win."""
    for name, body in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}")
        (tmp_path / name).chmod(0o755)
    records = reward.read_records(world / "train.jsonl")
    generator = torch.Generator().manual_seed(0)
    for record in records:
        record["rewards"] = torch.randn(len(record["responses"]), generator=generator).tolist()
    reward.write_jsonl(tmp_path / "train.jsonl", records)
    variables = {
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "1",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_SUBMIT_DIR": ROOT,
        "NPROC": "1",
        "MODEL": world / "init",
        "DATA": tmp_path / "train.jsonl",
        "OUT": tmp_path / "run",
        "PYTHON": sys.executable,
        "PORT": get_free_port(),
        "LOG": tmp_path / "slurm.log",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }

    def start(**more: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            ["bash", str(ROOT / "run.sbatch")],
            env=os.environ | {name: str(value) for name, value in (variables | more).items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ({"SLURM_JOB_ID": ""}, "must be started by Slurm"),
        ({"MODEL": ""}, "MODEL= must be set"),
        ({"DATA": "nowhere.jsonl"}, "DATA=nowhere.jsonl: must be a file of scored records"),
        ({"OUT": ""}, "OUT= must be set"),
        ({"PYTHON": "no-python"}, "PYTHON=no-python: no such program"),
    ],
)
def test_what_is_missing_is_said_in_a_line(start: Start, variable: dict[str, str], message: str) -> None:
    job = start(**variable)
    printed, _ = job.communicate(timeout=60)
    assert job.returncode == 2
    assert printed.startswith(f"run.sbatch: {message}")
    assert printed.count("\n") == 1


def test_a_job_at_its_time_limit_saves_and_the_next_one_ends_the_run(start: Start, tmp_path: Path) -> None:
    out = tmp_path / "run"
    log = tmp_path / "slurm.log"
    flags = "--max_steps 40 --batch_size 8 --pack_tokens 400"
    job = start(TRAIN_FLAGS=flags)
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").is_file() or not (out / "metrics.jsonl").read_text():
        assert job.poll() is None and time.monotonic() < deadline, job.communicate()
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    printed, _ = job.communicate(timeout=120)
    assert job.returncode != 0, printed
    assert not (out / "final").exists()
    assert log.read_text() == "requeue 7\n"
    assert len(clha.checkpoints(out / "checkpoints")) == 1

    job = start(TRAIN_FLAGS=flags)
    printed, _ = job.communicate(timeout=240)
    assert job.returncode == 0, printed
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 41))
    assert (out / "final" / "model.safetensors").is_file()
    assert log.read_text() == "requeue 7\n"  # not again
