"""The fast path and the plain one agree."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from safetensors.torch import load_file
from test_logps import MODELS, flex_of_plain_operations, random_queries, tiny
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import GraniteConfig, GraniteForCausalLM

import clha
import fast
from records import InputError, read_records, write_jsonl


def logps_and_gradients(model: Any, batch: clha.Batch) -> list[torch.Tensor]:
    """The sums of a pack, and the gradients of a loss of them."""
    model.zero_grad()
    sums, _ = clha.sequence_logps(model, batch)
    (sums * torch.arange(1, sums.numel() + 1).view_as(sums)).sum().backward()
    return [sums.detach(), *(weight.grad.clone() for weight in model.parameters())]


@pytest.mark.parametrize("more", MODELS)
@pytest.mark.parametrize("rows", [1, 7])
def test_a_head_in_chunks_gives_the_same(
    more: dict[str, Any], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = tiny(**more), clha.pack(random_queries(6))
    plain = logps_and_gradients(model, batch)
    monkeypatch.setattr(fast, "LOGITS", 64 * rows)
    assert fast.rows_at_a_time(model) == rows < len(batch["targets"])
    for ours, theirs in zip(logps_and_gradients(model, batch), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert "forward" not in vars(model.get_output_embeddings())  # it is itself again


def test_no_more_logits_are_kept_than_a_chunk_has(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, kept = tiny(vocab_size=4096), clha.pack(random_queries(6)), []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.shape)
        return tensor

    def largest() -> int:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            clha.sequence_logps(model, batch)
        return max((shape[0] for shape in kept if shape[-1:] == (4096,)), default=0)

    assert largest() == len(batch["targets"]) > 100  # M x V
    monkeypatch.setattr(fast, "LOGITS", 4096 * 8)
    assert largest() == 0  # they are made again for the gradient


def test_logits_that_are_scaled_after_the_head_go_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = GraniteForCausalLM(GraniteConfig(vocab_size=64, logits_scaling=3.0, **sizes))
    batch = clha.pack(random_queries(3))
    expected = clha.sequence_logps(model, batch)[0]
    monkeypatch.setattr(fast, "LOGITS", 64)
    assert torch.equal(clha.sequence_logps(model, batch)[0], expected)


def train_with_two(world: Path, out: Path, *flags: str, logits: int = 2**30) -> dict[str, torch.Tensor]:
    """The weights after three steps of two processes."""
    data = out.with_name("data.jsonl")
    if not data.exists():
        records = [r | {"rewards": [1.0, -1.0]} for r in read_records(world / "train.jsonl")[:24]]
        write_jsonl(data, records)
    program = f"import sys, fast, clha; fast.LOGITS = {logits}; "
    program += "fast.uses_flex = lambda *_: False; clha.train(clha.parse_args(sys.argv[1:]))"
    launch = "-m torch.distributed.run --standalone --nproc_per_node 2 --no-python"
    settings = f"--model {world / 'init'} --train_data {data} --output_dir {out} --max_steps 3 --batch_size 8"
    command = [sys.executable, *launch.split(), sys.executable, "-c", program, *settings.split(), *flags]
    command += ["--learning_rate", "1e-5"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return load_file(out / "final" / "model.safetensors")


def test_two_processes_train_alike_by_every_way(world: Path, tmp_path: Path) -> None:
    plain = train_with_two(world, tmp_path / "plain")
    before = load_file(world / "init" / "model.safetensors")
    assert max((plain[name] - before[name]).abs().max() for name in plain) > 2e-5
    copies = ["--replicate", "2", "--activation_checkpointing", "selective"]
    ways = {
        "chunks": train_with_two(world, tmp_path / "chunks", logits=768 * 9),
        "compiled": train_with_two(world, tmp_path / "compiled", "--compile"),
        "copies": train_with_two(world, tmp_path / "copies", *copies),
    }
    for weights in ways.values():
        for name, weight in plain.items():
            torch.testing.assert_close(weights[name], weight, atol=1e-6, rtol=0)


@pytest.fixture
def compiler() -> Any:
    """What torch.compile counts, from zero."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch._dynamo.utils.counters["stats"]


# Attention


def filled_pack(queries: int = 14) -> tuple[clha.Batch, clha.Batch]:
    """The same queries as a plain pack, and as one that is filled to the tiles of flex_attention."""
    examples = random_queries(queries)
    return clha.pack(examples), clha.pack(examples, fill_to=3 * fast.TILE)


def dense(mask: BlockMask) -> torch.Tensor:
    """What a BlockMask lets see, (N, N): its pairs, and only in the tiles that it lists."""
    n = mask.seq_lengths[0]
    tiles = torch.zeros(n // fast.TILE, n // fast.TILE, dtype=torch.bool)
    for row, (number, columns) in enumerate(
        zip(mask.kv_num_blocks[0, 0], mask.kv_indices[0, 0], strict=True)
    ):
        tiles[row, columns[:number].long()] = True
    listed = tiles.repeat_interleave(fast.TILE, 0).repeat_interleave(fast.TILE, 1)
    place = torch.arange(n)
    return listed & mask.mask_mod(0, 0, place[:, None], place)


def test_the_mask_of_flex_attention_is_that_of_the_queries() -> None:
    plain, filled = filled_pack()
    size, whole = len(plain["owner"]), filled["input_ids"].shape[1]
    assert 2 * fast.TILE < size < whole and whole % (3 * fast.TILE) == 0
    mask, n = fast.block_mask(filled), whole // fast.TILE
    expected = torch.block_diag(*clha.query_masks(plain)).bool()
    assert torch.equal(dense(mask)[:size, :size], expected)
    assert not dense(mask)[:size, size:].any() and not dense(mask)[size:, :size].any()
    theirs = create_block_mask(mask.mask_mod, None, None, whole, whole, device="cpu")
    counts = theirs.kv_num_blocks + theirs.full_kv_num_blocks  # by looking at all pairs
    assert mask.kv_num_blocks.tolist() == counts.tolist() and mask.kv_num_blocks.sum() < n * (n + 1) / 2


@pytest.mark.parametrize("more", MODELS)
def test_flex_attention_gives_the_log_probs_and_gradients_of_sdpa(
    more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    flex_of_plain_operations(monkeypatch)
    model, (plain, filled) = tiny(**more), filled_pack()
    expected = logps_and_gradients(model, plain)
    for ours, theirs in zip(logps_and_gradients(model, filled), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("whole_layers", [False, True])
def test_the_compiled_kernel_gives_the_log_probs_of_sdpa_and_is_compiled_once(
    whole_layers: bool, compiler: Any
) -> None:
    model = tiny().train(whole_layers)
    plain_model = tiny()
    fast.wrap_layers(list(model.model.layers), "none", compile=whole_layers)
    with torch.no_grad():
        for seed in range(3):  # other queries, another number of them, in packs of one length
            examples = random_queries(20 + seed, seed)
            plain, filled = clha.pack(examples), clha.pack(examples, fill_to=8 * fast.TILE)
            assert filled["input_ids"].shape[1] == 8 * fast.TILE
            expected = clha.sequence_logps(plain_model, plain)[0]
            torch.testing.assert_close(clha.sequence_logps(model, filled)[0], expected, rtol=1e-5, atol=1e-4)
    assert compiler["unique_graphs"] == 1


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({}, "without a GPU"),
        ({"attention_dropout": 0.1}, "with attention_dropout"),
        ({"sliding_window": 99}, "with sliding_window"),
        ({"sliding_window": 100}, "without a GPU"),
    ],
)
def test_flex_attention_is_refused_where_it_has_no_way(more: dict[str, Any], reason: str) -> None:
    model = tiny(**more)
    assert not fast.uses_flex(model, "auto", 100) and not fast.uses_flex(model, "sdpa", 100)
    with pytest.raises(InputError, match=f"--attention flex: can't be used {reason}"):
        fast.uses_flex(model, "flex", 100)
    with pytest.raises(InputError, match=f"--compile: needs flex_attention, not used {reason}"):
        fast.uses_flex(model, "auto", 100, compile=True)


def test_the_length_of_packs_is_the_cheapest() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    order = [(0.0, list(range(10)))]
    assert fast.pack_length([500] * 10, order, 8192) == 5120  # all in one, 120 too many
    assert fast.pack_length([500] * 10, order, 4096) == 2560  # 2 x (2560 + 512); one by one: 10 x 1024
    assert fast.pack_length([5000, *[500] * 9], order, 1024) == 5120  # the longest query is not divided
    assert fast.pack_length([500] * 10, order, 1024, longest=1400) == 1408  # one of the dev set


def test_packs_of_other_lengths_are_filled_to_a_few() -> None:
    lengths = [fast.filled(tokens) for tokens in (1, 128, 129, 256, 257, 512, 513, 8192)]
    assert lengths == [128, 128, 256, 256, 512, 512, 1024, 8192]


# Layers


@pytest.mark.parametrize("checkpointing", ["full", "selective"])
def test_activation_checkpointing_changes_no_gradient_and_keeps_less(checkpointing: str) -> None:
    examples, results, kept = random_queries(4), [], []
    for how in ("none", checkpointing):
        model, sizes = tiny().train(), []
        fast.wrap_layers(list(model.model.layers), how, compile=False)
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.append(t.numel()) or t, id
        )
        with hooks:
            clha.sequence_logps(model, clha.pack(examples))
        kept.append(sum(sizes))
        results.append(logps_and_gradients(model, clha.pack(examples)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    assert kept[1] < 0.8 * kept[0]


def test_compiled_layers_give_the_same_and_are_compiled_once_for_all(compiler: Any) -> None:
    model, batch = tiny(num_hidden_layers=3).train(), clha.pack(random_queries(4))
    expected = logps_and_gradients(model, batch)
    fast.wrap_layers(list(model.model.layers), "full", compile=True)
    for ours, theirs in zip(logps_and_gradients(model, batch), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert compiler["unique_graphs"] == 1


# Data


def test_what_is_made_ahead_comes_in_order_and_errors_arrive() -> None:
    made = []

    def make(item: int) -> int:
        made.append(item)
        return 1 // (3 - item)

    results = fast.ahead(make, range(5))
    assert [next(results), next(results)] == [0, 0] and made[:2] == [0, 1]
    next(results)
    with pytest.raises(ZeroDivisionError):
        list(results)
