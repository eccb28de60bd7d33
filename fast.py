"""What makes large models go, and go fast, beside the plain way that clha.py shows; both give the same.

- Attention of a pack in one kernel (flex_attention); all packs of a run have one length, so that it is
  compiled once.
- The LM head in chunks: of a pack of 8,192 tokens LLaMA-7B would hold gigabytes of logits and their copies.
- Layers that keep less for the backward pass, or are compiled; packs that are made ahead of their use.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from records import InputError

# ------------------------------------------------------------------------------------------------------------
# Attention

TILE = 128  # positions: the side of a block of flex_attention's


def uses_flex(model: PreTrainedModel, attention: str, longest: int, compile: bool = False) -> bool:
    """Whether packs go through flex_attention: by --attention, and "auto" where it can.

    Raises InputError where it is asked for and can't: its backward pass needs a GPU, it has no dropout, and
    soft caps, or windows shorter than the `longest` query, are not in the mask of a pack. And where layers
    are to be compiled without it: each number of queries would be compiled anew.
    """
    config = model.config.get_text_config()
    hindrances = ["attention_dropout", "attn_pdrop", "attn_logit_softcapping"]
    there = [name for name in hindrances if getattr(config, name, None)]
    there += ["sliding_window"] if (getattr(config, "sliding_window", None) or longest) < longest else []
    reason = f"with {there[0]}" if there else "without a GPU" if model.device.type != "cuda" else ""
    if attention == "flex" and reason:
        raise InputError(f"--attention flex: can't be used {reason}; sdpa can")
    flex = attention != "sdpa" and not reason
    if compile and not flex:
        raise InputError(f"--compile: needs flex_attention, not used {reason or 'with --attention sdpa'}")
    return flex


def block_mask(batch: dict[str, Any]) -> BlockMask:
    """The mask of a pack, whose N is a multiple of TILE, for flex_attention; as `clha.query_masks` has it.

    A tile of rows needs the tiles from where the query of its first row begins up to itself. So they can be
    told without looking at all N x N pairs.
    """
    start, owner = batch["start"], batch["owner"]

    def may_see(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        own = (owner[column] == -1) | (owner[column] == owner[row])
        return (start[row] <= column) & (column <= row) & own

    tile = torch.arange(len(owner) // TILE, device=owner.device)
    first = start[::TILE] // TILE
    number = tile - first + 1
    columns = (first[:, None] + tile).clamp(max=len(tile) - 1)  # of a row only its first `number` are read
    return BlockMask.from_kv_blocks(
        number[None, None].int(), columns[None, None].int(), BLOCK_SIZE=TILE, mask_mod=may_see
    )


PASS = 512  # tokens that a pass without any costs: it moves all weights and gradients. An estimate


def pack_length(sizes: list[int], order: list[tuple[float, list[int]]], limit: int, longest: int = 0) -> int:
    """The length of all packs, at most `limit` if the longest query allows, that makes the steps cheapest.

    `sizes` are the tokens of all queries, `order` the steps as in `clha.data_order`. A step's packs should be
    nearly full on every process; what is missing is filled, and computed. `longest` is that of other queries
    which will be packed too.
    """
    import clha

    batches = [[sizes[i] for i in indices] for _, indices in order[:: math.ceil(len(order) / 50)]]
    processes = dist.get_world_size()

    def cost(length: int) -> int:
        return (length + PASS) * sum(len(clha.deal(batch, length, processes)) for batch in batches)

    least = math.ceil(max(longest, *sizes) / TILE) * TILE
    return min(range(least, max(limit, least) + 1, TILE), key=cost)


def filled(tokens: int) -> int:
    """The length that a pack of so many tokens is filled to where lengths vary: TILE, 2 TILE, 4 TILE, ..."""
    return TILE << ((tokens - 1) // TILE).bit_length()


# ------------------------------------------------------------------------------------------------------------
# The LM head

LOGITS = 2**25  # that exist at a time: 128 MiB in float32, and a few copies of it
SCALES = (  # of logits, after the head
    "final_logit_softcapping", "lm_head_multiplier", "logit_scale", "logits_scaling", "output_multiplier",
)  # fmt: skip


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
        found = [checkpoint(logps, *chunk, use_reentrant=False)[None] for chunk in chunks]
        return torch.cat(found, dim=1)

    head.forward = in_chunks
    try:
        yield
    finally:
        del head.forward


# ------------------------------------------------------------------------------------------------------------
# Layers

# What "selective" keeps for the backward pass: the results of matrix products and of attention; of
# flex_attention only in layers that are compiled, as else it is one operation that nothing sees into.
KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.higher_order.flex_attention,
}


def keep_products(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Which results of a layer are kept for its backward pass; the others are made again."""
    return CheckpointPolicy.MUST_SAVE if operation in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def wrap_layers(layers: list[torch.nn.Module], checkpointing: str, compile: bool) -> None:
    """Lets layers keep less for the backward pass ("full": only their input), and compiles them.

    Only while they train: replies have other shapes, for which nothing is compiled.
    """
    selective = {"context_fn": partial(create_selective_checkpoint_contexts, keep_products)}
    for layer in layers:
        plain = wrapped = layer.forward
        if checkpointing != "none":
            how = selective if checkpointing == "selective" else {}
            wrapped = partial(checkpoint, plain, use_reentrant=False, **how)
        if compile:
            wrapped = torch.compile(wrapped)
        layer.forward = partial(choose, layer, wrapped, plain)


def choose(
    layer: torch.nn.Module, wrapped: Callable[..., Any], plain: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """The forward pass of a layer."""
    return (wrapped if layer.training else plain)(*args, **kwargs)


# ------------------------------------------------------------------------------------------------------------
# Data


def ahead(make: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """Yields make(item) of each item; that of the next one is made by a thread meanwhile.

    What it copies to a GPU waits there behind the work that is queued already, but nobody waits for it.
    """
    with ThreadPoolExecutor(1) as thread:
        made = None
        for item in items:
            made, before = thread.submit(make, item), made
            if before:
                yield before.result()
        if made:
            yield made.result()
