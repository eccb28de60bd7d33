"""What does a training step cost? Four ways, the same model and queries, forward and backward, paired steps:

    padded        the release: one padded forward per candidate, full log-softmax, all hidden states kept
    concatenated  one padded forward over all prompt-response texts, full logits (the usual way of trainers)
    ours          clha.py: packs with shared prompts, the LM head on response positions only
    floor         a bare language-model step on as many tokens as `ours` has, the head on as many positions

    python -m bench.train_step --models 24M 58M --queries 2 8 --steps 7

Medians of ratios of paired steps, so that changes in the machine's speed cancel out. Peak
memory is that of one step in a process of its own, above what the process held before (Linux only). The last
line is JSON.
"""

import json
import multiprocessing
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig

import clha
import reward

# Models and queries to measure with, here and in the other programs -----------------------------------------

# prompt/chosen/rejected of 64 HH-RLHF dev queries, in LLaMA tokens with EOS, cut as in clha.py
_LENGTHS = """
26/15/4 31/72/288 384/83/32 195/31/14 189/11/18 27/27/9 173/7/145 18/14/16 371/12/2 138/30/23 273/17/16
27/6/33 23/89/161 245/136/120 139/104/81 67/34/53 154/32/72 237/47/98 20/226/253 117/71/22 127/31/49
311/102/134 23/21/17 115/67/29 69/97/16 27/30/21 138/225/13 321/70/63 146/27/27 43/158/99 216/36/18 239/6/6
36/61/282 318/90/118 261/55/85 384/128/128 384/41/47 26/45/59 155/117/111 108/39/27 33/73/184 171/13/9
211/58/44 106/81/22 384/128/128 119/23/37 127/29/26 24/53/20 155/138/37 107/38/26 167/28/36 162/87/29
70/73/13 98/147/37 82/46/38 384/128/128 384/128/116 16/3/2 83/11/80 384/109/128 384/17/69 129/89/14
363/133/74 119/32/56
"""
HH_LENGTHS = [tuple(map(int, query.split("/"))) for query in _LENGTHS.split()]

MODELS = {  # hidden size, layers, heads, intermediate size; with LLaMA's vocabulary of 32,000
    "2M": (32, 2, 2, 64),
    "24M": (320, 3, 5, 864),
    "58M": (512, 8, 8, 1376),
    "1.3B": (2048, 24, 16, 5504),
    "7B": (4096, 32, 32, 11008),
}
SMALL = ["24M", "58M"]  # those that a CPU measures


def llama(name: str, **more: Any) -> LlamaConfig:
    """A LLaMA of one of these sizes."""
    hidden, layers, heads, intermediate = MODELS[name]
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        max_position_embeddings=1024,
        **more,
    )


def queries(number: int, seed: int) -> list[clha.Example]:
    """Encoded queries of random tokens with the lengths of real ones and standard normal rewards."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for i in range(number):
        lengths = rng.choice(HH_LENGTHS)
        rewards = sorted((rng.gauss(0, 1) for _ in lengths[1:]), reverse=True)
        ids = [torch.randint(3, 32000, (n,), generator=generator).tolist() for n in lengths]
        size = {"size": sum(lengths), "longest": lengths[0] + max(lengths[1:])}
        example = {"prompt_ids": ids[0], "response_ids": ids[1:], "rewards": rewards, "id": str(i)}
        examples.append(example | size)
    return examples


def random_policy(model: PretrainedConfig, config: clha.Config, device: torch.device) -> clha.Policy:
    """`clha.build_policy` with random weights, the same every time; of no other use than to be measured."""
    policy = clha.build_policy(model, config, device)
    torch.manual_seed(0)
    policy.model.init_weights()
    return policy


# The four ways ----------------------------------------------------------------------------------------------

# clha.py's defaults; alpha as it is for two responses
SETTINGS = {"margin": clha.Config.margin, "min_reward_gap": clha.Config.min_reward_gap, "alpha": 0.05}


def loss_of(sum_logps: Tensor, counts: Tensor, examples: list[clha.Example]) -> Tensor:
    """The CLHA loss of summed log-probs and lengths (B, l)."""
    rewards = torch.tensor([example["rewards"] for example in examples], device=sum_logps.device)
    return clha.clha_loss(clha.mean_logps(sum_logps, counts), sum_logps, rewards, **SETTINGS)[0]


def padded_rows(examples: list[clha.Example], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """All candidates' texts, candidate by candidate: ids, attention mask, response mask (l B, T)."""
    texts = []
    prompts = []
    for i in range(len(examples[0]["response_ids"])):
        for example in examples:
            texts.append(example["prompt_ids"] + example["response_ids"][i])
            prompts.append(len(example["prompt_ids"]))
    width = max(map(len, texts))
    ids = torch.tensor([text + [2] * (width - len(text)) for text in texts])
    position = torch.arange(width)
    attention = position < torch.tensor([len(text) for text in texts])[:, None]
    response = attention & (position >= torch.tensor(prompts)[:, None])
    return ids.to(device), attention.to(device), response.to(device)


def padded(policy: clha.Policy, examples: list[clha.Example]) -> Tensor:
    """The released step: a forward pass per candidate; the loss needs all before the backward pass."""
    ids, attention, response = padded_rows(examples, policy.model.device)
    parts = [x.split(len(examples)) for x in (ids, attention, response)]
    sums = []
    counts = []
    kept = []  # as the release keeps them
    for rows, seen, mask in zip(*parts, strict=True):
        output = policy.model(input_ids=rows, attention_mask=seen, output_hidden_states=True, use_cache=False)
        kept.append(output.hidden_states)
        logps = F.log_softmax(output.logits.float(), dim=-1)[:, :-1]
        logps = logps.gather(2, rows[:, 1:, None])[..., 0]
        sums.append((logps * mask[:, 1:]).sum(1))
        counts.append(mask.sum(1))
    return loss_of(torch.stack(sums, 1), torch.stack(counts, 1), examples)


def concatenated(policy: clha.Policy, examples: list[clha.Example]) -> Tensor:
    """One forward pass over all texts; log-probs as logit - logsumexp, row by row, which spares memory."""
    ids, attention, response = padded_rows(examples, policy.model.device)
    logits = policy.model(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, :-1]
    chosen = logits.gather(2, ids[:, 1:, None])[..., 0].float()
    logps = chosen - torch.stack([row.float().logsumexp(-1) for row in logits])
    sums = (logps * response[:, 1:]).sum(1).view(-1, len(examples)).T
    return loss_of(sums, response.sum(1).view(-1, len(examples)).T, examples)


def ours(policy: clha.Policy, examples: list[clha.Example]) -> Tensor:
    """clha.py's step on one pack."""
    pack = clha.pack(examples, policy.model.device)
    return loss_of(policy(pack), pack.lengths, examples)


def floor(policy: clha.Policy, examples: list[clha.Example]) -> Tensor:
    """A bare LM step: a row per query, all of one length, the head on equally many positions in each."""
    number = len(examples)
    device = policy.model.device
    tokens = sum(example["size"] for example in examples) // number
    scored = sum(len(ids) for example in examples for ids in example["response_ids"]) // number
    ids = torch.randint(3, 32000, (number, tokens), device=device)
    kept = torch.arange(scored, device=device)
    logits = policy.model(input_ids=ids, logits_to_keep=kept, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, :scored].flatten())


WAYS: dict[str, Callable[..., Tensor]] = {way.__name__: way for way in (padded, concatenated, ours, floor)}
RATIOS = [("padded", "ours"), ("concatenated", "ours"), ("ours", "floor")]

# Measuring --------------------------------------------------------------------------------------------------


def build(name: str) -> clha.Policy:
    """A random LLaMA, the same every time."""
    torch.manual_seed(0)
    return clha.Policy(LlamaForCausalLM(llama(name)).train())


def step(way: str, policy: clha.Policy, examples: list[clha.Example]) -> float:
    """Seconds of a forward and backward pass."""
    if way != "ours":  # packs set their own attention; the others need the usual one again
        policy.model.set_attn_implementation("sdpa")
    policy.zero_grad()
    start = time.perf_counter()
    WAYS[way](policy, examples).backward()
    return time.perf_counter() - start


def rss(name: str) -> int:
    """Memory of this process in bytes: VmRSS, what it has, or VmHWM, its peak (Linux)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{name}:")[1].split()[0])


def in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """A function's result, from a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def peak_memory(way: str, name: str, number: int) -> float:
    """GiB that one step takes at its peak beyond the model, measured in a fresh process."""
    policy = build(name)
    examples = queries(number, seed=0)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = rss("VmHWM")
    step(way, policy, examples)
    return (rss("VmHWM") - before) / 2**30


def median_ratio(seconds: list[float], others: list[float]) -> float:
    """The median of ratios of paired steps."""
    return statistics.median(a / b for a, b in zip(seconds, others, strict=True))


def measure(name: str, number: int, steps: int) -> dict[str, Any]:
    """Ratios and peak memory of one model at one batch size."""
    memory = {way: round(in_new_process(peak_memory, way, name, number), 3) for way in WAYS}
    policy = build(name)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for seed in range(-1, steps):  # the first round warms up
        examples = queries(number, seed)
        for way in WAYS:
            seconds[way].append(step(way, policy, examples))
    parameters = policy.model.num_parameters()
    row = {"model": name, "parameters": parameters, "queries": number, "steps": steps}
    for way, other in RATIOS:
        row[f"{way}_over_{other}"] = round(median_ratio(seconds[way][1:], seconds[other][1:]), 3)
    return row | {"peak_memory_gib": memory}


def main() -> None:
    """Measures every model at every batch size and prints a table and JSON."""
    parser = reward.Parser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=SMALL, help="sizes")
    parser.add_argument("--queries", nargs="+", type=int, default=[2, 8], help="queries per step")
    parser.add_argument("--steps", type=int, default=7, help="paired steps")
    args = parser.parse_args()
    reward.check_numbers(args, positive=("steps",))
    results = []
    columns = ["model", "queries", *map(" / ".join, RATIOS), "peak GiB of the four, as in --help"]
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for name in args.models:
        for number in args.queries:
            row = measure(name, number, args.steps)
            results.append(row)
            cells = [name, number, *(row[f"{way}_over_{other}"] for way, other in RATIOS)]
            cells.append(", ".join(f"{value:.2f}" for value in row["peak_memory_gib"].values()))
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    clha.run(main)
