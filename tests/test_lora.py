"""LoRA: adapters alone train, the same however the run is divided or stopped; the result is PEFT's."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, config
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import clha
import evaluate
from clha import InputError

pytest.importorskip("peft")


def lora(world: Path, out: Path, **more: Any) -> clha.Config:
    """Four small steps of LoRA."""
    settings = config(world, out)
    values = {
        "train_data": str(world / "scored.jsonl"),
        "lora_rank": 2,
        "max_steps": 4,
        "learning_rate": 1e-2,
    }
    for name, value in (values | {"checkpoint_every": 2} | more).items():
        setattr(settings, name, value)
    return settings


@pytest.fixture(scope="module")
def trained(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUTPUT_DIR of a run."""
    out = tmp_path_factory.mktemp("lora") / "run"
    clha.train(lora(world, out))
    return out


def adapters(out: Path) -> dict[str, torch.Tensor]:
    """What a run left."""
    return load_file(out / "final/adapter_model.safetensors")


def test_adapters_alone_are_trained_saved_and_checkpointed(world: Path, trained: Path) -> None:
    names = {path.name for path in (trained / "final").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer_config.json"} <= names
    assert "model.safetensors" not in names
    found = adapters(trained)
    assert all("lora_" in name for name in found) and all(weight.any() for weight in found.values())
    assert len(found) == 2 * 7 * 2  # A and B of seven linear layers in each of two
    [shard] = (trained / "checkpoints/step-4").glob("*.safetensors")
    state = load_file(shard)
    assert all("lora_" in name for name in state)
    assert len([name for name in state if name.startswith("model.")]) == len(found)


def test_the_result_is_the_base_and_the_adapters_and_can_be_merged(
    world: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = AutoModelForCausalLM.from_pretrained(world / "init")
    adapted = AutoModelForCausalLM.from_pretrained(trained / "final")
    argv = ["evaluate.py", "merge", "--model", str(trained / "final"), "--out", str(tmp_path / "merged")]
    monkeypatch.setattr(sys, "argv", argv)
    evaluate.main()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (
        type(merged) is type(base) and AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token == "</s>"
    )
    ids = torch.tensor([[0, 28, 275, 461, 530]])
    logits = [model(ids).logits.detach() for model in (base, adapted, merged)]
    assert (logits[0] - logits[1]).abs().max() > 1e-3
    assert logits[2] == pytest.approx(logits[1], abs=1e-5)
    with pytest.raises(InputError, match=r"holds LoRA adapters; `python evaluate\.py merge`"):
        evaluate.load(str(trained / "final"), torch.device("cpu"))


def test_a_resumed_run_ends_with_the_same_bits(world: Path, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/final")
    shutil.rmtree(tmp_path / "run/checkpoints/step-4")
    clha.train(lora(world, tmp_path / "run"))
    first, second = [path / "final/adapter_model.safetensors" for path in (trained, tmp_path / "run")]
    assert first.read_bytes() == second.read_bytes()


def test_two_processes_train_the_same_adapters(world: Path, trained: Path, tmp_path: Path) -> None:
    flags = []
    for name, value in vars(lora(world, tmp_path / "two")).items():
        if value != getattr(clha.Config("", "", ""), name):
            flags += [f"--{name}", str(value)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run([*command, "clha.py", *flags], cwd=ROOT, check=True, capture_output=True)
    one, two = adapters(trained), adapters(tmp_path / "two")
    for name, weight in one.items():
        assert two[name] == pytest.approx(weight, abs=2e-6), name


def test_frozen_weights_are_kept_in_the_dtype_of_the_computation(world: Path, tmp_path: Path) -> None:
    _, _, device = clha.init_process()
    policy, _ = clha.load_policy(lora(world, tmp_path, dtype="bfloat16"), device)
    kept = {weight.requires_grad: weight.dtype for weight in policy.parameters()}
    assert kept == {True: torch.float32, False: torch.bfloat16}


def test_the_identity_of_a_run_has_the_base_and_the_rank(world: Path, trained: Path, tmp_path: Path) -> None:
    run = json.loads((trained / "checkpoints/step-4/run.json").read_text())["run"]
    assert run["lora_rank"] == 2
    shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/final")
    with pytest.raises(InputError, match="lora_rank 2 -> 3"):
        clha.train(lora(world, tmp_path / "run", lora_rank=3))


def test_a_model_card_says_what_was_trained_on_what(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "publish", "--run", str(tmp_path / "run")])
    evaluate.main()
    card = (tmp_path / "run/final/README.md").read_text()
    [last] = (tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1:]
    assert card.startswith("---\nlibrary_name: peft\n") and "\ninit, aligned with" in card
    assert f"| loss | {json.loads(last)['loss']:.4g} |" in card and "| lora_rank | 2 |" in card
    assert "4 steps of" in card and "queries of scored.jsonl" in card and "the text of HH-RLHF" in card
    assert str(tmp_path.parent) not in card.replace(str(tmp_path / "run/final"), "")
    (tmp_path / "run/final/README.md").write_text(card + "Mine.")
    evaluate.main()
    assert (tmp_path / "run/final/README.md").read_text() == card + "Mine."
    shutil.rmtree(tmp_path / "run/final")
    with pytest.raises(InputError, match="not a finished run"):
        evaluate.main()
