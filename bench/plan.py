"""What will a run of clha.py need? Memory by part, tokens, steps and hours, before any GPU is rented.

    python bench/plan.py --model M --train_data F --gpu h200 --nproc 8 [settings of clha.py]

Of M only config.json and the tokenizer are read. Memory comes from a step that is run without memory
(footprint.py). Hours come from rates that were measured (bench/rates.jsonl, which bench/rates.py makes, and
out/bench/gpu.jsonl of bench/gpu.py) or, said to be assumed, from --mfu. The tokens of the released loop are
counted with clha.py's ids, EOS included.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
from footprint import PARTS, layers_of, memory, pretend

import clha
import fast
import program
from program import HelpFormatter, loading, refuse
from records import InputError, read_jsonl
from tokens import Examples, load_examples

HERE = Path(__file__).parent
RATES = [HERE / "rates.jsonl", HERE.parent / "out" / "bench" / "gpu.jsonl"]
CARDS = {  # bytes of memory, FLOP/s in bfloat16 without sparsity, as their maker states them
    "h200": (141e9, 990e12),
    "h100": (80e9, 990e12),
    "a100": (80e9, 312e12),
    "a800": (80e9, 312e12),
    "cpu": (0, 0),
}

# ------------------------------------------------------------------------------------------------------------
# Tokens and work


class Lengths(NamedTuple):
    """Tokens of a query."""

    prompt: int
    replies: list[int]

    @property
    def size(self) -> int:
        """Tokens of the query in a pack."""
        return self.prompt + sum(self.replies)

    @property
    def seen(self) -> float:
        """Pairs of positions of which the later one sees the earlier one, or itself."""
        own = sum(n * self.prompt + n * (n + 1) / 2 for n in self.replies)
        return self.prompt * (self.prompt + 1) / 2 + own


def lengths_of(examples: Examples) -> list[Lengths]:
    """Tokens of each query."""
    return [Lengths(len(e["prompt_ids"]), [len(reply) for reply in e["response_ids"]]) for e in examples]


def released_tokens(queries: list[Lengths]) -> int:
    """Tokens that the released loop computes: a row a candidate, padded to the longest of two queries."""
    total = 0
    for two in (queries[i : i + 2] for i in range(0, len(queries), 2)):
        total += max(q.prompt + max(q.replies) for q in two) * sum(len(q.replies) for q in two)
    return total


class Size(NamedTuple):
    """What of a model the work depends on."""

    parameters: int
    in_layers: int  # weights that each token is multiplied with
    head: int  # and those for positions that predict a reply's token
    layers: int
    width: int  # of the heads of a layer together


def size_of(config: PretrainedConfig) -> Size:
    """From config.json alone."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers, text = layers_of(model), config.get_text_config()
    inside = sum(weight.numel() for layer in layers for weight in layer.parameters() if weight.dim() > 1)
    heads = text.num_attention_heads
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    head = model.get_output_embeddings().weight.numel()
    return Size(sum(p.numel() for p in model.parameters()), inside, head, len(layers), width)


def flops(size: Size, queries: list[Lengths], checkpointing: str) -> tuple[float, float]:
    """(needed, done) FLOPs of a forward and backward pass; with "full", layers are done forward once more.

    6 for each weight and token, the LM head on replies only; 12 for each channel of attention and pair of
    positions that see each other.
    """
    tokens, replies = sum(q.size for q in queries), sum(sum(q.replies) for q in queries)
    in_layers = 6 * size.in_layers * tokens + 12 * size.layers * size.width * sum(q.seen for q in queries)
    needed = in_layers + 6 * size.head * replies
    return needed, needed + (in_layers / 3 if checkpointing == "full" else 0)


def read_rates(paths: list[Path]) -> list[dict[str, Any]]:
    """The rows of the files that are there. Raises InputError for one without a rate."""
    rows = [(path, number, row) for path in paths if path.is_file() for number, row in read_jsonl(path)]
    for path, number, row in rows:
        rate, kind = row.get("flops_per_s"), row.get("kind") or row.get("gpu")
        if not isinstance(rate, int | float) or not 0 < rate < 1e20 or not kind:
            raise InputError(f"{path}, line {number}: not a rate, with flops_per_s and kind (or gpu)")
    return [row for _, _, row in rows]


def find_rate(rows: list[dict[str, Any]], kind: str, nproc: int, parameters: int) -> dict[str, Any] | None:
    """The rate of this kind of machine nearest to a run, by processes and then by the model's size."""

    def distance(row: dict[str, Any]) -> tuple[bool, int]:
        return row.get("processes", 1) != nproc, abs(row.get("parameters", 0) - parameters)

    rows = [row for row in rows if kind in str(row.get("kind") or row["gpu"]).lower()]
    return min(rows, key=distance, default=None)


def seconds(rate: dict[str, Any], plan: dict[str, Any]) -> float:
    """How long a run takes at a rate: for its FLOPs, and for what a pass costs whatever its tokens.

    A rate without these two (of another program) is of 6 FLOPs for each parameter and token.
    """
    if "done_flops_per_s" not in rate:
        work, per_s = 6 * plan["parameters"] * plan["tokens"], rate["flops_per_s"]
    else:
        work, per_s = plan["done"], rate["done_flops_per_s"]
    passes = plan["steps"] * plan["passes"] * plan["parameters"] * rate.get("pass_s_per_parameter", 0)
    return plan["filled"] * work / (per_s / rate.get("processes", 1) * plan["nproc"]) + passes


# ------------------------------------------------------------------------------------------------------------
# The plan


def settle(config: clha.Config, kind: str) -> torch.dtype:
    """Fills in what clha.py chooses by the device; gives the dtype of the computation."""
    program.check_ranges(config)
    if config.max_prompt_length >= config.max_length:
        raise InputError(f"--max_prompt_length {config.max_prompt_length}: must be less than --max_length")
    config.pack_tokens = config.pack_tokens or (1024 if kind == "cpu" else 8192)
    auto = torch.float32 if kind == "cpu" else torch.bfloat16
    return auto if config.dtype == "auto" else getattr(torch, config.dtype)


def load(config: clha.Config) -> tuple[PretrainedConfig, Examples, list[tuple[float, list[int]]]]:
    """The model's config, the queries as tokens, and the order of the steps."""
    tokenizer = program.load_tokenizer(config.model)
    with loading(config.model):
        model = transformers.AutoConfig.from_pretrained(config.model, trust_remote_code=False)
    examples = load_examples(config.train_data, tokenizer, config)
    if config.batch_size > len(examples):
        raise InputError(f"--batch_size {config.batch_size}: must be 1 to {len(examples)} (queries)")
    if not (order := clha.data_order(len(examples), config)):
        raise InputError(f"--epochs {config.epochs}: too few for a step")
    return model, examples, order


def make_plan(config: clha.Config, kind: str, nproc: int) -> dict[str, Any]:
    """What a run of `nproc` processes on this kind of machine will need."""
    dtype = settle(config, kind)
    if nproc % config.replicate:
        raise InputError(f"--replicate {config.replicate}: must divide --nproc {nproc}")
    with pretend(nproc):
        model, examples, order = load(config)
        flex = kind != "cpu" and config.attention != "sdpa"
        fill_to = fast.pack_length(examples.sizes, order, config.pack_tokens) if flex else 0
    sizes, loads, passes = examples.sizes, [], []
    for _, indices in order[:50]:
        packs = clha.deal([sizes[i] for i in indices], fill_to or config.pack_tokens, nproc)
        loads += [[indices[i] for i in part] for part in packs]
        passes.append(len(packs) // nproc)
    replies = lambda part: sum(len(r) for i in part for r in examples[i]["response_ids"])  # noqa: E731
    largest = max(loads, key=lambda part: (not fill_to and sum(sizes[i] for i in part), replies(part)))
    batch = clha.pack([examples[i] for i in largest], fill_to=fill_to)
    shards, checkpointing = nproc // config.replicate, config.activation_checkpointing
    parts = memory(model, batch, dtype, shards, checkpointing, max(passes))
    queries, size = lengths_of(examples), size_of(model)
    used = [queries[i] for _, indices in order for i in indices]
    needed, done = flops(size, used, checkpointing)
    computed = fill_to * len(loads) / sum(sizes[i] for part in loads for i in part) if fill_to else 1
    return {
        "model": config.model, "kind": kind, "nproc": nproc, "parameters": size.parameters, "memory": parts,
        "pack": batch["input_ids"].shape[1], "checkpointing": checkpointing,
        "queries": len(queries), "steps": len(order), "passes": statistics.mean(passes),
        "epoch_tokens": sum(sizes), "released_tokens": released_tokens(queries),
        "filled": computed, "tokens": sum(q.size for q in used), "needed": needed, "done": done,
    }  # fmt: skip


def report(plan: dict[str, Any], rates: list[dict[str, Any]], mfu: float) -> str:
    """The plan as Markdown."""
    kind, nproc, total = plan["kind"], plan["nproc"], plan["memory"].total()
    room, peak_flops = CARDS[kind]
    of = f" of {room / 1e9:,.0f} ({total / room:.0%})" if room else ""
    lines = [
        f"# {plan['model']} on {nproc} x {kind}", "",
        f"Memory of a rank at the peak of a step ({plan['passes']:.1f} passes, {plan['pack']:,} tokens in "
        f"the largest pack, checkpointing {plan['checkpointing']}), computed, not measured:", "",
        "| part | GB |", "| --- | --- |",
        *(f"| {part} | {plan['memory'][part] / 1e9:.2f} |" for part in PARTS),
        f"| **total** | **{total / 1e9:.2f}**{of} |", "",
        "Not counted: context, NCCL, workspaces of kernels, what the allocator leaves unused.", "",
        "| work | |", "| --- | --- |",
        f"| parameters | {plan['parameters']:,} |", f"| queries | {plan['queries']:,} |",
        f"| tokens an epoch, each prompt once | {plan['epoch_tokens']:,} |",
        f"| the same by the released loop, padded | {plan['released_tokens']:,} "
        f"({plan['released_tokens'] / plan['epoch_tokens']:.2f} times) |",
        f"| computed to fill packs of one length | {plan['filled'] - 1:+.1%} |",
        f"| steps, and tokens in all of them | {plan['steps']:,}, {plan['tokens']:,} |",
        f"| FLOPs needed, and done | {plan['needed']:.3g}, {plan['done']:.3g} |", "",
    ]  # fmt: skip
    rate = find_rate(rates, kind, nproc, plan["parameters"])
    if rate:
        hours = seconds(rate, plan) / 3600
        lines.append(
            f"Time: {hours:.3g} hours, {hours * nproc:.3g} of a process, at the rate measured on "
            f"{rate.get('machine', kind)} with {rate.get('processes', 1)} process(es) and {rate['model']}."
        )
    else:
        lines.append(f"Time: no rate of {kind} is measured yet; `python bench/gpu.py` on one measures it.")
    if mfu and peak_flops:
        hours = plan["filled"] * plan["needed"] / (mfu * peak_flops * nproc) / 3600
        lines.append(
            f"Assumed, not measured: at {mfu:.0%} of {peak_flops / 1e12:,.0f} TFLOP/s, {hours:.3g} hours, "
            f"{hours * nproc:.3g} GPU-hours."
        )
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------
# The command line


def main() -> None:
    """Plans a run; flags that are not ours are clha.py's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.error = refuse
    flag = parser.add_argument
    flag("--gpu", choices=CARDS, default="h200", help="the card, or cpu")
    flag("--nproc", type=int, default=8, metavar="N", help="processes, one a card")
    flag("--mfu", type=float, default=0.0, metavar="F", help="share of the card's FLOP/s that is assumed")
    flag("--rates", nargs="+", type=Path, metavar="FILE", help="of measured rates, instead of those two")
    args, settings = parser.parse_known_args()
    if not 1 <= args.nproc < 2**20:
        raise InputError(f"--nproc {args.nproc}: must be 1 or more")
    if not 0 <= args.mfu <= 1:
        raise InputError(f"--mfu {args.mfu}: must be 0 to 1, a share of the card's FLOP/s")
    with tempfile.TemporaryDirectory() as folder:
        config = clha.parse_args([*settings, "--output_dir", folder])
        rates = read_rates(args.rates or RATES)
        print(report(make_plan(config, args.gpu, args.nproc), rates, args.mfu))


if __name__ == "__main__":
    program.run(main)
