"""How far does a run scale? Hours on 8, 64 and 512 cards, and where more of them stop paying.

    python -m bench.scaling --check                     the model of it against published runs
    python -m bench.scaling --model M --train_data F    a run [settings of clha.py]

In each forward and backward pass FSDP gathers the weights twice, in bfloat16, and scatters the gradients
once, in float32: 8 bytes per parameter, over NVLink within a machine, over the adapters of its cards between
machines. How much of that hides behind the matrix products is not known beforehand, so times are a range: all
of it, to none. HSDP (--replicate) shards within a machine, and then averages the gradients over the machines.
"""

import statistics
import sys
import tempfile
from dataclasses import replace
from typing import NamedTuple

import torch

import clha
import reward
from bench import plan

NVLINK = 450e9  # bytes/s of a card, each way: H100, H200 (NVIDIA)
ADAPTER = 50e9  # bytes/s of a card's network adapter: 400 Gb/s
REACHED = 0.8  # of these by NCCL, for large messages
GATHERED, REDUCED = 4, 4  # bytes per parameter and pass; the latter only of those that train


class Layout(NamedTuple):
    """Which cards share what."""

    cards: int
    per_machine: int = 8
    replicate: int = 1  # copies of the sharded model


def communication(parameters: float, trained: float, layout: Layout, adapter: float = ADAPTER) -> float:
    """Seconds that a forward and backward pass spends on sending weights and gradients."""
    shards = layout.cards // layout.replicate
    # What a machine lacks enters it through all of its adapters, and is passed on over NVLink.
    alone = shards <= layout.per_machine
    speed = NVLINK if alone else min(NVLINK, layout.per_machine * adapter)
    traffic = (GATHERED * parameters + REDUCED * trained) * (shards - 1) / shards
    copies = layout.replicate
    averaged = 2 * REDUCED * trained / shards * (copies - 1) / copies  # an all-reduce of a card's shard
    return (traffic / speed + averaged / adapter) / REACHED


class Published(NamedTuple):
    """Tokens/s per card of one model on two numbers of cards, each with 16,384 tokens a pass."""

    source: str
    parameters: float
    fewer: Layout
    fewer_rate: float
    more: Layout
    more_rate: float

    def predicted(self) -> tuple[float, float]:
        """The rate on more cards, by that on fewer: nothing hidden, and all."""
        seconds = 16_384 / self.fewer_rate
        before = communication(self.parameters, self.parameters, self.fewer)
        after = communication(self.parameters, self.parameters, self.more)
        return 16_384 / (seconds - before + after), 16_384 / max(seconds, after)


# benchmarks/mfu_scaling of KempnerForge; of torchtitan benchmarks/llama3_h100_202412_torchtitan.md and
# benchmarks/llama3_8b_h200_2025-06_torchtitan.md
PUBLISHED = [
    Published("KempnerForge, H200", 8.03e9, Layout(1, 4), 10_471, Layout(2, 4), 18_728 / 2),
    Published("KempnerForge, H200", 8.03e9, Layout(1, 4), 10_471, Layout(4, 4), 38_983 / 4),
    Published("torchtitan, H100", 8.03e9, Layout(8), 5_762, Layout(128), 5_605),
    Published("torchtitan, H100, compiled", 8.03e9, Layout(8), 6_667, Layout(128), 6_514),
    Published("torchtitan, H100, compiled, float8", 8.03e9, Layout(8), 8_532, Layout(128), 8_380),
    Published("torchtitan, H200, compiled, float8", 8.03e9, Layout(32), 10_938, Layout(64), 10_753),
]


def check() -> str:
    """The table of published runs, and how far each is from its predicted range."""
    lines = [["run", "cards", "tokens/s per card", "predicted", "measured", "outside the range by"]]
    for run in PUBLISHED:
        low, high = run.predicted()
        off = max(low - run.more_rate, run.more_rate - high, 0) / run.more_rate
        cards = f"{run.parameters / 1e9:.1f}B, {run.fewer.cards} to {run.more.cards}"
        numbers = [f"{run.fewer_rate:,.0f}", f"{low:,.0f} to {high:,.0f}", f"{run.more_rate:,.0f}"]
        lines.append([run.source, cards, *numbers, f"{off:.1%}"])
    return reward.markdown(lines)


LAYOUTS = [Layout(8), Layout(64), Layout(64, replicate=8), Layout(512), Layout(512, replicate=64)]


def table(config: clha.Config, flops_per_s: float, adapter: float) -> str:
    """A run on more and more cards; the last column is the batch size whose computing hides all sending."""
    header = ["cards", "sharding", "tokens of a card's pass", "computing, s", "sending, s", "hours"]
    lines = [[*header, "card-hours", "even at, queries a step"]]
    for layout in LAYOUTS:
        with plan.fake_processes(layout.cards):
            run = plan.prepare(replace(config, replicate=layout.replicate), torch.device("cuda"))
        sizes = run.examples["size"][:]
        steps = [[sizes[i] for i in step] for step in run.order[:50].tolist()]
        packs = statistics.mean(len(clha.balance(step, run.limit, layout.cards)) for step in steps)
        hours = len(run.order) * packs / layout.cards / 3600  # if a pass took a second
        parameters, trained = plan.count_parameters(run.model, config)
        tokens_per_s = flops_per_s / plan.flops_per_token(parameters, trained)
        computing = run.limit / tokens_per_s
        sending = communication(parameters, trained, layout, adapter)
        low, high = hours * max(computing, sending), hours * (computing + sending)
        even = sending * tokens_per_s * layout.cards / statistics.mean(sizes)
        names = [f"{layout.cards}", "FSDP" if layout.replicate == 1 else "HSDP", f"{run.limit:,}"]
        numbers = [f"{computing:.2f}", f"{sending:.2f}", f"{low:.3f} to {high:.3f}"]
        cost = f"{low * layout.cards:,.1f} to {high * layout.cards:,.1f}"
        lines.append([*names, *numbers, cost, f"{even:,.0f}"])
    return reward.markdown(lines)


def main() -> None:
    """Prints one of the tables."""
    if sys.argv[1:] == ["--check"]:
        print(check())
        return
    parser = reward.Parser(clha.Config, description=__doc__)
    flag = parser.add_argument
    flag("--mfu", type=float, default=50, help="percent of an H200's FLOP/s that a step reaches")
    flag("--adapter", type=float, default=400, metavar="GBIT", help="Gb/s of a card's network adapter")
    with tempfile.TemporaryDirectory() as folder:  # gets the tokens
        config, args = parser.parse_args_into_dataclasses([*sys.argv[1:], "--output_dir", folder])
        reward.check_numbers(args, positive=("mfu", "adapter"))
        print(table(config, args.mfu / 100 * plan.CARDS["h200"][1], args.adapter * 1e9 / 8))


if __name__ == "__main__":
    clha.run(main)
