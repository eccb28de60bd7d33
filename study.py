"""Tables 2 and 3 of the paper in one frame: every objective on the same data, base model, trainer and judge.

    python study.py toy --seeds 0 1 2 3 4        the toy world, whose true reward is known
    python study.py real --source FOLDER         real HH-RLHF text and rewards, in the authors' format
    python study.py report                       RESULTS.md and its pictures from all runs that are finished

Runs are paired: all objectives of a seed share its data, its base model and its reward models. A run that is
finished is not made again, so a study that was stopped goes on where it was. Seeds of the toy world may be
started side by side.
"""

import argparse
import contextlib
import io
import itertools
import json
import random
import sys
from collections.abc import Iterable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import clha
import evaluate
import prepare_data
import program
import reward
import rlhf
import toy
from program import HelpFormatter, refuse
from records import InputError, Record, claim, new_folder, read_records, write_jsonl

NOISE, NOISES, LENGTHS = 0.2, (0.0, 0.2, 0.4), (2, 3)  # shares of wrong labels; the first for everything
STEPS, LEARNING_RATE = 80, 5e-4  # of alignment, on each toy world
REAL = {  # of alignment, on real text
    "learning_rate": 2e-4, "max_steps": 20, "batch_size": 32, "pack_tokens": 4096, "max_length": 256,
    "max_prompt_length": 192, "dtype": "bfloat16", "activation_checkpointing": "none",
}  # fmt: skip
EVERYTHING = {"contrast": False, "rescore": False, "ranking": "given", "sft_target": "chosen"}  # plain SFT


class World(NamedTuple):
    """What all runs of a seed share."""

    folder: Path  # gets a folder for each run
    length: int  # of the rankings
    base: Path  # the language model to align
    train_data: Path  # scored records
    dev_data: Path  # the same, for the likelihoods over training
    test: list[Record]
    judge: Path  # the reward model of the evaluation
    settings: dict[str, Any]  # of clha.Config, for every run
    generation: dict[str, Any]  # of evaluate.py


# ------------------------------------------------------------------------------------------------------------
# What is compared


def methods(length: int) -> dict[str, dict[str, Any]]:
    """The rows of Table 2 for replies of rankings of this length, as settings of clha.Config."""
    return {
        "SFT": {"objective": "sft"},
        "CoH": {"objective": "coh"},
        "RRHF": {"objective": "rrhf", "alpha": 1.0, "sft_reduction": "mean"},  # as released
        "RRHF, CLHA's SFT": {"objective": "rrhf", "alpha": 0.05 * (length - 1) ** 2},
        "PRO": {"objective": "pro"},
        "PRO w/o temperatures": {"objective": "pro", "temperatures": False},
        "DPO": {"objective": "dpo"},
        "CLHA": {},
    }


# TRL's, where it is installed; its KL coefficient was chosen on a world that is not in the study.
RLHF: dict[str, dict[str, Any]] = {"RLHF": {"objective": "rlhf"}}
RLHF_FLAGS = {"max_steps": 100, "learning_rate": 3e-4, "kl_beta": 0.15, "max_new_tokens": 64}
ABLATIONS: dict[str, dict[str, Any]] = {  # the rows of Table 3
    "CLHA w/o rescore": {"rescore": False},
    "CLHA w/o contrast": {"contrast": False},
    "CLHA w/o margin": {"margin": 0.0},
}
CENTRE = {"min_reward_gap": 1.0}  # of the sweeps: the default that they were made to test, and moved to 0.5
SWEEPS: dict[str, dict[float, dict[str, Any]]] = {  # one setting changed at a time
    "margin": {value: CENTRE | {"margin": value} for value in (0.0, 0.1, 0.3, 1.0, 3.0)},
    "reward gap": {value: CENTRE | {"min_reward_gap": value} for value in (0.0, 0.5, 1.0, 2.0)},
    "weight of the summed SFT": {value: CENTRE | {"alpha": value} for value in (0.0, 0.01, 0.05, 0.2, 1.0)},
    "weight of the mean SFT": {
        value: CENTRE | {"alpha": value, "sft_reduction": "mean"} for value in (0.2, 1.0, 5.0)
    },
}
RELEASE = {"release's recipe": clha.RECIPES["release"] | {"save_every": 0}}
NAMED_BY = {  # the settings that tell the runs of an objective apart
    "clha": ("margin", "min_reward_gap", "alpha", "reduction", "sft_reduction", "rescore", "contrast"),
    "rrhf": ("alpha", "sft_reduction"),
    "pro": ("alpha", "temperatures"),
}


def run_name(settings: dict[str, Any], length: int) -> str:
    """The folder of a run: equal settings, equal name, so that rows of different tables share a run."""
    objective = settings.get("objective", "clha")
    values = {"alpha": 0.05 * (length - 1) ** 2} | settings
    idle = {"min_reward_gap"} if not values.get("rescore", True) else set()
    idle |= {"margin", "min_reward_gap", "reduction"} if not values.get("contrast", True) else set()
    keys = [key for key in NAMED_BY.get(objective, ()) if key not in idle]
    named = {key: values.get(key, getattr(clha.Config, key)) for key in keys}
    return " ".join(
        [
            objective,
            *(
                f"{key}={value:g}" if type(value) is float else f"{key}={value}"
                for key, value in named.items()
            ),
        ]
    )


# ------------------------------------------------------------------------------------------------------------
# Runs


def train(model: Path, data: Path, out: Path, **settings: Any) -> Path:
    """Trains with clha.py unless it is done; the folder of the model. Refuses a run of other settings."""
    config = clha.Config(str(model), str(data), str(out), **settings)
    if (out / "final").exists():
        found = program.read_json(out / "config.json", {}, "the settings of a run")
        differing = [k for k, value in settings.items() if found.get(k) != value and k != "dev_data"]
        if differing:
            raise InputError(
                f"{out}: holds a run of other settings ({', '.join(differing)}); choose another --out"
            )
    else:
        with contextlib.redirect_stdout(io.StringIO()):
            clha.train(config)
    return out / "final"


def train_reward_model(base: Path, data: Path, out: Path, **settings: Any) -> Path:
    """Trains with reward.py unless it is done; the folder of the reward model."""
    defaults = {"norm_penalty": 0.001, "max_length": 1024, "pack_tokens": 4096, "batch_size": 32, "epochs": 1}
    if not out.exists():
        paths = {"model": str(base), "data": str(data), "out": str(out)}
        with contextlib.redirect_stdout(io.StringIO()):
            reward.train(argparse.Namespace(**paths | defaults | settings))
    return out


def evaluate_run(world: World, name: str, model: Path, judge: reward.RewardModel, hindsight: bool) -> None:
    """Evaluates a model into world.folder/name/eval, unless that is done."""
    folder = world.folder / name / "eval"
    if not (folder / "scores.json").exists():
        args = {
            "max_prompt_length": 384,
            "batch_size": 64,
            "hindsight": hindsight,
            "responses": "",
        } | world.generation
        evaluate.evaluate_model(str(model), folder, world.test, judge, argparse.Namespace(**args))


def run_all(world: World, runs: Iterable[dict[str, Any]], seed: int) -> None:
    """Trains and evaluates a run of each of these settings in a world, and evaluates its base model."""
    judge = reward.load_reward_model(str(world.judge))
    evaluate_run(world, "base", world.base, judge, hindsight=False)
    named = {run_name(settings, world.length): settings for settings in runs}
    for name, settings in tqdm(named.items(), desc=str(world.folder), disable=None):
        dev = {"dev_data": str(world.dev_data), "eval_every": 20}
        out = world.folder / name
        if settings in RLHF.values():
            model = train_rlhf(world, out, seed)
        else:
            model = train(world.base, world.train_data, out, **world.settings | dev | settings, seed=seed)
        evaluate_run(world, name, model, judge, hindsight=settings.get("objective") == "coh")


def train_rlhf(world: World, out: Path, seed: int) -> Path:
    """Trains with rlhf.py unless it is done; the folder of the model."""
    if not (out / "final").exists():
        paths = {"model": world.base, "train_data": world.train_data, "output_dir": out}
        flags = paths | {"reward_model": world.folder.parent / "rm_train", "seed": seed} | RLHF_FLAGS
        rlhf.train(
            rlhf.parse_args([text for key, value in flags.items() for text in (f"--{key}", str(value))])
        )
    return out / "final"


def score(model: Path, records: Path, out: Path) -> Path:
    """Scores with reward.py unless it is done."""
    if not out.exists():
        reward.write_scores(reward.load_reward_model(str(model)), read_records(records), out)
    return out


def toy_world(out: Path, seed: int, noise: float, length: int) -> World:
    """A toy world; its seed's base model serves every noise and length, its reward models every length."""
    small = {"batch_size": 64, "pack_tokens": 4096, "activation_checkpointing": "none"}
    home = out / f"seed-{seed}"
    noisy, folder = home / f"noise-{noise:g}", home / f"noise-{noise:g}" / f"length-{length}"
    data = folder / "data"
    if not data.exists():
        toy.write(data, seed, label_noise=noise, length=length)
    cosine = {"learning_rate": 2e-3, "max_steps": 280, "lr_schedule": "cosine"}
    base = train(data / "init", data / "pretrain.jsonl", home / "base", **small | EVERYTHING | cosine)
    models = [
        train_reward_model(base, data / f"{name}.jsonl", noisy / name, learning_rate=7e-4, seed=seed + k)
        for k, name in enumerate(("rm_train", "rm_eval"))
    ]
    return World(
        folder,
        length,
        base,
        score(models[0], data / "train.jsonl", folder / "train.jsonl"),
        score(models[0], data / "dev.jsonl", folder / "dev.jsonl"),
        read_records(data / "test.jsonl"),
        models[1],
        small | {"learning_rate": LEARNING_RATE, "max_steps": STEPS},
        {"gold": True, "max_new_tokens": 64},
    )


def real_world(out: Path, source: str) -> World:
    """Real dialogues with real rewards: one half trains the language model, the other half the judge.

    A LLaMA of 15 M parameters is trained from scratch on the first half, on all its text; the judge is made
    of it with the human labels of the second half, which no run sees. The test items are in neither.
    """
    home, data = out / "real", out / "real" / "data"
    if not data.exists():
        write_halves(data, source)
    if not (home / "base").exists():
        train_language_model(read_records(data / "train.jsonl"), home / "base")
    learning = {"learning_rate": 3e-4, "seed": 0, "max_length": 256}
    judge = train_reward_model(home / "base", data / "judge.jsonl", home / "judge", **learning)
    return World(
        home, 2, home / "base", data / "train.jsonl", data / "dev.jsonl",
        read_records(data / "test.jsonl"), judge,
        REAL,
        {"gold": False, "max_new_tokens": 48, "max_prompt_length": 192},
    )  # fmt: skip


def write_halves(folder: Path, source: str) -> None:
    """Writes train, judge, dev and test.jsonl of the authors' files; no query is in two of them."""
    splits, _ = prepare_data.collect(prepare_data.read_release(source), prepare_data.release_record)
    every = {prepare_data.same_query(record): record for records in splits.values() for record in records}
    records = list(every.values())
    random.Random(0).shuffle(records)
    if len(records) < 1000:
        raise InputError(f"{source}: has {len(records)} different queries; the study needs 1,000 or more")
    test, dev, rest = records[:400], records[400:480], records[480:]
    parts = {"train": rest[::2], "judge": rest[1::2], "dev": dev, "test": test}
    with new_folder(folder) as new:
        for name, part in parts.items():
            write_jsonl(new / f"{name}.jsonl", part)


def train_language_model(records: list[Record], out: Path, steps: int = 240) -> None:
    """A LLaMA of 15 M parameters and its tokenizer, from scratch on all text of the records."""
    generator = random.Random(0)
    texts = [
        f"{clha.render(record['prompt'])} {reply}" for record in records for reply in record["responses"]
    ]
    generator.shuffle(texts)
    tokenizer = toy.train_tokenizer(texts, vocab_size=12288)
    stream = [i for ids in tokenizer(texts).input_ids for i in (*ids, tokenizer.eos_token_id)]
    rows = torch.tensor(stream[: len(stream) // 256 * 256]).view(-1, 256)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=384,
            intermediate_size=1024,
            num_hidden_layers=6,
            num_attention_heads=6,
            max_position_embeddings=512,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            tie_word_embeddings=True,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.1)
    scheduler = transformers.get_scheduler("cosine", optimizer, steps // 20, steps)
    bar = tqdm(range(steps), desc="language model", disable=None)
    for step in bar:
        batch = rows[[(step * 16 + i) % len(rows) for i in range(16)]]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.2f}")
    report = {"loss": loss.item(), "parameters": sum(p.numel() for p in model.parameters()), "steps": steps}
    with new_folder(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "training.json").write_text(json.dumps(report) + "\n")


def plan(noise: float, length: int) -> list[dict[str, Any]]:
    """The settings of all runs on the toy worlds of one kind."""
    rows = methods(length)
    if noise == NOISE:  # all of them; the sweeps at length 2
        online = RLHF.values() if length == 2 and find_spec("trl") else []  # it samples its own replies
        swept = [settings for sweep in SWEEPS.values() for settings in sweep.values()]
        return [
            *rows.values(),
            *ABLATIONS.values(),
            *online,
            *(swept + list(RELEASE.values()) if length == 2 else []),
        ]
    # At other noise rates not every row, to save hours.
    left_out = {"CoH", "PRO w/o temperatures"} | ({"RRHF, CLHA's SFT", "DPO"} if length == 3 else set())
    return [*(rows[name] for name in rows if name not in left_out), *ABLATIONS.values()]


def run_toy(args: argparse.Namespace) -> None:
    """Every objective and ablation on each toy world, and the sweeps on one of each seed."""
    for seed in args.seeds:
        with claim(args.out / "toy" / f"seed-{seed}"):
            for noise, length in itertools.product((NOISE, *NOISES), LENGTHS):
                run_all(toy_world(args.out / "toy", seed, noise, length), plan(noise, length), seed)


def run_real(args: argparse.Namespace) -> None:
    """The main objectives on real text; the seeds draw the order of the data only."""
    world, rows = real_world(args.out, args.source), methods(2) | ABLATIONS
    names = ("SFT", "RRHF, CLHA's SFT", "PRO", "DPO", "CLHA", "CLHA w/o rescore")
    for seed in args.seeds:
        run_all(world._replace(folder=world.folder / f"seed-{seed}"), [rows[name] for name in names], seed)


def write_report(args: argparse.Namespace) -> None:
    """Writes RESULTS.md."""
    import report  # it imports this module

    report.write(args.out)


def main() -> None:
    """Parses the command line and runs a part of the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.error = refuse
    commands = parser.add_subparsers(dest="command", required=True)
    add_command = partial(commands.add_parser, formatter_class=HelpFormatter, description=__doc__)
    toy_study = add_command("toy", help="every objective on the toy world")
    toy_study.set_defaults(run=run_toy)
    real_study = add_command("real", help="every objective on real HH-RLHF text")
    real_study.set_defaults(run=run_real)
    real_study.add_argument(
        "--source", required=True, help="the authors' files: a folder, see prepare_data.py"
    )
    report_study = add_command("report", help="RESULTS.md and its pictures")
    report_study.set_defaults(run=write_report)
    for command in (toy_study, real_study, report_study):
        command.error = refuse
        command.add_argument("--out", type=Path, default=Path("out/study"), help="folder for the runs")
    for command in (toy_study, real_study):
        command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="a world each")
    args = parser.parse_args()
    program.check_ranges(args)
    program.check_out(args.out, "folder")
    args.run(args)


if __name__ == "__main__":
    sys.modules["study"] = sys.modules["__main__"]  # report.py imports this module, not a second one
    program.run(main)
