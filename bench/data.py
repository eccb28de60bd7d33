"""How long until a data set is tokens, and packs? Does memory grow with it?

    python bench/data.py --data test.jsonl --tokenizer MODEL --queries 40000 160000

The records of a file, over and over, with numbers for ids, until there are so many. For each number a process
of its own tokenises them (tokens.py), asks again, when it finds them done, and makes the packs of an epoch.
Prints a Markdown table, JSON last. Run it alone: it uses every core that it may.
"""

import argparse
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1])]
import torch

import clha
import program
from program import HelpFormatter, load_tokenizer, refuse
from records import read_records


def peak() -> float:
    """Peak resident memory of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(data: str, model: str, queries: int) -> dict[str, Any]:
    """Seconds and memory of one number of queries."""
    clha.init_process()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.jsonl"
        with path.open("w") as file:
            for i, record in enumerate(islice(cycle(read_records(data)), queries)):
                file.write(json.dumps(record | {"id": str(i)}) + "\n")
        config = clha.Config(model, str(path), folder, pack_tokens=8192, rescore=False, ranking="given")
        tokenizer = load_tokenizer(model)
        before, seconds = peak(), []
        for _ in range(2):
            start = time.perf_counter()
            examples = clha.load_examples(str(path), tokenizer, config)
            seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
        for _, indices in clha.data_order(queries, clha.replace(config, epochs=1)):
            clha.packs_of([examples[i] for i in indices], torch.device("cpu"), config)
        seconds.append(time.perf_counter() - start)
    names = ("tokens_s", "again_s", "packs_s")
    figures = {name: round(value, 2) for name, value in zip(names, seconds, strict=True)}
    grown = round(peak() - before, 2)
    return {"queries": queries, "tokens": sum(examples.sizes), **figures, "memory_gib": grown}


def main() -> None:
    """Measures each number of queries."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.error = refuse
    parser.add_argument("--data", required=True, help="records, JSON lines")
    parser.add_argument(
        "--tokenizer", required=True, help="folder of a model, or of its tokenizer and config"
    )
    parser.add_argument("--queries", type=int, nargs="+", default=[40_000, 160_000], help="how many")
    args = parser.parse_args()
    program.check_ranges(args)
    cores, rows = len(os.sched_getaffinity(0)), []
    print(
        f"| queries | tokens | tokenised, s on {cores} cores | again, s | packs of an epoch, s | GiB more |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for queries in args.queries:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            row = pool.apply(measure, (args.data, args.tokenizer, queries))
        rows.append(row | {"cores": cores})
        times = " | ".join(f"{row[name]:.1f}" for name in ("tokens_s", "again_s", "packs_s"))
        print(f"| {queries:,} | {row['tokens']:,} | {times} | {row['memory_gib']:.2f} |", flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    program.run(main)
