"""The study of docs/study/protocol.md: every method, tuned alike, on a toy world whose true reward is known.

    python -m study.run tune                        eight settings per method on tuning seeds, by dev gold
    python -m study.run compare --seeds 100 101     the tuned methods and CLHA's ablations on fresh seeds
    python -m study.run vary --seeds 100 101        CLHA with and without rescoring in other worlds
    python -m study.report                          RESULTS.md from the rows

A row of OUT/tuning.jsonl, fresh.jsonl or worlds.jsonl is one run. Runs with a row are not repeated, so the
same command resumes a stopped study; up to --jobs of them run in parallel. All runs of a seed share data,
base model and reward models. A run's model is the mean of the weights of its last four checkpoints.
"""

import argparse
import contextlib
import importlib.util
import io
import itertools
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import filelock
import torch
from tqdm import tqdm

import clha
import evaluate
import reward
from clha import InputError, Record
from study import baselines, rlhf, toy

Settings = dict[str, Any]  # of a run: its objective, and what is not the default

ROWS = Path(__file__).parents[1] / "docs" / "study"  # the committed ones
TUNING_SEEDS = (50, 51, 52, 53)
FRESH_SEEDS = tuple(range(100, 120))  # which no tuning has seen
SMALL = {"batch_size": 64, "pack_tokens": 4096, "activation_checkpointing": "none"}
AVERAGED = 4  # checkpoints of a run, SAVE_EVERY steps apart
SAVE_EVERY = 10

# What is compared -------------------------------------------------------------------------------------------


def grid(objective: str, **values: tuple[float, ...]) -> list[Settings]:
    """All combinations of these values."""
    combinations = itertools.product(*values.values())
    return [{"objective": objective} | dict(zip(values, chosen, strict=True)) for chosen in combinations]


IMITATION = {"learning_rate": (2e-4, 5e-4, 1e-3, 2e-3), "max_steps": (80, 160)}
RANKING = {"alpha": (0.01, 0.05, 0.2, 1.0), "learning_rate": (5e-4, 1e-3)}
REFERENCE = {"beta": (0.03, 0.1, 0.3, 1.0), "learning_rate": (2e-4, 5e-4)}
LOWER = {"alpha": (0.001, 0.002, 0.005, 0.02), "learning_rate": (2e-4, 5e-4)}
HIGHER = {"beta": (0.5, 2.0, 4.0, 8.0), "learning_rate": (1e-4, 2e-4)}
GRIDS: dict[str, list[Settings]] = {  # Section 2 of the protocol
    "CLHA": grid("clha", **RANKING),
    "PRO": grid("pro", **RANKING),
    "gated SFT": grid("gated_sft", alpha=(1.0,), **IMITATION),
    "SFT": grid("sft", **IMITATION),
    "RRHF": grid("rrhf", **RANKING),
    "DPO": grid("dpo", **REFERENCE),
    "CPO, hinge": grid("cpo", **REFERENCE),
    "ODPO": grid("odpo", **REFERENCE),
    "LiPO-lambda": grid("lipo", **REFERENCE),
    "SimPO": [
        settings | {"gamma": settings["beta"] * share}
        for share in (0.3, 0.8)
        for settings in grid("simpo", beta=(2.0, 10.0), learning_rate=(2e-4, 5e-4))
    ],
    "CoH": grid("coh", **IMITATION),
    "RLHF (RLOO)": grid("rlhf", kl_beta=(0.01, 0.03, 0.1, 0.3), learning_rate=(2e-4, 5e-4)),
    "CLHA, eight more": grid("clha", **LOWER),
    "PRO, eight more": grid("pro", **LOWER),
    "RRHF, eight more": grid("rrhf", **LOWER),
    "ODPO, eight more": grid("odpo", **HIGHER),
    "LiPO-lambda, eight more": grid("lipo", **HIGHER),
}
ADDED_LATER = [method for method in GRIDS if method.endswith(", eight more")]  # see the end of the protocol
RLHF_STEPS = 100
NOTHING_KEPT = 1e6  # a reward gap that no pair has: the contrast is off
ABLATIONS: dict[str, Settings] = {  # what changes in CLHA's chosen settings
    "CLHA w/o gate": {"gate": False},
    "CLHA w/o filter": {"min_reward_gap": 0.0},
    "CLHA w/o gate and filter": {"gate": False, "min_reward_gap": 0.0},
    "CLHA w/o contrast": {"min_reward_gap": NOTHING_KEPT},
    "CLHA w/o contrast and gate": {"min_reward_gap": NOTHING_KEPT, "gate": False},
    "CLHA w/o margin": {"margin": 0.0},
}
# Rows at the alpha of the paper's Section 3.3, and the end of their names
AS_IN_THE_PAPER: Settings = {"objective": "clha", "alpha": 0.05, "learning_rate": 5e-4}
PAPERS = ", alpha 0.05"
RELEASED: Settings = {"objective": "released", "learning_rate": 5e-4} | baselines.RELEASED

# Section 4 of the protocol: the options of toy.py, and what becomes of rewards
MAIN = "labels flipped, 20 %"
WORLDS: dict[str, Settings] = {
    "labels flipped, 0 %": {"label_noise": 0.0},
    MAIN: {},
    "labels flipped, 40 %": {"label_noise": 0.4},
    "labels drawn by the gold gap": {"by_gap": True},
    "15 % without a good response": {"label_noise": 0.0, "hopeless": 0.15},
    "45 % without a good response": {"label_noise": 0.0, "hopeless": 0.45},
    "75 % without a good response": {"label_noise": 0.0, "hopeless": 0.75},
    "centered rewards": {"rewards": "centered"},
    "standardized rewards": {"rewards": "standardized"},
    "a reward model of a quarter of the data": {"pairs": 1536},
    "a reward model of a sixteenth of the data": {"pairs": 384},
    "three responses": {"length": 3},
    "three responses, one by a better author": {"length": 3, "better_last": True},
    "even errors": {"even": True},
}
IN_WORLDS = ("SFT", "CLHA", "CLHA w/o gate", "CLHA w/o filter", "CLHA w/o gate and filter")
WORLD_SEEDS = FRESH_SEEDS[:10]


def settings_name(settings: Settings) -> str:
    """The settings of a run in a line: "clha alpha=0.05 learning_rate=0.0005"."""
    values = dict(settings)
    return " ".join([values.pop("objective"), *(f"{name}={value:g}" for name, value in values.items())])


def dev_golds(tuning: list[Record]) -> dict[str, float]:
    """The mean dev gold of all settings that have run on every tuning seed, by `settings_name`."""
    golds: dict[str, dict[int, float]] = {}
    for row in tuning:
        golds.setdefault(row["settings"], {})[row["seed"]] = row["gold"]
    whole = {name: own for name, own in golds.items() if own.keys() == {*TUNING_SEEDS}}
    return {name: statistics.mean(own.values()) for name, own in whole.items()}


def chosen(tuning: list[Record]) -> dict[str, Settings]:
    """The settings with the highest mean dev gold of each method that is tuned to the end."""
    golds = dev_golds(tuning)
    best: dict[str, Settings] = {}
    for method, settings in GRIDS.items():
        if all(settings_name(values) in golds for values in settings):
            best[method] = max(settings, key=lambda values: golds[settings_name(values)])
    return best


def compared(tuning: list[Record]) -> dict[str, Settings]:
    """The rows of the study and their settings, as far as methods are tuned."""
    rows = chosen(tuning)
    if "CLHA" in rows:
        rows |= {label: rows["CLHA"] | changes for label, changes in ABLATIONS.items()}
    for label, changes in {"CLHA": {}, **ABLATIONS}.items():
        if "contrast" not in label and "margin" not in label:
            rows[label + PAPERS] = AS_IN_THE_PAPER | changes
    return {"base": {"objective": "base"}} | rows | {"CLHA as released": RELEASED}


# Worlds -----------------------------------------------------------------------------------------------------


@dataclass
class World:
    """What all runs of a seed share."""

    folder: Path  # gets a folder per run
    base: Path  # the language model to align
    train_data: Path  # scored records
    dev_data: Path  # the same
    test_data: Path
    rm_train: Path  # the reward model that scored the records, for RLHF too
    rm_eval: Path  # the one of the evaluation, which no training sees


def toy_world(out: Path, seed: int, name: str = MAIN) -> World:
    """One of the WORLDS; those of a seed share the base model, and reward models if their data are alike."""
    options = dict(WORLDS[name])
    rewards = options.pop("rewards", "raw")
    home = out / f"seed-{seed}"
    folder = home / name
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(home / ".lock"):  # runs of a seed work side by side
        data = folder / "data"
        if not data.exists():
            toy.write(data, seed, **options)
        own = ("length", "hopeless", "better_last")  # what reward models do not see
        labels = [f"{key}={value}" for key, value in options.items() if key not in own]
        shared = home / " ".join(["labels", *labels])
        shared.mkdir(exist_ok=True)
        base = train_base(data, shared if options.get("even") else home)
        rm_train = train_reward_model(base, data / "rm_train.jsonl", shared, seed)
        rm_eval = train_reward_model(base, data / "rm_eval.jsonl", shared, seed + 1)
        train_data = score(rm_train, data / "train.jsonl", folder, rewards)
        dev_data = score(rm_train, data / "dev.jsonl", folder, rewards)
    return World(folder, base, train_data, dev_data, data / "test.jsonl", rm_train, rm_eval)


def train_base(data: Path, home: Path) -> Path:
    """The base model of a seed: SFT of an untrained model on random responses, unless it is done."""
    out = home / "base"
    if not (out / "final").exists():
        labelled = stage("labels", data / "pretrain.jsonl", home)
        learning = SMALL | {"learning_rate": 2e-3, "max_steps": 280, "lr_schedule": "cosine"}
        paths = map(str, (data / "init", labelled, out))
        baselines.train(baselines.BaselineConfig(*paths, objective="sft", **learning))
    return out / "final"


def train_reward_model(base: Path, data: Path, folder: Path, seed: int) -> Path:
    """Trains with reward.py unless it is done; the folder of the reward model, named as its data."""
    out = folder / data.stem
    if not out.exists():
        args = {"model": str(base), "data": str(data), "out": str(out), "seed": seed}
        args |= {"learning_rate": 7e-4, "norm_penalty": 0.001, "epochs": 1, "batch_size": 32}
        args |= {"max_length": 1024, "pack_tokens": 4096, "template": "auto"}
        reward.train(argparse.Namespace(**args))
    return out


def stage(name: str, data: Path, folder: Path, *flags: str) -> Path:
    """Records by a stage of study.baselines, in a file of a folder; unless it is done."""
    out = folder / f"{data.stem}-{name}.jsonl"
    if not out.exists():
        baselines.main([name, "--data", str(data), "--out", str(out), *flags])
    return out


def score(reward_model: Path, records: Path, folder: Path, rewards: str = "raw") -> Path:
    """Records scored by reward.py, in a file of a folder: rewards raw, centered or standardized."""
    out = folder / records.name
    if not out.exists():
        scored = out.with_suffix(".raw.jsonl")
        model = reward.load_reward_model(str(reward_model))
        reward.write_scores(model, reward.read_records(records), scored)
        rows = reward.read_records(scored, ["rewards"])
        values = [value for row in rows for value in row["rewards"]]
        mean = 0.0 if rewards == "raw" else statistics.mean(values)
        scale = statistics.pstdev(values) if rewards == "standardized" else 1.0
        for row in rows:
            row["rewards"] = [(value - mean) / scale for value in row["rewards"]]
        reward.write_jsonl(out, rows)
    return out


def data_for(objective: str, world: World, data: Path) -> Path:
    """The records as an objective needs them."""
    needed = {"coh": "hindsight", "released": "ranked"} | dict.fromkeys(baselines.REFERENCED, "reference")
    if objective not in needed:
        return data
    flags = ("--model", str(world.base)) if objective in baselines.REFERENCED else ()
    with filelock.FileLock(world.folder / ".lock"):
        return stage(needed[objective], data, world.folder, *flags)


# Runs -------------------------------------------------------------------------------------------------------


def align(world: World, settings: Settings, seed: int, out: Path) -> list[Path]:
    """Trains a run into a folder; the folders of its last checkpoints, oldest first."""
    values = dict(settings)
    objective = values.pop("objective")
    shutil.rmtree(out, ignore_errors=True)  # of a study that was stopped
    if objective == "rlhf":
        flags = {"model": world.base, "train_data": world.train_data, "reward_model": world.rm_train}
        flags |= {"output_dir": out, "seed": seed, "max_steps": RLHF_STEPS, "save_every": SAVE_EVERY}
        flags |= {"max_new_tokens": 64} | values
        rlhf.train(rlhf.parse_args([f"--{name}={value}" for name, value in flags.items()]))
    else:
        records = [data_for(objective, world, data) for data in (world.train_data, world.dev_data)]
        values = SMALL | {"max_steps": 80, "seed": seed, "save_every": SAVE_EVERY} | values
        values |= {"dev_data": str(records[1]), "eval_every": values["max_steps"], "checkpoint_every": 0}
        values |= {"token_cache": str(world.folder / "tokens")}
        paths = map(str, (world.base, records[0], out))
        if objective == "clha":
            clha.train(clha.Config(*paths, **values))
        else:
            baselines.train(baselines.BaselineConfig(*paths, objective=objective, **values))
    return clha.checkpoints(out)[-AVERAGED:]


def average(folders: list[Path]) -> tuple[Any, clha.Tokenizer]:
    """The model whose weights are the mean of these, and its tokenizer."""
    sums: dict[str, torch.Tensor] = {}
    for folder in folders:
        model, tokenizer = evaluate.load(str(folder), torch.device("cpu"))
        for name, weight in model.state_dict().items():
            sums[name] = sums.get(name, 0) + weight
    model.load_state_dict({name: total / len(folders) for name, total in sums.items()})
    return model, tokenizer


def respond(model: Any, tokenizer: clha.Tokenizer, records: list[Record], objective: str) -> list[str]:
    """Greedy responses to the prompts of records; chain of hindsight is asked for a good answer."""
    options: dict[str, Any] = {"max_new_tokens": 64, "batch_size": 200}
    if objective == "coh":
        options |= {"response_prefix": baselines.GOOD, "stop_strings": (baselines.GOOD, baselines.BAD)}
    return evaluate.generate(model, tokenizer, [record["prompt"] for record in records], **options)


def measure(world: World, settings: Settings, seed: int, split: str, out: Path) -> Record:
    """A run's scores: gold of its dev responses, or all that the report has of its test responses."""
    objective = settings["objective"]
    start = time.perf_counter()
    folders = [world.base] if objective == "base" else align(world, settings, seed, out)
    seconds = time.perf_counter() - start
    model, tokenizer = average(folders)
    records = reward.read_records(world.dev_data if split == "dev" else world.test_data)
    responses = respond(model, tokenizer, records, objective)
    golds = [toy.gold(record["prompt"], text) for record, text in zip(records, responses, strict=True)]
    row: Record = {"gold": statistics.mean(golds)}
    if split == "dev":
        return row
    given = [{"response": text, "gold": gold} for text, gold in zip(responses, golds, strict=True)]
    rows = evaluate.score_responses(records, given, reward.load_reward_model(str(world.rm_eval)))
    row |= scores(rows) | {"subsets": {}, "tasks": {}}
    for subset in toy.SUBSETS:
        row["subsets"][subset] = scores([line for line in rows if line["subset"] == subset])
    for task in toy.TASKS:
        own = [line["gold"] for line in rows if toy.task_of(line["prompt"]) is toy.TASKS[task]]
        row["tasks"][task] = [len(own), sum(own)]
    parts = [toy.anatomy(line["prompt"], line["response"]) for line in rows]
    row["anatomy"] = {name: statistics.mean(part[name] for part in parts) for name in parts[0]}
    if objective == "base":
        row["rescoring"] = rescoring(reward.read_records(world.train_data, ["rewards"]))
        report = json.loads((world.rm_train / "training.json").read_text())
        row["rescoring"]["mean reward"] = report["mean_reward"]
        return row
    log = [line for _, line in clha.read_jsonl(out / "metrics.jsonl")]
    row["seconds"] = seconds
    if objective == "rlhf":
        row["tokens"] = max(line.get("num_tokens", 0) for line in log)
    else:
        row["tokens"] = round(sum(line["tokens_per_second"] * line["seconds"] for line in log))
        for name in ("chosen", "rejected"):
            row[f"logps/{name}"] = log[-1][f"eval/logps/{name}"]
    return row


def scores(rows: list[Record]) -> dict[str, float]:
    """Mean scores of lines of `evaluate.score_responses`."""
    means = {name: statistics.mean(row[name] for row in rows) for name in ("gold", "reward", "char_bleu")}
    words = evaluate.word_bleu([row["response"] for row in rows], [row["reference"] for row in rows])
    return means | {"word_bleu": words}


def rescoring(records: list[Record]) -> dict[str, float]:
    """What rescoring sees of scored toy records: shares of queries, and of pairs whose gold differs."""
    ranked = [clha.rank(record) for record in records]
    rewards = torch.tensor([record["rewards"] for record in ranked])  # (B, l)
    gold = torch.tensor([toy.golds(record) for record in ranked])
    keep, gate = clha.rescore(rewards, clha.Config.min_reward_gap)
    ahead = gold[:, :, None] - gold[:, None, :]  # (B, l, l)
    differ = (ahead != 0).triu(1)
    best_is_good = gold[:, 0] > 0
    shares = {
        "pairs kept": keep[differ],
        "kept: in true order": ahead[differ & keep] > 0,
        "dropped: in true order": ahead[differ & ~keep] > 0,
        "gate open": gate,
        "best response good": best_is_good,
        "same, gate open": best_is_good[gate],
    }
    return {name: share.float().mean().item() for name, share in shares.items()}


# Many runs --------------------------------------------------------------------------------------------------


@dataclass
class Task:
    """A run that has no row yet."""

    seed: int
    method: str
    settings: Settings
    split: str  # "dev" or "test"
    world: str = MAIN

    def key(self) -> Record:
        """What begins its row."""
        name = settings_name(self.settings)
        return {"world": self.world, "seed": self.seed, "method": self.method, "settings": name}


def perform(task: Task, out: Path) -> Record:
    """Trains and measures a run in its world, in a process that works beside others; its row."""
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    start = task.key()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        world = toy_world(out, task.seed, task.world)
        folder = world.folder / f"{task.method} {start['settings']}".replace("/", "-")  # "w/o"
        row = start | measure(world, task.settings, task.seed, task.split, folder)
    shutil.rmtree(folder, ignore_errors=True)  # its row says it all
    return row


def perform_all(tasks: list[Task], path: Path, args: argparse.Namespace) -> None:
    """Adds the rows of tasks to a file, as they end."""
    done = [{name: row[name] for name in ("world", "seed", "method", "settings")} for row in read_rows(path)]
    todo = [task for task in tasks if task.key() not in done]
    path.parent.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # of the pool's processes
    pool = multiprocessing.get_context("spawn").Pool(args.jobs)
    with pool, tqdm(desc=str(path), total=len(tasks), initial=len(tasks) - len(todo)) as bar:
        for row in pool.imap_unordered(partial(perform, out=args.out), todo):
            reward.append_jsonl(path, [row])
            bar.update()


def read_rows(path: Path) -> list[Record]:
    """The rows of a file; none if there is no such file."""
    return [row for _, row in clha.read_jsonl(path)] if path.exists() else []


def runnable(methods: Iterable[str]) -> list[str]:
    """These methods, without RLHF where TRL is missing."""
    left = [method for method in methods if method != "RLHF (RLOO)"]
    if importlib.util.find_spec("trl") or len(left) == len([*methods]):
        return [*methods]
    print("leaves out RLHF (RLOO), which needs TRL: pip install .[rlhf]", file=sys.stderr)
    return left


def tune(args: argparse.Namespace) -> None:
    """dev gold of eight settings per method on the tuning seeds, as OUT/tuning.jsonl"""
    tasks = []
    for method in args.methods or runnable(GRIDS):
        for settings, seed in itertools.product(GRIDS[method], TUNING_SEEDS):
            tasks.append(Task(seed, method, settings, "dev"))
    perform_all(tasks, args.out / "tuning.jsonl", args)


def tuned(path: Path, methods: Iterable[str]) -> dict[str, Settings]:
    """What `compared` makes of a file. Raises InputError if one of the methods is not tuned in it."""
    rows = compared(read_rows(path))
    missing = [method for method in methods if method not in rows]
    if missing:
        raise InputError(f"{path}: {missing[0]} is no row, or not tuned to the end; see `study.run tune`")
    return rows


def compare(args: argparse.Namespace) -> None:
    """test gold of the tuned methods and of CLHA's ablations on fresh seeds, as OUT/fresh.jsonl"""
    rows = tuned(args.tuning, args.methods or ())
    methods = args.methods or runnable(rows)
    tasks = []
    for start in range(0, len(args.seeds), args.jobs):  # as many worlds at a time as there are jobs
        seeds = args.seeds[start : start + args.jobs]
        for method, seed in itertools.product(methods, seeds):
            tasks.append(Task(seed, method, rows[method], "test"))
    perform_all(tasks, args.out / "fresh.jsonl", args)


def vary(args: argparse.Namespace) -> None:
    """test gold of CLHA with and without gate and filter in other worlds, as OUT/worlds.jsonl"""
    methods = args.methods or IN_WORLDS
    rows = tuned(args.tuning, methods)
    tasks = []
    for world, method, seed in itertools.product(WORLDS, methods, args.seeds):
        settings = dict(rows[method])
        if "alpha" in settings:  # grows with the number of responses, Section 3.3 of the paper
            settings["alpha"] *= (WORLDS[world].get("length", 2) - 1) ** 2
        if world != MAIN:  # which `compare` runs
            tasks.append(Task(seed, method, settings, "test", world))
    perform_all(tasks, args.out / "worlds.jsonl", args)


def main() -> None:
    """Parses the command line and runs a part of the study."""
    parser = reward.Parser(description=__doc__)
    for name, run in (("tune", tune), ("compare", compare), ("vary", vary)):
        flag = parser.add_command(name, run)
        flag("--out", type=Path, default=Path("out/study"), help="folder for rows, worlds and runs")
        flag("--jobs", type=int, default=os.cpu_count(), help="runs at a time, a core each")
        known = [*GRIDS] if name == "tune" else None
        flag("--methods", nargs="+", choices=known, help="only these rows, such as CLHA PRO")
        if name != "tune":
            seeds = FRESH_SEEDS if name == "compare" else WORLD_SEEDS
            flag("--seeds", type=int, nargs="+", default=[*seeds], help="a world each")
            flag("--tuning", type=Path, default=ROWS / "tuning.jsonl", help="rows that settings follow from")
    args = parser.parse_args()
    reward.check_numbers(args, ["jobs"])
    reward.check_output(args.out, "folder")
    args.run(args)


if __name__ == "__main__":
    clha.run(main)
