"""run.sbatch: its flags are real, and what it starts trains, stops and goes on. Slurm itself is not here:
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
from records import read_records, write_jsonl

SCRIPTS = ["run.sh", "run.sbatch"]
SRUN = 'while [[ $1 == -* ]]; do shift; done\nexec "$@"\n'
SCONTROL = 'case $1 in show) echo localhost ;; *) echo "$*" >> "$LOG" ;; esac\n'

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_scripts_are_sound_shell(script: str) -> None:
    subprocess.run(["bash", "-n", script], cwd=ROOT, check=True)
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    found = subprocess.run(["shellcheck", script], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_for_clha_is_one(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        clha.parse_args(["--help"])
    known = set(re.findall(r"--\w+", capsys.readouterr().out))
    text = (ROOT / script).read_text().replace("\\\n", " ")
    commands = re.findall(r"clha\.py (--model .*)", text)
    small = re.findall(r"local (?:small|sft)=\((.*)\)", text)  # what run.sh's stages have in common
    flags = re.findall(r"--\w+", " ".join([*commands, *small]))
    assert len(commands) == {"run.sh": 4, "run.sbatch": 1}[script] and set(flags) <= known


@pytest.fixture
def start(world: Path, tmp_path: Path) -> Start:
    """Starts run.sbatch as Slurm would, as a job of one machine with one process; more variables win."""
    for name, body in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}")
        (tmp_path / name).chmod(0o755)
    records, generator = read_records(world / "train.jsonl"), torch.Generator().manual_seed(0)
    for record in records:
        record["rewards"] = torch.randn(len(record["responses"]), generator=generator).tolist()
    write_jsonl(tmp_path / "train.jsonl", records)

    def start(**more: str) -> "subprocess.Popen[str]":
        job = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "localhost", "NPROC": "1"}
        run = {"MODEL": world / "init", "DATA": tmp_path / "train.jsonl", "OUT": tmp_path / "run"}
        run |= {"PYTHON": sys.executable, "PORT": get_free_port(), "LOG": tmp_path / "slurm.log"}
        path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(ROOT)}
        return subprocess.Popen(
            ["bash", str(ROOT / "run.sbatch")],
            env=os.environ | path | {name: str(value) for name, value in (job | run | more).items()},
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
    assert job.returncode == 2 and printed.startswith(f"run.sbatch: {message}") and printed.count("\n") == 1


def test_a_job_at_its_time_limit_saves_and_the_next_one_ends_the_run(start: Start, tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "slurm.log"
    flags = "--max_steps 40 --batch_size 8 --pack_tokens 400"
    job = start(TRAIN_FLAGS=flags)
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").is_file() or not (out / "metrics.jsonl").read_text():
        assert job.poll() is None and time.monotonic() < deadline, job.communicate()
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    printed, _ = job.communicate(timeout=120)
    assert job.returncode != 0 and not (out / "final").exists(), printed
    assert log.read_text() == "requeue 7\n" and (out / "checkpoints" / "latest").exists()

    job = start(TRAIN_FLAGS=flags)
    printed, _ = job.communicate(timeout=240)
    assert job.returncode == 0, printed
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 40 and (out / "final" / "model.safetensors").is_file()
    assert log.read_text() == "requeue 7\n"  # not again
