"""How does the memory of a step grow with the pack? The LM head in chunks (fast.py) against all at once.

    python bench/lm_head.py --tokens 2048 4096 8192

A LLaMA of two thin layers with its whole vocabulary, so that the head is what counts; queries of 160 tokens
of prompt and two replies of 90. Each measurement is a process of its own. Prints a Markdown table, JSON last.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path[:0] = [str(Path(__file__).parents[1])]
import clha
import fast
import program
from program import HelpFormatter, refuse


def peak(tokens: int) -> float:
    """GiB that a forward and backward pass over a pack adds to the process."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32000, **sizes)).train()
    model.gradient_checkpointing_enable()
    ids = torch.randint(3, 32000, (tokens // 340, 340)).tolist()
    queries = [
        {"prompt_ids": row[:160], "response_ids": [row[160:250], row[250:]], "rewards": None, "chosen": 0}
        for row in ids
    ]
    batch = clha.pack(queries)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sum_logps, _ = clha.sequence_logps(model, batch)
    (-sum_logps.mean()).backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20


def main() -> None:
    """Measures both ways at each size of a pack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.error = refuse
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8192], help="of a pack")
    parser.add_argument("--way", choices=["plain", "chunks"], default="", help="one measurement; prints GiB")
    args = parser.parse_args()
    program.check_ranges(args)
    if args.way:
        fast.LOGITS = 2**60 if args.way == "plain" else fast.LOGITS
        print(peak(args.tokens[0]))
        return
    rows = []
    print("| tokens | logits at once, GiB | in chunks, GiB |\n| --- | --- | --- |")
    for tokens in args.tokens:
        row = {"tokens": tokens}
        for way in ("plain", "chunks"):
            command = [sys.executable, __file__, "--tokens", str(tokens), "--way", way]
            row[way] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        rows.append(row)
        print(f"| {tokens:,} | {row['plain']:.2f} | {row['chunks']:.2f} |", flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    program.run(main)
