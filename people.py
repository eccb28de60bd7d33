"""Two models side by side: judged by people (Figure 3), by a reward model, and by cases (Table 4).

    python evaluate.py sheets eval/clha eval/base --out sheets       what annotators get, and its key
    python evaluate.py tally --key sheets/key.json answers/*.json --plot figure3.png --out tally.md
    python evaluate.py compare eval/base eval/sft eval/clha --out pairs

All read folders that `evaluate.py --model ... --out FOLDER` made. Annotators open sheet.html in a
browser, or fill in sheet.csv; both show each pair of replies in random order and without a name. Send
them one of these, and keep key.json, which says whose reply stands where.
"""

import argparse
import csv
import hashlib
import io
import itertools
import json
import math
import random
import re
import textwrap
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import clha
import evaluate
import reward
from program import HelpFormatter, check_out, read_json, refuse
from records import InputError, Record, check_record, new_folder, read_jsonl

Evaluation = dict[str, Record]  # item -> its line of responses.jsonl
ANSWERS = ("left", "right", "tie")
OUTCOMES = {"win": "#6f9bd1", "tie": "#dcdcdc", "lose": "#eda268"}  # of the first model; colours

# ------------------------------------------------------------------------------------------------------------
# Evaluations


def read_evaluation(folder: Path) -> Evaluation:
    """The replies that an evaluation left in a folder, by item: its id, or its line if it has none."""
    path, rows = folder / "responses.jsonl", {}
    if not path.is_file():
        raise InputError(f"{folder}: no responses.jsonl in it; `evaluate.py --model ... --out` makes it")
    for number, row in read_jsonl(path):
        item = str(number if row.get("id") is None else row["id"])
        texts = isinstance(row.get("subset"), str) and isinstance(row.get("response"), str)
        record = {"prompt": row.get("prompt"), "responses": ["-"] * 2}
        if not texts or check_record(record | {"rewards": [row.get("reward"), row.get("gold", 0)]}, []):
            raise InputError(f"{path}, line {number}: no reply of an evaluation with its reward")
        if item in rows:
            raise InputError(f"{path}, line {number}: a second reply to item {item}")
        rows[item] = row
    if not rows:
        raise InputError(f"{path}: no replies in it")
    return rows


def read_evaluations(folders: list[str]) -> dict[str, Evaluation]:
    """Evaluations by the names of their folders. Raises InputError if items differ or names do not."""
    names = [Path(folder).resolve().name for folder in folders]
    if len(set(names)) < len(names):
        raise InputError(f"{', '.join(folders)}: two of these have one name")
    rows = [read_evaluation(Path(folder)) for folder in folders]
    for name, other in zip(names[1:], rows[1:], strict=True):
        for item in rows[0] | other:
            if rows[0].get(item, {}).get("prompt") != other.get(item, {}).get("prompt"):
                raise InputError(f"{names[0]} and {name} are of different items, such as {item}")
    return dict(zip(names, rows, strict=True))


def groups(subsets: dict[str, str]) -> dict[str, list[str]]:
    """The items of each subset, and in "Total" all of them, from {item: subset}."""
    names = sorted(set(subsets.values()))
    parts = {name: [item for item, subset in subsets.items() if subset == name] for name in names}
    return parts | {"Total": list(subsets)}


def dialogue(prompt: list[dict[str, str]]) -> str:
    """A prompt as people read it: its turns, without the cue for the model."""
    return clha.render(prompt).removesuffix("Assistant:").strip()


# ------------------------------------------------------------------------------------------------------------
# Sheets


def make_sheet(evaluations: dict[str, Evaluation], items: int, seed: int) -> tuple[list[Record], Record]:
    """A sheet of `items` drawn from each subset of two evaluations, in random order, and its key.

    A row of the sheet is {"item", "subset", "prompt", "left", "right"}, its sides drawn by a fair coin.
    The key is {"sheet": id, "models": [first, second], "items": {item: {"id", "subset", "left"}}}.
    """
    generator = random.Random(seed)
    models = list(evaluations)
    rows = evaluations[models[0]]
    *parts, _ = groups({item: row["subset"] for item, row in rows.items()}).values()
    drawn = [item for part in parts for item in generator.sample(part, min(items, len(part)))]
    generator.shuffle(drawn)
    sheet, key = [], {}
    for number, item in enumerate(drawn, 1):
        left, right = generator.sample(models, 2)
        subset, prompt = rows[item]["subset"], rows[item]["prompt"]
        sheet.append({"item": str(number), "subset": subset, "prompt": prompt})
        sheet[-1]["left"] = evaluations[left][item]["response"]
        sheet[-1]["right"] = evaluations[right][item]["response"]
        key[str(number)] = {"id": item, "subset": subset, "left": left}
    # The id begins with a word, as a spreadsheet would take 12345e678901 for a number.
    sheet_id = "sheet-" + hashlib.sha256(json.dumps(sheet).encode()).hexdigest()[:12]
    return sheet, {"sheet": sheet_id, "models": models, "items": key}


def html_sheet(sheet: list[Record], sheet_id: str) -> str:
    """The sheet as one page. Its data has no "<", so that no reply can end the element around it."""
    shown = [{name: row[name] for name in ("item", "prompt", "left", "right")} for row in sheet]
    data = json.dumps({"sheet": sheet_id, "items": shown}).replace("<", "\\u003c")
    return Path(__file__).with_name("sheet.html").read_text(encoding="utf-8").replace("SHEET_DATA", data)


def csv_sheet(sheet: list[Record], sheet_id: str) -> str:
    """The sheet as a table with an empty column for the answers."""
    file = io.StringIO()
    table = csv.DictWriter(file, ["sheet", "item", "subset", "prompt", "left", "right", "answer"])
    table.writeheader()
    table.writerows(row | {"sheet": sheet_id, "prompt": dialogue(row["prompt"])} for row in sheet)
    return "\ufeff" + file.getvalue()  # by this mark Excel knows UTF-8


def sheets(args: argparse.Namespace) -> None:
    """Writes sheet.html, sheet.csv and key.json for two evaluated folders."""
    check_out(args.out, "new")
    sheet, key = make_sheet(read_evaluations(args.folders), args.items, args.seed)
    texts = {"sheet.html": html_sheet(sheet, key["sheet"]), "sheet.csv": csv_sheet(sheet, key["sheet"])}
    write_folder(args.out, texts | {"key.json": json.dumps(key, indent=2) + "\n"})
    print(f"{len(sheet):,} items in {args.out}; annotators get sheet.html or sheet.csv, not key.json")


# ------------------------------------------------------------------------------------------------------------
# The tally


def read_key(path: str) -> Record:
    """The key that `make_sheet` made. Raises InputError where it is not as that says."""
    key = read_json(path, {"sheet": str, "models": list, "items": dict}, "the key of a sheet")
    if len(key["models"]) != 2 or not all(isinstance(model, str) for model in key["models"]):
        raise InputError(f'{path}: "models" must be the names of two models')
    for item, row in key["items"].items():
        whole = isinstance(row, dict) and isinstance(row.get("subset"), str)
        if not whole or row.get("left") not in key["models"]:
            raise InputError(f'{path}, item {item}: needs "subset", a text, and "left", one of the models')
    return key


def read_csv(path: str) -> Record:
    """A filled-in sheet.csv as the object that the page saves; its name stands for the annotator's."""
    try:
        rows = list(csv.DictReader(io.StringIO(Path(path).read_text(encoding="utf-8-sig"))))
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: not readable as CSV in UTF-8 ({error})") from None
    if not rows or not {"sheet", "item", "answer"} <= rows[0].keys():
        raise InputError(f"{path}: not a sheet, with the columns sheet, item, answer parted by commas")
    answers = {row["item"]: (row["answer"] or "").strip().lower() for row in rows}
    filled = {item: answer for item, answer in answers.items() if answer}
    return {"sheet": rows[0]["sheet"], "annotator": Path(path).stem, "answers": filled}


def read_votes(path: str, key: Record) -> tuple[str, dict[str, str]]:
    """An annotator's name and votes {item: "win", "tie" or "lose"} for the first model of a key.

    Raises InputError for answers of another sheet, and for an item or an answer that there is not.
    """
    need = {"sheet": str, "annotator": str, "answers": dict}
    file = read_csv(path) if path.endswith(".csv") else read_json(path, need, "a file of answers")
    if file["sheet"] != key["sheet"]:
        raise InputError(f"{path}: the answers are of {file['sheet']}, the key is of {key['sheet']}")
    votes = {}
    for item, answer in file["answers"].items():
        if item not in key["items"]:
            raise InputError(f"{path}: the sheet has no item {item}")
        if answer not in ANSWERS:
            raise InputError(f"{path}, item {item}: {answer!r} is none of {', '.join(ANSWERS)}")
        first_is_left = key["items"][item]["left"] == key["models"][0]
        winner = "win" if (answer == "left") == first_is_left else "lose"
        votes[item] = "tie" if answer == "tie" else winner
    return file["annotator"], votes


def majority(votes: list[str]) -> str:
    """What more than half of the votes say; "tie" where nothing has so many."""
    vote, count = Counter(votes).most_common(1)[0]
    return vote if 2 * count > len(votes) else "tie"


def fleiss_kappa(counts: list[list[int]]) -> float:
    """Agreement beyond chance: 1 is perfect, 0 is chance (Fleiss 1971).

    counts (items, categories): how many raters chose each category, as many raters for every item. It is
    nan where it means nothing: no items, one rater, or all votes in one category.
    """
    if not counts:
        return math.nan
    table = torch.tensor(counts, dtype=torch.float64)
    raters = table[0].sum()
    observed = ((table.square().sum(1) - raters) / (raters * (raters - 1))).mean()
    expected = (table.sum(0) / table.sum()).square().sum()
    return ((observed - expected) / (1 - expected)).item()


def shares(outcomes: list[str]) -> dict[str, Any]:
    """Wins, ties and losses in percent of the items, each {"mean", "interval"}, the latter of 95 %."""
    hits = {name: [100.0 * (outcome == name) for outcome in outcomes] for name in OUTCOMES}
    return {
        name: {"mean": sum(values) / len(values), "interval": evaluate.interval(values)}
        for name, values in hits.items()
    }


def markdown(rows: list[list[str]]) -> str:
    """A Markdown table; the first row is its header."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def plot_shares(summary: dict[str, dict[str, Any]], models: list[str], path: str) -> None:
    """Draws Figure 3, a bar a subset of wins, ties and losses, as a picture file."""
    pyplot = reward.import_pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.5 * len(summary)), layout="constrained")
    labels = {"win": f"{models[0]} wins", "tie": "tie", "lose": f"{models[1]} wins"}
    subsets, starts = list(summary), [0.0] * len(summary)
    for name, colour in OUTCOMES.items():
        widths = [row[name]["mean"] for row in summary.values()]
        bars = axes.barh(subsets, widths, left=starts, color=colour, label=labels[name], height=0.65)
        numbers = [f"{width:.1f}" if width >= 4 else "" for width in widths]  # where there is room
        axes.bar_label(bars, numbers, label_type="center")
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    axes.set(xlim=(0, 100), xlabel="% of the items")
    axes.invert_yaxis()  # the first row on top, as in the table
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    reward.save_picture(figure, path)


def tally(args: argparse.Namespace) -> None:
    """Prints wins, ties and losses by the majority of the annotators, and how far they agree."""
    if args.out:
        check_out(args.out, "new")
    if args.plot:
        reward.check_plot(args.plot)  # what is wrong is said now rather than after the work
    key = read_key(args.key)
    annotators: dict[str, dict[str, str]] = {}
    for path in args.answers:
        name, votes = read_votes(path, key)
        if name in annotators:
            raise InputError(f"{path}: a second file of the annotator {name}")
        annotators[name] = votes
    ballots = annotators.values()
    cast = {item: [votes[item] for votes in ballots if item in votes] for item in key["items"]}
    judged = {item: key["items"][item]["subset"] for item, votes in cast.items() if votes}
    if not judged:
        raise InputError(f"{', '.join(args.answers)}: no answers in them")

    summary: dict[str, dict[str, Any]] = {}
    rows = [["subset", "n", "win %", "tie %", "lose %", "Fleiss' kappa", "items of kappa"]]
    for subset, items in groups(judged).items():
        whole = [cast[item] for item in items if len(cast[item]) == len(annotators)]
        kappa = fleiss_kappa([[votes.count(name) for name in OUTCOMES] for votes in whole])
        summary[subset] = shares([majority(cast[item]) for item in items])
        cells = [evaluate.cell(share) for share in summary[subset].values()]
        rows.append([subset, f"{len(items):,}", *cells, f"{kappa:.3f}", f"{len(whole):,}"])
    skipped = ", ".join(f"{name} {len(cast) - len(votes):,}" for name, votes in annotators.items())
    text = (
        f"{' against '.join(key['models'])}: the majority of {len(annotators)} annotators, a tie where "
        f"there is none; kappa on the items that all of them judged.\n\n{markdown(rows)}\n"
        f"Items skipped: {skipped}; by all, and so left out: {len(cast) - len(judged):,}.\n"
    )
    print(text, end="")
    if args.plot:
        plot_shares(summary, key["models"], args.plot)
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(text, encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------
# Pairs by reward


def preferred(row: Record, other: Record) -> str:
    """The outcome of a reply against another by their rewards; within 1e-9 it is a tie."""
    gap = row["reward"] - other["reward"]
    return "tie" if abs(gap) <= 1e-9 else "win" if gap > 0 else "lose"


def fenced(text: str) -> str:
    """A text as Markdown shows it unchanged: folded, in a fence longer than any that it has."""
    fence = "~" * (3 + max(map(len, re.findall("~+", text)), default=0))
    lines = [textwrap.fill(line, 100, replace_whitespace=False) for line in text.splitlines()]
    return "\n".join([fence, *lines, fence, ""])


def cases(models: tuple[str, str], rows: Evaluation, other: Evaluation, count: int) -> str:
    """The items on which the rewards of two models differ most, as Markdown."""
    widest = sorted(rows, key=lambda item: -abs(rows[item]["reward"] - other[item]["reward"]))
    parts = [f"# {models[0]} against {models[1]}\n"]
    for number, item in enumerate(widest[:count], 1):
        parts.append(f"## {number}. {rows[item]['subset']}, item {item}\n")
        parts.append(fenced(dialogue(rows[item]["prompt"])))
        for model, row in zip(models, (rows[item], other[item]), strict=True):
            scores = ", ".join(f"{name} {row[name]:.2f}" for name in ("reward", "gold") if name in row)
            parts += [f"**{model}**, {scores}\n", fenced(row["response"])]
    return "\n".join(parts)


def compare(args: argparse.Namespace) -> None:
    """Prints how often one model's reply has the higher reward; --out adds where they differ most."""
    if args.out:
        check_out(args.out, "new")
    if len(args.folders) < 2:
        raise InputError("compare: needs two folders or more")
    table, pages = [["model", "against", "subset", "n", "win %", "tie %", "lose %"]], []
    for pair in itertools.combinations(read_evaluations(args.folders).items(), 2):
        (model, rows), (against, other) = pair
        for subset, items in groups({item: row["subset"] for item, row in rows.items()}).items():
            summary = shares([preferred(rows[item], other[item]) for item in items])
            cells = (evaluate.cell(share) for share in summary.values())
            table.append([model, against, subset, f"{len(items):,}", *cells])
        pages.append(cases((model, against), rows, other, args.cases))
    print(markdown(table), end="")
    if args.out:
        write_folder(args.out, {"compare.md": markdown(table), "cases.md": "\n".join(pages)})


# ------------------------------------------------------------------------------------------------------------
# The command line


def write_folder(path: str, texts: dict[str, str]) -> None:
    """Writes {name: text} as the files of a new folder, whole or not at all."""
    with new_folder(path) as folder:
        for name, text in texts.items():
            (folder / name).write_bytes(text.encode())  # bytes, as CSV has line ends of its own


def add_commands(commands: Any) -> None:
    """Adds sheets, tally and compare to the sub-commands of evaluate.py; `run` is what one does."""

    def add(name: str, run: Callable[[argparse.Namespace], None], help: str) -> Callable[..., Any]:
        formatter = HelpFormatter
        command = commands.add_parser(name, help=help, description=__doc__, formatter_class=formatter)
        command.error = refuse
        command.set_defaults(run=run)
        return command.add_argument

    flag = add("sheets", sheets, "two models' replies side by side, for people to judge")
    flag("folders", nargs=2, help="--out folders of evaluations of the same data")
    flag("--out", required=True, help="folder for sheet.html, sheet.csv and key.json")
    flag("--items", type=int, default=300, help="of each subset, or all it has (paper: 300)")
    flag("--seed", type=int, default=42, help="of the items, their order and the sides")
    flag = add("tally", tally, "what the annotators of a sheet prefer, and whether they agree")
    flag("answers", nargs="+", help="files that the page saved, or filled-in sheet.csv files")
    flag("--key", required=True, help="key.json of the sheet")
    flag("--plot", default="", help="Figure 3 as a picture, such as figure3.png")
    flag("--out", default="", help="Markdown file for what is printed")
    flag = add("compare", compare, "how often one model's reply has the higher reward")
    flag("folders", nargs="+", help="--out folders of evaluations of the same data, two or more")
    flag("--out", default="", help="folder for compare.md and cases.md, as in Table 4")
    flag("--cases", type=int, default=10, help="items a pair in cases.md, the widest gaps")
