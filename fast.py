"""What makes large models and large packs fit, beside the plain way that clha.py shows; both give the same.

The LM head: of a pack of 8,192 tokens LLaMA-7B would hold gigabytes of logits and their copies. In chunks,
whose logits are made again for the gradient, a few hundred megabytes are enough.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

LOGITS = 2**25  # that exist at a time: 128 MiB in float32, and a few copies of it
SCALES = ("final_logit_softcapping", "logit_scale", "logits_scaling")  # of logits, after the head


def rows_at_a_time(model: PreTrainedModel) -> int | None:
    """How many positions the LM head does at a time; None where its logits are scaled after it."""
    config = model.config.get_text_config()
    scaled = any(getattr(config, name, None) not in (None, 1, 1.0) for name in SCALES)
    return None if scaled else max(1, LOGITS // config.vocab_size)


@contextmanager
def head_gives_logps(model: PreTrainedModel, targets: Tensor, rows: int) -> Iterator[None]:
    """Lets the LM head of a model give the log-probs (1, M) of targets (M,), not logits (1, M, V).

    It is the head itself that does so, within the model's own forward pass, as its weights are sharded: they
    are only there while that pass, or its backward pass, is under way.
    """
    head = model.get_output_embeddings()
    plain = partial(type(head).forward, head)

    def logps(states: Tensor, tokens: Tensor) -> Tensor:  # (rows, d), (rows,) -> (rows,)
        return -F.cross_entropy(plain(states).float(), tokens, reduction="none")

    def in_chunks(states: Tensor) -> Tensor:  # (1, M, d) -> (1, M)
        chunks = zip(states[0].split(rows), targets.split(rows), strict=True)
        return torch.cat([checkpoint(logps, *chunk, use_reentrant=False) for chunk in chunks])[None]

    head.forward = in_chunks
    try:
        yield
    finally:
        del head.forward
