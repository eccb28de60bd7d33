"""What does reward scoring cost? reward.py's packs against padded batches in file order, paired rounds.

    python -m bench.score --models 24M --queries 64 --rounds 5

The padded way runs the classifier over a row per response, 16 rows per batch, in the file's order. Prints
medians of ratios of paired rounds, and the largest difference of a score. The last line is JSON.
"""

import json
import time
from typing import Any

import torch
from transformers import LlamaForSequenceClassification

import clha
import reward
from bench import lengths
from bench.train_step import median_ratio

ROWS = 16  # of a padded batch


@torch.inference_mode()
def padded(model: LlamaForSequenceClassification, queries: list[clha.Example]) -> list[float]:
    """Scores of all responses, padded batches in file order."""
    model.set_attn_implementation("sdpa")
    rows = [query["prompt_ids"] + ids for query in queries for ids in query["response_ids"]]
    scores = []
    for start in range(0, len(rows), ROWS):
        part = rows[start : start + ROWS]
        width = max(map(len, part))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in part], device=model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in part], device=model.device)
        scores += model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 0].tolist()
    return scores


@torch.inference_mode()
def packed(model: LlamaForSequenceClassification, queries: list[clha.Example]) -> list[float]:
    """The same by reward.py's packs."""
    tokens = reward.default_pack_tokens(model.device)
    scorer = reward.RewardModel(model, None, None, False, 1024, tokens)
    scores: dict[int, list[float]] = {}
    for chunk in reward.chunks([query["size"] for query in queries], tokens):
        rewards = scorer.rewards([queries[i] for i in chunk])
        scores |= zip(chunk, rewards.tolist(), strict=True)
    return [score for i in range(len(queries)) for score in scores[i]]


WAYS = {"padded": padded, "packed": packed}


def build(name: str, device: torch.device, dtype: torch.dtype) -> LlamaForSequenceClassification:
    """A random reward model, the same every time."""
    torch.manual_seed(0)
    with device:
        model = LlamaForSequenceClassification(lengths.config(name, num_labels=1, pad_token_id=0))
        return model.to(dtype).eval()


def compare(
    model: LlamaForSequenceClassification, number: int, rounds: int
) -> tuple[dict[str, list[float]], float]:
    """Seconds of both ways in paired rounds of so many queries, and the largest difference of a score."""
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    difference = 0.0
    for seed in range(-1, rounds):
        queries = lengths.queries(number, seed)
        scores = {}
        for way, score in WAYS.items():
            start = time.perf_counter()
            scores[way] = score(model, queries)
            if seed >= 0:  # the first round warms up
                times[way].append(time.perf_counter() - start)
        for ours, theirs in zip(scores["packed"], scores["padded"], strict=True):
            difference = max(difference, abs(ours - theirs))
    return times, difference


def main() -> None:
    """Measures every model and prints a table and JSON."""
    parser = reward.Parser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=lengths.MODELS, default=lengths.SMALL, help="sizes")
    parser.add_argument("--queries", type=int, default=64, help="queries of two responses per round")
    parser.add_argument("--rounds", type=int, default=5, help="paired rounds")
    args = parser.parse_args()
    reward.check_numbers(args, positive=("rounds",))
    rows: list[dict[str, Any]] = []
    print("| model | queries | padded / packed | largest difference |\n| --- | --- | --- | --- |")
    for name in args.models:
        model = build(name, torch.device("cpu"), torch.float32)
        times, difference = compare(model, args.queries, args.rounds)
        ratio = median_ratio(times["padded"], times["packed"])
        row = {
            "model": name,
            "parameters": model.num_parameters(),
            "queries": args.queries,
            "rounds": args.rounds,
            "padded_over_packed": round(ratio, 3),
            "largest_difference": difference,
        }
        rows.append(row)
        print(f"| {name} | {args.queries} | {row['padded_over_packed']} | {difference:.1e} |", flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    clha.run(main)
