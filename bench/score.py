"""What does reward scoring cost? reward.py's packs against padded batches in file order, paired rounds.

    python bench/score.py --models 24M --queries 64 --rounds 5

The padded way runs the classifier over a row for each reply, 16 rows a batch, in the file's order. Prints
medians of ratios of paired rounds, and the largest difference of a score. The last line is JSON.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaForSequenceClassification

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import lengths

import clha
import program
import reward
from program import HelpFormatter, refuse


@torch.inference_mode()
def padded(
    model: LlamaForSequenceClassification, queries: list[clha.Example], rows_a_batch: int
) -> list[float]:
    """Scores of all replies, padded batches in file order."""
    model.set_attn_implementation("sdpa")
    rows = [query["prompt_ids"] + ids for query in queries for ids in query["response_ids"]]
    scores = []
    for start in range(0, len(rows), rows_a_batch):
        part = rows[start : start + rows_a_batch]
        width = max(map(len, part))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in part])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in part])
        scores += model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 0].tolist()
    return scores


@torch.inference_mode()
def packed(model: LlamaForSequenceClassification, queries: list[clha.Example], tokens: int) -> list[float]:
    """The same by reward.py's packs."""
    model.set_attn_implementation("shared_prefix")
    scorer = reward.RewardModel(model, None, None, False, 1024, tokens)
    scores: dict[int, list[float]] = {}
    for part in reward.chunks([([i], query) for i, query in enumerate(queries)], tokens):
        values = scorer.rewards([query for _, query in part]).tolist()
        scores |= {i: row for ([i], _), row in zip(part, values, strict=True)}
    return [score for i in range(len(queries)) for score in scores[i]]


def main() -> None:
    """Measures every model and prints a table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.error = refuse
    parser.add_argument("--models", nargs="+", choices=lengths.MODELS, default=["24M", "58M"])
    parser.add_argument("--queries", type=int, default=64, help="queries of two replies a round")
    parser.add_argument("--rounds", type=int, default=5, help="paired rounds")
    args = parser.parse_args()
    rows = []
    print("| model | queries | padded / packed | largest difference |\n| --- | --- | --- | --- |")
    for name in args.models:
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(lengths.config(name, num_labels=1, pad_token_id=0)).eval()
        ratios, difference = [], 0.0
        for seed in range(-1, args.rounds):
            queries, seconds, scores = lengths.queries(args.queries, seed), [], []
            for way, size in ((padded, 16), (packed, 1024)):
                start = time.perf_counter()
                scores.append(way(model, queries, size))
                seconds.append(time.perf_counter() - start)
            difference = max(difference, *(abs(a - b) for a, b in zip(*scores, strict=True)))
            if seed >= 0:  # the first round warms up
                ratios.append(seconds[0] / seconds[1])
        row = {
            "model": name,
            "parameters": model.num_parameters(),
            "queries": args.queries,
            "rounds": len(ratios),
            "padded_over_packed": round(statistics.median(ratios), 3),
            "largest_difference": difference,
        }
        rows.append(row)
        print(f"| {name} | {args.queries} | {row['padded_over_packed']} | {difference:.1e} |", flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    program.run(main)
