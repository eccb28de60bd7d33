"""What memory does a step of clha.py take, and for what? Without the memory.

Not a formula: the step itself is run with tensors that have shapes but no memory, in a process group that
moves nothing, and what is alive is added up. Not in it: the GPU's context, the buffers of NCCL and of
kernels, and what the allocator leaves unused. `plan.py` shows it, `rates.py --check` compares it.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import PretrainedConfig

import clha

WEIGHTS, GRADIENTS, MOMENTS = "weights, fp32 shard", "gradients, fp32 shard", "AdamW's two moments, fp32"
LAYERS, ROOT = "gathered layers, with the one fetched ahead", "gathered embedding, norm and head"
REDUCED, KEPT = "whole gradients, until they are reduced", "activations kept by the forward pass"
WORK, HEAD = "the layer at work (made again, its gradients)", "logits of the LM head"
PARTS = [WEIGHTS, GRADIENTS, MOMENTS, LAYERS, ROOT, REDUCED, KEPT, WORK, HEAD]


class Live(TorchDispatchMode):
    """Adds up the bytes of all tensors that are alive, by part, and keeps the parts of the peak."""

    def __init__(self, vocabulary: int = 0) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.root: set[int] = set()  # bytes of embedding and head, and of all outside the layers
        self.matrices: set[tuple[int, ...]] = set()  # shapes of weights, as their gradients have them
        self.storages: dict[int, tuple[int, str]] = {}
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.kind, self.tokens, self.reducing = WEIGHTS, 0, False

    def note(self, storage: torch.UntypedStorage, kind: str) -> None:
        """Counts a storage as it is now, as a part of this kind."""
        key = id(storage)
        if key not in self.storages:
            weakref.finalize(storage, self.forget, key)
        before, was = self.storages.get(key, (0, kind))
        self.storages[key] = storage.nbytes(), kind
        self.now[was] -= before
        self.now[kind] += storage.nbytes()
        if self.now.total() >= self.peak.total():
            self.peak = self.now.copy()

    def forget(self, key: int) -> None:
        """Of a storage that is gone."""
        size, kind = self.storages.pop(key)
        self.now[kind] -= size

    def gathered(self, storage: torch.UntypedStorage) -> str:
        """Which gathered weights these are, by their size; a gathered row of a shard may be padding."""
        return ROOT if any(size <= storage.nbytes() <= 1.001 * size for size in self.root) else LAYERS

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        if op is torch.ops.fsdp.chunk_cat.default:
            self.note(kwargs["out"].untyped_storage(), REDUCED)
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                tensor = getattr(tensor, "_local_tensor", tensor)  # a DTensor says the size of the whole
                storage, shape = tensor.untyped_storage(), tuple(tensor.shape)
                if op.namespace == "fsdp":
                    kind = self.gathered(storage)
                elif id(storage) in self.storages:
                    kind = self.storages[id(storage)][1]
                elif self.reducing:  # right after chunk_cat: the shard of the sum
                    kind = GRADIENTS
                elif shape[-1:] == (self.vocabulary,) and len(shape) > 1:
                    kind = HEAD
                elif self.kind == WORK and shape in self.matrices and self.tokens not in shape:
                    kind = REDUCED
                else:
                    kind = self.kind
                self.note(storage, kind)
        self.reducing = op is torch.ops.fsdp.chunk_cat.default
        return result


@contextmanager
def pretend(processes: int) -> Iterator[None]:
    """A process group of so many of which this is the first; what it sends goes nowhere."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def resizes(live: Live) -> Iterator[None]:
    """FSDP makes and frees gathered weights by resizing their storage, which no operation tells of."""
    resize = torch.UntypedStorage.resize_

    def noted(storage: torch.UntypedStorage, size: int) -> Any:
        result = resize(storage, size)
        live.note(storage, live.gathered(storage))
        return result

    torch.UntypedStorage.resize_ = noted
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = resize


def layers_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The decoder layers, each of which is a unit of FSDP, which gives them another name."""
    named = ((type(module).__name__.removeprefix("FSDP"), module) for module in model.modules())
    return [module for name, module in named if name in model._no_split_modules]


def memory(
    config: PretrainedConfig, batch: clha.Batch, dtype: torch.dtype, shards: int, checkpointing: str,
    passes: int = 2,
) -> Counter[str]:  # fmt: skip
    """Bytes of each part at the peak of a step of rank 0, whose weights are divided over `shards` processes.

    `passes` as many packs as a process does in a step; the third is like the second. Attention is query by
    query, as on a CPU: flex_attention keeps the same, but for the masks, which are small.
    """
    with pretend(shards):
        model = clha.build_model(config, torch.device("meta"), dtype, checkpointing)
        model.set_attn_implementation("shared_prefix")
        inner = {id(weight) for layer in layers_of(model) for weight in layer.parameters()}
        rest = [weight.numel() for weight in model.parameters() if id(weight) not in inner]
        vocabulary = config.get_text_config().vocab_size
        root = {size * dtype.itemsize for size in [*rest, sum(rest)] if size >= vocabulary}
        matrices = {tuple(weight.shape) for weight in model.parameters() if weight.dim() > 1}
        live = Live(vocabulary)
        live.root, live.matrices = root, matrices
        live.tokens = batch["input_ids"].shape[1]
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        batch = batch | {k: fake.from_tensor(v) for k, v in batch.items() if isinstance(v, Tensor)}
        with fake, live, resizes(live):
            model.to_empty(device="cpu")
            for buffer in model.buffers():
                live.note(buffer.untyped_storage(), WORK)
            live.now[MOMENTS] = 2 * live.now[WEIGHTS]
            for _ in range(min(passes, 2)):
                live.kind = KEPT
                sums = clha.sequence_logps(model, batch | {"fill_to": 0})[0]
                live.kind = WORK
                sums.sum().backward()
                del sums
                for weight in model.parameters():
                    live.note(weight.grad.to_local().untyped_storage(), GRADIENTS)
    return Counter({part: live.peak[part] for part in PARTS})
