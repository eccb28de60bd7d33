"""How does a step scale? Two processes measured here, and many GPUs by a model of what they send.

    python bench/scaling.py --measure --batch_size 8     1 and 2 processes, a core and a thread each
    python bench/scaling.py --batch_size 1024 --mfu 0.5      8 to 512 GPUs, modelled, not measured

Measured: the same queries a step on 1 and 2 processes in turns; efficiency = t1 / (2 t2), a median of ratios.
Modelled: each pass gathers all weights in bfloat16 twice, forward and backward, and reduces their gradients
in fp32; with a copy of the model a machine (HSDP, --replicate) that stays inside it, and shards of gradients
are summed between machines. A gather or sum over machines goes through all their network ports at once.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import lengths
import plan
import rates

import fast
import program
from program import HelpFormatter, refuse
from records import InputError

MACHINE = 8  # GPUs


class Step(NamedTuple):
    """A step of one GPU, in milliseconds."""

    tokens: float  # of real queries
    passes: int
    pack: int  # tokens of a pass
    compute: float
    sent: float  # gathers and reductions, if nothing else were done
    exposed: float  # what of it no computation hides
    efficiency: float  # time for the real tokens alone, of the time of the step


def wire_ms(size: float, group: int, machines: int, args: argparse.Namespace) -> float:
    """Milliseconds to gather, or reduce and scatter, `size` bytes over a group on so many machines."""
    if group == 1:
        return 0.0
    share, ways = (group - 1) / group, [args.nvlink_gb_s]
    if machines > 1:
        share, ways = 1.0, [args.nvlink_gb_s, args.network_gb_s * group / machines]
    return size * share / min(ways) / 1e6 + (group - 1) * args.latency_us / 1e3


def step(gpus: int, copies: int, args: argparse.Namespace) -> Step:
    """A step on so many GPUs with so many whole copies of the model; queries are dealt evenly."""
    queries = args.batch_size * (gpus / MACHINE if args.weak else 1)
    tokens, group = queries * args.query_tokens / gpus, gpus // copies
    passes = max(1, math.ceil(tokens / args.pack_tokens))
    pack = math.ceil(max(tokens / passes, args.longest) / fast.TILE) * fast.TILE
    ms = 6 * args.parameters / (args.mfu * plan.CARDS[args.gpu][1]) * 1e3  # of a token
    units = args.layers + 1  # the layers; embedding and head are taken for one more
    part, machines = args.parameters / units, math.ceil(group / MACHINE)
    gather = wire_ms(2 * part, group, machines, args)
    reduce = wire_ms(4 * part, group, machines, args)
    if copies > 1:  # a sum is a reduction and a gather of the shard
        shard, over = 4 * part / group, (copies - 1) / copies
        between = args.nvlink_gb_s if gpus <= MACHINE else args.network_gb_s
        reduce += 2 * (shard * over / between / 1e6 + (copies - 1) * args.latency_us / 1e3)
    # Of a unit's FLOPs a fourth is the forward pass; the rest is that again, and the gradients.
    forward, backward = ms * pack / units / 4, ms * pack / units * 3 / 4
    late = max(0, gather - forward) + max(0, gather + reduce - backward)
    exposed = passes * (units * late + gather + reduce)  # the first gather and last reduction hide nowhere
    compute = passes * ms * pack
    sent = passes * units * (2 * gather + reduce)
    return Step(tokens, passes, pack, compute, sent, exposed, ms * tokens / (compute + exposed))


def model(args: argparse.Namespace) -> str:
    """The table of the modelled steps, headed by what it assumes."""
    peak_flops = plan.CARDS[args.gpu][1] / 1e12
    lines = [
        f"**Modelled, not measured.** Assumed: {args.parameters / 1e9:.2f} billion parameters in "
        f"{args.layers} layers; {args.mfu:.0%} of the {args.gpu}'s {peak_flops:,.0f} TFLOP/s, for packs of "
        f"any length; {args.nvlink_gb_s:g} GB/s inside a machine of {MACHINE} and {args.network_gb_s:g} GB/s "
        f"between machines, a GPU and a direction; {args.latency_us:g} us for each other member of a group; "
        f"a layer's messages hide behind another layer's work. A step has {args.batch_size} queries"
        f"{' for each 8 GPUs' if args.weak else ''} of {args.query_tokens:g} tokens, the longest "
        f"{args.longest}; packs have at most {args.pack_tokens:,}. AdamW and uneven packs are left out.",
        "",
        "| GPUs | layout | tokens a GPU | passes x pack | compute ms | gather/reduce ms | exposed ms | "
        "efficiency |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for gpus in args.gpus:
        for copies in sorted({1, max(1, gpus // MACHINE)}):
            s = step(gpus, copies, args)
            layout = "FSDP" if copies == 1 else f"HSDP, {copies} copies"
            lines.append(
                f"| {gpus} | {layout} | {s.tokens:,.0f} | {s.passes} x {s.pack:,} | {s.compute:,.0f} | "
                f"{s.sent:,.0f} | {s.exposed:,.0f} | {s.efficiency:.0%} |"
            )
    few = [gpus for gpus in args.gpus if gpus > args.batch_size and not args.weak]
    if few:
        lines += [
            "",
            f"With {args.batch_size} queries a step, {few[0]} GPUs and more have less than one each: a query "
            "is not divided, so the others compute what counts nowhere. More GPUs then help only with a "
            "larger --batch_size (--weak).",
        ]
    return "\n".join(lines)


def measure(names: list[str], rounds: int, steps: int, batch_size: int) -> None:
    """Efficiency of two processes on this machine."""
    print("| model | queries a step | t1 / (2 t2), median | of rounds |\n| --- | --- | --- | --- |")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            flags = ["--models", name, "--steps", str(steps), "--batch_size", str(batch_size)]
            ratios = []
            for _ in range(rounds):
                speed = [rates.launch(flags, n, Path(folder) / "rate")["tokens_per_s"] for n in (1, 2)]
                ratios.append(speed[1] / (2 * speed[0]))
            rows.append({"model": name, "queries": batch_size, "efficiency": statistics.median(ratios)})
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
            print(f"| {name} | {batch_size} | {rows[-1]['efficiency']:.2f} | {spread} |", flush=True)
    print(json.dumps(rows))


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.error = refuse
    flag = parser.add_argument
    flag("--measure", action="store_true", help="1 and 2 processes here, instead of the model")
    flag("--models", nargs="+", choices=lengths.MODELS, default=list(lengths.MODELS), help="of --measure")
    flag("--rounds", type=int, default=5, metavar="N", help="of --measure: 1 process, then 2")
    flag("--steps", type=int, default=3, metavar="N", help="of --measure, a round")
    flag("--batch_size", type=int, default=128, metavar="N", help="queries a step")
    flag("--weak", action="store_true", help="--batch_size is that of 8 GPUs, and grows with them")
    flag("--gpus", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256, 512], metavar="N", help="how many")
    flag("--gpu", choices=[name for name in plan.CARDS if name != "cpu"], default="h200", help="the card")
    flag("--mfu", type=float, default=0.4, metavar="F", help="assumed share of the card's FLOP/s")
    flag("--parameters", type=float, default=6.74e9, metavar="N", help="of the model; LLaMA-7B's")
    flag("--layers", type=int, default=32, metavar="N", help="of the model")
    flag("--query_tokens", type=float, default=262, metavar="N", help="mean; prompt and two replies of HH")
    flag("--longest", type=int, default=640, metavar="N", help="tokens of the longest query, 384 + 2 x 128")
    flag("--pack_tokens", type=int, default=8192, metavar="N", help="as of clha.py")
    flag("--nvlink_gb_s", type=float, default=450, metavar="F", help="of a GPU inside a machine, one way")
    flag("--network_gb_s", type=float, default=50, metavar="F", help="of a GPU between machines, one way")
    flag("--latency_us", type=float, default=3, metavar="F", help="for each other member of a group")
    args = parser.parse_args(argv)
    program.check_ranges(args)
    for name, value in vars(args).items():
        if type(value) in (int, float) and value <= 0 and name != "latency_us":
            raise InputError(f"--{name} {value}: must be more than 0")
    if args.mfu > 1:
        raise InputError(f"--mfu {args.mfu}: must be 1 or less, a share of the card's FLOP/s")
    if wrong := [gpus for gpus in args.gpus if gpus < 1 or (gpus > MACHINE and gpus % MACHINE)]:
        raise InputError(f"--gpus {wrong[0]}: must be whole machines of {MACHINE}, or less than one")
    return args


def main() -> None:
    """Measures, or models."""
    args = parse(sys.argv[1:])
    if args.measure:
        measure(args.models, args.rounds, args.steps, args.batch_size)
    else:
        print(model(args))


if __name__ == "__main__":
    program.run(main)
