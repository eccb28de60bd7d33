"""What will a run of clha.py need? Memory by part, tokens, steps and hours, before any GPU is rented.

    python -m bench.plan --model M --train_data F --gpu h200 --nproc 8 [settings of clha.py]

Only config.json and the tokenizer of M are read. Memory is what PyTorch's own tracker adds up over a step
with fake tensors, which have no memory. Hours are 6 FLOPs per parameter and token (4 where a weight does not
train, with --lora_rank) at a measured rate (bench/rates.jsonl, by bench.rates, and out/bench/gpu.jsonl, by
bench.gpu), and at a range of assumed rates. The tokens of the released loop
are counted with clha.py's ids, EOS included. --memory_gb and --tflops describe any other card.
"""

import statistics
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
import torch.distributed as dist
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, PretrainedConfig

import clha
import reward

HERE = Path(__file__).parent
RATES = [HERE / "rates.jsonl", HERE.parent / "out" / "bench" / "gpu.jsonl"]
CARDS = {  # bytes of memory, FLOP/s in bfloat16 without sparsity, as their maker states them
    "h200": (141e9, 990e12),
    "h100": (80e9, 990e12),
    "a100": (80e9, 312e12),
    "a800": (80e9, 312e12),
    "rtx4090": (24e9, 165e12),
    "other": (0, 0),
    "cpu": (0, 0),
}
ASSUMED = (0.5, 0.3)  # shares of a card's FLOP/s, where no rate is measured

# Memory -----------------------------------------------------------------------------------------------------

PARTS = {  # the tracker's names, and what they are
    "Sharded Param": "weights, sharded: fp32, but bf16 where they do not train",
    "Sharded Grad": "gradients, fp32 shard",
    "OptState": "AdamW's two moments, fp32 shard",
    "Unsharded Param": "gathered weights",
    "All Gather": "buffers that weights are gathered in",
    "Unsharded Grad": "gradients not yet reduced",
    "Reduce Scatter": "buffers that gradients are reduced in",
    "Activation": "activations, kept or recomputed, and logits",
    "Temp": "gradients of activations, and temporary tensors",
}


@contextmanager
def fake_processes(number: int) -> Iterator[None]:
    """A process group of so many of which this is the first; what it sends goes nowhere."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=number)
    try:
        yield
    finally:
        dist.destroy_process_group()


def memory(
    model: PretrainedConfig, config: clha.Config, examples: list[clha.Example], shards: int, passes: int = 2
) -> dict[str, int]:
    """Bytes of each of PARTS at the peak of a step of rank 0, whose weights are divided over `shards`.

    `passes` as many packs as a process has in a step; the third is like the second. Attention is query by
    query, as on a CPU: flex_attention keeps the same, apart from the masks, which are small.
    """
    batch = clha.pack(examples)
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # FSDP does, harmlessly
    with fake_processes(shards):
        policy = clha.build_policy(model, replace(config, replicate=1), torch.device("cpu"))
        with FakeTensorMode(allow_non_fake_inputs=True):
            policy.to_empty(device="cpu")  # until here address space was taken, and no memory
            policy.model.tie_weights()
            optimizer = torch.optim.AdamW(policy.parameters(), fused=True)
            # A step first, as the tracker would count what DTensor allocates when an operation is new to it.
            policy(batch).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            with FSDPMemTracker(policy, optimizer) as tracker:
                for _ in range(min(passes, 2)):
                    policy(batch).sum().backward()
                    tracker.reset_mod_stats()  # it wants to be told of each further pass
                optimizer.step()
                optimizer.zero_grad()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    return {part: peak.get(part, 0) for part in PARTS}


# Work and hours ---------------------------------------------------------------------------------------------


def flops_per_token(parameters: int, trained: int) -> float:
    """As they are usually counted: 6 per parameter, 4 if it has no gradient; none for recomputing."""
    return 6 * trained + 4 * (parameters - trained)


def released_tokens(longest: list[int], candidates: list[int]) -> int:
    """Tokens that the released loop computes: a row per candidate, padded to the longest of two queries."""
    return sum(max(longest[i : i + 2]) * sum(candidates[i : i + 2]) for i in range(0, len(longest), 2))


@dataclass
class Plan:
    """What a run needs."""

    model: str
    kind: str  # of CARDS
    nproc: int
    room: float  # bytes of memory of a card
    peak: float  # FLOP/s of a card
    parameters: int
    trained: int  # of the parameters
    memory: dict[str, int]  # of a rank, by part
    pack: int  # tokens of the largest pack
    queries: int
    epoch_tokens: int
    released_tokens: int
    steps: int
    passes: float  # of a process in a step, on average
    tokens: int  # of all steps
    filled: float  # tokens computed per real token, where packs have one length

    @property
    def flops(self) -> float:
        """Of the run, for tokens that fill packs too."""
        return flops_per_token(self.parameters, self.trained) * self.tokens * self.filled


class Run(NamedTuple):
    """What clha.py makes of its settings before it loads the model."""

    config: clha.Config
    model: PretrainedConfig
    examples: datasets.Dataset
    order: torch.Tensor  # (steps, batch_size)
    limit: int  # tokens of a pack
    fill: bool  # whether packs are filled to it, for flex_attention


def prepare(config: clha.Config, device: torch.device) -> Run:
    """The run of these settings on such devices, in the process group that there is."""
    config = clha.settle(config, device)
    tokenizer = clha.load_tokenizer(config.model, config.template)
    model = clha.load(transformers.AutoConfig, config.model)
    examples = clha.load_examples(config.train_data, tokenizer, config)
    sizes = examples["size"][:]
    order = clha.data_order(len(examples), config)
    limit = clha.pack_limit(sizes, order, config.pack_tokens)
    fill = device.type == "cuda" and not getattr(model, "attention_dropout", 0)
    return Run(config, model, examples, order, limit, fill)


def count_parameters(model: PretrainedConfig, config: clha.Config) -> tuple[int, int]:
    """All of a model's parameters, and those that train."""
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(model)
        clha.add_adapters(built, config)
    return built.num_parameters(), built.num_parameters(only_trainable=True)


def make_plan(config: clha.Config, kind: str, nproc: int, room: float = 0, peak: float = 0) -> Plan:
    """What a run of `nproc` processes on this kind of machine will need."""
    with fake_processes(nproc):
        run = prepare(config, torch.device("cpu" if kind == "cpu" else "cuda"))
    sizes = run.examples["size"][:]
    packs = []
    passes = []
    for step in run.order[:50].tolist():
        shares = clha.balance([sizes[i] for i in step], run.limit, nproc)
        packs += [[step[i] for i in share] for share in shares]
        passes.append(len(shares) // nproc)
    largest = max(packs, key=lambda pack: sum(sizes[i] for i in pack))
    batch = [run.examples[i] for i in largest]
    if run.fill:  # a query without responses fills the pack
        missing = run.limit - sum(sizes[i] for i in largest)
        batch.append({"prompt_ids": [0] * missing, "response_ids": [], "rewards": []})
    real = sum(sizes[i] for pack in packs for i in pack)
    parameters, trained = count_parameters(run.model, config)
    return Plan(
        model=config.model,
        kind=kind,
        nproc=nproc,
        room=room or CARDS[kind][0],
        peak=peak or CARDS[kind][1],
        parameters=parameters,
        trained=trained,
        memory=memory(run.model, run.config, batch, nproc // config.replicate, max(passes)),
        pack=clha.pack(batch).input_ids.shape[1],
        queries=len(sizes),
        epoch_tokens=sum(sizes),
        released_tokens=released_tokens(run.examples["longest"][:], run.examples["count"][:]),
        steps=len(run.order),
        passes=statistics.mean(passes),
        tokens=torch.tensor(sizes)[run.order].sum().item(),
        filled=run.limit * len(packs) / real if run.fill else 1.0,
    )


def find_rate(rates: list[dict[str, Any]], plan: Plan) -> dict[str, Any] | None:
    """The rate of this kind of machine nearest to a run, by processes and then by the model's size."""
    own = [rate for rate in rates if plan.kind in rate["kind"].lower()]
    own.sort(key=lambda rate: (rate["processes"] != plan.nproc, abs(rate["parameters"] - plan.parameters)))
    return own[0] if own else None


def hours_at(flops_per_s: float, plan: Plan) -> float:
    """How long a run takes at this rate of each of its processes."""
    return plan.flops / flops_per_s / plan.nproc / 3600


def hours(plan: Plan) -> str:
    """Hours by a measured rate, and by assumed ones."""
    rate = find_rate([row for path in RATES if path.exists() for _, row in clha.read_jsonl(path)], plan)
    text = f"Time: no rate of {plan.kind} is measured yet; `python -m bench.gpu` on one measures it."
    if rate:
        found = hours_at(rate["flops_per_s"] / rate["processes"], plan)
        text = f"Time: {found:.3g} hours, at the rate measured with {rate['model']} on "
        text += f"{rate['processes']} process(es) of {rate['machine']}."
    if plan.peak:
        low, high = [hours_at(share * plan.peak, plan) for share in ASSUMED]
        shares = " to ".join(f"{share:.0%}" for share in ASSUMED)
        text += f"\nAssumed, not measured: {low:.3g} to {high:.3g} hours, at {shares} of the card's "
        text += f"{plan.peak / 1e12:,.0f} TFLOP/s."
    return text


def report(plan: Plan) -> str:
    """The plan as Markdown."""
    total = sum(plan.memory.values())
    share = f" of {plan.room / 1e9:,.0f} ({total / plan.room:.0%})" if plan.room else ""
    parts = "\n".join(f"| {PARTS[part]} | {size / 1e9:.2f} |" for part, size in plan.memory.items())
    return f"""# {plan.model} on {plan.nproc} x {plan.kind}

Memory of a rank at the peak of a step ({plan.passes:.1f} passes, {plan.pack:,} tokens in the largest pack),
computed, not measured:

| part | GB |
| --- | --- |
{parts}
| **total** | **{total / 1e9:.2f}**{share} |

Not counted: CUDA context, NCCL, kernel workspaces, the allocator's unused memory.

| work | |
| --- | --- |
| parameters, and how many of them train | {plan.parameters:,}, {plan.trained:,} |
| queries | {plan.queries:,} |
| tokens per epoch, each prompt once | {plan.epoch_tokens:,} |
| the same by the released loop, padded | {plan.released_tokens / plan.epoch_tokens:.2f} times as many |
| computed to fill packs of one length | {plan.filled - 1:+.1%} |
| steps, and tokens in all of them | {plan.steps:,}, {plan.tokens:,} |
| FLOPs, 6 per parameter and token, 4 if it does not train | {plan.flops:.3g} |
| disk for 3 checkpoints, two kept, one being written, GB | {3 * 12 * plan.trained / 1e9:,.1f} |

{hours(plan)}"""


def main() -> None:
    """Plans a run, of clha.py's settings."""
    parser = reward.Parser(clha.Config, description=__doc__)
    flag = parser.add_argument
    flag("--gpu", choices=CARDS, default="h200", help="the card, or cpu")
    flag("--nproc", type=int, default=8, metavar="N", help="processes, one per card")
    flag("--memory_gb", type=float, default=0.0, metavar="GB", help="of the card, if it is another")
    flag("--tflops", type=float, default=0.0, metavar="N", help="of the card in bfloat16, if it is another")
    with tempfile.TemporaryDirectory() as folder:  # gets the tokens
        config, args = parser.parse_args_into_dataclasses([*sys.argv[1:], "--output_dir", folder])
        reward.check_numbers(args, positive=("nproc",))
        print(report(make_plan(config, args.gpu, args.nproc, 1e9 * args.memory_gb, 1e12 * args.tflops)))


if __name__ == "__main__":
    clha.run(main)
