"""The training loop: what every process does, that no division of the work changes it, and what it leaves."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

import clha
import evaluate
import reward
from program import load_tokenizer
from program import run as run_program
from records import InputError, read_records, write_jsonl


@pytest.fixture(scope="module")
def data(world: Path) -> Path:
    """The training records of the toy world with rewards, some of them close, and two or three replies."""
    generator = torch.Generator().manual_seed(0)
    records = read_records(world / "train.jsonl")
    for i, record in enumerate(records):
        record["responses"] += ["I do not know."] * (i % 2)
        record["rewards"] = torch.randn(len(record["responses"]), generator=generator).tolist()
    write_jsonl(world / "scored.jsonl", records)
    return world / "scored.jsonl"


def config(world: Path, data: Path, out: Path, **more: Any) -> clha.Config:
    """Five steps of eight queries."""
    settings = {"max_steps": 5, "batch_size": 8, "learning_rate": 1e-5, "pack_tokens": 400} | more
    return clha.Config(str(world / "init"), str(data), str(out), **settings)


def launch(world: Path, data: Path, out: Path, *flags: str, processes: int = 1) -> str:
    """Runs clha.py as a user starts it, by default with the settings of `config`; gives what it printed."""
    settings = {"max_steps": 5, "batch_size": 8, "learning_rate": 1e-5, "pack_tokens": 400}
    settings |= {"model": world / "init", "train_data": data, "output_dir": out}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    command = [sys.executable, *(launch if processes > 1 else []), "clha.py"]
    command += [word for name, value in settings.items() for word in (f"--{name}", value)]
    words = list(map(str, [*command, *flags]))
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def plain_model(world: Path) -> LlamaForCausalLM:
    """The model that the runs start from, as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(world / "init", dtype=torch.float32)


def batches(world: Path, data: Path, settings: clha.Config) -> list[clha.Batch]:
    """The queries of each step of a run, in one pack a step."""
    tokenizer = load_tokenizer(str(world / "init"))
    examples = [clha.encode(record, tokenizer) for record in read_records(data)]
    order = clha.data_order(len(examples), settings)
    return [clha.pack([examples[i] for i in indices]) for _, indices in order]


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
    "settings",
    [
        {"pack_tokens": 60},
        {"pack_tokens": 4096},
        {"activation_checkpointing": "none"},
        {"activation_checkpointing": "selective"},
    ],
)
def test_packs_and_accumulation_change_no_weight(
    world: Path, data: Path, one_process: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    clha.train(config(world, data, tmp_path / "run", **settings))
    assert_same_weights(tmp_path / "run", one_process, world)


def test_a_run_is_a_plain_training_loop(world: Path, data: Path, one_process: Path) -> None:
    # No packs to divide, no shards, no accumulation: a step is one pack through a model of transformers.
    model, steps = plain_model(world), batches(world, data, config(world, data, one_process))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01)
    for batch, row in zip(steps, log(one_process), strict=True):
        sum_logps, lengths = clha.sequence_logps(model, batch)
        loss, _ = clha.clha_loss(
            sum_logps / lengths.clamp(min=1),
            sum_logps,
            batch["rewards"],
            margin=0.3,
            min_reward_gap=0.5,
            alpha=0.2,  # 0.05 (3 - 1)^2
        )
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    trained = weights(one_process / "final")
    for name, weight in model.named_parameters():
        torch.testing.assert_close(trained[name], weight.detach(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        ({"margin": 2.0}, {"margin": 2.0}),
        ({"min_reward_gap": 0.1}, {"min_reward_gap": 0.1}),
        ({"rescore": False}, {"min_reward_gap": None}),
        ({"contrast": False}, {"contrast": False}),
        ({"alpha": 3.0}, {"alpha": 3.0}),
        ({"reduction": "release"}, {"reduction": "release"}),
        ({"sft_reduction": "mean"}, {"sft_reduction": "mean"}),
        ({"sft_target": "chosen"}, {"target": "chosen"}),
    ],
)
def test_each_setting_of_the_method_reaches_the_loss(
    world: Path, data: Path, tmp_path: Path, settings: dict[str, Any], changed: dict[str, Any]
) -> None:
    clha.train(config(world, data, tmp_path / "run", max_steps=1, **settings))
    (batch,) = batches(world, data, config(world, data, tmp_path, max_steps=1))
    sum_logps, lengths = clha.sequence_logps(plain_model(world), batch)
    values = sum_logps / lengths.clamp(min=1), sum_logps, batch["rewards"]
    usual = {"margin": 0.3, "min_reward_gap": 0.5, "alpha": 0.2}
    if "target" in changed:
        changed = {"target": batch["chosen"]}
    expected, usually = (clha.clha_loss(*values, **kwargs)[0].item() for kwargs in (usual | changed, usual))
    assert log(tmp_path / "run")[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert abs(expected - usually) > 1e-3  # on this data the setting makes a difference


def test_gradients_are_clipped_and_weights_decay(world: Path, data: Path, tmp_path: Path) -> None:
    # Gradients of norm 1e-12 are far below AdamW's epsilon of 1e-8: each step moves a weight by at most
    # 0.1 x 1e-12 / 1e-8 = 1e-5. What is left is the decay: three times by 1 - 0.1 x 0.2 = 0.98.
    settings = {"max_steps": 3, "learning_rate": 0.1, "weight_decay": 0.2, "max_grad_norm": 1e-12}
    clha.train(config(world, data, tmp_path / "run", **settings))
    before = weights(world / "init")
    for name, weight in weights(tmp_path / "run" / "final").items():
        torch.testing.assert_close(weight, before[name] * 0.98**3, atol=5e-5, rtol=0)


def test_a_run_that_diverges_says_so(world: Path, data: Path, tmp_path: Path) -> None:
    settings = {"learning_rate": 1e30, "max_steps": 30, "max_bad_steps": 3}
    with pytest.raises(InputError, match=r"step 4: 3 steps in a row were not finite .*checkpoint is None"):
        clha.train(config(world, data, tmp_path / "run", **settings))
    assert not (tmp_path / "run" / "final").exists()


@pytest.mark.parametrize("settings", [{}, {"reduction": "release"}, {"objective": "dpo"}])
def test_two_processes_train_like_one(
    world: Path, data: Path, one_process: Path, tmp_path: Path, settings: dict[str, str]
) -> None:
    flags = [word for name, value in settings.items() for word in (f"--{name}", value)]
    printed = launch(world, data, tmp_path / "two", *flags, processes=2)
    assert "on each of 2 process(es)" in printed
    one = one_process
    if settings:
        one = tmp_path / "one"
        clha.train(config(world, data, one, **settings))
    assert_same_weights(tmp_path / "two", one, world)
    for ours, theirs in zip(log(tmp_path / "two"), log(one), strict=True):
        del ours["tokens_per_second"], theirs["tokens_per_second"]
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def test_more_processes_than_packs_need_keep_step(world: Path, data: Path, tmp_path: Path) -> None:
    # One query a step: the second process gets an empty pack, and its pass must count for nothing.
    launch(world, data, tmp_path / "two", "--max_steps", "2", "--batch_size", "1", processes=2)
    clha.train(config(world, data, tmp_path / "one", max_steps=2, batch_size=1))
    two = weights(tmp_path / "two" / "final")
    for name, weight in weights(tmp_path / "one" / "final").items():
        torch.testing.assert_close(weight, two[name], atol=1e-6, rtol=0)
    # AdamW's steps are the same for gradients twice as long: their norm tells whether the pass counted.
    for ours, theirs in zip(log(tmp_path / "two"), log(tmp_path / "one"), strict=True):
        for name in ("loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4)


def test_the_program_run_again_gives_the_same_bytes(
    world: Path, data: Path, one_process: Path, tmp_path: Path
) -> None:
    launch(world, data, tmp_path / "run")
    again, first = (folder / "final" / "model.safetensors" for folder in (tmp_path / "run", one_process))
    assert again.read_bytes() == first.read_bytes()


def test_another_seed_is_another_run(world: Path, data: Path, one_process: Path, tmp_path: Path) -> None:
    clha.train(config(world, data, tmp_path / "run", seed=43))
    assert log(tmp_path / "run")[0]["num_tokens"] != log(one_process)[0]["num_tokens"]  # other queries


def test_evaluation_changes_no_weight(world: Path, data: Path, one_process: Path, tmp_path: Path) -> None:
    clha.train(config(world, data, tmp_path / "run", dev_data=str(data), eval_every=2))
    evaluated, other = (folder / "final" / "model.safetensors" for folder in (tmp_path / "run", one_process))
    assert evaluated.read_bytes() == other.read_bytes()


def test_training_goes_on_in_training_mode_after_an_evaluation(
    world: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In evaluation mode there is no activation checkpointing, nor dropout.
    modes, run_batch = [], clha.run_batch

    def watched(model: Any, *arguments: Any, train: bool) -> dict[str, float]:
        modes.append((train, model.training))
        return run_batch(model, *arguments, train=train)

    monkeypatch.setattr(clha, "run_batch", watched)
    clha.train(config(world, data, tmp_path / "run", max_steps=2, dev_data=str(data), eval_every=1))
    assert modes == [(True, True), (False, False)] * 2


def test_a_run_learns_logs_and_saves(world: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    clha.train(
        config(
            world,
            data,
            tmp_path / "run",
            max_steps=30,
            learning_rate=1e-3,
            dev_data=str(data),
            eval_every=12,
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
    assert all(names <= set(row) for row in rows)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert {f"eval/{name}" for name in ("loss", "rewards/accuracies", "rewards/margins")} <= set(rows[-1])
    first = batches(world, data, config(world, data, tmp_path, max_steps=1))[0]
    assert rows[0]["num_tokens"] == first["input_ids"].numel()
    assert rows[-1]["epoch"] == pytest.approx(30 * 8 / 256)
    early, late = (sum(row["loss"] for row in part) / 5 for part in (rows[:5], rows[-5:]))
    assert late < 0.9 * early
    assert [row["step"] for row in rows if "eval/loss" in row] == [12, 24, 30]
    assert rows[-1]["eval/loss"] < 0.95 * rows[11]["eval/loss"]  # it learns its training data
    # Three steps of warm-up, 0, 1/3 and 2/3; then half a cosine over the other 27, 15 of them at step 19.
    rates = {row["step"]: row["learning_rate"] for row in rows}
    assert [rates[step] for step in (1, 2, 4, 19)] == pytest.approx(
        [0, 1e-3 / 3, 1e-3, 1e-3 * (1 + math.cos(math.pi * 15 / 27)) / 2]
    )
    folders = {path.name for path in (tmp_path / "run").iterdir() if path.is_dir()} - {"tensorboard"}
    assert folders == {"step-15", "step-30", "final", "checkpoints", "tokens"}
    middle, end, final = (weights(tmp_path / "run" / name) for name in ("step-15", "step-30", "final"))
    assert all(torch.equal(end[name], final[name]) for name in final)
    assert not any(torch.equal(middle[name], final[name]) for name in final)
    printed = capsys.readouterr().out
    records = read_records(data)
    gated = sum(max(record["rewards"]) <= 0 for record in records) / len(records)
    assert f"{gated:.1%} of queries gated" in printed and f"{len(records)} queries" in printed


@pytest.mark.parametrize("tied", [True, False])
def test_a_step_is_trained_and_saved_like_that_of_a_plain_model(
    world: Path, data: Path, tmp_path: Path, tied: bool
) -> None:
    # Tied embeddings are one weight before, in and after a step, and stand in the file once.
    settings = LlamaConfig.from_pretrained(world / "init", tie_word_embeddings=tied)
    torch.manual_seed(0)
    LlamaForCausalLM(settings).save_pretrained(tmp_path / "start")
    batch = batches(world, data, config(world, data, tmp_path, max_steps=1))[0]
    clha.init_process()
    sharded = clha.load_model(str(tmp_path / "start"), torch.device("cpu"), torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "start", dtype=torch.float32)
    before = plain.lm_head.weight.detach().clone()
    for model in (sharded, plain):
        sum_logps, _ = clha.sequence_logps(model, batch)
        (-sum_logps.mean()).backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    clha.save_model(sharded, load_tokenizer(str(world / "init")), tmp_path / "final", torch.float32)
    assert ("lm_head.weight" in weights(tmp_path / "final")) != tied

    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "final", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert (loaded.lm_head.weight - before).abs().max() > 0.01  # it did learn
    ids = torch.arange(20)[None]
    plain.set_attn_implementation("sdpa")
    torch.testing.assert_close(loaded(ids).logits, plain(ids).logits, atol=1e-4, rtol=0)


def test_the_final_folder_holds_all_that_a_model_needs(world: Path, data: Path, one_process: Path) -> None:
    text = clha.render(read_records(data)[0]["prompt"])
    ours, theirs = (load_tokenizer(str(f)) for f in (one_process / "final", world / "init"))
    assert ours(text).input_ids == theirs(text).input_ids and ours.eos_token_id == theirs.eos_token_id
    model = AutoModelForCausalLM.from_pretrained(one_process / "final")
    ids = torch.tensor([ours(text).input_ids])
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]


def test_the_rotary_frequencies_survive_sharding(world: Path) -> None:
    clha.init_process()
    sharded = clha.load_model(str(world / "init"), torch.device("cpu"), torch.float32)
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


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_every_process_gets_as_many_packs_even_if_some_are_empty(processes: int) -> None:
    packs = clha.deal([30, 20], 100, processes)  # both fit one pack; four processes have two to spare
    assert len(packs) == processes
    assert sorted(i for part in packs for i in part) == [0, 1]


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
    assert set(first) | set(second) <= set(range(11))
    settings.seed += 1
    assert clha.data_order(11, settings) != order


@pytest.mark.parametrize(("max_steps", "epochs"), [(3, [0.5, 1.0, 1.5]), (0, [0.5, 1.0])])
def test_max_steps_overrules_epochs(max_steps: int, epochs: list[float]) -> None:
    settings = clha.Config("m", "d", "o", batch_size=4, epochs=1, max_steps=max_steps)
    assert [epoch for epoch, _ in clha.data_order(11, settings)] == epochs


NEEDED = ["--model", "m", "--train_data", "d", "--output_dir", "o"]


def test_flags_not_given_have_the_defaults_of_the_configuration() -> None:
    assert clha.parse_args(NEEDED) == clha.Config("m", "d", "o")


@pytest.mark.parametrize("flags", [["--recipe", "release"], ["--recipe=release"]])
def test_a_recipe_sets_defaults(flags: list[str]) -> None:
    expected = clha.Config("m", "d", "o", recipe="release", **clha.RECIPES["release"])
    assert clha.parse_args([*NEEDED, *flags]) == expected
    assert (expected.margin, expected.min_reward_gap, expected.reduction) == (3.0, 3.0, "release")


@pytest.mark.parametrize(
    "flags",
    [["--recipe", "release", "--margin", "0.3"], ["--margin", "0.3", "--recipe", "release"]],
)
def test_a_flag_that_is_given_wins_over_the_recipe(flags: list[str]) -> None:
    # Even if its value is the default of the other recipe.
    release = clha.parse_args([*NEEDED, *flags])
    assert (release.margin, release.min_reward_gap) == (0.3, 3.0)


@pytest.mark.parametrize("name", ["rescore", "contrast", "temperatures"])
def test_what_is_on_can_be_switched_off(name: str) -> None:
    assert getattr(clha.parse_args(NEEDED), name) is True
    assert getattr(clha.parse_args([*NEEDED, f"--no_{name}"]), name) is False


def test_alpha_follows_the_length_of_the_ranking(world: Path, data: Path, tmp_path: Path) -> None:
    clha.train(config(world, data, tmp_path / "run", max_steps=1))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["alpha"] == 0.05 * (3 - 1) ** 2


def test_a_finished_run_is_refused_with_exit_code_2(
    world: Path, data: Path, one_process: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (one_process / "metrics.jsonl").read_text()
    with pytest.raises(SystemExit) as end:
        run_program(lambda: clha.train(config(world, data, one_process)))
    assert end.value.code == 2 and "holds a finished run (final/)" in capsys.readouterr().err
    assert (one_process / "metrics.jsonl").read_text() == before


def test_tensorboard_is_written_where_it_is_installed(one_process: Path) -> None:
    pytest.importorskip("tensorboard")
    assert os.listdir(one_process / "tensorboard")


@pytest.mark.parametrize("processes", [1, 2])
def test_the_dev_reward_is_that_of_evaluate(world: Path, data: Path, tmp_path: Path, processes: int) -> None:
    # At a learning rate of 0 the model stays what it is. 15 prompts do not divide by two.
    write_jsonl(tmp_path / "dev.jsonl", read_records(data)[:15])
    model = AutoModelForSequenceClassification.from_pretrained(world / "init", num_labels=1, pad_token_id=0)
    model.save_pretrained(tmp_path / "judge")
    load_tokenizer(str(world / "init")).save_pretrained(tmp_path / "judge")
    flags = ["--dev_data", tmp_path / "dev.jsonl", "--reward_model", tmp_path / "judge"]
    flags += ["--learning_rate", "0", "--max_steps", "1"]
    launch(world, data, tmp_path / "run", *map(str, flags), processes=processes)
    plain = plain_model(world).eval()
    prompts = [record["prompt"] for record in read_records(tmp_path / "dev.jsonl")]
    replies = evaluate.generate(plain, load_tokenizer(str(world / "init")), prompts)
    scores = reward.load_reward_model(str(tmp_path / "judge")).score(prompts, replies)
    expected = 100 * torch.tensor(scores).sigmoid().mean().item()
    assert log(tmp_path / "run")[0]["eval/reward"] == pytest.approx(expected, abs=1e-3)
    assert (tmp_path / "run" / "checkpoints" / "best").resolve().name == "step-1"
