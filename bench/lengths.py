"""Token lengths of real queries, and models to measure with; shared by the measurements in this folder."""

import random
from typing import Any

import torch
from transformers import LlamaConfig, PretrainedConfig

import clha

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


def config(name: str, **more: Any) -> LlamaConfig:
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
