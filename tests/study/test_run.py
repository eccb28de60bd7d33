"""The study: what it compares, how it chooses, which data and models a run gets; runs in a small world."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

import clha
import evaluate
import reward
from clha import InputError
from study import baselines, rlhf, run, toy


def test_every_method_has_eight_settings_and_no_two_are_alike() -> None:
    assert {method: len(grid) for method, grid in run.GRIDS.items()} == dict.fromkeys(run.GRIDS, 8)
    names = [run.settings_name(settings) for grid in run.GRIDS.values() for settings in grid]
    assert len(set(names)) == len(names)
    assert names[0] == "clha alpha=0.01 learning_rate=0.0005"
    assert "simpo beta=10 learning_rate=0.0002 gamma=8" in names


def tuning_rows(method: str, golds: list[float]) -> list[dict[str, Any]]:
    """A row per setting of a method and tuning seed, with these golds, give or take 1 by seed."""
    rows = []
    for settings, gold in zip(run.GRIDS[method], golds, strict=True):
        for seed, off in zip(run.TUNING_SEEDS, (1, -1, 1, -1), strict=True):
            rows.append(
                {"seed": seed, "method": method, "settings": run.settings_name(settings), "gold": gold + off}
            )
    return rows


def test_the_setting_with_the_highest_mean_dev_gold_is_chosen() -> None:
    rows = tuning_rows("CLHA", [0.1, 0.3, 0.2, 0.9, 0.8, 0.7, 0.6, 0.5])
    rows += tuning_rows("PRO", [0.0] * 8)[:-1]  # a run is missing
    assert run.chosen(rows) == {"CLHA": run.GRIDS["CLHA"][3]}
    rows += tuning_rows("PRO", [0.0] * 8)[-1:]
    assert run.chosen(rows)["PRO"] == run.GRIDS["PRO"][0]


def test_ablations_change_one_thing_in_the_chosen_settings() -> None:
    chosen = run.GRIDS["CLHA"][5]
    rows = run.compared(tuning_rows("CLHA", [0, 0, 0, 0, 0, 1, 0, 0]))
    assert rows["CLHA"] == chosen
    assert rows["CLHA w/o gate"] == chosen | {"gate": False}
    assert rows["CLHA w/o filter"] == chosen | {"min_reward_gap": 0.0}
    assert rows["CLHA w/o gate, alpha 0.05"] == run.AS_IN_THE_PAPER | {"gate": False}
    assert rows["CLHA as released"] == {
        "objective": "released",
        "learning_rate": 5e-4,
        "margin": 3.0,
        "min_reward_gap": 3.0,
    }
    # Without contrast no pair of a reward model's rewards is left, and the rest is gated SFT.
    avg, rewards = torch.tensor([[-1.0, -2.0]]), torch.tensor([[50.0, -50.0]])
    gap = rows["CLHA w/o contrast"]["min_reward_gap"]
    loss, _ = clha.clha_loss(avg, 3 * avg, rewards, margin=0.3, min_reward_gap=gap, alpha=0.5)
    assert loss.item() == pytest.approx(0.5 * 3.0)


def test_a_method_that_is_not_tuned_is_refused(tmp_path: Path) -> None:
    reward.write_jsonl(tmp_path / "tuning.jsonl", tuning_rows("CLHA", [0.0] * 8))
    flags = {"out": tmp_path, "jobs": 1, "seeds": [100], "tuning": tmp_path / "tuning.jsonl"}
    with pytest.raises(InputError, match="PRO is no row, or not tuned to the end"):
        run.compare(argparse.Namespace(methods=["CLHA", "PRO"], **flags))


@pytest.mark.parametrize("installed", [True, False])
def test_rlhf_is_left_out_where_trl_is_missing(
    installed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: installed or None)
    others = [method for method in run.GRIDS if method != "RLHF (RLOO)"]
    assert run.runnable(others) == others
    assert capsys.readouterr().err == ""
    assert run.runnable(run.GRIDS) == ([*run.GRIDS] if installed else others)
    assert ("pip install .[rlhf]" in capsys.readouterr().err) is not installed


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
    monkeypatch.setattr(reward, "read_records", lambda path, need=(): [{"rewards": [5.0, 1.0]}])
    world = run.toy_world(tmp_path, seed=0, name="standardized rewards")
    assert scored_by == {"train.raw.jsonl": "rm_train.jsonl", "dev.raw.jsonl": "rm_train.jsonl"}
    assert run.read_rows(world.train_data) == [{"rewards": [1.0, -1.0]}]
    assert trained_on[world.rm_train] == "rm_train.jsonl"
    assert trained_on[world.rm_eval] == "rm_eval.jsonl"


@pytest.fixture
def world(tmp_path: Path) -> run.World:
    """A world of paths where nothing is."""
    names = ("base", "train.jsonl", "dev.jsonl", "test.jsonl", "rm_train", "rm_eval")
    return run.World(tmp_path, *(tmp_path / name for name in names))


def test_rlhf_asks_the_reward_model_that_scored_the_training_data(
    world: run.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    monkeypatch.setattr(rlhf, "train", runs.append)
    run.align(world, run.GRIDS["RLHF (RLOO)"][0], 7, world.folder / "rlhf")
    [args] = runs
    assert args.reward_model == str(world.rm_train) != str(world.rm_eval)
    assert (args.model, args.train_data) == (str(world.base), str(world.train_data))
    assert (args.seed, args.max_steps, args.kl_beta, args.save_every) == (7, 100, 0.01, 10)


@pytest.mark.parametrize(("objective", "prefix"), [("coh", "Good answer:"), ("sft", None)])
def test_only_chain_of_hindsight_is_asked_for_a_good_answer(
    monkeypatch: pytest.MonkeyPatch, objective: str, prefix: str | None
) -> None:
    asked = {}
    monkeypatch.setattr(evaluate, "generate", lambda *args, **options: asked.update(options))
    run.respond(None, None, [], objective)
    assert asked.get("response_prefix") == prefix
    assert set(asked.get("stop_strings", ())) >= ({"Bad answer:"} if prefix else set())


@pytest.mark.parametrize(
    ("objective", "stage"),
    [
        ("coh", "hindsight"),
        ("dpo", "reference"),
        ("lipo", "reference"),
        ("released", "ranked"),
        ("clha", None),
        ("gated_sft", None),
    ],
)
def test_each_objective_trains_on_records_as_it_needs_them(
    world: run.World, monkeypatch: pytest.MonkeyPatch, objective: str, stage: str | None
) -> None:
    stages = []
    configs = []
    monkeypatch.setattr(baselines, "main", stages.append)
    monkeypatch.setattr(baselines, "train", configs.append)
    monkeypatch.setattr(clha, "train", configs.append)
    run.align(world, {"objective": objective}, 1, world.folder / "run")
    [config] = configs
    assert getattr(config, "objective", "clha") == objective
    assert (config.model, config.seed, config.max_steps) == (str(world.base), 1, 80)
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
    toy.write(data, seed=0, queries=24, base=64, pairs=48, dev=8, test=60)
    for name in ("train", "dev"):
        rows = [row | {"rewards": [1.0, -1.0]} for _, row in clha.read_jsonl(data / f"{name}.jsonl")]
        reward.write_jsonl(home / f"{name}.jsonl", rows)
    rm = run.train_reward_model(data / "init", data / "rm_train.jsonl", home, seed=0)
    paths = (data / "init", home / "train.jsonl", home / "dev.jsonl", data / "test.jsonl", rm, rm)
    return run.World(home / "runs", *paths)


def test_what_is_measured_is_the_mean_of_the_last_weights(
    small: run.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "SAVE_EVERY", 1)
    monkeypatch.setattr(run, "SMALL", run.SMALL | {"batch_size": 8})
    folders = run.align(small, {"objective": "sft", "max_steps": 5}, 0, small.folder / "mean")
    assert [folder.name for folder in folders] == ["step-2", "step-3", "step-4", "step-5"]
    model, _ = run.average(folders)
    weights = [evaluate.load(str(folder), torch.device("cpu"))[0].state_dict() for folder in folders]
    for name, weight in model.state_dict().items():
        mean = torch.stack([state[name] for state in weights]).mean(0)
        torch.testing.assert_close(weight, mean)


def test_a_row_has_what_the_report_shows_and_is_made_once(
    small: run.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "SAVE_EVERY", 1)
    monkeypatch.setattr(run, "SMALL", run.SMALL | {"batch_size": 8})
    rows = {}
    for settings in (
        {"objective": "base"},
        {"objective": "clha", "max_steps": 1},
        {"objective": "coh", "max_steps": 1},
    ):
        rows[settings["objective"]] = run.measure(small, settings, 0, "test", small.folder / "row")
    for row in rows.values():
        assert -3 <= row["gold"] <= 3 and 0 <= row["reward"] <= 100 and row["anatomy"]["words"] >= 0
        sizes = [number for number, _ in row["tasks"].values()]
        assert sum(sizes) == 60 and sum(total for _, total in row["tasks"].values()) == pytest.approx(
            60 * row["gold"]
        )
        assert row["subsets"].keys() == toy.SUBSETS.keys()
    assert rows["clha"]["tokens"] > 0 and rows["clha"]["seconds"] > 0 and rows["clha"]["logps/chosen"] < 0
    assert rows["base"]["rescoring"]["gate open"] == 1.0
    assert run.measure(
        small, {"objective": "sft", "max_steps": 1}, 0, "dev", small.folder / "row"
    ).keys() == {"gold"}


def test_what_has_a_row_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [run.Task(seed, "SFT", settings, "dev") for settings in run.GRIDS["SFT"][:2] for seed in (50, 51)]
    row = tasks[0].key() | {"gold": 0.5}
    reward.write_jsonl(tmp_path / "tuning.jsonl", [row])
    performed = []

    class Pool:
        """Runs what it gets here."""

        def __init__(self, *args: Any) -> None: ...

        def __enter__(self) -> "Pool":
            return self

        def __exit__(self, *args: Any) -> None: ...

        def imap_unordered(self, work: Any, tasks: list[run.Task]) -> list[dict[str, Any]]:
            performed.extend(tasks)
            return [task.key() for task in tasks]

    monkeypatch.setattr(run.multiprocessing, "get_context", lambda kind: argparse.Namespace(Pool=Pool))
    run.perform_all(tasks, tmp_path / "tuning.jsonl", argparse.Namespace(jobs=1, out=tmp_path))
    assert performed == tasks[1:]
    assert len(run.read_rows(tmp_path / "tuning.jsonl")) == 4


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
