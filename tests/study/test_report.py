"""The report: its numbers by hand, verdicts that follow from the rows, and the committed page."""

import itertools
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

import reward
from clha import InputError
from study import report, run, toy

ROOT = Path(__file__).parents[2]
TABLE = {1: 12.706, 2: 4.303, 4: 2.776, 10: 2.228, 19: 2.093}  # of Student's t, 97.5 %


@pytest.mark.parametrize("freedom", TABLE)
def test_students_t_against_the_table(freedom: int) -> None:
    assert report.quantile(0.95, freedom) == pytest.approx(TABLE[freedom], abs=5e-4)
    assert report.tail(TABLE[freedom], freedom) == pytest.approx(0.05, abs=5e-5)


def test_a_mean_with_its_interval_by_hand() -> None:
    # 1, 2, 3: standard deviation 1, its error 1 / sqrt(3), t of two degrees of freedom 4.303
    mean = report.mean_of([1.0, 2.0, 3.0])
    assert mean == (2.0, pytest.approx(3**-0.5), 3)
    assert report.cell(mean) == "2.00 ± 2.48"
    assert mean.p() == pytest.approx(0.0742, abs=5e-5)  # t = 3.464
    assert report.cell(report.mean_of([0.5]), "+.2f") == "+0.50 (one seed)"
    assert report.mean_of([]) is None


def test_holms_correction_by_hand() -> None:
    assert report.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert report.holm([0.9, 0.8]) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("mean", "error", "p", "word"),
    [
        (0.3, 0.1, 0.04, "holds"),
        (-0.3, 0.1, 0.04, "fails"),
        (0.02, 0.04, 0.6, "equal within 0.1"),  # .02 + 1.729 x .04 = .089
        (-0.04, 0.04, 0.3, "not shown"),
        (0.3, 0.2, 0.06, "not shown"),
    ],
)
def test_a_verdict_follows_from_mean_error_and_p(mean: float, error: float, p: float, word: str) -> None:
    assert report.verdict(report.Mean(mean, error, 20), p) == word


def test_differences_are_paired_by_seed() -> None:
    first = {0: {"gold": 1.0}, 1: {"gold": 5.0}, 2: {"gold": 100.0}}
    second = {1: {"gold": 3.0}, 0: {"gold": -1.0}}
    assert report.difference(first, second) == (2.0, 0.0, 2)  # 2 in both seeds that both have


def test_tasks_drawn_again_widen_an_interval_that_rests_on_one_task() -> None:
    names = [f"task {i}" for i in range(10)]
    second = {seed: {"tasks": {name: [4, 0.0] for name in names}} for seed in range(5)}
    even = {seed: {"tasks": {name: [4, 4.0] for name in names}} for seed in range(5)}
    one = {seed: {"tasks": {name: [4, 40.0 * (name == "task 3")] for name in names}} for seed in range(5)}
    assert report.over_tasks(even, second) == (1.0, 1.0)
    low, high = report.over_tasks(one, second)
    assert low == 0.0 and high >= 2.0  # the task is missing in a third of the draws


def write_rows(folder: Path, golds: dict[str, list[float]], first_seed: int = 100) -> None:
    """Tuning in which the first setting of each method wins, and these golds on fresh seeds."""
    tuning = []
    for method, grid in run.GRIDS.items():
        for (place, settings), seed in itertools.product(enumerate(grid), run.TUNING_SEEDS):
            row = {"seed": seed, "method": method, "settings": run.settings_name(settings), "gold": -place}
            tuning.append(row)
    rows = []
    for label, settings in run.compared(tuning).items():
        for seed, gold in enumerate(golds.get(label, []), first_seed):
            scores = {"gold": gold, "reward": 50 + 10 * gold, "char_bleu": 9.0, "word_bleu": 7.0}
            row: dict[str, Any] = {"seed": seed, "method": label, "settings": run.settings_name(settings)}
            row |= scores | {"subsets": dict.fromkeys(toy.SUBSETS, scores), "anatomy": {"words": 12.0}}
            row |= {"tasks": {name: [2, 2 * gold] for name in toy.TASKS}, "seconds": 2.0, "tokens": 10}
            rows.append(row | ({"seconds": 8.0, "tokens": 50} if label == "PRO" else {}))
    folder.mkdir(exist_ok=True)
    reward.write_jsonl(folder / "tuning.jsonl", tuning)
    reward.write_jsonl(folder / "fresh.jsonl", rows)


GOLD = [1.0, 2.0, 3.0, 4.0, 5.0]
GOLDS = {
    "base": [gold - 2 for gold in GOLD],
    "CLHA": GOLD,
    "PRO": [gold - 0.5 for gold in GOLD],
    "gated SFT": [gold - 0.25 for gold in GOLD],
    "CLHA w/o gate": [gold - 0.02 * (-1) ** gold for gold in GOLD],
    "CLHA w/o filter": [gold - 0.5 * (-1) ** gold for gold in GOLD],
    "DPO": [gold + 0.5 for gold in GOLD],
    "CLHA, alpha 0.05": [gold - 0.25 for gold in GOLD],
    "CLHA w/o gate, alpha 0.05": [gold - 1.0 for gold in GOLD],
}


def page(folder: Path, golds: dict[str, list[float]], first_seed: int = 100) -> str:
    """The report of these golds."""
    write_rows(folder, golds, first_seed)
    report.write(folder, folder / "RESULTS.md")
    assert (folder / "endpoints.png").read_bytes()[:4] == b"\x89PNG"
    return (folder / "RESULTS.md").read_text()


def verdicts(text: str) -> dict[str, str]:
    """The last but one cell of each endpoint's row."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[-2].strip("*") for row in rows if row[0] in report.ENDPOINTS}


def test_the_page_follows_from_the_rows(tmp_path: Path) -> None:
    text = page(tmp_path, GOLDS)
    assert "On 5 seeds, 100 to 104 (not the 20 of the protocol), whose" in text
    assert verdicts(text) == {
        "CLHA - PRO": "holds",
        "the gate": "equal within 0.1",
        "the filter": "not shown",
        "the contrast": "holds",
    }
    assert "- *CLHA has a higher gold than PRO, both tuned*: **holds** (+0.50 ± 0.00 gold" in text
    assert "behind it: PRO; gated SFT. Ahead of it: DPO. Not told apart from it: none." in text
    # Rewards are fifty plus ten times the gold; PRO took four times the seconds and five times the tokens.
    assert (
        "| PRO | 2.50 ± 1.96 | 75.00 ± 19.63 | 9.00 ± 0.00 | 7.00 ± 0.00 | +0.50 ± 0.00 | 5.0 | 4.0 | 5 |"
        in text
    )
    assert (
        "| the gate, alpha 0.05 | +0.75 ± 0.00 | 5 |" in text and "| gate and filter," not in text
    )  # at the paper's alpha
    assert "| PRO | **alpha=0.01 learning_rate=0.0005** | 0.00 |" in text


def test_other_rows_give_another_page(tmp_path: Path) -> None:
    """No sentence survives turned signs or other seeds unless it is still true."""
    turned = {
        label: [2 * own - gold for own, gold in zip(GOLD, golds, strict=True)]
        for label, golds in GOLDS.items()
    }
    text = page(tmp_path, turned, first_seed=7)
    assert "On 5 seeds, 7 to 11 (not the 20 of the protocol), whose" in text
    assert verdicts(text)["CLHA - PRO"] == verdicts(text)["the contrast"] == "fails"
    assert "behind it: DPO. Ahead of it: PRO; gated SFT. Not told apart from it: none." in text
    before = set(page(tmp_path / "straight", GOLDS).splitlines())
    prose = [line for line in text.splitlines() if line not in before and "|" not in line]
    assert all(line.startswith(("- ", "On 5 seeds", "![")) for line in prose if line)


def test_what_further_settings_give_is_told(tmp_path: Path) -> None:
    text = page(tmp_path, GOLDS | {"PRO, eight more": [gold + 0.25 for gold in GOLD]})
    assert "added later, exploratory: *PRO, eight more* -0.25 ± 0.00.\n" in text
    assert "Not told apart from it: none." in text  # it is no method of its own


def test_a_verdict_that_rests_on_one_seed_is_told(tmp_path: Path) -> None:
    odd = [0.01, -0.01, 0.01, -0.01, -0.5]
    golds = GOLDS | {"CLHA w/o gate": [gold + gap for gold, gap in zip(GOLD, odd, strict=True)]}
    text = page(tmp_path, golds)
    assert verdicts(text)["the gate"] == "not shown"
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    last = {row[0]: row[-1] for row in rows if row[0] in report.ENDPOINTS}
    assert last["the gate"] == "equal within 0.1 without 104" and last["CLHA - PRO"] == "the same"


def test_other_worlds_are_told_as_far_as_they_are_run(tmp_path: Path) -> None:
    gains = {"CLHA w/o gate and filter": 0.0, "CLHA w/o filter": 0.5, "CLHA": -0.25, "SFT": -0.75}
    rows = []
    for seed, (method, gain) in itertools.product(range(3), gains.items()):
        rows.append({"world": "even errors", "seed": seed, "method": method, "gold": seed + gain})
    write_rows(tmp_path, GOLDS)
    reward.write_jsonl(tmp_path / "worlds.jsonl", rows)
    report.write(tmp_path, tmp_path / "RESULTS.md")
    text = (tmp_path / "RESULTS.md").read_text()
    # neither, the gate, the filter and both over neither
    row = "| even errors | 0.25 ± 2.48 | 1.00 ± 2.48 | +0.50 ± 0.00 |  | -0.25 ± 0.00 | +0.50 ± 0.00 | 3 |"
    assert row in text  # without the filter: "CLHA w/o gate" has not run
    assert "CLHA - SFT is +0.50 ± 0.00, **against what was expected**" in text
    assert "*both*: **raises** gold in: none. **Lowers** it in: even errors.\n" in text
    assert "*gate*: **raises** gold in: even errors. **Lowers** it in: none.\n" in text
    assert (tmp_path / "worlds.png").read_bytes()[:4] == b"\x89PNG"


def test_without_the_rows_of_an_endpoint_nothing_is_written(tmp_path: Path) -> None:
    write_rows(tmp_path, {label: golds for label, golds in GOLDS.items() if label != "CLHA w/o gate"})
    with pytest.raises(InputError, match="no seed with CLHA and CLHA w/o gate;"):
        report.write(tmp_path, tmp_path / "RESULTS.md")
    assert not (tmp_path / "RESULTS.md").exists()


def test_a_study_that_goes_on_has_a_page(tmp_path: Path) -> None:
    golds = {label: golds[:2] for label, golds in GOLDS.items()}
    text = page(tmp_path, golds | {"CLHA w/o gate": golds["CLHA w/o gate"][:1]})
    assert verdicts(text).keys() == report.ENDPOINTS.keys()


def test_one_seed_gives_a_page_without_verdicts(tmp_path: Path) -> None:
    text = page(tmp_path, {label: golds[:1] for label, golds in GOLDS.items()})
    assert set(verdicts(text).values()) == {"not shown"}
    assert "+0.50 (one seed)" in text and str(math.inf) not in text


def test_the_committed_page_is_what_the_committed_rows_give(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs/study", tmp_path / "docs/study")
    report.write(tmp_path / "docs/study", tmp_path / "RESULTS.md")
    assert (tmp_path / "RESULTS.md").read_bytes() == (ROOT / "RESULTS.md").read_bytes()
