"""How the default recipe was chosen: gold reward on the toy world for margins, reward gaps, SFT reductions.

    python bench/recipe.py --seeds 3 --out out/recipe

Every seed has its own data, base model and reward model, which all settings share. One setting at a time is
changed from clha.py's default; the release's recipe and the paper's ablations are settings too. A run that is
finished is not run again. Prints the mean gold reward of greedy replies to the test prompts, its standard
deviation over seeds, and the mean paired difference from the default with its standard error.
"""

import argparse
import contextlib
import io
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
import clha
import evaluate
import reward
import toy

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    **{f"margin {margin:g}": {"margin": margin} for margin in (0.0, 0.1, 0.6, 1.0, 3.0)},
    **{f"gap {gap:g}": {"min_reward_gap": gap} for gap in (0.0, 0.5, 2.0, 3.0)},
    "SFT by mean": {"sft_reduction": "mean"},
    "SFT by mean, alpha 1": {"sft_reduction": "mean", "alpha": 1.0},
    "release (margin 3, gap 3)": clha.RECIPES["release"] | {"save_every": 0},
    "w/o rescore": {"rescore": False},
    "w/o contrast": {"contrast": False},
}
SMALL = {"batch_size": 64, "pack_tokens": 4096, "activation_checkpointing": False}
SFT = {"contrast": False, "rescore": False, "ranking": "given", "sft_target": "chosen"}


def train(model: Path, data: Path, out: Path, **settings: Any) -> Path:
    """Trains with clha.py unless it is done; the folder of the model."""
    if not (out / "final").exists():
        with contextlib.redirect_stdout(io.StringIO()):
            clha.train(clha.Config(str(model), str(data), str(out), **SMALL | settings))
    return out / "final"


def prepare(out: Path, seed: int) -> tuple[Path, Path, list[clha.Record]]:
    """Data, base model and scored training data of a seed: (base, scored records, test records)."""
    data, scored = out / "data", out / "train.jsonl"
    if not data.exists():
        toy.write(data, seed=seed)
    base = train(
        data / "init",
        data / "pretrain.jsonl",
        out / "base",
        **SFT,
        learning_rate=2e-3,
        max_steps=280,
        lr_schedule="cosine",
    )
    if not (out / "rm_train").exists():
        reward.train(
            argparse.Namespace(
                model=str(base),
                data=str(data / "rm_train.jsonl"),
                out=str(out / "rm_train"),
                epochs=1,
                batch_size=32,
                learning_rate=7e-4,
                norm_penalty=0.001,
                max_length=1024,
                pack_tokens=4096,
                seed=seed,
            )
        )
    if not scored.exists():
        judge = reward.load_reward_model(str(out / "rm_train"))
        clha.write_jsonl(scored, reward.score_records(judge, clha.read_records(data / "train.jsonl")))
    return base, scored, clha.read_records(data / "test.jsonl")


def gold(model: Path, test: list[clha.Record]) -> float:
    """Mean gold reward of a model's greedy replies; kept beside the model."""
    kept = model.parent / "gold.json"
    if not kept.exists():
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        prompts = [record["prompt"] for record in test]
        replies = evaluate.generate(loaded, clha.load_tokenizer(str(model)), prompts, max_new_tokens=64)
        kept.write_text(json.dumps(statistics.mean(map(toy.gold, prompts, replies))))
    return json.loads(kept.read_text())


def main() -> None:
    """Runs every setting on every seed and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=clha.HelpFormatter)
    parser.error = clha.refuse
    parser.add_argument("--seeds", type=int, default=3, help="worlds")
    parser.add_argument("--out", default="out/recipe", help="folder for the runs")
    args = parser.parse_args()
    results: dict[str, list[float]] = {name: [] for name in ["base", "SFT on chosen", *SETTINGS]}
    for seed in range(args.seeds):
        out = Path(args.out) / f"seed-{seed}"
        base, scored, test = prepare(out, seed)
        results["base"].append(gold(base, test))
        tuned = {"learning_rate": 5e-4, "max_steps": 80, "seed": seed}
        sft = train(base, out / "data/train.jsonl", out / "sft", **SFT | tuned)
        results["SFT on chosen"].append(gold(sft, test))
        for name, setting in SETTINGS.items():
            results[name].append(
                gold(train(base, scored, out / name.replace("/", ""), **tuned | setting), test)
            )
            print(f"seed {seed}, {name}: {results[name][-1]:.2f}", file=sys.stderr, flush=True)
    print("| setting | gold | sd | minus default |\n| --- | --- | --- | --- |")
    for name, values in results.items():
        paired = [a - b for a, b in zip(values, results["default"], strict=True)]
        error = statistics.stdev(paired) / len(paired) ** 0.5 if len(paired) > 1 else float("nan")
        spread = statistics.stdev(values) if len(values) > 1 else float("nan")
        difference = f"{statistics.mean(paired):+.2f} +- {error:.2f}"
        print(f"| {name} | {statistics.mean(values):.2f} | {spread:.2f} | {difference} |")


if __name__ == "__main__":
    clha.run(main)
