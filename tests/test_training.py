"""The training loop: what every process does, that no division of the work changes it, and what it leaves."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import clha


@pytest.fixture(autouse=True)
def leave_the_group() -> Iterator[None]:
    """Ends the process group that `clha.train` makes in this process."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def data(world: Path) -> Path:
    """The training records of the toy world with rewards, some of them close, and two or three replies."""
    generator = torch.Generator().manual_seed(0)
    records = clha.read_records(world / "train.jsonl")
    for i, record in enumerate(records):
        record["responses"] += ["I do not know."] * (i % 2)
        record["rewards"] = torch.randn(len(record["responses"]), generator=generator).tolist()
    clha.write_jsonl(world / "scored.jsonl", records)
    return world / "scored.jsonl"


def config(world: Path, data: Path, out: Path, **more: Any) -> clha.Config:
    """Five steps of eight queries."""
    settings = {"max_steps": 5, "batch_size": 8, "learning_rate": 1e-5, "pack_tokens": 400} | more
    return clha.Config(str(world / "init"), str(data), str(out), **settings)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a Hugging Face folder."""
    return load_file(folder / "model.safetensors")


def log(folder: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one_process(world: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of one process leaves."""
    out = tmp_path_factory.mktemp("one") / "run"
    clha.train(config(world, data, out))
    dist.destroy_process_group()
    return out


def assert_same_weights(run: Path, other: Path, world: Path) -> None:
    """The same weights to 1e-6, after steps that changed them by more than that."""
    before, expected = weights(world / "init"), weights(other / "final")
    for name, weight in weights(run / "final").items():
        torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=0)
    assert max((expected[name] - before[name]).abs().max() for name in expected) > 3e-5


@pytest.mark.parametrize(
    "settings", [{"pack_tokens": 60}, {"pack_tokens": 4096}, {"activation_checkpointing": False}]
)
def test_packs_and_accumulation_change_no_weight(
    world: Path, data: Path, one_process: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    clha.train(config(world, data, tmp_path / "run", **settings))
    assert_same_weights(tmp_path / "run", one_process, world)


@pytest.mark.parametrize("flags", [[], ["--reduction", "release"]])
def test_two_processes_train_like_one(
    world: Path, data: Path, one_process: Path, tmp_path: Path, flags: list[str]
) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "clha.py",
        "--model",
        world / "init",
        "--train_data",
        data,
        "--output_dir",
        tmp_path / "run",
        "--max_steps",
        "5",
        "--batch_size",
        "8",
        "--learning_rate",
        "1e-5",
        "--pack_tokens",
        "400",
        *flags,
    ]
    result = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "on each of 2 process(es)" in result.stdout
    if flags:
        one_process = tmp_path / "one"
        clha.train(config(world, data, one_process, reduction="release"))
    assert_same_weights(tmp_path / "run", one_process, world)
    for ours, theirs in zip(log(tmp_path / "run"), log(one_process), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_more_processes_than_packs_need_keep_step(world: Path, data: Path, tmp_path: Path) -> None:
    # One query a step: the second process gets an empty pack, and its pass must count for nothing.
    flags = ["--max_steps", "2", "--batch_size", "1", "--learning_rate", "1e-5", "--pack_tokens", "400"]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "clha.py",
        "--model",
        world / "init",
        "--train_data",
        data,
        "--output_dir",
        tmp_path / "two",
        *flags,
    ]
    result = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    clha.train(config(world, data, tmp_path / "one", max_steps=2, batch_size=1))
    two = weights(tmp_path / "two" / "final")
    for name, weight in weights(tmp_path / "one" / "final").items():
        torch.testing.assert_close(weight, two[name], atol=1e-6, rtol=0)


def test_the_same_run_twice_gives_the_same_bytes(
    world: Path, data: Path, one_process: Path, tmp_path: Path
) -> None:
    clha.train(config(world, data, tmp_path / "run"))
    again, first = (folder / "final" / "model.safetensors" for folder in (tmp_path / "run", one_process))
    assert again.read_bytes() == first.read_bytes()


def test_a_run_learns_logs_and_saves(world: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    clha.train(
        config(
            world,
            data,
            tmp_path / "run",
            max_steps=30,
            learning_rate=2e-3,
            dev_data=str(data),
            eval_every=10,
            save_every=15,
            lr_schedule="cosine",
            warmup_steps=3,
        )
    )
    rows = log(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 31))
    names = {
        "loss",
        "loss/rank",
        "loss/sft",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
        "pairs_kept",
        "gated",
        "epoch",
        "grad_norm",
        "learning_rate",
        "num_tokens",
        "tokens_per_second",
    }
    assert names <= set(rows[0])
    assert [row["step"] for row in rows if "eval/loss" in row] == [10, 20, 30]
    assert rows[-1]["eval/loss"] < 0.95 * rows[9]["eval/loss"]  # it learns its training data
    assert rows[0]["learning_rate"] == 0 and rows[3]["learning_rate"] == pytest.approx(2e-3)
    assert rows[-1]["learning_rate"] < 1e-4
    assert {p.name for p in (tmp_path / "run").iterdir()} >= {"config.json", "step-15", "step-30", "final"}
    printed = capsys.readouterr().out
    records = clha.read_records(data)
    gated = sum(max(record["rewards"]) <= 0 for record in records) / len(records)
    assert f"{gated:.1%} of queries gated" in printed and f"{len(records)} queries" in printed


def test_the_saved_folder_is_the_trained_model(world: Path, data: Path, tmp_path: Path) -> None:
    # The toy model ties its embeddings: they are to stay one weight, and to load without complaint.
    clha.train(config(world, data, tmp_path / "run", learning_rate=1e-3))
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokenizer = clha.load_tokenizer(str(tmp_path / "run" / "final"))
    example = clha.encode(clha.read_records(data)[0], tokenizer)
    clha.init_process()
    sharded = clha.load_model(str(tmp_path / "run" / "final"), torch.device("cpu"), torch.float32, False)
    a, b = (clha.sequence_logps(m.eval(), clha.pack([example]))[0] for m in (model, sharded))
    torch.testing.assert_close(a, b)


def test_the_rotary_frequencies_survive_sharding(world: Path) -> None:
    clha.init_process()
    sharded = clha.load_model(str(world / "init"), torch.device("cpu"), torch.float32, True)
    plain = AutoModelForCausalLM.from_pretrained(world / "init")
    expected = dict(plain.named_buffers())
    assert any("inv_freq" in name for name in expected)
    for name, buffer in sharded.named_buffers():
        torch.testing.assert_close(buffer, expected[name])


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_queries_are_dealt_once_within_the_limit_and_evenly(processes: int) -> None:
    sizes = torch.randint(10, 200, (57,), generator=torch.Generator().manual_seed(1)).tolist()
    packs = clha.deal(sizes, 500, processes)
    assert sorted(i for part in packs for i in part) == list(range(57))
    loads = [sum(sizes[i] for i in part) for part in packs]
    assert max(loads) <= 500 and len(packs) % processes == 0
    assert max(loads) - min(loads) < 200  # no more than a query apart


def test_a_query_larger_than_a_pack_gets_one_of_its_size() -> None:
    assert sorted(map(sorted, clha.deal([900, 20, 30], 100, 1))) == [[0], [1, 2]]


def test_an_epoch_is_a_seeded_permutation_without_its_tail() -> None:
    settings = clha.Config("m", "d", "o", batch_size=4, epochs=2)
    order = clha.data_order(11, settings)
    assert [len(indices) for _, indices in order] == [4] * 4
    assert [epoch for epoch, _ in order] == [0.5, 1.0, 1.5, 2.0]
    first, second = ([i for _, indices in order[k : k + 2] for i in indices] for k in (0, 2))
    assert len(set(first)) == len(set(second)) == 8 and first != second
    assert clha.data_order(11, settings) == order
    settings.seed += 1
    assert clha.data_order(11, settings) != order


def test_a_recipe_sets_defaults_and_flags_win() -> None:
    needed = ["--model", "m", "--train_data", "d", "--output_dir", "o"]
    plain = clha.parse_args(needed)
    assert (plain.margin, plain.min_reward_gap, plain.reduction) == (
        clha.Config.margin,
        clha.Config.min_reward_gap,
        "query",
    )
    release = clha.parse_args([*needed, "--recipe", "release", "--margin", "2", "--no_rescore"])
    assert (release.margin, release.min_reward_gap, release.reduction, release.rescore) == (
        2.0,
        3.0,
        "release",
        False,
    )


def test_alpha_follows_the_length_of_the_ranking(world: Path, data: Path, tmp_path: Path) -> None:
    clha.train(config(world, data, tmp_path / "run", max_steps=1))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["alpha"] == 0.05 * (3 - 1) ** 2


def test_a_finished_run_is_not_overwritten(world: Path, data: Path, one_process: Path) -> None:
    with pytest.raises(clha.InputError, match="holds a finished run"):
        clha.train(config(world, data, one_process))


def test_tensorboard_is_written_where_it_is_installed(one_process: Path) -> None:
    pytest.importorskip("tensorboard")
    assert os.listdir(one_process / "tensorboard")
