"""The ways that bench.train_step and bench.gpu compare do the same work, on a tiny model."""

import json
import sys
import weakref
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

import clha
from bench import gpu, train_step

CPU = torch.device("cpu")


def shortest(number: int) -> list[clha.Example]:
    """A few short queries."""
    return sorted(train_step.queries(24, seed=0), key=lambda query: query["size"])[:number]


def test_all_ways_of_a_step_have_one_loss() -> None:
    policy = train_step.build("2M")
    losses = {}
    for way in ("padded", "concatenated", "ours"):
        policy.model.set_attn_implementation("sdpa")  # packs choose their own
        losses[way] = train_step.WAYS[way](policy, shortest(3)).item()
    assert losses == pytest.approx(dict.fromkeys(losses, losses["ours"]), rel=1e-5)


def test_the_bare_step_has_as_many_tokens() -> None:
    policy = train_step.build("2M")
    queries = [query for query in shortest(1) for _ in range(2)]
    seen = []
    hook = policy.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    policy.model.set_attn_implementation("sdpa")
    train_step.floor(policy, queries)
    hook.remove()
    assert seen[0]["input_ids"].shape == (2, queries[0]["size"])
    assert len(seen[0]["logits_to_keep"]) == sum(map(len, queries[0]["response_ids"]))


def test_the_last_line_is_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pool = MagicMock()
    pool.return_value.Pool.return_value.__enter__.return_value.apply.return_value = 1.0
    monkeypatch.setattr(train_step.multiprocessing, "get_context", pool)
    monkeypatch.setattr(sys, "argv", ["train_step", "--models", "2M", "--queries", "1", "--steps", "1"])
    train_step.main()
    [row] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(row) == [
        *("model", "parameters", "queries", "steps", "padded_over_ours", "concatenated_over_ours"),
        *("ours_over_floor", "peak_memory_gib"),
    ]
    assert list(row["peak_memory_gib"]) == ["padded", "concatenated", "ours", "floor"]


def test_a_pack_is_filled_and_not_overfilled() -> None:
    for tokens in (640, 4096, 65536):
        total = sum(query["size"] for query in gpu.fill(tokens, seed=1))
        assert tokens - 640 < total <= tokens


def test_a_run_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flags = "--stages ways profile sweep scoring generation --model 2M --device cpu --queries 1 --rounds 1"
    flags += f" --pack_tokens 640 --checkpointing none --out {tmp_path}/gpu.jsonl"
    monkeypatch.setitem(gpu.CARDS, "cpu", (0, 0.5e12))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu", *flags.split()])
    gpu.main()
    printed = capsys.readouterr().out
    assert "aten::mm" in printed
    results = json.loads(printed.splitlines()[-1])
    ours, unshared, padded, _ = results["ways"]
    assert [row["way"] for row in results["ways"]] == ["ours", "unshared", "padded", "concatenated"]
    assert unshared["tokens_per_s"] == pytest.approx(ours["tokens_per_s"] / unshared["over_ours"])
    for row in results["ways"]:
        if row is unshared:  # which has another loss
            continue
        assert row["loss"] == pytest.approx(ours["loss"], rel=1e-2)  # each trains weights of its own
        assert row["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-2)
        assert row["flops_per_s"] == pytest.approx(6 * 2068640 * row["tokens_per_s"])
        assert row["mfu"] == pytest.approx(row["flops_per_s"] / 0.5e12)
        assert row["over_ours"] == pytest.approx(row["seconds"][0] / ours["seconds"][0])
    assert f"| 2M | padded | full | 1024 | done | 2068640 | {padded['queries_per_s']:,.4g} |" in printed
    assert results["scoring"][0]["responses_per_s"] > 0 and results["generation"][0]["prompts_per_s"] > 0
    [full] = results["sweep"]
    assert (full["checkpointing"], full["pack_tokens"], full["result"]) == ("none", 640, "done")
    rate = json.loads((tmp_path / "gpu.jsonl").read_text())
    assert (rate["kind"], rate["processes"], rate["flops_per_s"]) == ("CPU", 1, ours["flops_per_s"])


@pytest.mark.parametrize("family", gpu.FAMILIES)
def test_log_probs_and_gradients_are_compared_with_responses_alone_in_float32(family: str) -> None:
    rows = gpu.numerics(CPU, 640, family)
    assert [(row["dtype"], row["attention"]) for row in rows] == [
        ("float32", "alone"),
        ("float32", "sdpa"),
        ("bfloat16", "alone"),
        ("bfloat16", "sdpa"),
    ]
    far = [(row["logps_apart_by_nats_per_token"], row["gradient_apart_by_share"]) for row in rows]
    assert far[0] == (0, 0)
    assert 0 < far[1][0] < 1e-5 and 0 < far[1][1] < 1e-5
    for logps, gradient in far[2:]:
        assert 1e-5 < logps < 0.03 and 1e-5 < gradient < 0.1


def test_responses_that_share_nothing_have_all_of_their_prompt() -> None:
    [query] = train_step.queries(1, seed=0)
    made = gpu.unshared([query])
    assert [row["response_ids"] for row in made] == [[ids] for ids in query["response_ids"]]
    assert all(row["prompt_ids"] == query["prompt_ids"] for row in made)
    assert sum(row["size"] for row in made) == query["size"] + len(query["prompt_ids"])


def test_a_way_that_runs_out_of_memory_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def too_large(trainer: Any, way: str, queries: list[clha.Example]) -> dict[str, float]:
        made.append(weakref.ref(trainer))
        if way == "padded":
            raise torch.OutOfMemoryError("no memory")
        return {"loss": 1.0, "grad_norm": 1.0}

    monkeypatch.setattr(gpu, "step", too_large)
    rows = gpu.ways(gpu.Trial("ours", "2M", CPU, 1024, [shortest(1)] * 2))
    assert [row["result"] for row in rows] == ["done", "done", "out of memory", "done"]
    assert rows[2]["over_ours"] is None
    gpu.show(rows, peak=1e12)  # with empty cells


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
    monkeypatch.setattr(sys, "argv", ["gpu", *flags.split()])
    with pytest.raises(clha.InputError, match=said):
        gpu.parse_args()
