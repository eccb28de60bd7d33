"""What does a training step cost? Five ways, the same model and queries, forward and backward, paired steps:

    padded        the release: one padded forward a candidate, full log-softmax, all hidden states kept
    concatenated  one padded forward over all prompt-reply texts, full logits (the usual preference trainer)
    ours          clha.py: packs with shared prompts, the LM head on reply positions only
    floor         a bare language-model step on as many tokens as `ours` has, the head on as many positions
    rows          ours, but a forward pass a query: is a pack better than rows of one query?

    python bench/train_step.py --models 24M 58M --queries 2 8 --steps 7

Medians of ratios of paired steps, in which a machine's mood cancels out. Peak memory is that of one step in a
process of its own, above what the process held before (Linux only). The last line is JSON.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import lengths

import clha
import program
from program import HelpFormatter, refuse

# The default recipe; alpha as it is for two replies.
RECIPE = {"margin": clha.Config.margin, "min_reward_gap": clha.Config.min_reward_gap, "alpha": 0.05}


def loss_of(sum_logps: Tensor, counts: Tensor, examples: list[clha.Example]) -> Tensor:
    """The CLHA loss with the default recipe; sum_logps, counts (B, l)."""
    rewards = clha.reply_matrix(examples).to(sum_logps.device)
    return clha.clha_loss(sum_logps / counts, sum_logps, rewards, **RECIPE)[0]


def padded_rows(examples: list[clha.Example], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Prompt + reply of all candidates, candidate by candidate: ids, attention mask, reply mask (l B, T)."""
    texts = [
        (e["prompt_ids"] + e["response_ids"][i], len(e["prompt_ids"]))
        for i in range(len(examples[0]["response_ids"]))
        for e in examples
    ]
    width = max(len(ids) for ids, _ in texts)
    ids = torch.tensor([ids + [2] * (width - len(ids)) for ids, _ in texts])
    position = torch.arange(width)
    attention = position < torch.tensor([[len(ids)] for ids, _ in texts])
    reply = attention & (position >= torch.tensor([[prompt] for _, prompt in texts]))
    return ids.to(device), attention.to(device), reply.to(device)


def padded(model: LlamaForCausalLM, examples: list[clha.Example]) -> Tensor:
    """The released step: a forward pass a candidate; the loss needs all of them before the backward pass."""
    ids, attention, reply = padded_rows(examples, model.device)
    sums, counts, kept = [], [], []
    for rows, seen, mask in zip(*(x.split(len(examples)) for x in (ids, attention, reply)), strict=True):
        output = model(input_ids=rows, attention_mask=seen, output_hidden_states=True, use_cache=False)
        kept.append(output.hidden_states)  # as the release does
        logps = F.log_softmax(output.logits.float(), dim=-1)[:, :-1].gather(2, rows[:, 1:, None])[..., 0]
        sums.append((logps * mask[:, 1:]).sum(1))
        counts.append(mask.sum(1))
    return loss_of(torch.stack(sums, 1), torch.stack(counts, 1), examples)


def concatenated(model: LlamaForCausalLM, examples: list[clha.Example]) -> Tensor:
    """One forward pass over all texts; log-probs as logit - logsumexp, row by row, which spares memory."""
    ids, attention, reply = padded_rows(examples, model.device)
    logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, :-1]
    chosen = logits.gather(2, ids[:, 1:, None])[..., 0].float()
    logps = chosen - torch.stack([row.float().logsumexp(-1) for row in logits])
    sums = (logps * reply[:, 1:]).sum(1).view(-1, len(examples)).T
    return loss_of(sums, reply.sum(1).view(-1, len(examples)).T, examples)


def ours(model: LlamaForCausalLM, examples: list[clha.Example]) -> Tensor:
    """clha.py's step on one pack."""
    return loss_of(*clha.sequence_logps(model, clha.pack(examples, model.device)), examples)


def rows(model: LlamaForCausalLM, examples: list[clha.Example]) -> Tensor:
    """The same, one query a forward pass."""
    parts = [clha.sequence_logps(model, clha.pack([example], model.device)) for example in examples]
    return loss_of(*map(torch.cat, zip(*parts, strict=True)), examples)


def floor(model: LlamaForCausalLM, examples: list[clha.Example]) -> Tensor:
    """A bare LM step: a row a query, all of one length, the head on equally many positions in each."""
    number, device = len(examples), model.device
    tokens = sum(map(clha.size, examples)) // number
    scored = sum(len(r) for e in examples for r in e["response_ids"]) // number
    ids = torch.randint(3, 32000, (number, tokens), device=device)
    kept = torch.arange(scored, device=device)
    logits = model(input_ids=ids, logits_to_keep=kept, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, :scored].flatten())


WAYS: dict[str, Callable[..., Tensor]] = {
    "padded": padded,
    "concatenated": concatenated,
    "ours": ours,
    "floor": floor,
    "rows": rows,
}


def build(name: str) -> LlamaForCausalLM:
    """A random LLaMA, the same every time."""
    torch.manual_seed(0)
    return LlamaForCausalLM(lengths.config(name)).train()


def step(way: str, model: LlamaForCausalLM, examples: list[clha.Example]) -> float:
    """Seconds of a forward and backward pass."""
    model.set_attn_implementation("shared_prefix" if way in ("ours", "rows") else "sdpa")
    model.zero_grad()
    start = time.perf_counter()
    WAYS[way](model, examples).backward()
    return time.perf_counter() - start


def peak_memory(way: str, name: str, number: int) -> float:
    """GiB that one step takes at its peak beyond the model, measured in a fresh process."""
    model, examples = build(name), lengths.queries(number, seed=0)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = peak()
    step(way, model, examples)
    return (peak() - before) / 2**20


def peak() -> int:
    """Peak resident memory of this process, in KiB."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def measure(name: str, number: int, steps: int) -> dict[str, Any]:
    """Ratios and peak memory of one model at one batch size."""
    context = multiprocessing.get_context("spawn")
    memory = {}
    for way in WAYS:
        with context.Pool(1) as pool:
            memory[way] = round(pool.apply(peak_memory, (way, name, number)), 3)
    model = build(name)
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for seed in range(-1, steps):
        examples = lengths.queries(number, seed)
        for way in WAYS:
            seconds = step(way, model, examples)
            if seed >= 0:  # the first round warms up
                times[way].append(seconds)

    def ratio(a: str, b: str) -> float:
        return round(statistics.median(x / y for x, y in zip(times[a], times[b], strict=True)), 3)

    return {
        "model": name,
        "parameters": model.num_parameters(),
        "queries": number,
        "steps": steps,
        "padded_over_ours": ratio("padded", "ours"),
        "concatenated_over_ours": ratio("concatenated", "ours"),
        "ours_over_floor": ratio("ours", "floor"),
        "rows_over_ours": ratio("rows", "ours"),
        "peak_memory_gib": memory,
    }


def main() -> None:
    """Measures every model at every batch size and prints a table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.error = refuse
    parser.add_argument("--models", nargs="+", choices=lengths.MODELS, default=["24M", "58M"])
    parser.add_argument("--queries", nargs="+", type=int, default=[2, 8], help="queries a step")
    parser.add_argument("--steps", type=int, default=7, help="paired steps")
    args = parser.parse_args()
    results = []
    print(
        "| model | queries | padded / ours | concatenated / ours | ours / floor | rows / ours | "
        "peak GiB of the five, as in --help |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in args.models:
        for number in args.queries:
            row = measure(name, number, args.steps)
            results.append(row)
            memory = ", ".join(f"{value:.2f}" for value in row["peak_memory_gib"].values())
            print(
                f"| {name} | {number} | {row['padded_over_ours']} | {row['concatenated_over_ours']} | "
                f"{row['ours_over_floor']} | {row['rows_over_ours']} | {memory} |",
                flush=True,
            )
    print(json.dumps(results))


if __name__ == "__main__":
    program.run(main)
