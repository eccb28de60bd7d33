"""The report: its numbers by hand, its signs, and the committed page from the committed runs."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import clha
import reward
from clha import InputError
from study import report, run

ROOT = Path(__file__).parents[2]


def test_a_mean_with_its_interval_by_hand() -> None:
    # 1, 2, 3: standard deviation 1, its error 1 / sqrt(3), t of two degrees of freedom 4.303
    mean = report.mean_of([1.0, 2.0, 3.0])
    assert mean == (2.0, pytest.approx(4.303 / 3**0.5), 3)
    assert report.cell(mean) == "2.00 ± 2.48"
    assert report.signed(report.mean_of([0.5])) == "+0.50 (one seed)"
    assert report.mean_of([]) is None


@pytest.mark.parametrize(("freedom", "t"), [(1, 12.706), (4, 2.776), (10, 2.228), (11, 2.201), (19, 2.093)])
def test_quantiles_of_students_t(freedom: int, t: float) -> None:
    assert report.student_t(freedom) == pytest.approx(t, abs=0.0025)


@pytest.mark.parametrize(
    ("mean", "half", "word"),
    [(0.3, 0.2, "holds"), (0.1, 0.2, "not shown"), (-0.3, 0.2, "fails"), (0.0, 0.0, "not shown")],
)
def test_a_verdict_follows_from_the_interval(mean: float, half: float, word: str) -> None:
    assert report.verdict(report.Mean(mean, half, 5)).startswith(f"**{word}**")
    assert report.verdict(None) == "not run"


def test_differences_are_paired_by_seed() -> None:
    first = {0: {"gold": 1.0}, 1: {"gold": 5.0}, 2: {"gold": 100.0}}
    second = {1: {"gold": 3.0}, 0: {"gold": -1.0}}
    assert report.difference(first, second) == (2.0, 0.0, 2)  # 2 in both seeds that both have


def write_rows(scores: dict[tuple[int, str], list[float]], **details: Any) -> None:
    """Writes runs.jsonl of the main worlds, gold by (responses per query, label), a value per seed.

    The reward is 50 plus ten times the gold; CLHA's rows get the details.
    """
    rows = []
    for (length, label), golds in scores.items():
        settings = (run.methods(length) | run.ABLATIONS).get(label)
        name = run.run_name(settings, length) if settings else label
        for seed, gold in enumerate(golds):
            row = {"world": run.world_name(run.NOISE, length), "seed": seed, "run": name, "gold": gold}
            row |= {"reward": 50 + 10 * gold, "char_bleu": 9.0, "word_bleu": 7.0}
            rows.append(row | (details if label == "CLHA" else {}))
    Path("docs/study").mkdir(parents=True, exist_ok=True)
    reward.write_jsonl("docs/study/runs.jsonl", rows)


def cells_of(text: str, start: str) -> list[list[str]]:
    """The cells of the lines of tables that start with a cell."""
    lines = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return [line.strip("| ").split(" | ") for line in lines]


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The report of five seeds of rows by hand."""
    monkeypatch.chdir(tmp_path)
    golds = [1.0, 2.0, 3.0, 4.0, 5.0]
    write_rows(
        {
            (2, "base"): [gold - 2 for gold in golds],
            (2, "PRO"): [gold - 0.5 for gold in golds],
            (2, "DPO"): [gold + 0.5 for gold in golds],
            (2, "CLHA"): golds,
            (2, "SFT"): [gold - 1.5 for gold in golds],
            (2, "CLHA w/o rescore"): [gold - 0.125 for gold in golds],
            (2, "CLHA w/o contrast"): [gold - 0.25 for gold in golds],
            (2, "CLHA w/o margin"): [gold + 0.1 * (-1) ** gold for gold in golds],
            (3, "base"): golds,
            (3, "CLHA"): [gold + 0.75 for gold in golds],
        },
        anatomy={"words": 12.0},
    )
    report.write()
    return Path("RESULTS.md").read_text()


def test_claims_have_the_sign_of_what_they_say(page: str) -> None:
    verdicts = {
        "CLHA beats PRO (Table 2), 2 responses": "**holds** (+0.50 ± 0.00, 5 seeds)",
        "CLHA beats SFT (Table 2), 2 responses": "**holds** (+1.50 ± 0.00, 5 seeds)",
        "CLHA beats DPO (not a claim of the paper), 2 responses": "**fails**: it is the other way",
        "CLHA beats CoH (Table 2), 2 responses": "not run |",
        "gate and filter together help (Table 3, rescoring), 2 responses": "**holds** (+0.12 ± 0.00",
        "the gate helps SFT (CLHA w/o contrast beats SFT), 2 responses": "**holds** (+1.25 ± 0.00, 5 seeds)",
        "contrast helps (Table 3), 2 responses": "**holds** (+0.25 ± 0.00, 5 seeds)",
        "margin helps (Table 3), 2 responses": "**not shown** (+0.02",
        "three responses of one author beat two (CLHA)": "**holds** (+0.75 ± 0.00, 5 seeds)",
    }
    for words, verdict in verdicts.items():
        assert f"| {words} | {verdict}" in page
    assert "| CLHA beats PRO (Table 2), 3 responses | not run | not run | not run | not run |" in page


def test_rewards_are_above_the_base_models(page: str) -> None:
    two, _ = cells_of(page, "**CLHA**")
    assert two[1:3] == ["3.00 ± 1.96", "+20.00 ± 0.00"]  # 2.776 x 1.581 / sqrt(5); ten times two above base
    [pro] = cells_of(page, "PRO")
    assert pro[1:3] == ["2.50 ± 1.96", "+15.00 ± 0.00"] and pro[-2:] == ["+0.50 ± 0.00", "5"]


def test_what_rows_keep_besides_scores_is_shown(page: str) -> None:
    assert "| method | words |\n| --- | --- |\n| CLHA | 12.00 |\n" in page
    assert page.count(report.NOT_KEPT) == 2  # rescoring and likelihoods


def test_a_sweep_is_told_as_difference_from_its_center() -> None:
    runs = {}
    for value, settings in run.SWEEPS["margin"].items():
        runs[run.run_name(settings, 2)] = {0: {"gold": value}, 1: {"gold": value}}
    lines = report.sweep_table(runs)
    assert "| margin | 0.3 | 0.30 ± 0.00 |  |\n" in lines
    assert "| margin | 0.1 | 0.10 ± 0.00 | -0.20 ± 0.00 |\n" in lines


def test_the_committed_page_is_what_the_committed_runs_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(ROOT / "docs/study", tmp_path / "docs/study")
    monkeypatch.chdir(tmp_path)
    report.write()
    assert Path("RESULTS.md").read_bytes() == (ROOT / "RESULTS.md").read_bytes()
    assert Path("docs/study/noise.png").read_bytes()[:4] == b"\x89PNG"
    assert "## What to make of it" in Path("RESULTS.md").read_text()
    rows = Path("docs/study/runs.jsonl").read_text()
    Path("docs/study/runs.jsonl").write_text(rows.replace("-0.325", "-0.326", 1))
    report.write()
    assert "## What to make of it" not in Path("RESULTS.md").read_text()  # nobody has read these


def test_finished_runs_become_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"out: no finished runs in it; `python -m study.run toy --out out`"):
        report.collect(Path("out"))
    for seed in (1, 0):
        folder = Path(f"out/toy/seed-{seed}/noise-0/length-2/sft")
        folder.mkdir(parents=True)
        (folder / "row.json").write_text(json.dumps({"seed": seed, "gold": 0.5}))
    report.collect(Path("out"))
    rows = [row for _, row in clha.read_jsonl("docs/study/runs.jsonl")]
    assert rows == [{"seed": 0, "gold": 0.5}, {"seed": 1, "gold": 0.5}]


def test_a_report_without_the_main_worlds_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows({(3, "CLHA"): [1.0]})
    with pytest.raises(InputError, match=r"has no run of the world toy, 2 responses, noise 0.2"):
        report.write()
    assert not Path("RESULTS.md").exists()
