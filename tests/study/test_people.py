"""Two models side by side: blind sheets, what a browser makes of them, tallies and pairs by hand."""

import json
import math
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import evaluate
from clha import InputError, read_jsonl
from reward import write_jsonl
from study import people

Program = Callable[..., str]  # arguments of study.people -> what it prints
HOSTILE = "</script><script>document.title = 'x'</script><img src=x onerror=alert(1)> & ~~~~ SHEET_DATA"


def evaluation(folder: Path, rewards: list[float], subsets: str = "", response: str = "") -> str:
    """A scored folder with one item per reward; `subsets` has one letter per item."""
    rows = [
        {
            "id": f"item-{i}",
            "subset": letter,
            "prompt": [
                {"role": "user", "content": f"Hello {i}"},
                {"role": "assistant", "content": "Hi."},
                {"role": "user", "content": f"Question {i}\n\n<b>bold?</b>"},
            ],
            "response": response or f"{folder.name[::-1]} says {i}",
            "reward": value,
        }
        for i, (value, letter) in enumerate(zip(rewards, subsets or "a" * len(rewards), strict=True))
    ]
    write_jsonl(folder / "responses.jsonl", rows)
    return str(folder)


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Program:
    """Runs study.people in this process."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["people.py", *map(str, arguments)])
        people.main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def sheet(tmp_path: Path, program: Program) -> Path:
    """A sheet of two models called clha and base, of eight items in each of two subsets."""
    for name in ("clha", "base"):
        evaluation(tmp_path / name, [50.0] * 16, "ab" * 8)
    program("sheets", tmp_path / "clha", tmp_path / "base", "--out", tmp_path / "sheet")
    return tmp_path / "sheet"


def answer_file(sheet: Path, name: str, outcomes: list[str]) -> Path:
    """A file of answers that gives items 1, 2, ... these outcomes for the first model; "" skips one."""
    key = json.loads((sheet / "key.json").read_text())
    answers = {}
    for number, outcome in enumerate(outcomes, 1):
        first_is_left = key["items"][str(number)]["left"] == key["models"][0]
        if outcome == "tie":
            answers[str(number)] = "tie"
        elif outcome:
            answers[str(number)] = "left" if (outcome == "win") == first_is_left else "right"
    path = sheet.parent / f"answers-{name}.json"
    path.write_text(json.dumps({"sheet": key["sheet"], "annotator": name, "answers": answers}))
    return path


# ------------------------------------------------------------------------------------------------------------
# Agreement


def test_kappa_of_fleiss_1971() -> None:
    counts = [  # 10 subjects, 14 raters, 5 categories
        [0, 0, 0, 0, 14],
        [0, 2, 6, 4, 2],
        [0, 0, 3, 5, 6],
        [0, 3, 9, 2, 0],
        [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0],
        [3, 2, 6, 3, 0],
        [2, 5, 3, 2, 2],
        [6, 5, 2, 1, 0],
        [0, 2, 2, 3, 7],
    ]
    assert people.fleiss_kappa(counts) == pytest.approx(0.210, abs=5e-4)


def test_kappa_by_hand() -> None:
    # Two raters agree on one of two items: 1/2. By chance (3/4)^2 + (1/4)^2 = 5/8. (4/8 - 5/8) / (3/8).
    assert people.fleiss_kappa([[2, 0], [1, 1]]) == pytest.approx(-1 / 3)
    assert people.fleiss_kappa([[3, 0, 0], [0, 0, 3]]) == pytest.approx(1)
    for meaningless in ([], [[1, 0], [0, 1]], [[5, 0], [5, 0]]):
        assert math.isnan(people.fleiss_kappa(meaningless))


@pytest.mark.parametrize(
    ("votes", "outcome"),
    [
        ("win win win lose lose", "win"),
        ("lose lose lose tie win", "lose"),
        ("win win lose lose tie", "tie"),
        ("win win lose tie", "tie"),  # two of four are not more than half
        ("lose", "lose"),
        ("win lose", "tie"),
    ],
)
def test_the_majority_is_more_than_half(votes: str, outcome: str) -> None:
    assert people.majority(votes.split()) == outcome


# ------------------------------------------------------------------------------------------------------------
# Sheets


def test_a_sheet_is_blind_and_its_key_is_right(sheet: Path) -> None:
    key = json.loads((sheet / "key.json").read_text())
    html = (sheet / "sheet.html").read_text(encoding="utf-8")
    data = json.loads(html.split('id="data">')[1].split("</script>")[0])
    rows = data["items"]
    assert [row["item"] for row in rows] == [str(i) for i in range(1, 17)] == list(key["items"])
    # The responses spell a model's name backwards, which tells the test, and nobody else, whose they are.
    for row in rows:
        secret = key["items"][row["item"]]
        left, right = (row[side].split()[0][::-1] for side in ("left", "right"))
        assert left == secret["left"] and {left, right} == {"clha", "base"} == set(key["models"])
        number = secret["id"].removeprefix("item-")
        assert row["left"].endswith(f"says {number}") and row["right"].endswith(f"says {number}")
        assert row["prompt"][-1]["content"] == f"Question {number}\n\n<b>bold?</b>"
    assert data["sheet"] == key["sheet"]
    assert {secret["left"] for secret in key["items"].values()} == {"clha", "base"}
    assert not any(secret in html for secret in ("clha", "base", "item-", "reward"))


def test_items_and_sides_are_drawn_fairly_and_by_seed(tmp_path: Path) -> None:
    folders = [evaluation(tmp_path / name, [0.0] * 900, "ab" * 200 + "c" * 500) for name in ("x", "y")]
    evaluations = people.read_evaluations(folders)
    rows, key = people.make_sheet(evaluations, 300, seed=1)
    assert (rows, key) == people.make_sheet(evaluations, 300, seed=1)
    assert key["sheet"] != people.make_sheet(evaluations, 300, seed=2)[1]["sheet"]
    subsets = [key["items"][row["item"]]["subset"] for row in rows]
    assert {name: subsets.count(name) for name in "abc"} == {"a": 200, "b": 200, "c": 300}
    assert len(set(subsets[:20])) == 3  # mixed, so that a sheet half done is no half of the subsets
    assert len({item["id"] for item in key["items"].values()}) == 700
    lefts = [item["left"] for item in key["items"].values()].count("x")
    assert abs(lefts - 350) < 4 * math.sqrt(700) / 2  # four standard deviations of a fair coin


def test_no_response_can_end_the_script_that_holds_it(tmp_path: Path, program: Program) -> None:
    folders = evaluation(tmp_path / "a", [0.0], response=HOSTILE), evaluation(tmp_path / "b", [0.0])
    program("sheets", *folders, "--out", tmp_path / "out")
    template = Path(people.__file__).with_name("sheet.html").read_text()
    html = (tmp_path / "out" / "sheet.html").read_text()
    assert html.count("<") == template.count("<")  # so there is no element that the template has not
    data = json.loads(html.split('id="data">')[1].split("</script>")[0])
    assert HOSTILE in (data["items"][0]["left"], data["items"][0]["right"])


# ------------------------------------------------------------------------------------------------------------
# Tallies


def test_a_tally_by_hand(sheet: Path, program: Program) -> None:
    files = [
        # item         1      2      3      4      5      6
        answer_file(sheet, "Ann", ["win", "win", "lose", "tie", "win", ""]),
        answer_file(sheet, "Bob", ["win", "win", "lose", "win", "lose", ""]),
        answer_file(sheet, "Eve", ["win", "lose", "lose", "lose", "", ""]),
    ]  # majority:       win    win    lose   none   none   nobody
    out = sheet.parent / "tally.md"
    printed = program("tally", "--key", sheet / "key.json", *files, "--out", out)
    assert out.read_text() == printed
    *_, total = [line for line in printed.splitlines() if line.startswith("| Total")]
    cells = [cell.strip() for cell in total.strip("|").split("|")]
    assert cells[1] == "5" and [cell.split(" ")[0] for cell in cells[2:5]] == ["40.00", "40.00", "20.00"]
    low, high = evaluate.interval([100.0, 100.0, 0.0, 0.0, 0.0])
    assert cells[2] == f"40.00 ({low:.2f} to {high:.2f})"
    # Kappa, of the four items that all judged. Agreement: 1, 1/3, 1, 0, mean 7/12. Of 12 votes 6 are
    # wins, 1 is a tie, 5 are losses: (36 + 1 + 25) / 144 by chance. (84 - 62) / (144 - 62) = 22/82.
    assert cells[5:] == [f"{22 / 82:.3f}", "4"]
    assert "Items skipped: Ann 11, Bob 11, Eve 12; by all, and so left out: 11." in printed


def test_a_subset_counts_its_own_items(sheet: Path, program: Program) -> None:
    key = json.loads((sheet / "key.json").read_text())
    outcomes = ["win" if item["subset"] == "a" else "lose" for item in key["items"].values()]
    plot = sheet.parent / "figure3.png"
    answers = answer_file(sheet, "Ann", outcomes)
    printed = program("tally", "--key", sheet / "key.json", answers, "--plot", plot)
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()[2:7]]
    assert [row[:3] for row in table[2:4]] == [
        ["a", "8", "100.00 (100.00 to 100.00)"],
        ["b", "8", "0.00 (0.00 to 0.00)"],
    ]
    assert table[4][2].startswith("50.00 (") and table[4][3:5] == ["0.00 (0.00 to 0.00)", table[4][2]]
    assert plot.stat().st_size > 5000


def test_names_with_dollars_are_no_formulas(tmp_path: Path) -> None:
    shares = people.shares(["win", "tie"])
    people.plot_shares({"$x^{$": shares, "Total": shares}, ["$y^{$", "base"], str(tmp_path / "p.png"))
    assert (tmp_path / "p.png").stat().st_size > 5000


# ------------------------------------------------------------------------------------------------------------
# Pairs by reward


def test_pairs_and_cases_by_hand(tmp_path: Path, program: Program) -> None:
    folders = [
        evaluation(tmp_path / "x", [10.0, 20.0, 30.0, 40.0], "aabb", response=f"one\n{HOSTILE}"),
        evaluation(tmp_path / "y", [5.0, 20.0 + 1e-10, 90.0, 39.0], "aabb"),
        evaluation(tmp_path / "z", [0.0, 0.0, 0.0, 0.0], "aabb"),
    ]
    shuffled = (tmp_path / "y" / "responses.jsonl").read_text().splitlines(keepends=True)[::-1]
    (tmp_path / "y" / "responses.jsonl").write_text("".join(shuffled))  # pairs go by id, not by line
    printed = program("compare", *folders, "--out", tmp_path / "pairs", "--cases", 2)
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()[2:]]
    assert [row[:2] for row in table] == [[*pair] for pair in ("xy", "xz", "yz") for _ in range(3)]
    low, high = evaluate.interval([100.0, 0.0])
    half = f"50.00 ({low:.2f} to {high:.2f})"
    assert table[0] == ["x", "y", "a", "2", half, half, "0.00 (0.00 to 0.00)"]
    total = [cell.split(" ")[0] for cell in table[2]]
    assert total == ["x", "y", "Total", "4", "50.00", "25.00", "25.00"]
    assert table[5][4] == "100.00 (100.00 to 100.00)"

    assert (tmp_path / "pairs" / "compare.md").read_text() == printed
    text = (tmp_path / "pairs" / "cases.md").read_text()
    first = text.split("\n# ")[0]
    assert first.startswith("# x against y\n\n## 1. b, item item-2\n")
    assert "## 2. a, item item-0\n" in first and first.count("## ") == 2
    assert first.index("**x**, reward 30.00") < first.index("**y**, reward 90.00")
    assert "~~~~~~~\none\n</script>" in first  # a fence longer than the response's


# ------------------------------------------------------------------------------------------------------------
# Wrong input: one line, and nothing written


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("sheets {x} {empty} --out {out}", "empty: no responses.jsonl in it"),
        ("sheets {x} {x}/. --out {out}", "two of these have one name"),
        ("sheets {x} {fewer} --out {out}", "fewer: their items or prompts differ"),
        ("sheets {x} {other} --out {out}", "other: their items or prompts differ"),
        ("sheets {x} {broken} --out {out}", "line 1: not a response with its id, prompt, subset and reward"),
        ("sheets {x} {twice} --out {out}", "line 4: a second response to item item-2"),
        ("sheets {x} {none} --out {out}", "no responses in it"),
        ("sheets {x} {y} --out {out} --items 0", "--items 0: must be"),
        ("sheets {x} {y} --out {x}", "x: already exists"),
        ("sheets {x} --out {out}", "arguments are required: folders (see --help)"),
        ("compare {x}", "needs two folders or more"),
        ("compare {x} {y} {fewer} --out {out}", "their items or prompts differ"),
        ("compare {x} {y} --out {x}", "x: already exists"),
        ("tally --key {key} {ann} --out {x}", "x: already exists"),
        ("tally --key {key} {ann} {ann} --out {out}", "a second file of the annotator Ann"),
        ("tally --key {key} {ann} {other_sheet} --out {out}", "the answers are for sheet-0, the key for "),
        ("tally --key {key} {both} --out {out}", "item 1: 'both' is none of left, right, tie"),
        ("tally --key {key} {far} --out {out}", "the sheet has no item 99"),
        ("tally --key {key} {silent} --out {out}", "no answers in them"),
        ("tally --key {ann} {ann} --out {out}", "not the key of a sheet, with sheet, models, items"),
        ("tally --key {key} {key} --out {out}", "not a file of answers, with sheet, annotator, answers"),
        ("tally --key {key} {x} --out {out}", "not readable as JSON"),
        ("tally --key {key} nowhere --out {out}", "not readable as JSON"),
        ("tally --key {key} {list} --out {out}", "item 1: ['left'] is none of left, right, tie"),
        ("tally --key {key} {ann} --plot figure3", "--plot figure3: the name must end in one of"),
        ("tally --key {one} {ann}", '"models" must be the names of two models'),
        ("tally --key {no_left} {ann}", 'item 1: needs "subset", a text, and "left", one of the models'),
        ("tally --key {no_item} {ann}", 'item 1: needs "subset", a text, and "left", one of the models'),
        ("compare {x} {y} --cases -1", "--cases -1: must be"),
    ],
)
def test_wrong_input(command: str, message: str, tmp_path: Path, program: Program) -> None:
    names = ("empty", "out", "fewer", "other", "broken", "twice", "none")
    paths = {name: tmp_path / name for name in names}
    paths["empty"].mkdir()
    for name in ("x", "y"):
        paths[name] = Path(evaluation(tmp_path / name, [1.0, 2.0, 3.0]))
    evaluation(paths["fewer"], [1.0, 2.0])
    write_jsonl(paths["none"] / "responses.jsonl", [])
    lines = [row for _, row in read_jsonl(paths["x"] / "responses.jsonl")]
    write_jsonl(paths["twice"] / "responses.jsonl", [*lines, lines[-1]])
    write_jsonl(paths["broken"] / "responses.jsonl", [row | {"reward": math.nan} for row in lines])
    prompt = [{"role": "user", "content": "another"}]
    write_jsonl(paths["other"] / "responses.jsonl", [row | {"prompt": prompt} for row in lines])

    program("sheets", paths["x"], paths["y"], "--out", tmp_path / "sheet")
    paths |= {"key": tmp_path / "sheet" / "key.json"}
    good = json.loads(answer_file(tmp_path / "sheet", "Ann", ["win"]).read_text())
    changes: dict[str, dict[str, Any]] = {
        "ann": {},
        "other_sheet": {"annotator": "Bob", "sheet": "sheet-0"},
        "both": {"answers": {"1": "both"}},
        "far": {"answers": {"99": "left"}},
        "silent": {"answers": {}},
        "list": {"answers": {"1": ["left"]}},
        "one": {"models": ["x"], "items": {}},
        "no_left": {"models": ["x", "y"], "items": {"1": {"subset": "a", "left": "z"}}},
        "no_item": {"models": ["x", "y"], "items": {"1": None}},
    }
    for name, change in changes.items():
        paths[name] = tmp_path / f"{name}.json"
        paths[name].write_text(json.dumps(good | change))

    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError) as error:
        program(*command.format(**paths).split())
    assert message in str(error.value) and "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


# ------------------------------------------------------------------------------------------------------------
# The page in a browser, by the WebDriver protocol

LEFT, UP, RIGHT, DOWN, BACKSPACE, ENTER = "\ue012", "\ue013", "\ue014", "\ue015", "\ue003", "\ue007"


class Browser:
    """A headless Chromium; each call is a request to chromedriver."""

    def __init__(self, address: str, folder: Path) -> None:
        self.address, self.folder = address, folder
        switches = "headless no-sandbox disable-gpu disable-quic no-first-run disable-sync"
        switches += " disable-background-networking disable-component-update window-size=1366,768"
        switches += f" user-data-dir={folder / 'profile'}"
        arguments = [f"--{switch}" for switch in switches.split()]
        options = {"alwaysMatch": {"goog:chromeOptions": {"args": arguments}}}
        self.address += "/session/" + self.call("/session", capabilities=options)["sessionId"]
        download = {"behavior": "allow", "downloadPath": str(folder)}
        self.call("/goog/cdp/execute", cmd="Browser.setDownloadBehavior", params=download)

    def call(self, path: str, method: str = "POST", **body: Any) -> Any:
        data = json.dumps(body).encode() if method == "POST" else None
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.address + path, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)["value"]

    def press(self, *keys: str) -> None:
        """Presses keys one after the other, without a pause."""
        steps = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.call("/actions", actions=[{"type": "key", "id": "keys", "actions": steps}])

    def ask(self, script: str) -> Any:
        """The value of an expression of the page."""
        return self.call("/execute/sync", script=f"return {script}", args=[])

    def shows(self, script: str, value: Any) -> bool:
        """Whether an expression of the page comes to have a value within some seconds."""
        for _ in range(100):
            if self.ask(script) == value:
                return True
            time.sleep(0.1)
        raise AssertionError(f"{script} is {self.ask(script)!r}, not {value!r}")

    def saved(self, name: str) -> Path:
        """A file that was downloaded, once it is there."""
        for _ in range(100):
            if (self.folder / name).is_file():
                return self.folder / name
            time.sleep(0.1)
        raise AssertionError(f"no {name} among {list(self.folder.iterdir())}")


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    if not (shutil.which("chromedriver") and shutil.which("chromium")):
        pytest.skip("chromium and chromedriver are not here: apt-get install chromium chromium-driver")
    driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        port = next(line for line in driver.stdout if "successfully" in line).split("on port ")[1]
        client = Browser(f"http://127.0.0.1:{port.strip().strip('.')}", tmp_path)
        yield client
        client.call("", method="DELETE")
    finally:
        driver.terminate()
        driver.wait()


def test_a_person_judges_a_sheet_in_a_browser(
    browser: Browser, tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = (
        evaluation(tmp_path / "clha", [0.0] * 6, response=HOSTILE),
        evaluation(tmp_path / "base", [0.0] * 6),
    )
    program("sheets", *folders, "--out", tmp_path / "sheet")
    key = json.loads((tmp_path / "sheet" / "key.json").read_text())
    url = (tmp_path / "sheet" / "sheet.html").as_uri()
    count = "document.getElementById('count').textContent"

    browser.call("/url", url=url)
    assert browser.shows("document.activeElement.id", "name")
    browser.press(LEFT)  # while a name is asked for, keys judge nothing
    browser.press(*"Ann B.", ENTER)
    assert browser.shows(count, "0 of 6 judged")
    side = "left" if key["items"]["1"]["left"] == "clha" else "right"
    assert browser.ask(f"document.querySelector('#{side} p').textContent") == HOSTILE
    assert browser.ask("document.title") == "Which response is better?"
    assert browser.ask("document.querySelectorAll('main img, main script, main .turn b').length") == 0
    assert browser.ask("document.querySelectorAll('.turn').length") == 3

    browser.press(LEFT, RIGHT, DOWN, "t", LEFT)  # faster than the page moves on: none is lost
    assert browser.shows(count, "5 of 6 judged")
    browser.press(UP, BACKSPACE)  # back from the sixth over the fifth to the fourth, a tie ...
    assert browser.shows("document.querySelector('.chosen')?.id", "tie")
    browser.press(RIGHT)  # ... which now becomes "right"
    browser.call("/refresh")
    assert browser.shows("document.activeElement.id", "name")
    browser.press(ENTER)  # the name is remembered, and so is the progress
    assert browser.shows(count, "5 of 6 judged")
    browser.press("n")
    assert "1 of 6 are skipped" in browser.ask("document.getElementById('end').innerText")
    browser.ask("document.getElementById('save').click()")

    saved = browser.saved("answers-Ann-B-.json")
    assert json.loads(saved.read_text()) == {
        "sheet": key["sheet"],
        "annotator": "Ann B.",
        "answers": {"1": "left", "2": "right", "3": "tie", "4": "right", "5": "left"},
    }
    printed = program("tally", "--key", tmp_path / "sheet" / "key.json", saved)
    wins = [key["items"][item]["left"] == "clha" for item in "15"]
    wins += [key["items"][item]["left"] == "base" for item in "24"]
    assert f"| Total | 5 | {100 * sum(wins) / 5:.2f} (" in printed
    assert "Items skipped: Ann B. 1; by all, and so left out: 1." in printed

    browser.call("/refresh")  # another annotator in the same browser begins anew
    browser.ask("document.getElementById('name').select()")
    browser.press(*"Bob", ENTER)
    assert browser.shows(count, "0 of 6 judged")
