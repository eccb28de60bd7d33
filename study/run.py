"""Tables 2 and 3 of the paper in one frame: every objective on the same data, base model and reward models.

    python -m study.run toy --out out/study --seeds 0 1 2 3 4      a world whose true reward is known
    python -m study.run real --out out/study --data DATA --model MODEL --reward_model RM
    python -m study.report --runs out/study                        RESULTS.md, from the runs that are finished

All toy runs of a seed share data, base model and reward models. DATA are real records: scored ones in its
train.jsonl and dev.jsonl, and test.jsonl, as prepare_data.py and reward.py leave them. A finished run is not
repeated, so the same command resumes a study that was stopped. Seeds may run side by side.
"""

import argparse
import contextlib
import io
import itertools
import statistics
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import clha
import evaluate
import reward
from clha import InputError, Record
from study import baselines, rlhf, toy

Settings = dict[str, Any]  # of a run: its objective, and what is not the default

NOISE = 0.2  # share of wrong labels on the main worlds
NOISES = (0.0, 0.2, 0.4)
LENGTHS = (2, 3)  # responses per query
STEPS = 80  # of alignment, on each toy world
LEARNING_RATE = 5e-4
SMALL = {"batch_size": 64, "pack_tokens": 4096, "activation_checkpointing": "none"}

# ------------------------------------------------------------------------------------------------------------
# What is compared


def methods(length: int) -> dict[str, Settings]:
    """The rows of Table 2 for queries with so many responses."""
    alpha = 0.05 * (length - 1) ** 2  # CLHA's
    return {
        "SFT": {"objective": "sft"},
        "CoH": {"objective": "coh"},
        "RRHF": {"objective": "rrhf", "sft_reduction": "mean"},  # as released
        "RRHF, CLHA's SFT": {"objective": "rrhf", "alpha": alpha},
        "PRO": {"objective": "pro"},
        "PRO w/o temperatures": {"objective": "pro", "temperatures": False},
        "DPO": {"objective": "dpo"},
        "CLHA": {"objective": "clha"},
        "CLHA as released": {"objective": "released"} | baselines.RELEASED,
        "RLHF": {"objective": "rlhf"},
    }


ABLATIONS: dict[str, Settings] = {  # the rows of Table 3
    "CLHA w/o rescore": {"objective": "clha", "gate": False, "min_reward_gap": 0.0},
    "CLHA w/o contrast": {"objective": "gated_sft"},
    "CLHA w/o margin": {"objective": "clha", "margin": 0.0},
}
RLHF_FLAGS = {"max_steps": 100, "learning_rate": 3e-4, "kl_beta": 0.15, "max_new_tokens": 64}
CENTER = {"objective": "clha", "min_reward_gap": 1.0}  # of the sweeps: the default that they moved to 0.5
SWEEPS = {  # one setting changed at a time
    "margin": {value: CENTER | {"margin": value} for value in (0.0, 0.1, 0.3, 1.0, 3.0)},
    "reward gap": {value: CENTER | {"min_reward_gap": value} for value in (0.0, 0.5, 1.0, 2.0)},
    "weight of the SFT term": {value: CENTER | {"alpha": value} for value in (0.0, 0.01, 0.05, 0.2, 1.0)},
}


def plan(noise: float, length: int) -> list[Settings]:
    """The settings of all runs on the toy worlds of one kind; RLHF and the sweeps on the main one only."""
    rows = methods(length) | ABLATIONS
    is_main = noise == NOISE and length == 2
    if not is_main or not find_spec("trl"):
        del rows["RLHF"]
    runs = list(rows.values())
    if is_main:
        for sweep in SWEEPS.values():
            runs += sweep.values()
    return runs


def run_name(settings: Settings, length: int) -> str:
    """The folder of a run: equal settings, equal name, so that rows of different tables share a run."""
    values = dict(settings)
    objective = values.pop("objective")
    if objective == "clha":
        defaults = {name: getattr(clha.Config, name) for name in ("margin", "min_reward_gap", "gate")}
        values = defaults | {"alpha": 0.05 * (length - 1) ** 2} | values
    parts = [f"{name}={value}" for name, value in values.items()]
    return " ".join([objective, *parts])


# ------------------------------------------------------------------------------------------------------------
# Worlds


@dataclass
class World:
    """What all runs of a seed share."""

    name: str  # of its kind, such as "toy, 2 responses, noise 0.2"
    folder: Path  # gets a folder per run
    length: int  # responses per query
    base: str | Path  # the language model to align
    train_data: Path  # scored records
    dev_data: Path  # the same, for the likelihoods over training
    test_data: Path
    rm_train: Path | None  # the reward model that scored the records, for RLHF too
    rm_eval: str | Path  # the one of the evaluation, which no training sees
    settings: Settings  # of clha.Config, for every run
    max_new_tokens: int  # of a response to a test prompt


def world_name(noise: float, length: int) -> str:
    """The name of a kind of toy world."""
    return f"toy, {length} responses, noise {noise:g}"


def toy_world(out: Path, seed: int, noise: float, length: int) -> World:
    """A toy world; its seed's base model serves every noise and length, its reward models every length."""
    home = out / "toy" / f"seed-{seed}"
    noisy = home / f"noise-{noise:g}"
    folder = noisy / f"length-{length}"
    data = folder / "data"
    if not data.exists():
        toy.write(data, seed, label_noise=noise, length=length)
    base = train_base(data, home)
    rm_train = train_reward_model(base, data / "rm_train.jsonl", noisy, seed)
    rm_eval = train_reward_model(base, data / "rm_eval.jsonl", noisy, seed + 1)
    return World(
        name=world_name(noise, length),
        folder=folder,
        length=length,
        base=base,
        train_data=score(rm_train, data / "train.jsonl", folder),
        dev_data=score(rm_train, data / "dev.jsonl", folder),
        test_data=data / "test.jsonl",
        rm_train=rm_train,
        rm_eval=rm_eval,
        settings=SMALL | {"learning_rate": LEARNING_RATE, "max_steps": STEPS},
        max_new_tokens=64,
    )


def train_base(data: Path, home: Path) -> Path:
    """The base model of a seed: SFT of an untrained model on random responses."""
    labelled = stage("labels", data / "pretrain.jsonl", home)
    learning = SMALL | {"learning_rate": 2e-3, "max_steps": 280, "lr_schedule": "cosine"}
    paths = map(str, (data / "init", labelled, home / "base"))
    return train(baselines.BaselineConfig(*paths, objective="sft", **learning))


def train_reward_model(base: Path, data: Path, folder: Path, seed: int) -> Path:
    """Trains with reward.py unless it is done; the folder of the reward model, named as its data."""
    out = folder / data.stem
    if not out.exists():
        args = {"model": str(base), "data": str(data), "out": str(out), "seed": seed}
        args |= {"learning_rate": 7e-4, "norm_penalty": 0.001, "epochs": 1, "batch_size": 32}
        args |= {"max_length": 1024, "pack_tokens": 4096, "template": "auto", "template_args": ""}
        reward.train(argparse.Namespace(**args))
    return out


def stage(name: str, data: Path, folder: Path, *flags: str) -> Path:
    """Records by a stage of study.baselines, in a file of a folder; unless it is done."""
    out = folder / f"{data.stem}-{name}.jsonl"
    if not out.exists():
        baselines.main([name, "--data", str(data), "--out", str(out), *flags])
    return out


def score(reward_model: Path, records: Path, folder: Path) -> Path:
    """Scores records with reward.py, in a file of a folder, unless it is done."""
    out = folder / records.name
    if not out.exists():
        model = reward.load_reward_model(str(reward_model))
        reward.write_scores(model, reward.read_records(records), out)
    return out


# ------------------------------------------------------------------------------------------------------------
# Runs


def train(config: clha.Config) -> Path:
    """Trains unless it is done; the folder of the model. Raises InputError for a run of other settings."""
    final = Path(config.output_dir, "final")
    if final.exists():
        found = reward.read_json(final.with_name("config.json"), {}, "the settings of a run")
        free = {*clha.FREE, "model", "dtype"}  # a study may be moved
        for name, value in asdict(config).items():
            if name not in free and value is not None and found.get(name) != value:
                wrong = f"holds a run of other settings ({name}); choose another --out"
                raise InputError(f"{final.parent}: {wrong}")
    elif isinstance(config, baselines.BaselineConfig):
        baselines.train(config)
    else:
        clha.train(config)
    return final


def align(world: World, settings: Settings, seed: int) -> Path:
    """Trains a run of a world unless it is done; the folder of its model."""
    out = world.folder / run_name(settings, world.length)
    values = dict(settings)
    objective = values.pop("objective")
    if objective == "rlhf":
        return train_rlhf(world, out, seed)
    train_data = data_for(objective, world, world.train_data)
    dev_data = data_for(objective, world, world.dev_data)
    paths = map(str, (world.base, train_data, out, dev_data))
    values = world.settings | {"eval_every": 20, "seed": seed} | values
    if objective == "clha":
        return train(clha.Config(*paths, **values))
    return train(baselines.BaselineConfig(*paths, objective=objective, **values))


def data_for(objective: str, world: World, data: Path) -> Path:
    """The records as an objective needs them."""
    needed = {"coh": "hindsight", "released": "ranked", "dpo": "reference"}
    if objective not in needed:
        return data
    flags = ("--model", str(world.base)) if objective == "dpo" else ()
    return stage(needed[objective], data, world.folder, *flags)


def train_rlhf(world: World, out: Path, seed: int) -> Path:
    """Trains with study.rlhf unless it is done; the folder of the model."""
    if not (out / "final").exists():
        flags = {"model": world.base, "train_data": world.train_data, "reward_model": world.rm_train}
        flags |= {"output_dir": out, "seed": seed} | RLHF_FLAGS
        argv = [f"--{name}={value}" for name, value in flags.items()]
        rlhf.train(rlhf.parse_args(argv))
    return out / "final"


def evaluate_run(world: World, name: str, model: Path, seed: int, reward_model: reward.RewardModel) -> None:
    """Generates and scores responses to the test prompts, and leaves the run's row for the report."""
    folder = world.folder / name
    if (folder / "row.json").exists():
        return
    options: dict[str, Any] = {"max_new_tokens": world.max_new_tokens}
    if name == "coh":
        options |= {"response_prefix": baselines.GOOD, "stop_strings": (baselines.GOOD, baselines.BAD)}
    records = reward.read_records(world.test_data)
    responses = folder / "responses.jsonl"
    evaluate.write_responses(str(model), records, responses, **options)
    if world.rm_train:  # the toy world
        with_gold = folder / "with_gold.jsonl"
        toy.add_gold(str(world.test_data), str(responses), with_gold)
        responses = with_gold
    summaries = evaluate.score_file(str(responses), records, reward_model, folder / "eval")
    summary = summaries["Total"]
    row: Record = {"world": world.name, "seed": seed, "run": name}
    for score_name in ("gold", "reward", "char_bleu"):
        if score_name in summary:
            row[score_name] = summary[score_name]["mean"]
    row["word_bleu"] = summary["word_bleu"]
    metrics = folder / "metrics.jsonl"
    if metrics.is_file() and name not in ("coh", "rlhf"):
        row["likelihoods"] = likelihoods(metrics)
    if world.rm_train:
        row["anatomy"] = anatomy(folder / "eval/responses.jsonl")
    if world.rm_train and name == "base":
        report = world.rm_train / "training.json"
        training = reward.read_json(report, {}, "a report of reward.py")
        seen = {"agrees with labels": training["accuracy"], "mean reward": training["mean_reward"]}
        row["rescoring"] = seen | rescoring(reward.read_records(world.train_data, ["rewards"]))
    reward.write_jsonl(folder / "row.json", [row])


def likelihoods(metrics: Path) -> dict[str, float]:
    """Dev log-probs per token of chosen and rejected responses, in the first evaluation and in the last."""
    rows = [row for _, row in clha.read_jsonl(metrics) if "eval/logps/chosen" in row]
    found = {}
    for name in ("chosen", "rejected"):
        found[f"{name}, first"] = rows[0][f"eval/logps/{name}"]
        found[f"{name}, last"] = rows[-1][f"eval/logps/{name}"]
    return found


def anatomy(responses: Path) -> dict[str, float]:
    """What the toy responses of a run are made of, on average."""
    parts = [toy.anatomy(row["prompt"], row["response"]) for _, row in clha.read_jsonl(responses)]
    return {name: statistics.mean(part[name] for part in parts) for name in parts[0]}


def rescoring(records: list[Record]) -> dict[str, float]:
    """What rescoring sees of scored toy records: shares of queries, and of pairs whose gold differs."""
    ranked = [clha.rank(record) for record in records]
    rewards = torch.tensor([record["rewards"] for record in ranked])  # (B, l)
    gold = torch.tensor([[toy.gold(row["prompt"], text) for text in row["responses"]] for row in ranked])
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


def run_all(world: World, runs: list[Settings], seed: int) -> None:
    """Trains and evaluates a run of each of these settings in a world, and evaluates its base model."""
    reward_model = reward.load_reward_model(str(world.rm_eval))
    evaluate_run(world, "base", world.base, seed, reward_model)
    for settings in tqdm(runs, desc=str(world.folder), disable=None):
        model = align(world, settings, seed)
        evaluate_run(world, run_name(settings, world.length), model, seed, reward_model)


def run_toy(args: argparse.Namespace) -> None:
    """every objective and ablation on each toy world, and the sweeps on one of each seed"""
    for seed in args.seeds:
        for noise, length in itertools.product(NOISES, LENGTHS):
            run_all(toy_world(args.out, seed, noise, length), plan(noise, length), seed)


def run_real(args: argparse.Namespace) -> None:
    """the main objectives on real records; the seeds draw the order of the data only"""
    data = Path(args.data)
    rows = methods(2) | ABLATIONS
    names = ("SFT", "RRHF, CLHA's SFT", "PRO", "DPO", "CLHA", "CLHA w/o rescore")
    for seed in args.seeds:
        world = World(
            name="real",
            folder=args.out / "real" / f"seed-{seed}",
            length=2,
            base=args.model,
            train_data=data / "train.jsonl",
            dev_data=data / "dev.jsonl",
            test_data=data / "test.jsonl",
            rm_train=None,
            rm_eval=args.reward_model,
            settings={},
            max_new_tokens=128,
        )
        run_all(world, [rows[name] for name in names], seed)


def main() -> None:
    """Parses the command line and runs a part of the study."""
    parser = reward.Parser(description=__doc__)
    for name, run in (("toy", run_toy), ("real", run_real)):
        flag = parser.add_command(name, run)
        flag("--out", type=Path, default=Path("out/study"), help="folder for the runs")
        flag("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="a world each")
    flag("--data", required=True, help="folder of train.jsonl, dev.jsonl and test.jsonl")
    flag("--model", required=True, help="language model: a folder or a hub name")
    flag("--reward_model", required=True, help="that of the evaluation")
    args = parser.parse_args()
    reward.check_numbers(args)
    reward.check_output(args.out, "folder")
    with contextlib.redirect_stdout(io.StringIO()):  # what each run prints; progress bars are on stderr
        args.run(args)


if __name__ == "__main__":
    clha.run(main)
