"""Plans by hand: memory by part, tokens, hours; and the rate that a machine gives them."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

import clha
import reward
from bench import plan, rates, scaling, train_step


@pytest.fixture
def files(world: Path, tmp_path: Path) -> list[str]:
    """Flags for a model folder without weights, and eight records."""
    (tmp_path / "model").mkdir()
    for file in (world / "init").glob("*.json"):
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    prompt = [{"role": "user", "content": "How do I make tea?"}]
    record = {"prompt": prompt, "responses": ["Boil the water.", "No."], "rewards": [1.0, -1.0]}
    reward.write_jsonl(tmp_path / "data.jsonl", [record] * 8)
    flags = f"--model {tmp_path / 'model'} --train_data {tmp_path / 'data.jsonl'} --batch_size 4"
    return flags.split()


def run(program: Any, flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A program's main with these flags."""
    monkeypatch.setattr(sys, "argv", [program.__file__, *flags])
    program.main()


def test_memory_by_part_by_hand() -> None:
    model = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        num_hidden_layers=2,
        intermediate_size=48,
        num_attention_heads=4,
    )
    queries = train_step.queries(1, seed=1)
    layer = 4 * 256**2 + 3 * 256 * 48 + 2 * 256
    weights = 4 * (2 * layer + 2 * 4096 * 256 + 256)
    tensors = 2 * 9 + 3
    found = {}
    for ranks, checkpointing in [(1, "full"), (2, "full"), (1, "none")]:
        config = clha.Config("", "", "", dtype="float32", activation_checkpointing=checkpointing)
        parts = plan.memory(model, config, queries, ranks)
        assert parts["Sharded Param"] == parts["Sharded Grad"] == weights / ranks
        assert parts["OptState"] == 2 * weights / ranks + 4 * tensors  # two moments, and counts of steps
        found[ranks, checkpointing] = sum(parts.values())
    kept = 2 * 4 * queries[0]["size"] * (6 * 256 + 3 * 48)  # what the products of both layers read and give
    assert found[1, "none"] - found[1, "full"] > kept / 2


def test_tokens_of_the_released_loop_by_hand() -> None:
    longest = [15, 7, 8]
    assert (
        plan.released_tokens(longest, [2, 2, 3]) == 4 * 15 + 3 * 8
    )  # rows of the first two, then of the third


def plan_of(**more: Any) -> plan.Plan:
    """A plan with these figures."""
    figures = {"kind": "h200", "nproc": 4, "tokens": 10**6, "filled": 1.5}
    figures |= {"parameters": 10**9, "trained": 10**9}
    names = plan.Plan.__dataclass_fields__
    return plan.Plan(**(dict.fromkeys(names, 0) | figures | more))


def test_hours_of_a_rate_by_hand() -> None:
    rate = {"kind": "NVIDIA H200", "flops_per_s": 6e12, "processes": 2, "parameters": 99}  # 3e12 per process
    wanted = plan_of()
    assert wanted.flops == 1.5 * 6e15
    assert plan.hours_at(3e12, wanted) == pytest.approx(750 / 3600)  # 9e15 / 12e12
    assert plan_of(trained=0).flops == 1.5 * 4e15
    small = {"kind": "NVIDIA H200", "flops_per_s": 1, "processes": 1, "parameters": 10}
    assert plan.find_rate([small, rate], plan_of(nproc=1, parameters=90)) == small
    assert plan.find_rate([small, rate], plan_of(nproc=2, parameters=10)) == rate
    assert plan.find_rate([small, rate], plan_of(kind="a800")) is None


def test_a_plan_reads_no_weights(
    files: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(plan, "RATES", [tmp_path / "none"])
    flags = "--gpu a800 --nproc 4 --replicate 2 --memory_gb 40"
    run(plan, [*files, *flags.split()], monkeypatch)
    text = capsys.readouterr().out
    assert "no rate of a800 is measured yet; `python -m bench.gpu`" in text
    assert "hours, at 50% to 30% of the card's 312 TFLOP/s" in text
    assert re.search(r"\*\*0\.\d\d\*\* of 40 \(", text)
    assert "(1.0 passes, 128 tokens in the largest pack)" in text  # filled to a tile
    assert "| queries | 8 |" in text
    assert "| steps, and tokens in all of them | 4," in text


def test_a_measured_rate_gives_hours(
    files: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(plan, "RATES", [tmp_path / "rates.jsonl"])
    run(rates, ["--steps", "1", *files, "--rates", str(tmp_path / "rates.jsonl")], monkeypatch)
    row = json.loads(capsys.readouterr().out)
    assert row == json.loads((tmp_path / "rates.jsonl").read_text())
    assert row["processes"] == 1
    assert row["flops_per_s"] == pytest.approx(6 * row["parameters"] * row["tokens_per_s"], rel=0.01)
    torch.distributed.destroy_process_group()
    run(plan, ["--gpu", "cpu", "--nproc", "1", *files], monkeypatch)
    assert "hours" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("module", "flags", "line"),
    [
        (plan, "--nproc 0", "--nproc 0: must be a number of 1 or more"),
        (plan, "--memory_gb -1", "--memory_gb -1.0: must be a number of 0 or more"),
        (plan, "--nproc 3 --replicate 2", "--replicate 2: must divide the 3 processes"),
        (plan, "--gpu abacus", "--gpu: invalid choice"),
        (plan, "--max_length 9", "--max_prompt_length 384: must be less than --max_length"),
        (rates, "--steps 0", "--steps 0: must be"),
    ],
)
def test_wrong_input_is_told_in_a_line(
    module: Any, flags: str, line: str, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(clha.InputError) as error:
        run(module, [*files, *flags.split()], monkeypatch)
    assert line in str(error.value)


# Scaling


def test_sending_by_hand() -> None:
    Layout = scaling.Layout
    nvlink, adapter = 0.8 * 450e9, 0.8 * 50e9  # bytes/s
    send = scaling.communication
    assert send(1e9, 1e9, Layout(1)) == 0
    assert send(1e9, 1e9, Layout(8)) == pytest.approx(8e9 * 7 / 8 / nvlink)
    assert send(1e9, 0, Layout(8)) == pytest.approx(4e9 * 7 / 8 / nvlink)  # LoRA: nothing to reduce
    # Two machines: all of their weights pass the eight adapters of each; 400 GB/s is less than NVLink's 450.
    assert send(1e9, 1e9, Layout(16)) == pytest.approx(8e9 * 15 / 16 / (8 * adapter))
    assert send(1e9, 1e9, Layout(8, per_machine=4)) == pytest.approx(8e9 * 7 / 8 / (4 * adapter))
    assert send(1e9, 1e9, Layout(16), adapter=5e9) == pytest.approx(8e9 * 15 / 16 / (8 * adapter / 10))
    # A copy per machine: within it as on one, then each card's eighth of the gradients, there and back.
    within = 8e9 * 7 / 8 / nvlink
    between = 2 * 4e9 / 8 / 2 / adapter
    assert send(1e9, 1e9, Layout(16, replicate=2)) == pytest.approx(within + between)


def test_published_runs_are_predicted_to_15_percent() -> None:
    for run in scaling.PUBLISHED:
        low, high = run.predicted()
        assert low < high and run.fewer.cards < run.more.cards
        assert 0.85 * low < run.more_rate < high / 0.85, run
        assert high <= run.fewer_rate


def test_a_range_of_hours_from_all_sending_hidden_to_none(
    files: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(scaling, [*files, "--adapter", "100"], monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:] if line]
    assert [row[:2] for row in rows] == [
        ["8", "FSDP"],
        ["64", "FSDP"],
        ["64", "HSDP"],
        ["512", "FSDP"],
        ["512", "HSDP"],
    ]
    for row in rows:
        low, high = map(float, row[5].split(" to "))
        assert 0 <= low <= high <= 2.1 * low + 0.001
        assert row[2] == "128"  # a query, filled to a tile
    run(scaling, ["--check"], monkeypatch)
    assert capsys.readouterr().out.count("\n|") == len(scaling.PUBLISHED) + 1
