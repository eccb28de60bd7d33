"""Plans by hand: memory by part, tokens, hours, and what many GPUs send each other."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from test_logps import random_queries, tiny
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import clha
import fast
import program
from records import InputError, write_jsonl

sys.path.append(str(ROOT / "bench"))
import footprint
import plan
import rates
import scaling


@pytest.fixture
def files(world: Path, tmp_path: Path) -> list[str]:
    """Flags for a model folder without weights, and records; no batch of 4 is left over."""
    for file in (world / "init").iterdir():
        if file.suffix == ".json":
            (tmp_path / "model" / file.name).parent.mkdir(exist_ok=True)
            (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    prompt = [{"role": "user", "content": "How do I make tea?"}]
    rows = [{"prompt": prompt, "responses": ["Boil the water.", "No."], "rewards": [1.0, -1.0]}] * 8
    write_jsonl(tmp_path / "data.jsonl", rows)
    flags = f"--model {tmp_path / 'model'} --train_data {tmp_path / 'data.jsonl'} --batch_size 4"
    return flags.split()


def run(program_module: Any, flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A program's main with these flags."""
    monkeypatch.setattr(sys, "argv", [program_module.__file__, *flags])
    program_module.main()


# Memory


@pytest.mark.parametrize("ranks", [1, 2])
def test_memory_by_part_by_hand(ranks: int) -> None:
    model, batch = tiny(vocab_size=4096, hidden_size=256), clha.pack(random_queries(1))
    matrix = 4096 * 256  # weights of the embedding, and of the head
    layer = 4 * 256**2 + 3 * 256 * 48 + 2 * 256
    weights = 2 * layer + 2 * matrix + 256
    parts = footprint.memory(model.config, batch, torch.float32, ranks, "full")
    assert (
        parts[footprint.WEIGHTS]
        == parts[footprint.GRADIENTS]
        == parts[footprint.MOMENTS] / 2
        == 4 * weights / ranks
    )
    if ranks == 1:
        # The peak is the end of the backward pass. Embedding and head are still gathered, their gradients are
        # whole, and those of the last layer are being sent.
        assert (parts[footprint.ROOT], parts[footprint.REDUCED]) == (4 * 2 * matrix, 4 * (2 * matrix + layer))
    else:  # It is when they have been gathered, and are copied from where they came in.
        assert (parts[footprint.ROOT], parts[footprint.REDUCED]) == (4 * (2 * 2 * matrix + 256), 0)

    # In bfloat16 it comes later: their gradients are there in fp32, and the shard of their sum. With more
    # than one process FSDP still holds the last of the whole gradients then.
    parts = footprint.memory(model.config, batch, torch.bfloat16, ranks, "full")
    assert parts[footprint.ROOT] == 0
    assert parts[footprint.REDUCED] == 4 * (2 * matrix + 256) + 2 * matrix * (ranks > 1)
    assert parts[footprint.GRADIENTS] == 4 * (weights + 2 * matrix + 256) / ranks


def bytes_of_a_step(fake: bool, checkpointing: str) -> list[int]:
    """Bytes alive after a forward pass, and at the peak of a step; and what autograd saves."""
    examples, saved = random_queries(4), {}
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext()
    batch = clha.pack(examples)
    if fake:
        batch |= {k: mode.from_tensor(v) for k, v in batch.items() if isinstance(v, torch.Tensor)}
    with mode:
        model = tiny().train()
        fast.wrap_layers(footprint.layers_of(model), checkpointing, compile=False)
        clha.sequence_logps(model, batch)  # sets the attention
        live = footprint.Live()
        given = [*model.parameters(), *model.buffers(), *batch.values()]
        given = [tensor for tensor in given if isinstance(tensor, torch.Tensor)]
        for tensor in given:
            live.note(tensor.untyped_storage(), footprint.WEIGHTS)
        before = live.now.total()

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if all(storage is not other.untyped_storage() for other in given):
                saved[id(storage)] = storage
            return tensor

        with live, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            sums = clha.sequence_logps(model, batch)[0]
        kept = live.now.total() - before
        with live:
            sums.sum().backward()
    saved_bytes = sum(storage.nbytes() for storage in saved.values())
    return [kept - sums.nbytes, live.peak.total() - before, saved_bytes]


@pytest.mark.parametrize("checkpointing", ["full", "selective", "none"])
def test_tensors_without_memory_take_as_much_as_real_ones(checkpointing: str) -> None:
    real = bytes_of_a_step(fake=False, checkpointing=checkpointing)
    assert bytes_of_a_step(fake=True, checkpointing=checkpointing) == real
    if checkpointing == "none":  # what is alive is what autograd saved; else checkpoints hold some of it
        assert real[0] == real[2]


# Tokens and hours


def test_tokens_of_the_released_loop_by_hand() -> None:
    queries = [plan.Lengths(10, [5, 2]), plan.Lengths(3, [4, 1]), plan.Lengths(2, [2, 6])]
    assert [q.size for q in queries] == [17, 8, 10]
    assert plan.released_tokens(queries) == 4 * 15 + 2 * 8  # rows of the first two, then of the third


def test_flops_are_those_that_torch_counts() -> None:
    model, examples = tiny(), random_queries(3)
    size = plan.size_of(model.config)
    queries = [plan.Lengths(len(e["prompt_ids"]), [len(r) for r in e["response_ids"]]) for e in examples]
    clha.sequence_logps(model, clha.pack(examples))
    with FlopCounterMode(display=False) as counter:
        clha.sequence_logps(model, clha.pack(examples))[0].sum().backward()
    counted = counter.get_flop_counts()["Global"].items()  # bmm: of the angles, in some versions
    products = sum(n for op, n in counted if str(op) in ("aten.mm", "aten.addmm"))
    seen = sum(int(mask.sum()) for mask in clha.query_masks(clha.pack(examples)))
    needed, done = plan.flops(size, queries, "none")
    assert needed == done == products + 12 * size.layers * size.width * seen
    again = plan.flops(size, queries, "full")[1] - needed
    assert again == pytest.approx((needed - 6 * size.head * sum(sum(q.replies) for q in queries)) / 3)


def test_hours_of_a_rate_by_hand() -> None:
    rate = {"kind": "h200", "flops_per_s": 6e12, "processes": 2}  # 3e12 of a process
    run_of = {"nproc": 4, "parameters": 10**9, "tokens": 10**6, "done": 8e12, "filled": 1.5}
    run_of |= {"steps": 10, "passes": 2}
    assert plan.seconds(rate, run_of) == 1.5 * 6e15 / 12e12
    own = {"done_flops_per_s": 2e12, "pass_s_per_parameter": 1e-9}  # a second a pass
    assert plan.seconds(rate | own, run_of) == pytest.approx(1.5 * 2 + 20)
    rows = [{"gpu": "NVIDIA H200", "flops_per_s": 1, "parameters": 10}, rate | {"parameters": 99}]
    assert plan.find_rate(rows, "h200", 1, 90) == rows[0]
    assert plan.find_rate(rows, "h200", 2, 10) == rows[1]
    assert plan.find_rate(rows, "a800", 1, 10) is None


def test_a_plan_reads_no_weights(
    files: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flags = "--gpu a800 --nproc 4 --replicate 2 --mfu 0.5 --rates"
    run(plan, [*files, *flags.split(), str(tmp_path / "none")], monkeypatch)
    text = capsys.readouterr().out
    assert "no rate of a800 is measured yet; `python bench/gpu.py`" in text
    assert "Assumed, not measured: at 50% of 312 TFLOP/s" in text
    assert "| queries | 8 |" in text and "| steps, and tokens in all of them | 4," in text


def test_a_measured_rate_gives_hours(
    files: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = ["--rates", str(tmp_path / "rates.jsonl")]
    run(rates, ["--steps", "1", *files, *file], monkeypatch)
    row = json.loads(capsys.readouterr().out)
    assert row == json.loads((tmp_path / "rates.jsonl").read_text()) and row["processes"] == 1
    assert row["flops_per_s"] == pytest.approx(6 * row["parameters"] * row["tokens_per_s"], rel=0.01)
    torch.distributed.destroy_process_group()
    run(plan, ["--gpu", "cpu", "--nproc", "1", *files, *file], monkeypatch)
    assert "hours" in capsys.readouterr().out.splitlines()[-1]


# Wrong input


@pytest.mark.parametrize(
    ("module", "flags", "line"),
    [
        (plan, "--nproc 0", "--nproc 0: must be 1 or more"),
        (plan, "--mfu 40", "--mfu 40.0: must be 0 to 1, a share of the card's FLOP/s"),
        (plan, "--nproc 3 --replicate 2", "--replicate 2: must divide --nproc 3"),
        (plan, "--batch_size 9", "--batch_size 9: must be 1 to 8 (queries)"),
        (plan, "--gpu abacus", "--gpu: invalid choice"),
        (plan, "--max_length 9", "--max_prompt_length 384: must be less than --max_length"),
        (plan, "--rates {wrong}", "line 1: not a rate, with flops_per_s and kind (or gpu)"),
        (rates, "--steps 0", "--steps 0: must be 1 or more"),
        (scaling, "--gpus 12", "--gpus 12: must be whole machines of 8, or less than one"),
        (scaling, "--mfu 2", "--mfu 2.0: must be 1 or less"),
        (scaling, "--layers 0", "--layers 0: must be more than 0"),
    ],
)
def test_wrong_input_ends_in_a_line(
    module: Any, flags: str, line: str, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "wrong").write_text('{"kind": "h200", "flops_per_s": "fast"}\n')
    flags = [*(files if module is not scaling else []), *flags.format(wrong=tmp_path / "wrong").split()]
    with pytest.raises(SystemExit) as stopped:
        program.run(lambda: run(module, flags, monkeypatch))
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and line in error.splitlines()[-1]


# Many GPUs


def test_a_modelled_step_by_hand() -> None:
    flags = "--parameters 4e9 --layers 3 --mfu 0.5 --gpu a100 --batch_size 64 --query_tokens 128"
    links = "--longest 128 --nvlink_gb_s 100 --network_gb_s 10 --latency_us 0"
    args = scaling.parse([*flags.split(), *links.split()])
    ms = 6 * 4e9 / (0.5 * 312e12) * 1e3  # of a token
    one = scaling.step(8, 1, args)  # 4 units of a billion; 8 queries of 128 tokens a GPU
    assert (one.tokens, one.passes, one.pack) == (1024, 1, 1024)
    gather, reduce = 2e9 * 7 / 8 / 100e9 * 1e3, 4e9 * 7 / 8 / 100e9 * 1e3
    assert one.compute == pytest.approx(ms * 1024)
    assert one.sent == pytest.approx(4 * (2 * gather + reduce))
    late = max(0, gather - ms * 256 / 4) + max(0, gather + reduce - ms * 256 * 3 / 4)
    assert one.exposed == pytest.approx(4 * late + gather + reduce)
    assert one.efficiency == pytest.approx(one.compute / (one.compute + one.exposed))
    over = scaling.step(16, 1, args)  # the slower of 100 GB/s inside and 8 x 10 GB/s of a machine's ports
    assert over.sent == pytest.approx(4 * (2 * 2e9 + 4e9) / 80e9 * 1e3)
    copies = scaling.step(16, 2, args)  # and each GPU's eighth of the gradients, twice half, at 10 GB/s
    assert copies.sent == pytest.approx(one.sent + 4 * 2 * 4e9 / 8 / 2 / 10e9 * 1e3)


def test_less_than_a_query_a_gpu_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(scaling, ["--gpus", "8", "512"], monkeypatch)
    text = capsys.readouterr().out
    assert text.startswith("**Modelled, not measured.** Assumed:")
    assert "512 GPUs and more have less than one" in text
    run(scaling, ["--gpus", "8", "512", "--weak"], monkeypatch)
    assert "less than one" not in capsys.readouterr().out
    with pytest.raises(InputError):
        scaling.parse(["--gpus", "0"])
