"""How noisy is the end of a run? Section 1 of docs/study/protocol.md, before anything is tuned.

    python -m study.measuring --out out/measuring --seeds 50 51 52 53  adds rows to docs/study/measuring.jsonl

Four methods, a constant and a cosine rate, two orders of the same data: dev gold of the last four
checkpoints, ten steps apart, and of the mean of their weights. Finished runs are not repeated. Prints a
Markdown table.
"""

import contextlib
import io
import itertools
import statistics
from pathlib import Path
from typing import Any

import torch

import clha
import evaluate
import reward
from clha import Record
from study import run, toy

METHODS = ("CLHA", "PRO", "SFT", "DPO")
SCHEDULES = ("constant_with_warmup", "cosine")
ORDERS = (0, 1)
STEPS = (50, 60, 70, 80)
ROWS = Path(__file__).parents[1] / "docs" / "study" / "measuring.jsonl"


def gold(model: Any, tokenizer: clha.Tokenizer, records: list[Record]) -> float:
    """Mean true reward of greedy responses to the prompts of these records."""
    responses = run.respond(model, tokenizer, records, "")
    return statistics.mean(
        toy.gold(row["prompt"], text) for row, text in zip(records, responses, strict=True)
    )


def measure(world: run.World, method: str, schedule: str, order: int, seed: int) -> Record:
    """Dev gold of a run's last checkpoints ("step-N") and of the mean of their weights ("average")."""
    settings = {"objective": method.lower(), "learning_rate": 5e-4, "lr_schedule": schedule}
    out = world.folder / f"{method} {schedule} {order}"
    folders = run.align(world, settings, seed + 1000 * order, out)
    records = reward.read_records(world.dev_data)
    row: Record = {"seed": seed, "method": method, "schedule": schedule, "order": order}
    for folder in folders:
        row[folder.name] = gold(*evaluate.load(str(folder), torch.device("cpu")), records)
    return row | {"average": gold(*run.average(folders), records)}


def table(rows: list[Record]) -> str:
    """Deviations of dev gold: between two orders of the data, and among the last four checkpoints."""
    ways = {
        "constant rate, last step": ("constant_with_warmup", "step-80"),
        "cosine rate, last step": ("cosine", "step-80"),
        "constant rate, mean of weights": ("constant_with_warmup", "average"),
        "cosine rate, mean of weights": ("cosine", "average"),
    }
    lines = [["way", *METHODS, "mean", "among checkpoints", "mean dev gold"]]
    for way, (schedule, name) in ways.items():
        own = [row for row in rows if row["schedule"] == schedule]
        spreads = []
        for method in METHODS:
            by_seed: dict[int, list[float]] = {}
            for row in own:
                if row["method"] == method:
                    by_seed.setdefault(row["seed"], []).append(row[name])
            variances = [statistics.variance(pair) for pair in by_seed.values() if len(pair) > 1]
            spreads.append(statistics.mean(variances) ** 0.5)
        within = statistics.mean(statistics.variance(row[f"step-{n}"] for n in STEPS) for row in own) ** 0.5
        level = statistics.mean(row[name] for row in own)
        cells = [*spreads, statistics.mean(spreads), within, level]
        lines.append([way, *(f"{cell:.2f}" for cell in cells)])
    return evaluate.markdown(lines)


def main() -> None:
    """Measures what is not measured yet."""
    parser = reward.Parser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/measuring"), help="folder for the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[50, 51, 52, 53], help="a world each")
    args = parser.parse_args()
    rows = [row for _, row in clha.read_jsonl(ROWS)] if ROWS.exists() else []
    done = {(row["seed"], row["method"], row["schedule"], row["order"]) for row in rows}
    for seed in args.seeds:
        todo = [way for way in itertools.product(METHODS, SCHEDULES, ORDERS) if (seed, *way) not in done]
        with contextlib.redirect_stdout(io.StringIO()):  # what each run prints
            for way in todo:
                world = run.toy_world(args.out, seed)
                row = measure(world, *way, seed)
                reward.append_jsonl(ROWS, [row])
                rows.append(row)
    print(table(rows))


if __name__ == "__main__":
    clha.run(main)
