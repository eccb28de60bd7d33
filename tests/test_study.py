"""The study: what it names, refuses and concludes; and its runs on a world made small."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import clha
import prepare_data
import report
import study
import toy
from program import load_tokenizer
from records import InputError, read_jsonl, read_records, write_jsonl


def test_equal_settings_share_a_run_and_others_do_not() -> None:
    default = study.run_name({}, 2)
    assert default == study.run_name({"alpha": 0.05}, 2) == study.run_name({"margin": clha.Config.margin}, 2)
    assert default != study.run_name({}, 3)  # alpha is 0.2 there
    rows = {**study.methods(2), **study.RLHF, **study.ABLATIONS, **study.RELEASE}
    assert len({study.run_name(settings, 2) for settings in rows.values()}) == len(rows)
    swept = [settings for sweep in study.SWEEPS.values() for settings in sweep.values()]
    centre = study.run_name(study.CENTRE, 2)
    assert sum(study.run_name(settings, 2) == centre for settings in swept) == 3  # one a panel


def test_every_row_of_tables_2_and_3_is_planned() -> None:
    for length in study.LENGTHS:
        planned = study.plan(study.NOISE, length)
        for settings in (study.methods(length) | study.ABLATIONS).values():
            assert settings in planned
        for noise in study.NOISES:
            assert {} in study.plan(noise, length)  # CLHA itself, in every world


def test_a_mean_with_its_interval_by_hand() -> None:
    # 1, 2, 3: standard deviation 1, its error 1 / sqrt(3), t of two degrees of freedom 4.30
    mean = report.mean_of([1.0, 2.0, 3.0])
    assert mean.mean == 2.0 and mean.half == pytest.approx(4.30 / 3**0.5) and mean.seeds == 3
    assert str(mean) == "2.00 ± 2.48" and str(report.mean_of([0.5])) == "0.50 (one seed)"


@pytest.mark.parametrize(
    ("mean", "half", "word"),
    [(0.3, 0.2, "holds"), (0.1, 0.2, "not shown"), (-0.3, 0.2, "fails"), (0.0, 0.0, "not shown")],
)
def test_a_verdict_follows_from_the_interval(mean: float, half: float, word: str) -> None:
    assert report.verdict(report.Mean(mean, half, 5)).startswith(f"**{word}**")
    assert report.verdict(None) == "not run"


def write_scores(folder: Path, settings: dict[str, Any] | None, length: int, gold: float) -> None:
    """The scores of a run as evaluate.py leaves them."""
    name = "base" if settings is None else study.run_name(settings, length)
    values = {
        n: {"mean": v, "interval": [v, v]} for n, v in (("gold", gold), ("reward", 50), ("char_bleu", 9))
    }
    (folder / name / "eval").mkdir(parents=True)
    total = {"n": 4, "word_bleu": 7.0} | values
    (folder / name / "eval/scores.json").write_text(json.dumps({"Total": total}))


def test_the_report_says_what_the_scores_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = study.methods(2)
    for seed in range(5):
        folder = tmp_path / f"out/toy/seed-{seed}/noise-0.2/length-2"
        write_scores(folder, None, 2, -0.5)
        write_scores(folder, {}, 2, 1.0 + seed)  # CLHA: a mean of 3
        write_scores(folder, rows["PRO"], 2, 0.5 + seed)  # always half a point less
        write_scores(folder, rows["DPO"], 2, 1.5 + seed)  # always half a point more
        write_scores(folder, study.ABLATIONS["CLHA w/o margin"], 2, 1.0 + seed + 0.1 * (-1) ** seed)
    monkeypatch.chdir(tmp_path)
    report.write(Path("out"))
    text = Path("RESULTS.md").read_text()
    assert "| CLHA beats PRO (Table 2) | **holds** (+0.50 ± 0.00, 5 seeds) |" in text
    assert "| CLHA beats DPO (not a claim of the paper) | **fails**: it is the other way round (-0.50" in text
    assert "| margin helps (Table 3) | **not shown** (-0.02" in text
    assert "| CLHA beats SFT (Table 2) | not run |" in text
    assert "| **CLHA** | 3.00 ± 1.97 | +0.00 ± 0.00 |" in text  # 2.78 x 1.58 / sqrt(5)
    runs = [row for _, row in read_jsonl("docs/study/runs.jsonl")]
    assert len(runs) == 25 and {row["seed"] for row in runs} == set(range(5))
    for name in ("noise", "sweeps", "likelihoods"):
        assert Path(f"docs/study/{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_a_report_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no finished runs in it"):
        report.write(tmp_path)


@pytest.fixture(scope="module")
def small(world: Path, tmp_path_factory: pytest.TempPathFactory) -> study.World:
    """A world of a few queries whose base model and judge are untrained."""
    home = tmp_path_factory.mktemp("study")
    for name in ("train", "dev", "test", "rm_train"):
        rows = [row | {"rewards": [1.0, -1.0]} for _, row in read_jsonl(world / f"{name}.jsonl")]
        write_jsonl(home / f"{name}.jsonl", rows[:64])
    judge = home / "judge"
    study.train_reward_model(world / "init", home / "rm_train.jsonl", judge, learning_rate=1e-3, seed=0)
    settings = {"max_steps": 2, "batch_size": 8, "pack_tokens": 2048, "activation_checkpointing": "none"}
    return study.World(
        home, 2, world / "init", home / "train.jsonl", home / "dev.jsonl",
        read_records(home / "test.jsonl")[:4], judge, settings, {"gold": True, "max_new_tokens": 4},
    )  # fmt: skip


def test_a_finished_run_is_not_made_again_and_a_stopped_one_is(small: study.World) -> None:
    runs = [{}, {"objective": "coh"}, {"objective": "dpo"}]
    study.run_all(small, runs, seed=0)
    names = [study.run_name(settings, 2) for settings in runs]
    weights = [small.folder / name / "final/model.safetensors" for name in names]
    times = [path.stat().st_mtime_ns for path in weights]
    kind = report.Kind({0: small.folder}, 2)
    assert set(kind.runs) == {"base", *names} and -3 <= kind.runs["base"][0]["gold"] <= 3
    shutil.rmtree(weights[1].parent)  # as if it had been stopped before its end
    shutil.rmtree(weights[1].parents[1] / "eval")
    study.run_all(small, runs, seed=0)
    again = [path.stat().st_mtime_ns for path in weights]
    assert [a == b for a, b in zip(times, again, strict=True)] == [True, False, True]
    assert report.Kind({0: small.folder}, 2).runs == kind.runs  # and it came out the same


def test_a_run_of_other_settings_is_refused_and_kept(small: study.World, tmp_path: Path) -> None:
    arguments = (small.base, small.train_data, tmp_path / "run")
    model = study.train(*arguments, **small.settings, margin=0.3)
    before = (model / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match=r"run: holds a run of other settings \(margin\)"):
        study.train(*arguments, **small.settings, margin=0.6)
    assert (model / "model.safetensors").read_bytes() == before


def test_the_base_model_of_a_seed_serves_every_noise_and_length() -> None:
    splits = [toy.make_splits(1, label_noise=n, length=k, queries=8, base=64, pairs=8, dev=4, test=4)
              for n, k in ((0.0, 2), (0.4, 3))]  # fmt: skip
    assert splits[0]["pretrain"] == splits[1]["pretrain"]
    prompts = [[record["prompt"] for record in split["test"]] for split in splits]
    assert prompts[0] == prompts[1]


def test_the_halves_of_the_real_text_share_no_query(shared: Path, tmp_path: Path) -> None:
    study.write_halves(tmp_path / "data", str(shared / "hh/release_format"))
    parts = [read_records(tmp_path / f"data/{n}.jsonl") for n in ("train", "judge", "dev", "test")]
    assert [len(part) for part in parts] == [2161, 2160, 80, 400]
    assert len({prepare_data.same_query(record) for part in parts for record in part}) == 4801
    seen = {repr(record["prompt"]) for part in parts[:3] for record in part}
    assert not seen & {repr(record["prompt"]) for record in parts[3]}  # nor does test share a prompt


def test_a_language_model_from_scratch_learns(world: Path, tmp_path: Path) -> None:
    records = read_records(world / "train.jsonl")[:64]
    study.train_language_model(records, tmp_path / "base", steps=6)
    facts = json.loads((tmp_path / "base/training.json").read_text())
    words = len(load_tokenizer(str(tmp_path / "base")))
    assert (
        facts["steps"] == 6 and facts["loss"] < math.log(words) - 1
    )  # a model that knows nothing has ln words
    model = clha.load_model(
        str(tmp_path / "base"), clha.init_process()[2], torch.float32, checkpointing="none"
    )
    assert sum(p.numel() for p in model.parameters()) == facts["parameters"]


def test_too_few_real_queries_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    row = {"prefix": ["<|prompter|>Hi<|assistant|>"], "suffix": ["a", "b"], "reward": [1.0, 0.0]}
    write_jsonl(tmp_path / "source/train.json", [row])
    with pytest.raises(InputError, match=r"has 1 different queries; the study needs 1,000"):
        study.write_halves(tmp_path / "data", str(tmp_path / "source"))
    assert not (tmp_path / "data").exists()


def test_what_rescoring_sees_by_hand() -> None:
    prompt = [{"role": "user", "content": "How do I make tea?"}]
    good = "Boil the water. Add the tea leaves. Wait four minutes."  # gold -2 + 4.5 = 2.5
    poor = "Boil the water."  # gold -0.5
    records = [
        {"prompt": prompt, "responses": [good, poor], "rewards": [2.0, 0.0]},  # kept, right, open
        {"prompt": prompt, "responses": [good, poor], "rewards": [0.1, 0.2]},  # dropped, wrong, open
        {"prompt": prompt, "responses": [good, poor], "rewards": [-1.0, -3.0]},  # kept, right, shut
    ]
    assert report.rescoring([*records, records[0]]) == {
        "kept": 0.75, "kept right": 1.0, "dropped right": 0.0, "open": 0.75, "good": 0.75,
        "good where open": pytest.approx(2 / 3),
    }  # fmt: skip
