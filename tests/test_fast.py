"""The fast path and the plain one agree."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from test_logps import MODELS, random_queries, tiny
from transformers import GraniteConfig, GraniteForCausalLM

import clha
import fast
from records import read_records, write_jsonl


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


def test_shards_of_two_processes_train_alike(world: Path, tmp_path: Path) -> None:
    records = [r | {"rewards": [1.0, -1.0]} for r in read_records(world / "train.jsonl")[:24]]
    write_jsonl(tmp_path / "data.jsonl", records)
    program = "import sys, fast, clha; fast.LOGITS = {logits}; clha.train(clha.parse_args(sys.argv[1:]))"
    flags = f"--model {world / 'init'} --train_data {tmp_path / 'data.jsonl'} --max_steps 3 --batch_size 8"
    flags += " --learning_rate 1e-5"
    for name, logits in (("plain", 2**30), ("chunks", 768 * 9)):
        launch = "-m torch.distributed.run --standalone --nproc_per_node 2 --no-python"
        command = [sys.executable, *launch.split(), sys.executable, "-c", program.format(logits=logits)]
        command += [*flags.split(), "--output_dir", str(tmp_path / name)]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
        assert result.returncode == 0, result.stderr
    plain, chunks = (load_file(tmp_path / n / "final" / "model.safetensors") for n in ("plain", "chunks"))
    for name, weight in plain.items():
        torch.testing.assert_close(chunks[name], weight, atol=1e-6, rtol=0)
