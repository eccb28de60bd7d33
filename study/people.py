"""Two models side by side: judged by people (Figure 3), by a reward model, and case by case (Table 4).

    python -m study.people sheets eval/clha eval/base --out sheets      what annotators get, and its key
    python -m study.people tally --key sheets/key.json answers/*.json --plot figure3.png --out tally.md
    python -m study.people compare eval/base eval/sft eval/clha --out pairs

All read folders that `evaluate.py score` wrote. Annotators open sheet.html in a browser: each pair of
responses in random order, without names. Keep key.json secret: it says which side is whose.
"""

import argparse
import hashlib
import itertools
import json
import math
import random
import re
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import clha
import evaluate
import reward
from clha import InputError, Record

Evaluation = dict[str, Record]  # id -> its line of responses.jsonl
ANSWERS = ("left", "right", "tie")
OUTCOMES = {"win": "#6f9bd1", "tie": "#dcdcdc", "lose": "#eda268"}  # of the first model; colours

# Evaluations ------------------------------------------------------------------------------------------------


def read_evaluation(folder: Path) -> Evaluation:
    """The responses that `evaluate.py score` left in a folder, by id. Raises InputError."""
    path = folder / "responses.jsonl"
    if not path.is_file():
        raise InputError(f"{folder}: no responses.jsonl in it; `evaluate.py score` writes it")
    rows: Evaluation = {}
    for number, row in clha.read_jsonl(path):
        values = [row.get("reward"), 0, *evaluate.numbers(row).values()]  # 0: a record has two or more
        record = row | {"responses": ["-"] * len(values), "rewards": values}
        texts = [row.get(name) for name in ("id", "subset", "response")]
        if not all(isinstance(text, str) for text in texts) or clha.check_record(record):
            raise InputError(f"{path}, line {number}: not a response with its id, prompt, subset and reward")
        if row["id"] in rows:
            raise InputError(f"{path}, line {number}: a second response to item {row['id']}")
        rows[row["id"]] = row
    if not rows:
        raise InputError(f"{path}: no responses in it")
    return rows


def read_evaluations(folders: list[str]) -> dict[str, Evaluation]:
    """Evaluations by the names of their folders. Raises InputError if names are equal or items differ."""
    evaluations: dict[str, Evaluation] = {}
    for folder in folders:
        name = Path(folder).resolve().name
        if name in evaluations:
            raise InputError(f"{', '.join(folders)}: two of these have one name")
        evaluations[name] = read_evaluation(Path(folder))
    prompts = [{item: row["prompt"] for item, row in rows.items()} for rows in evaluations.values()]
    if any(found != prompts[0] for found in prompts):
        raise InputError(f"{', '.join(folders)}: their items or prompts differ")
    return evaluations


def by_subset(rows: dict[str, Record]) -> dict[str, list[str]]:
    """The items of each subset, and in "Total" all of them, from {item: what has its "subset"}."""
    groups: dict[str, list[str]] = {}
    for item, row in rows.items():
        groups.setdefault(row["subset"], []).append(item)
    return dict(sorted(groups.items())) | {"Total": list(rows)}


# Sheets -----------------------------------------------------------------------------------------------------


def make_sheet(evaluations: dict[str, Evaluation], items: int, seed: int) -> tuple[list[Record], Record]:
    """A sheet of `items` drawn from each subset of two evaluations, in random order, and its key.

    A row of the sheet is {"item", "prompt", "left", "right"}, its sides drawn by a fair coin.
    The key is {"sheet": id, "models": [first, second], "items": {item: {"id", "subset", "left"}}}.
    """
    generator = random.Random(seed)
    models = list(evaluations)
    rows = evaluations[models[0]]
    groups = by_subset(rows)
    del groups["Total"]
    drawn = []
    for group in groups.values():
        drawn += generator.sample(group, min(items, len(group)))
    generator.shuffle(drawn)
    sheet = []
    key = {}
    for number, item in enumerate(drawn, 1):
        left, right = generator.sample(models, 2)
        row = {"item": str(number), "prompt": rows[item]["prompt"]}
        row["left"] = evaluations[left][item]["response"]
        row["right"] = evaluations[right][item]["response"]
        sheet.append(row)
        key[str(number)] = {"id": item, "subset": rows[item]["subset"], "left": left}
    sheet_id = hashlib.sha256(json.dumps(sheet).encode()).hexdigest()[:12]
    return sheet, {"sheet": sheet_id, "models": models, "items": key}


def sheets(args: argparse.Namespace) -> None:
    """responses of two models side by side, for people to judge"""
    reward.check_output(args.out, "new")
    sheet, key = make_sheet(read_evaluations(args.folders), args.items, args.seed)
    # Without "<" in the data no response can end the element around it.
    data = json.dumps({"sheet": key["sheet"], "items": sheet}).replace("<", "\\u003c")
    page = Path(__file__).with_name("sheet.html").read_text(encoding="utf-8")
    html = page.replace("SHEET_DATA", data)
    write_folder(args.out, {"sheet.html": html, "key.json": json.dumps(key, indent=2) + "\n"})
    print(f"{len(sheet):,} items in {args.out}; annotators get sheet.html, and not key.json")


# The tally --------------------------------------------------------------------------------------------------


def read_key(path: str) -> Record:
    """The key that `make_sheet` made. Raises InputError if it has another form."""
    key = reward.read_json(path, {"sheet": str, "models": list, "items": dict}, "the key of a sheet")
    if len(key["models"]) != 2 or not all(isinstance(model, str) for model in key["models"]):
        raise InputError(f'{path}: "models" must be the names of two models')
    for item, row in key["items"].items():
        complete = isinstance(row, dict) and isinstance(row.get("subset"), str)
        if not complete or row.get("left") not in key["models"]:
            raise InputError(f'{path}, item {item}: needs "subset", a text, and "left", one of the models')
    return key


def read_votes(path: str, key: Record) -> tuple[str, dict[str, str]]:
    """An annotator's name and votes {item: "win", "tie" or "lose"} for the first model. Raises InputError."""
    file = reward.read_json(path, {"sheet": str, "annotator": str, "answers": dict}, "a file of answers")
    if file["sheet"] != key["sheet"]:
        raise InputError(f"{path}: the answers are for {file['sheet']}, the key for {key['sheet']}")
    votes = {}
    for item, answer in file["answers"].items():
        if item not in key["items"]:
            raise InputError(f"{path}: the sheet has no item {item}")
        if answer not in ANSWERS:
            raise InputError(f"{path}, item {item}: {answer!r} is none of {', '.join(ANSWERS)}")
        first_is_left = key["items"][item]["left"] == key["models"][0]
        if answer == "tie":
            votes[item] = "tie"
        elif (answer == "left") == first_is_left:
            votes[item] = "win"
        else:
            votes[item] = "lose"
    return file["annotator"], votes


def majority(votes: list[str]) -> str:
    """What more than half of the votes say; "tie" if nothing has so many."""
    vote, count = Counter(votes).most_common(1)[0]
    return vote if 2 * count > len(votes) else "tie"


def fleiss_kappa(counts: list[list[int]]) -> float:
    """Agreement beyond chance: 1 is perfect, 0 is chance (Fleiss 1971).

    counts (items, categories): raters that chose each category, as many for every item. It is NaN where it
    means nothing: no items, one rater, or all votes in one category.
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
    return {name: evaluate.mean([100.0 * (outcome == name) for outcome in outcomes]) for name in OUTCOMES}


def plot_shares(summary: dict[str, dict[str, Any]], models: list[str], path: str) -> None:
    """Draws Figure 3, a bar of wins, ties and losses per subset, as a picture file."""
    pyplot = reward.import_pyplot()
    pyplot.rcParams["text.parse_math"] = False  # a "$" in a name begins no formula
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.5 * len(summary)), layout="constrained")
    labels = {"win": f"{models[0]} wins", "tie": "tie", "lose": f"{models[1]} wins"}
    starts = [0.0] * len(summary)
    for name, colour in OUTCOMES.items():
        widths = [row[name]["mean"] for row in summary.values()]
        bars = axes.barh(list(summary), widths, left=starts, color=colour, label=labels[name], height=0.65)
        numbers = [f"{width:.1f}" if width >= 4 else "" for width in widths]  # where there is room
        axes.bar_label(bars, numbers, label_type="center")
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    axes.set(xlim=(0, 100), xlabel="% of the items")
    axes.invert_yaxis()  # the first row on top, as in the table
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    reward.save_picture(figure, path)


def tally(args: argparse.Namespace) -> None:
    """what the annotators of a sheet prefer, and whether they agree"""
    if args.out:
        reward.check_output(args.out, "new")
    if args.plot:
        reward.check_plot(args.plot)
    key = read_key(args.key)
    annotators = {}
    for path in args.answers:
        name, votes = read_votes(path, key)
        if name in annotators:
            raise InputError(f"{path}: a second file of the annotator {name}")
        annotators[name] = votes
    cast = {item: [votes[item] for votes in annotators.values() if item in votes] for item in key["items"]}
    judged = {item: key["items"][item] for item, votes in cast.items() if votes}
    if not judged:
        raise InputError(f"{', '.join(args.answers)}: no answers in them")

    summary = {}
    rows = [["subset", "n", "win %", "tie %", "lose %", "Fleiss' kappa", "items of kappa"]]
    for subset, items in by_subset(judged).items():
        by_all = [cast[item] for item in items if len(cast[item]) == len(annotators)]
        kappa = fleiss_kappa([[votes.count(name) for name in OUTCOMES] for votes in by_all])
        summary[subset] = shares([majority(cast[item]) for item in items])
        cells = [evaluate.cell(share) for share in summary[subset].values()]
        rows.append([subset, f"{len(items):,}", *cells, f"{kappa:.3f}", f"{len(by_all):,}"])
    skipped = ", ".join(f"{name} {len(cast) - len(votes):,}" for name, votes in annotators.items())
    text = (
        f"{' against '.join(key['models'])}: the majority of {len(annotators)} annotators, a tie where "
        f"there is none; kappa is on the items that all of them judged.\n\n{reward.markdown(rows)}\n"
        f"Items skipped: {skipped}; by all, and so left out: {len(cast) - len(judged):,}.\n"
    )
    print(text, end="")
    if args.plot:
        plot_shares(summary, key["models"], args.plot)
    if args.out:
        reward.write_text(Path(args.out), text)


# Pairs by reward --------------------------------------------------------------------------------------------


def preferred(row: Record, other: Record) -> str:
    """The outcome of a response against another by their rewards; within 1e-9 it is a tie."""
    gap = row["reward"] - other["reward"]
    if abs(gap) <= 1e-9:
        return "tie"
    return "win" if gap > 0 else "lose"


def fenced(text: str) -> str:
    """A text as Markdown shows it unchanged: folded, in a fence longer than any that it has."""
    fence = "~" * (3 + max(map(len, re.findall("~+", text)), default=0))
    lines = [textwrap.fill(line, 100, replace_whitespace=False) for line in text.splitlines()]
    return "\n".join([fence, *lines, fence, ""])


def cases(models: tuple[str, str], rows: Evaluation, others: Evaluation, count: int) -> str:
    """The items on which the rewards of two models differ most, as Markdown."""
    widest = sorted(rows, key=lambda item: -abs(rows[item]["reward"] - others[item]["reward"]))
    parts = [f"# {models[0]} against {models[1]}\n"]
    for number, item in enumerate(widest[:count], 1):
        pair = (rows[item], others[item])
        dialogue = clha.render(pair[0]["prompt"]).removesuffix("Assistant:")
        parts += [f"## {number}. {pair[0]['subset']}, item {item}\n", fenced(dialogue.strip())]
        for model, row in zip(models, pair, strict=True):
            scores = {"reward": row["reward"]} | evaluate.numbers(row)
            shown = ", ".join(f"{name} {value:.2f}" for name, value in scores.items())
            parts += [f"**{model}**, {shown}\n", fenced(row["response"])]
    return "\n".join(parts)


def compare(args: argparse.Namespace) -> None:
    """how often one model's response has the higher reward"""
    if args.out:
        reward.check_output(args.out, "new")
    if len(args.folders) < 2:
        raise InputError("compare: needs two folders or more")
    table = [["model", "against", "subset", "n", "win %", "tie %", "lose %"]]
    pages = []
    for (model, rows), (against, others) in itertools.combinations(read_evaluations(args.folders).items(), 2):
        for subset, items in by_subset(rows).items():
            summary = shares([preferred(rows[item], others[item]) for item in items])
            cells = [evaluate.cell(share) for share in summary.values()]
            table.append([model, against, subset, f"{len(items):,}", *cells])
        pages.append(cases((model, against), rows, others, args.cases))
    text = reward.markdown(table)
    print(text, end="")
    if args.out:
        write_folder(args.out, {"compare.md": text, "cases.md": "\n".join(pages)})


def write_folder(path: str, texts: dict[str, str]) -> None:
    """Writes {name: text} as the files of a new folder, whole or not at all."""
    with reward.whole(path) as folder:
        folder.mkdir()
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")


def main() -> None:
    """Parses the command line and runs one of the commands."""
    parser = reward.Parser(description=__doc__)
    flag = parser.add_command("sheets", sheets)
    flag("folders", nargs=2, help="folders of `evaluate.py score`, of the same data")
    flag("--out", required=True, help="folder for sheet.html and key.json")
    flag("--items", type=int, default=300, help="per subset, or all it has (paper: 300)")
    flag("--seed", type=int, default=42, help="of the items, their order and the sides")
    flag = parser.add_command("tally", tally)
    flag("answers", nargs="+", help="files that the page saved")
    flag("--key", required=True, help="key.json of the sheet")
    flag("--plot", default="", help="Figure 3 as a picture, such as figure3.png")
    flag("--out", default="", help="Markdown file for what is printed")
    flag = parser.add_command("compare", compare)
    flag("folders", nargs="+", help="two or more folders of `evaluate.py score`, of the same data")
    flag("--out", default="", help="folder for compare.md and cases.md, as in Table 4")
    flag("--cases", type=int, default=10, help="items per pair in cases.md, the widest gaps")
    args = parser.parse_args()
    reward.check_numbers(args)
    args.run(args)


if __name__ == "__main__":
    clha.run(main)
