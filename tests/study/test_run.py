"""The study: what it names and plans, which data and models a run gets, and runs in a small world."""

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import clha
import evaluate
import reward
from clha import InputError
from study import baselines, rlhf, run, toy


def test_equal_settings_share_a_run_and_others_do_not() -> None:
    default = run.run_name({"objective": "clha"}, 2)
    assert default == "clha margin=0.3 min_reward_gap=0.5 gate=True alpha=0.05"
    assert default == run.run_name({"objective": "clha", "alpha": 0.05, "margin": clha.Config.margin}, 2)
    assert default != run.run_name({"objective": "clha"}, 3)  # alpha is 0.2 there
    rows = run.methods(2) | run.ABLATIONS
    assert len({run.run_name(settings, 2) for settings in rows.values()}) == len(rows)
    center = run.run_name(run.CENTER, 2)
    for sweep in run.SWEEPS.values():
        assert [run.run_name(settings, 2) for settings in sweep.values()].count(center) == 1


def test_every_row_of_tables_2_and_3_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "find_spec", lambda name: name == "trl")
    swept = [settings for sweep in run.SWEEPS.values() for settings in sweep.values()]
    for length in run.LENGTHS:
        for noise in run.NOISES:
            planned = run.plan(noise, length)
            main = noise == run.NOISE and length == 2
            rows = list((run.methods(length) | run.ABLATIONS).values())
            if not main:
                rows.remove({"objective": "rlhf"})
            assert planned == rows + (swept if main else [])
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    assert {"objective": "rlhf"} not in run.plan(run.NOISE, 2)  # it needs TRL


def test_without_rescoring_is_without_gate_and_filter() -> None:
    settings = run.ABLATIONS["CLHA w/o rescore"]
    assert settings == {"objective": "clha", "gate": False, "min_reward_gap": 0.0}


def test_the_reward_model_of_training_is_not_that_of_the_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained_on = {}
    scored_by = {}

    def train(args: argparse.Namespace) -> None:
        trained_on[Path(args.out)] = Path(args.data).name

    def score(model: str, records: list[Any], out: Path) -> None:
        scored_by[out.name] = trained_on[Path(model)]

    monkeypatch.setattr(toy, "write", lambda out, seed, **options: None)
    monkeypatch.setattr(run, "train_base", lambda data, home: tmp_path / "base")
    monkeypatch.setattr(reward, "train", train)
    monkeypatch.setattr(reward, "load_reward_model", str)
    monkeypatch.setattr(reward, "write_scores", score)
    monkeypatch.setattr(reward, "read_records", lambda path: [])
    world = run.toy_world(tmp_path, seed=0, noise=0.2, length=2)
    assert scored_by == {"train.jsonl": "rm_train.jsonl", "dev.jsonl": "rm_train.jsonl"}
    assert trained_on[world.rm_train] == "rm_train.jsonl"
    assert trained_on[world.rm_eval] == "rm_eval.jsonl"


@pytest.fixture
def world(tmp_path: Path) -> run.World:
    """A world of paths where nothing is."""
    return run.World(
        name="nowhere",
        folder=tmp_path,
        length=2,
        base=tmp_path / "base",
        train_data=tmp_path / "train.jsonl",
        dev_data=tmp_path / "dev.jsonl",
        test_data=tmp_path / "test.jsonl",
        rm_train=tmp_path / "rm_train",
        rm_eval=tmp_path / "rm_eval",
        settings={"max_steps": 2},
        max_new_tokens=4,
    )


def test_runs_are_scored_by_the_reward_model_of_the_evaluation(
    world: run.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = []
    monkeypatch.setattr(reward, "load_reward_model", Path)
    monkeypatch.setattr(run, "align", lambda world, settings, seed: world.folder / settings["objective"])
    monkeypatch.setattr(run, "evaluate_run", lambda *args: scored.append(args))
    run.run_all(world, [{"objective": "sft"}], seed=3)
    assert scored == [
        (world, "base", world.base, 3, world.rm_eval),
        (world, "sft", world.folder / "sft", 3, world.rm_eval),
    ]


def test_rlhf_asks_the_reward_model_that_scored_the_training_data(
    world: run.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    monkeypatch.setattr(rlhf, "train", runs.append)
    assert run.align(world, {"objective": "rlhf"}, seed=7) == world.folder / "rlhf/final"
    [args] = runs
    assert args.reward_model == str(world.rm_train) != str(world.rm_eval)
    assert (args.model, args.train_data) == (str(world.base), str(world.train_data))
    assert (args.seed, args.max_steps, args.kl_beta) == (7, 100, 0.15)


@pytest.mark.parametrize(("name", "prefix"), [("coh", "Good answer:"), ("sft", None)])
def test_only_chain_of_hindsight_is_asked_for_a_good_answer(
    world: run.World, monkeypatch: pytest.MonkeyPatch, name: str, prefix: str | None
) -> None:
    asked = {}

    class Asked(Exception):
        pass

    def write_responses(path: str, records: list[Any], out: Path, **options: Any) -> None:
        asked.update(options)
        raise Asked

    monkeypatch.setattr(evaluate, "write_responses", write_responses)
    monkeypatch.setattr(reward, "read_records", lambda path: [])
    with pytest.raises(Asked):
        run.evaluate_run(world, name, world.base, 0, None)
    assert asked.get("response_prefix") == prefix
    assert set(asked.get("stop_strings", ())) >= ({"Bad answer:"} if prefix else set())


@pytest.mark.parametrize(
    ("objective", "stage"),
    [("coh", "hindsight"), ("dpo", "reference"), ("released", "ranked"), ("clha", None), ("gated_sft", None)],
)
def test_each_objective_trains_on_records_as_it_needs_them(
    world: run.World, monkeypatch: pytest.MonkeyPatch, objective: str, stage: str | None
) -> None:
    stages = []
    configs = []
    monkeypatch.setattr(baselines, "main", stages.append)
    monkeypatch.setattr(baselines, "train", configs.append)
    monkeypatch.setattr(clha, "train", configs.append)
    run.align(world, {"objective": objective}, seed=1)
    [config] = configs
    assert getattr(config, "objective", "clha") == objective
    assert (config.model, config.seed, config.max_steps) == (str(world.base), 1, 2)
    names = [f"train-{stage}.jsonl", f"dev-{stage}.jsonl"] if stage else ["train.jsonl", "dev.jsonl"]
    assert [Path(config.train_data).name, Path(config.dev_data).name] == names
    assert [argv[0] for argv in stages] == ([stage] * 2 if stage else [])
    if stage == "reference":
        assert stages[0][-2:] == ["--model", str(world.base)]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> run.World:
    """A toy world of a few queries whose base model is untrained."""
    home = tmp_path_factory.mktemp("study")
    data = home / "data"
    toy.write(data, seed=0, queries=24, base=64, pairs=48, dev=8, test=4)
    for name in ("train", "dev"):
        rows = [row | {"rewards": [1.0, -1.0]} for _, row in clha.read_jsonl(data / f"{name}.jsonl")]
        reward.write_jsonl(home / f"{name}.jsonl", rows)
    rm = run.train_reward_model(data / "init", data / "rm_train.jsonl", home, seed=0)
    return run.World(
        name=run.world_name(run.NOISE, 2),
        folder=home / "runs",
        length=2,
        base=data / "init",
        train_data=home / "train.jsonl",
        dev_data=home / "dev.jsonl",
        test_data=data / "test.jsonl",
        rm_train=rm,
        rm_eval=rm,
        settings={"max_steps": 1, "batch_size": 8, "activation_checkpointing": "none"},
        max_new_tokens=4,
    )


def test_a_finished_run_is_not_repeated_and_a_stopped_one_is(small: run.World) -> None:
    runs = [{"objective": name} for name in ("clha", "coh", "dpo")]
    run.run_all(small, runs, seed=0)
    names = ["base", *(run.run_name(settings, 2) for settings in runs)]
    rows = {name: json.loads((small.folder / name / "row.json").read_text()) for name in names}
    for name, row in rows.items():
        assert (row["world"], row["seed"], row["run"]) == (small.name, 0, name)
        assert -3 <= row["gold"] <= 3 and 0 <= row["reward"] <= 100 and row["anatomy"]["words"] >= 0
    assert set(rows["dpo"]["likelihoods"]) == {
        "chosen, first",
        "chosen, last",
        "rejected, first",
        "rejected, last",
    }
    assert rows["base"]["rescoring"]["gate open"] == 1.0

    weights = [small.folder / name / "final/model.safetensors" for name in names[1:]]
    times = [path.stat().st_mtime_ns for path in weights]
    stopped = small.folder / names[2]
    shutil.rmtree(stopped)
    run.run_all(small, runs, seed=0)
    again = [path.stat().st_mtime_ns for path in weights]
    assert [a == b for a, b in zip(times, again, strict=True)] == [True, False, True]
    assert json.loads((stopped / "row.json").read_text()) == rows["coh"]  # and it came out the same


def test_a_run_of_other_settings_is_refused_and_kept(small: run.World) -> None:
    world = replace(small, folder=small.folder.parent / "refused")
    model = run.align(world, {"objective": "clha"}, seed=0)
    before = (model / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match=r"holds a run of other settings \(seed\)"):
        run.align(world, {"objective": "clha"}, seed=1)
    assert (model / "model.safetensors").read_bytes() == before


def test_the_base_model_of_a_seed_serves_every_noise_and_length() -> None:
    sizes = {"queries": 8, "base": 64, "pairs": 8, "dev": 4, "test": 4}
    two = toy.make_splits(1, label_noise=0.0, length=2, **sizes)
    three = toy.make_splits(1, label_noise=0.4, length=3, **sizes)
    assert two["pretrain"] == three["pretrain"]
    assert [row["prompt"] for row in two["test"]] == [row["prompt"] for row in three["test"]]


def test_what_rescoring_sees_by_hand() -> None:
    prompt = [{"role": "user", "content": "How do I make tea?"}]
    good = "Boil the water. Add the tea leaves. Wait four minutes."  # gold -2 + 4.5 = 2.5
    poor = "Boil the water."  # gold -0.5
    record = {"prompt": prompt, "responses": [good, poor]}
    records = [
        record | {"rewards": [2.0, 0.0]},  # kept, right, open
        record | {"rewards": [2.0, 0.0]},
        record | {"rewards": [0.1, 0.2]},  # dropped, wrong, open
        record | {"rewards": [-1.0, -3.0]},  # kept, right, shut
        {"prompt": prompt, "responses": [poor, poor], "rewards": [-1.0, -3.0]},  # equal: no pair
    ]
    assert run.rescoring(records) == {
        "pairs kept": 0.75,
        "kept: in true order": 1.0,
        "dropped: in true order": 0.0,
        "gate open": pytest.approx(0.6),
        "best response good": pytest.approx(0.6),
        "same, gate open": pytest.approx(2 / 3),
    }
