"""The measurements of bench/gpu.py, on the CPU with a small model; and their arithmetic, by hand."""

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

import program

sys.path.append(str(ROOT / "bench"))
import gpu
import lengths


def test_a_run_without_a_gpu_measures_every_stage(tmp_path: Path) -> None:
    flags = "--model 2M --device cpu --queries 2 --rounds 1 --numerics --profile --generate --score 2M"
    flags += " --pack_tokens 640 --checkpointing none full --peak_tflops 0.5"
    command = [sys.executable, "bench/gpu.py", *flags.split(), "--out", str(tmp_path / "gpu.jsonl")]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, cwd=ROOT, env=hidden, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    stages: dict[str, list[dict[str, Any]]] = {}
    for line in (tmp_path / "gpu.rows.jsonl").read_text().splitlines():
        stages.setdefault((row := json.loads(line))["stage"], []).append(row)
        assert row["torch"] == torch.__version__ and row["arguments"]["queries"] == 2
    order = "numerics product ways head profile sweep scoring generation"
    assert " ".join(stages) == order

    ours, padded, concatenated = ways = stages["ways"]
    assert [row["way"] for row in ways] == ["ours", "padded", "concatenated"]
    assert f"| {ours['queries']} | padded | {padded['queries_per_s']:,.4g} |" in result.stdout
    tokens = sum(len(q["prompt_ids"]) + sum(map(len, q["response_ids"])) for q in lengths.queries(2, 0))
    for row in ways:
        assert row["result"] == "done" and row["peak_gib"] is None
        assert row["tokens_per_s"] == pytest.approx(row["queries_per_s"] * tokens / 2)
        assert row["flops_per_s"] == pytest.approx(6 * row["parameters"] * row["tokens_per_s"])
        assert row["mfu"] == pytest.approx(row["flops_per_s"] / 0.5e12)
        assert row["of_product"] == pytest.approx(row["flops_per_s"] / stages["product"][0]["tflops"] / 1e12)
        assert row["loss"] == pytest.approx(ours["loss"], rel=1e-2)
        assert row["over_ours"] == pytest.approx(ours["queries_per_s"] / row["queries_per_s"])
    assert min(padded["over_ours"], concatenated["over_ours"]) > 1.2

    [line] = (tmp_path / "gpu.jsonl").read_text().splitlines()  # of which bench/plan.py makes hours
    rate = json.loads(line)
    expected = {"gpu": "CPU", "model": "2M", "way": "ours", "processes": 1, "parameters": 2068640}
    assert rate.items() >= expected.items() and rate["flops_per_s"] == ours["flops_per_s"]
    assert {row["checkpointing"] for row in stages["sweep"]} == {"none", "full"}
    assert stages["head"][0]["loss"] == pytest.approx(stages["head"][1]["loss"], rel=1e-2)
    shares = {row["group"]: row["share"] for row in stages["profile"]}
    assert sum(shares.values()) == pytest.approx(1, abs=0.2) and shares["matrix products"] > 0
    assert [row["dtype"] for row in stages["numerics"]] == ["torch.float32", "torch.bfloat16"]
    assert 0 < stages["numerics"][1]["gradient_apart_by_share"] < 0.1
    assert stages["scoring"][1]["over_packed"] > 0 and stages["generation"][0]["tokens_a_reply"] > 100


@pytest.fixture
def trainer() -> gpu.Trainer:
    """A small model."""
    _, _, device = program.init_process()
    return gpu.Trainer(gpu.config("2M"), device, torch.float32)


def test_the_three_ways_are_the_same_step(trainer: gpu.Trainer) -> None:
    trainer.optimizer.param_groups[0]["lr"] = 0.0
    queries = sorted(lengths.queries(24, 0), key=gpu.clha.size)[:3]
    results = trainer.in_turn(["ours", "padded", "concatenated"], [queries], 640)
    [ours], [padded], [concatenated] = results.values()
    for name in ("loss", "grad_norm"):
        assert padded[name] == pytest.approx(ours[name], rel=1e-4)
        assert concatenated[name] == pytest.approx(ours[name], rel=1e-4)


def test_the_model_is_whole(trainer: gpu.Trainer) -> None:
    theirs = gpu.AutoModelForCausalLM.from_config(gpu.config("2M"))
    for name, buffer in theirs.named_buffers():
        assert torch.equal(trainer.model.get_buffer(name), buffer)
    weights = dict(trainer.model.named_parameters())
    assert weights.keys() == dict(theirs.named_parameters()).keys()
    assert weights["lm_head.weight"].to_local().std().item() == pytest.approx(0.02, rel=0.05)
    assert weights["model.norm.weight"].to_local().eq(1).all()


def test_a_way_that_runs_out_of_memory_is_left_out(
    trainer: gpu.Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, padded = [], gpu.train_step.padded

    def fail(gradient: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("no memory")

    def in_backward(module: Any, inputs: Any, output: torch.Tensor) -> None:
        output.register_hook(fail)

    def too_large(model: Any, queries: Any) -> torch.Tensor:
        asked.append(queries)
        model.model.layers[0].register_forward_hook(in_backward)
        return padded(model, queries)

    monkeypatch.setitem(gpu.train_step.WAYS, "padded", too_large)
    queries, optimizer = sorted(lengths.queries(24, 0), key=gpu.clha.size)[:2], weakref.ref(trainer.optimizer)
    weights = trainer.optimizer.param_groups[0]["params"]
    results = trainer.in_turn(["ours", "padded"], [queries] * 3, 640)
    assert len(asked) == 1 and results["padded"] == [None]
    # FSDP itself lives on; what is large must not, or there is no room for the next one.
    assert all(w.grad is None and not w.to_local().untyped_storage().nbytes() for w in weights)
    assert optimizer() is None
    first, *_ = losses = [step["loss"] for step in results["ours"]]
    assert len(losses) == 3 and losses[1] == pytest.approx(first, rel=1e-6)  # the weights are as at first


def test_mfu_by_hand() -> None:
    assert gpu.training_flops(7_000_000_000, 10_000) == 4.2e14  # 6 x 7e9 x 1e4
    config = gpu.config("7B")
    assert (config.hidden_size, config.vocab_size, config.num_key_value_heads) == (4096, 32000, 32)


def test_losses_by_hand() -> None:
    kernels = [
        ("nvjet_tst_128x256", 0.0, 4.0, 4.0),
        ("triton_tem_fused_flex_attention_0", 3.0, 5.0, 2.0),  # begins while the product still runs
        ("multi_tensor_apply_kernel<FusedAdamMathFunctor>", 6.0, 7.0, 1.0),
        ("sm90_xmma_gemm_bf16", 7.0, 8.0, 1.0),
        ("vectorized_elementwise_kernel<silu>", 8.0, 8.5, 0.5),
    ]
    rows = gpu.losses(kernels, wall=10.0)
    assert [(row["group"], row["share"]) for row in rows] == [
        ("matrix products", 0.5),
        ("idle", 0.25),  # 5 to 6, and 8.5 to 10
        ("attention", 0.2),
        ("clipping and optimizer", 0.1),
        ("norms and elementwise", 0.05),
    ]
    assert rows[0]["most_of_it"] == "nvjet_tst_128x256"


def test_a_pack_is_filled_and_not_overfilled() -> None:
    for tokens in (640, 4096, 65536):
        total = sum(map(gpu.clha.size, gpu.fill(tokens, seed=1)))
        assert tokens - 640 < total <= tokens


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--model 24M", "there is no GPU"),
        ("--device cpu --rounds 0", "--rounds 0"),
        ("--device cpu --pack_tokens 1000", "multiple of 128"),
        ("--model 9B", "invalid choice"),
    ],
)
def test_wrong_flags_are_told_in_a_line(flags: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", *flags.split()])
    with pytest.raises(gpu.InputError, match=said):
        gpu.parse_args()
