"""`bash run.sh tiny` as a user runs it, with fewer steps: the numbers it ends with, and that it resumes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT


def run_tiny(out: Path) -> subprocess.CompletedProcess[str]:
    """Runs it into a folder with this Python, at 60 percent of the steps."""
    settings = {"OUT": str(out), "OMP_NUM_THREADS": "1", "SCALE": "60", "PYTHON": sys.executable}
    command = ["bash", "run.sh", "tiny"]
    return subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, whose last lines are its printed table."""
    folder = tmp_path_factory.mktemp("tiny") / "out"
    result = run_tiny(folder)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (folder / "table.md").read_text() in result.stdout
    return folder


def read_scores(out: Path, name: str) -> dict[str, Any]:
    """The scores of a model over the test prompts."""
    return json.loads((out / "eval" / name / "scores.json").read_text())


def test_clha_beats_sft_and_the_base_model_by_the_true_reward(out: Path) -> None:
    scores = {name: read_scores(out, name) for name in ("base", "sft", "clha")}
    gold = {name: score["Total"]["gold"] for name, score in scores.items()}
    assert gold["clha"]["interval"][0] > max(gold["base"]["interval"][1], gold["sft"]["interval"][1])
    assert scores["clha"]["Total"]["reward"]["mean"] > scores["sft"]["Total"]["reward"]["mean"]
    assert scores["clha"]["Total"]["n"] == 400
    assert len(scores["clha"]) == 5  # four subsets and the total


def test_the_table_says_what_the_scores_say(out: Path) -> None:
    lines = (out / "table.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| base", "| sft", "| clha"]
    gold = read_scores(out, "clha")["Total"]["gold"]
    low, high = gold["interval"]
    assert f"{gold['mean']:.2f} ({low:.2f} to {high:.2f})" in lines[-1]


def test_the_reward_models_and_the_training_are_sane(out: Path) -> None:
    for name in ("rm_train", "rm_eval"):
        report = json.loads((out / name / "training.json").read_text())
        assert report["accuracy"] > 0.6  # labels are right in 80 %
    rows = [json.loads(line) for line in (out / "clha" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 48
    assert 0.2 < rows[0]["pairs_kept"] < 0.95
    assert 0.3 < rows[0]["gate_open"] < 0.9
    evaluated = [row["eval/rewards/accuracies"] for row in rows if "eval/loss" in row]
    assert evaluated[-1] > 0.55  # unseen pairs, too, are ordered as the reward model orders them


def test_the_pictures_are_drawn(out: Path) -> None:
    for name in ("reward.png", "gaps.png"):
        picture = (out / name).read_bytes()
        assert picture[:4] == b"\x89PNG"
        assert len(picture) > 10_000


def test_a_finished_stage_is_not_run_again(out: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    result = run_tiny(out)
    assert result.returncode == 0
    assert result.stdout.count("== have") == 17
    assert "took" not in result.stdout
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == before


def test_a_run_that_was_killed_while_it_scored_goes_on(out: Path) -> None:
    # The last model has no scores yet, the others have.
    table = (out / "table.md").read_text()
    for path in ("eval/clha/scores.json", "table.md"):
        (out / path).unlink()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    result = run_tiny(out)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("== have") == 16
    assert result.stdout.count(" took ") == 1
    assert (out / "table.md").read_text() == table
    changed = {path for path, moment in before.items() if path.stat().st_mtime_ns != moment}
    assert {path.parent for path in changed} == {out / "eval/clha"}
    assert not [*out.rglob("*.partial")]
