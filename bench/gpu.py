"""What does a step of LLaMA-7B cost on one GPU? Whole optimizer steps on the same queries:

    ours          clha.py: packs of one length, flex_attention
    unshared      the same, with the prompt computed for each response
    padded        the release: 2 queries at a time, a padded forward per candidate, full log-softmax
    concatenated  8 queries at a time, one padded forward over all prompt-response texts, full logits

    python -m bench.gpu --stages numerics ways profile
    python -m bench.gpu --stages sweep --pack_tokens 4096 16384 --checkpointing full none
    python -m bench.gpu --model 2M --device cpu --queries 2 --rounds 1      without a GPU, to try it

`numerics` compares packs with responses alone, `ways` the four above, `sweep` our settings on full packs;
`profile` prints which kernels take the time of our step; `scoring` and `generation` are the rates of
reward models of the paper's shapes, and of greedy responses. Weights are random; queries have the lengths of
HH-RLHF. The clock covers making the batch, forward, backward, clipping and AdamW. `mfu` is 6 x all parameters
x tokens per second over the GPU's peak: prompts count once, and nothing padded, filled or recomputed counts.
Prints Markdown tables, and JSON on the last line; our rate is appended to --out, for bench.plan. On a GPU
each row is measured in a process of its own, so that running out of memory in one leaves the next alone.
"""

import json
import statistics
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPTNeoXConfig

import clha
import evaluate
import reward
from bench import train_step
from bench.plan import CARDS
from bench.rates import Trainer, clock
from study import toy

TOGETHER = {"padded": 2, "concatenated": 8}  # queries of a backward pass; the release has 2 (train_hh.sh)
LONGEST = 640  # tokens of the longest of train_step.queries
WAYS = ("ours", "unshared", *TOGETHER)
FAMILIES = ("llama", "qwen3", "gemma3_text")
BILLION = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 16}
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}  # to try it without a GPU

Row = dict[str, Any]


@dataclass
class Trial:
    """Optimizer steps of one kind, of which the first warms up."""

    way: str
    model: str
    device: torch.device
    pack_tokens: int
    batches: list[list[clha.Example]]
    checkpointing: str = "full"


def fill(tokens: int, seed: int) -> list[clha.Example]:
    """As many queries as a pack of this length holds."""
    queries = train_step.queries(tokens // 64, seed)
    ends = accumulate(query["size"] for query in queries)
    return [query for query, end in zip(queries, ends, strict=True) if end <= tokens]


def build(trial: Trial) -> Trainer:
    """A random model and its optimizer; on a GPU all packs have one length, for flex_attention."""
    clha.init_process()
    config = clha.settle(clha.Config("", "", "", activation_checkpointing=trial.checkpointing), trial.device)
    policy = train_step.random_policy(train_step.llama(trial.model), config, trial.device)
    return Trainer(policy, trial.pack_tokens, fill=trial.device.type == "cuda")


def unshared(queries: list[clha.Example]) -> list[clha.Example]:
    """Each response as a query of its own, with all of its prompt; there is nothing to rank then."""
    texts = [(query["prompt_ids"], ids) for query in queries for ids in query["response_ids"]]
    kept = {"rewards": [1.0]}  # imitated, so that there is a gradient
    return [{"prompt_ids": p, "response_ids": [ids], "size": len(p) + len(ids)} | kept for p, ids in texts]


def step(trainer: Trainer, way: str, queries: list[clha.Example]) -> dict[str, float]:
    """One optimizer step: the loss, and the norm of the gradient."""
    if way in ("ours", "unshared"):
        return trainer.step(queries if way == "ours" else unshared(queries))
    policy = trainer.policy
    policy.model.set_attn_implementation("sdpa")
    policy.forward = partial(train_step.WAYS[way], policy)  # so that FSDP gathers the weights around it
    loss = torch.zeros((), device=trainer.device)
    for start in range(0, len(queries), TOGETHER[way]):
        part = queries[start : start + TOGETHER[way]]
        addend = policy(part) * len(part) / len(queries)
        addend.backward()
        loss += addend.detach()
    del policy.forward
    return {"loss": loss.item()} | trainer.update()


def measure(trial: Trial) -> Row:
    """Seconds of the steps without the first, what they come to, the loss of the last, the most memory."""
    row: Row = {"model": trial.model, "way": trial.way}
    row |= {"checkpointing": trial.checkpointing, "pack_tokens": trial.pack_tokens}
    seconds = []
    try:
        trainer = build(trial)
        for batch in trial.batches:
            start = clock(trial.device)
            metrics = step(trainer, trial.way, batch)
            seconds.append(clock(trial.device) - start)
    except torch.OutOfMemoryError:
        return row | {"result": "out of memory", "seconds": []}
    done = list(zip(trial.batches, seconds, strict=True))[1:]
    parameters = trainer.policy.model.num_parameters()
    tokens_per_s = statistics.median(sum(query["size"] for query in batch) / took for batch, took in done)
    cuda = trial.device.type == "cuda"
    return row | {
        "result": "done",
        "parameters": parameters,
        "queries_per_s": statistics.median(len(batch) / took for batch, took in done),
        "tokens_per_s": tokens_per_s,
        "flops_per_s": 6.0 * parameters * tokens_per_s,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0,
        "loss": metrics["loss"],
        "grad_norm": metrics["grad_norm"],
        "seconds": seconds[1:],
    }


def apart(device: torch.device, function: Callable[..., Any], *arguments: Any) -> Any:
    """A function's result; on a GPU from a process of its own."""
    return function(*arguments) if device.type == "cpu" else train_step.in_new_process(function, *arguments)


# Stages: each gives rows of a table -------------------------------------------------------------------------


def numerics(device: torch.device, tokens: int, family: str) -> list[Row]:
    """Log-probs and gradients in packs, against those of each response alone by transformers in float32."""
    clha.init_process()
    large = device.type == "cuda"
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128 if large else 16}
    model = AutoConfig.for_model(family, vocab_size=32000, **(BILLION if large else SMALL), **heads)
    queries = fill(tokens, seed=0)
    lengths = clha.pack(queries, device).lengths
    rows: list[Row] = []
    expected: list[torch.Tensor] = []
    for dtype in ("float32", "bfloat16"):
        config = clha.settle(clha.Config("", "", "", dtype=dtype), device)
        policy = train_step.random_policy(model, config, device)
        for attention in ("alone", "sdpa", "flex") if large else ("alone", "sdpa"):
            policy.zero_grad()
            if attention == "alone":
                texts = [(query["prompt_ids"], ids) for query in queries for ids in query["response_ids"]]
                sum_logps = torch.stack([policy.forward_alone(*text) for text in texts]).view_as(lengths)
            else:
                sum_logps = policy(clha.pack(queries, device, tokens if attention == "flex" else 0))
            sum_logps.mean().backward()
            logps = clha.mean_logps(sum_logps, lengths).detach()
            gradient = torch.cat([weight.grad.to_local().flatten() for weight in policy.parameters()])
            expected = expected or [logps, gradient]
            row = {"model": family, "dtype": dtype, "attention": attention}
            row["logps_apart_by_nats_per_token"] = (logps - expected[0]).abs().max().item()
            row["gradient_apart_by_share"] = ((gradient - expected[1]).norm() / expected[1].norm()).item()
            rows.append(row)
    return rows


def ways(trial: Trial) -> list[Row]:
    """The four ways; `over_ours` is the median ratio of the seconds of steps on the same queries.

    Each trains its own weights, so the losses are not quite the same.
    """
    rows = [apart(trial.device, measure, replace(trial, way=way)) for way in WAYS]
    ours = rows[0]["seconds"]
    for row in rows:
        row["over_ours"] = train_step.median_ratio(row["seconds"], ours) if row["seconds"] and ours else None
    return rows


def scoring(device: torch.device, hidden: int, layers: int, rounds: int) -> Row:
    """Responses per second of a random reward model; its memory is that of a model that does not train."""
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers}
    with device:
        model = reward.OpenAssistantRewardModel(GPTNeoXConfig(num_attention_heads=16, **sizes))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    judge = reward.RewardModel(model.to(dtype), None, list, max_length=1024)
    rates = []
    for seed in range(-1, rounds):
        queries = train_step.queries(512 if device.type == "cuda" else 2, seed)
        texts = [query["prompt_ids"] + ids for query in queries for ids in query["response_ids"]]
        start = clock(device)
        judge.score_ids(texts, [[i, i + 1] for i in range(0, len(texts), 2)])
        rates.append(len(texts) / (clock(device) - start))
    return {"scored by": f"{model.num_parameters():,}", "responses_per_s": statistics.median(rates[1:])}


def generation(device: torch.device, name: str, number: int, rounds: int) -> Row:
    """Prompts per second that a random LLaMA answers greedily with 128 tokens, as none is an end to it."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        model = AutoModelForCausalLM.from_config(train_step.llama(name), dtype=dtype).eval()
    tokenizer = toy.train_tokenizer([" the" * 9])
    prompts = [[{"role": "user", "content": "the " * length}] for length, *_ in train_step.HH_LENGTHS]
    rates = []
    for _ in range(rounds + 1):  # the first compiles
        start = clock(device)
        evaluate.sample(model, tokenizer, prompts[:number], batch_size=number)
        rates.append(number / (clock(device) - start))
    return {"generated by": name, "prompts_per_s": statistics.median(rates[1:])}


def sweep(args: Namespace, device: torch.device) -> list[Row]:
    """Our step of one full pack: how long, and what its layers keep; until one does not fit."""
    rows = []
    for checkpointing in args.checkpointing:
        for tokens in sorted(args.pack_tokens):
            batches = [fill(tokens, seed) for seed in range(-1, args.rounds)]
            trial = Trial("ours", args.model, device, tokens, batches, checkpointing)
            rows.append(apart(device, measure, trial))
            if rows[-1]["result"] != "done":
                break
    return rows


def profile(trial: Trial) -> str:
    """A table of the kernels, on a CPU the operations, of our second step."""
    trainer = build(trial)
    trainer.step(trial.batches[0])
    with torch.profiler.profile() as found:
        trainer.step(trial.batches[1])
    column = "self_cuda_time_total" if trial.device.type == "cuda" else "self_cpu_time_total"
    return found.key_averages().table(sort_by=column, row_limit=20, max_name_column_width=60)


def show(rows: list[Row], peak: float) -> None:
    """Rows as a Markdown table; gives those with a rate their `mfu`, if the GPU's FLOP/s are known."""
    for row in rows:
        if peak and "flops_per_s" in row:
            row["mfu"] = row["flops_per_s"] / peak
    columns = [name for name in rows[0] if name != "seconds"]
    table = [columns]
    for row in rows:
        values = [row.get(name, "") for name in columns]
        table.append([f"{value:,.4g}" if isinstance(value, float) else str(value) for value in values])
    print(f"\n{reward.markdown(table)}", flush=True)


STAGES = ("numerics", "ways", "profile", "sweep", "scoring", "generation")


def parse_args() -> Namespace:
    """The flags, checked."""
    parser = reward.Parser(description=__doc__)
    flag = parser.add_argument
    flag("--stages", nargs="+", choices=STAGES, default=STAGES, help="what to measure")
    flag("--model", choices=train_step.MODELS, default="7B", help="a random LLaMA of this size")
    flag("--device", choices=["cuda", "cpu"], default="cuda", help="where")
    flag("--queries", type=int, default=16, help="per step; the paper's 128 are 16 on each of 8 GPUs")
    flag("--rounds", type=int, default=5, help="steps of each kind, after one that warms up")
    flag("--pack_tokens", type=int, nargs="+", default=[8192], help="of `sweep`: lengths of full packs")
    flag("--checkpointing", nargs="+", choices=["full", "none"], default=["full"], help="for `sweep`")
    flag("--out", type=Path, default=Path("out/bench/gpu.jsonl"), help="gets our rate, for bench.plan")
    args = parser.parse_args()
    reward.check_numbers(args, positive=("rounds",))
    reward.check_output(args.out, "file")
    for tokens in args.pack_tokens:
        if tokens < LONGEST or tokens % 128:
            raise clha.InputError(f"--pack_tokens {tokens}: must be a multiple of 128, {LONGEST} or more")
    if torch.cuda.is_available() != (args.device == "cuda"):
        reason = "there is no GPU here" if args.device == "cuda" else "hide the GPU: CUDA_VISIBLE_DEVICES="
        raise clha.InputError(f"--device {args.device}: {reason}")
    return args


def main() -> None:
    """Measures what the flags ask for, stage by stage."""
    args = parse_args()
    device = torch.device(args.device)
    tokens = 8192 if args.device == "cuda" else 1024
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    machine = {"machine": gpu, "kind": gpu, "processes": 1, "torch": torch.__version__}
    peak = next((flops for card, (_, flops) in CARDS.items() if card in gpu.lower()), 0)
    results: dict[str, list[Row]] = {}
    for stage in args.stages:
        if stage == "profile":
            trial = Trial("ours", args.model, device, tokens, [fill(tokens, seed=0)] * 2)
            print(apart(device, profile, trial))
            continue
        if stage == "numerics":
            found = [apart(device, numerics, device, tokens, family) for family in FAMILIES]
            rows = [row for own in found for row in own]
        elif stage == "ways":
            batches = [train_step.queries(args.queries, seed) for seed in range(-1, args.rounds)]
            rows = ways(Trial("ours", args.model, device, tokens, batches))
        elif stage == "sweep":
            rows = sweep(args, device)
        elif stage == "scoring":
            shapes = [(2048, 24), (4096, 32)] if args.device == "cuda" else [(64, 2)]  # 1.4 and 6.9 B
            rows = [apart(device, scoring, device, *shape, args.rounds) for shape in shapes]
        else:
            rows = [apart(device, generation, device, args.model, min(64, args.queries), args.rounds)]
        show(rows, peak)
        results[stage] = rows
        if stage == "ways" and rows[0]["result"] == "done":
            args.out.parent.mkdir(parents=True, exist_ok=True)
            reward.append_jsonl(args.out, [rows[0] | machine])
    print(json.dumps(results | machine))


if __name__ == "__main__":
    clha.run(main)
