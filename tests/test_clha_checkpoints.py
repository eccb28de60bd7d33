"""Faults: a run that is stopped, killed or out of disk ends with the weights of one that was not."""

import gc
import json
import os
import pkgutil
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import filelock
import pytest
import torch
import torch.distributed as dist
import transformers
from conftest import config
from safetensors import safe_open
from test_clha_training import log, start, torchrun_store, weights_file, with_dropout, write
from torch import Tensor
from transformers import AutoModelForCausalLM

import clha

COSINE = {"lr_schedule": "cosine", "warmup_steps": 2}


@pytest.fixture(scope="module")
def data(world: Path) -> Path:
    """24 queries, three steps an epoch."""
    records = list(clha.iter_records(world / "scored.jsonl"))[:24]
    return write(world / "few.jsonl", records)


@pytest.fixture(scope="module")
def run_in(world: Path, data: Path) -> Callable[..., clha.Config]:
    """Makes settings of a run in a folder: eight steps, of a model with dropout, so random states matter."""
    model = with_dropout(world, world / "dropout")

    def settings(out: Path, **more: Any) -> clha.Config:
        run = config(world, out, max_steps=8, learning_rate=1e-3, token_cache=str(world / "tokens"))
        run.model = str(model)
        run.train_data = str(data)
        for name, value in more.items():
            setattr(run, name, value)
        return run

    return settings


@pytest.fixture(scope="module")
def whole(run_in: Callable[..., clha.Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves that was never stopped, nor wrote a checkpoint."""
    out = tmp_path_factory.mktemp("whole") / "run"
    clha.train(run_in(out, **COSINE, checkpoint_every=0))
    assert not (out / "checkpoints").exists()
    dist.destroy_process_group()
    return out


def steps(out: Path) -> list[int]:
    """The steps in metrics.jsonl."""
    return [row["step"] for row in log(out)]


def kept(out: Path) -> set[str]:
    """What lies in the folder of checkpoints."""
    return {path.name for path in (out / "checkpoints").iterdir()}


@contextmanager
def at_step(step: int, action: Callable[[], Any]) -> Iterator[None]:
    """Does something in the middle of the n-th step that runs are going to make here."""
    run_batch = clha.run_batch
    made = 0

    def watched(policy: Any, packs: Any, loss_fn: Any, train: bool) -> dict[str, float]:
        nonlocal made
        made += train
        if train and made == step:
            action()
        return run_batch(policy, packs, loss_fn, train)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clha, "run_batch", watched)
        yield


def fails(run: clha.Config, kind: Any, match: str) -> None:
    """A run that ends with this error here, and gives its folder free as a program does that ends."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with pytest.raises(kind, match=match):
        clha.train(run)
    gc.collect()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def stop(run: clha.Config, step: int, number: int = signal.SIGTERM) -> None:
    """A run that gets a signal in its n-th step from here, and ends as if the signal had ended it."""
    with at_step(step, lambda: os.kill(os.getpid(), number)):
        fails(run, SystemExit, str(128 + number))


@contextmanager
def small_disk(step: int, size: int) -> Iterator[None]:
    """From the n-th step on no file grows beyond so many bytes: a disk that fills up in the middle of one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with at_step(step, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# Signals


def test_a_stopped_run_goes_on_to_the_same_bits(
    run_in: Callable[..., clha.Config], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    run = run_in(out, **COSINE, checkpoint_every=0)
    done = 0
    for after, number in [(2, signal.SIGTERM), (3, signal.SIGINT), (6, signal.SIGTERM)]:
        stop(run, after - done, number)
        printed = capsys.readouterr().out
        assert f"steps {done + 1} to 8" in printed
        assert f"stopped after step {after}; the same command resumes" in printed
        assert steps(out) == list(range(1, after + 1))
        done = after
        assert clha.checkpoints(out / "checkpoints")[-1].name == f"step-{done}"
    assert kept(out) == {"step-3", "step-6"}  # the newest two
    clha.train(run)
    assert weights_file(out) == weights_file(whole)
    assert log(out) == log(whole)


def test_a_signal_in_the_last_step_does_not_stop_a_run_that_is_done(
    run_in: Callable[..., clha.Config], tmp_path: Path
) -> None:
    with at_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        clha.train(run_in(tmp_path / "run", max_steps=2))
    assert (tmp_path / "run" / "final").is_dir()


def test_signals_do_their_work_again_after_a_run(run_in: Callable[..., clha.Config], tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        with at_step(1, lambda: os.kill(os.getpid(), signal.SIGTERM)), pytest.raises(SystemExit):
            clha.train(run_in(tmp_path / "run"))
        assert signal.getsignal(signal.SIGTERM) is before
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, signal.default_int_handler)


# SIGKILL


def die_at(name: str, text: str, call: int = 1) -> None:
    """From now on the n-th call of this function that has the text in its arguments is a SIGKILL."""
    owner, _, attribute = name.rpartition(".")
    place = pkgutil.resolve_name(owner)
    original = getattr(place, attribute)
    calls = 0

    def counted(*arguments: Any, **settings: Any) -> Any:
        nonlocal calls
        calls += text in str(arguments)
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **settings)

    setattr(place, attribute, counted)


def train_and_die(run: clha.Config, name: str, text: str, call: int) -> None:
    """Trains up to there."""
    die_at(name, text, call)
    clha.train(run)


KILLS = [  # with a checkpoint after each second step: what is called when, and the newest that is whole then
    ("clha.encode", "", 20, None, "tokens of 19 queries"),
    ("pathlib.Path.replace", "metrics.partial", 1, None, "config.json written, but no metrics.jsonl"),
    ("torch.nn.utils.clip_grad_norm_", "", 2, None, "gradients of step 2"),
    ("torch.distributed.checkpoint.HuggingFaceStorageWriter.finish", "", 2, 2, "tensors of step 4 written"),
    ("pathlib.Path.write_text", "step-4", 1, 2, "settings of step 4 to be written"),
    ("pathlib.Path.rename", "step-4.partial", 1, 2, "step 4 complete but for its name"),
    ("os.rmdir", "step-2", 1, 6, "step 2 half removed"),
    ("pathlib.Path.rename", "final.partial", 1, 8, "the model complete but for its name"),
]


def test_a_killed_run_goes_on_to_the_same_bits(
    run_in: Callable[..., clha.Config], whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run = run_in(out, **COSINE, checkpoint_every=2, token_cache="")
    for name, text, call, newest, when in KILLS:
        codes = start(tmp_path / "printed", train_and_die, run, name, text, call)
        assert codes == [-signal.SIGKILL], (when, (tmp_path / "printed").read_text())
        found = clha.checkpoints(out / "checkpoints")
        assert [path.name for path in found[-1:]] == ([f"step-{newest}"] if newest else []), when
        assert not (out / "final").exists()
    clha.train(run)
    assert weights_file(out) == weights_file(whole)
    assert log(out) == log(whole)  # each step once
    assert kept(out) == {"step-6", "step-8"} and not list(out.rglob("*.partial"))


def test_what_a_kill_leaves_of_a_checkpoint_is_not_taken(
    run_in: Callable[..., clha.Config], whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run = run_in(out, **COSINE, checkpoint_every=3)
    stop(run, 6)
    newest = out / "checkpoints" / "step-6"
    newest.rename(out / "checkpoints" / "step-6.partial")
    (shard,) = (out / "checkpoints" / "step-6.partial").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1000])
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    seen = []
    with at_step(1, lambda: seen.extend(steps(out))):
        clha.train(run)
    assert seen == [1, 2, 3]  # what came after the checkpoint is made again
    assert weights_file(out) == weights_file(whole) and log(out) == log(whole)
    assert kept(out) == {"step-3", "step-6"}


# Two processes, as torchrun starts them


def one_is_killed(whole: clha.Config, run: clha.Config) -> None:
    """A run without a fault, and one whose second process is killed before the update of step 5."""
    clha.train(whole)
    if os.environ["RANK"] == "1":
        die_at("torch.nn.utils.clip_grad_norm_", "", 5)
    clha.train(run)


def faults_of_one(run: clha.Config, stopped: clha.Config, full: clha.Config, one: clha.Config) -> None:
    """The killed run goes on; then faults that only the second process sees, and a run of one process."""
    second = os.environ["RANK"] == "1"
    clha.train(run)
    with at_step(5, partial(os.kill, os.getpid(), signal.SIGTERM) if second else int):
        fails(stopped, SystemExit, "143")
    clha.train(stopped)
    with small_disk(3, 200_000 if second else resource.RLIM_INFINITY):
        fails(full, clha.InputError, "step-4: cannot be saved .*File too large.*; older checkpoints stay")
    clha.train(full)
    clha.train(one)


def test_faults_of_one_of_two_processes(
    world: Path, run_in: Callable[..., clha.Config], tmp_path: Path
) -> None:
    """Killed, stopped, out of disk: the same bits; and one process's checkpoint goes on in two."""
    store = torchrun_store()
    two = tmp_path / "two"
    run = run_in(tmp_path / "run", checkpoint_every=2)
    stopped = run_in(tmp_path / "stopped", checkpoint_every=0)
    full = run_in(tmp_path / "full", checkpoint_every=2)
    one = run_in(tmp_path / "one", model=str(world / "init"), learning_rate=1e-5)
    other = run_in(tmp_path / "other", model=str(world / "init"), learning_rate=1e-5)
    codes = start(tmp_path / "printed", one_is_killed, run_in(two), run, store=store)
    assert codes[1] == -signal.SIGKILL and codes[0] > 0, (codes, (tmp_path / "printed").read_text())
    assert [path.name for path in clha.checkpoints(tmp_path / "run" / "checkpoints")] == ["step-2", "step-4"]

    clha.train(other)
    stop(one, 3)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # torchrun starts both again, on the same store
    codes = start(tmp_path / "printed", faults_of_one, run, stopped, full, one, store=store, restarts=1)
    printed = (tmp_path / "printed").read_text()
    assert codes == [0, 0], printed
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == before
    assert "stopped after step 5; the same command resumes" in printed
    for out in ("run", "stopped", "full"):
        assert weights_file(tmp_path / out) == weights_file(two), out
        assert log(tmp_path / out) == log(two), out
    for ours, theirs in zip(log(tmp_path / "one"), log(tmp_path / "other"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


# Steps that are not finite


def spoiled(steps_of: dict[int, str]) -> Any:
    """Spoils the loss, or only the gradients, of these steps."""
    run_batch = clha.run_batch
    made = 0

    def watched(policy: Any, packs: Any, loss_fn: Any, train: bool) -> dict[str, float]:
        nonlocal made
        made += 1

        def bad(avg_logps: Tensor, sum_logps: Tensor, **values: Tensor) -> Any:
            loss, metrics = loss_fn(avg_logps, sum_logps, **values)
            if steps_of.get(made) == "loss":
                return loss * torch.nan, metrics | {"loss": loss.detach() * torch.nan}
            if steps_of.get(made) == "gradients":
                return loss + (sum_logps.sum() * 0).sqrt(), metrics
            return loss, metrics

        return run_batch(policy, packs, bad, train)

    return watched


def test_a_step_that_is_not_finite_is_left_out_and_its_queries_are_named(
    world: Path,
    data: Path,
    run_in: Callable[..., clha.Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = {"model": str(world / "init"), "checkpoint_every": 3}
    order = clha.data_order(24, run_in(tmp_path, **plain))
    with monkeypatch.context() as patch:
        patch.setattr(clha, "run_batch", spoiled({2: "loss", 3: "gradients", 4: "loss"}))
        clha.train(run_in(tmp_path / "run", **plain))
    rows = log(tmp_path / "run")
    ids = [record["id"] for record in clha.iter_records(data)]
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert {row["step"]: row["skipped"] for row in rows if "skipped" in row} == {
        step: [ids[i] for i in order[step - 1]] for step in (2, 3, 4)
    }
    assert [row["loss"] is None for row in rows] == [step in (2, 4) for step in range(1, 9)]
    assert rows[2]["grad_norm"] is None  # JSON has no NaN
    assert kept(tmp_path / "run") == {"step-6"}  # none of a step that was left out
    # As if the steps had not been there.
    monkeypatch.setattr(clha, "data_order", lambda *_: torch.cat((order[:1], order[4:])))
    clha.train(run_in(tmp_path / "other", **plain))
    assert weights_file(tmp_path / "run") == weights_file(tmp_path / "other")


def test_five_of_them_in_a_row_end_the_run(
    run_in: Callable[..., clha.Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_in(tmp_path / "run", checkpoint_every=1, max_steps=12)
    bad = dict.fromkeys([1, 2, 3, 4, 6, 7, 8, 9, 10, 11], "loss")
    monkeypatch.setattr(clha, "run_batch", spoiled(bad))
    fails(run, clha.InputError, r'metrics.jsonl: 5 steps in a row were not finite; see "skipped"$')
    assert steps(tmp_path / "run") == list(range(1, 11))
    assert kept(tmp_path / "run") == {"step-5"} and not (tmp_path / "run" / "final").exists()


# A full disk


def test_a_full_disk_is_a_line_and_earlier_checkpoints_stay(
    run_in: Callable[..., clha.Config], whole: Path, tmp_path: Path
) -> None:
    run = run_in(tmp_path / "run", **COSINE, checkpoint_every=2)
    with small_disk(5, 200_000):
        message = r"step-6: cannot be saved \(.*File too large.*\); older checkpoints stay$"
        fails(run, clha.InputError, message)
    assert kept(tmp_path / "run") == {"step-2", "step-4"}  # what was begun takes no room
    clha.train(run)
    assert weights_file(tmp_path / "run") == weights_file(whole)
    assert log(tmp_path / "run") == log(whole)


MODEL = (200_000, "final")


@pytest.mark.parametrize(("size", "part"), [(1000, "metrics.jsonl"), MODEL])
def test_a_full_disk_elsewhere_is_a_line_too(
    run_in: Callable[..., clha.Config], whole: Path, tmp_path: Path, size: int, part: str
) -> None:
    run = run_in(tmp_path / "run", **COSINE, checkpoint_every=5)
    with small_disk(8, size):
        fails(run, (OSError, clha.InputError), "File too large")  # clha.run makes a line of both
    assert not (tmp_path / "run" / "final").exists()
    clha.train(run)
    assert weights_file(tmp_path / "run") == weights_file(whole)
    assert log(tmp_path / "run") == log(whole)


# One run a folder


def test_two_runs_do_not_share_a_folder(run_in: Callable[..., clha.Config], tmp_path: Path) -> None:
    run = run_in(tmp_path / "run", max_steps=1)
    lock = filelock.FileLock(tmp_path / "run" / ".lock")
    (tmp_path / "run").mkdir()
    with lock:
        fails(run, clha.InputError, "run: another program works in it; choose another --output_dir")
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {".lock"}
    refused = []

    def second() -> None:
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            refused.append(True)

    with at_step(1, second):
        clha.train(run)
    assert refused == [True]
    lock.acquire(timeout=0)  # it is free again
    lock.release()


def test_another_run_is_refused_by_what_differs(
    run_in: Callable[..., clha.Config], data: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    stop(run_in(out, **COSINE), 3)
    others = {
        r"run: is another run's, or a model \(margin 0.3 -> 0.7, seed 42 -> 3\)": {"margin": 0.7, "seed": 3},
        r"\(max_steps 8 -> 9\)": {"max_steps": 9},
        r"\(dtype float32 -> bfloat16\)": {"dtype": "bfloat16"},
        r"\(batch_size 8 -> 4, weight_decay 0.01 -> 0.0\)": {"batch_size": 4, "weight_decay": 0.0},
    }
    records = list(clha.iter_records(data))
    records[0]["responses"][0] += " Yes."
    changed = write(tmp_path / "changed.jsonl", records)
    others[r"\(tokens \['\w+'\] -> \['\w+'\]\); choose another --output_dir"] = {"train_data": str(changed)}
    for message, settings in others.items():
        tokens = {*(out / "tokens").rglob("*.arrow")}
        fails(run_in(out, **(COSINE | settings)), clha.InputError, message)
        assert "tokens" in message or {*(out / "tokens").rglob("*.arrow")} == tokens  # told before the work
    assert steps(out) == [1, 2, 3] and kept(out) == {"step-3"}
    # What changes nothing but rounding may change, and the data may lie elsewhere.
    moved = shutil.copy(data, tmp_path / "moved.jsonl")
    speed = {"pack_tokens": 1000, "activation_checkpointing": "none", "checkpoint_every": 5}
    clha.train(run_in(out, **COSINE, **speed, train_data=str(moved)))
    assert steps(out) == list(range(1, 9))
    assert log(out)[:3] == log(whole)[:3]


def test_a_folder_of_something_else_is_no_output(
    run_in: Callable[..., clha.Config], world: Path, data: Path, tmp_path: Path
) -> None:
    told = "choose another --output_dir"
    shutil.copytree(world / "init", tmp_path / "model")
    fails(run_in(tmp_path / "model"), clha.InputError, f"model: is another run's, or a model .*{told}")
    assert (tmp_path / "model/config.json").read_bytes() == (world / "init/config.json").read_bytes()
    (tmp_path / "log").mkdir()
    (tmp_path / "log/metrics.jsonl").write_text("mine")
    fails(run_in(tmp_path / "log"), clha.InputError, rf"log: .*\(config.json is missing or torn\); {told}")
    assert (tmp_path / "log/metrics.jsonl").read_text() == "mine"
    # A run that was killed before its first checkpoint may have saved models, which are not another run's.
    out = tmp_path / "run"
    clha.train(run_in(out, save_every=2, max_steps=4))
    shutil.rmtree(out / "final")
    fails(run_in(out, save_every=2, max_steps=4, seed=3), clha.InputError, r"\(seed 42 -> 3\); " + told)
    rewards = [dict(record, rewards=record["rewards"][::-1]) for record in clha.iter_records(data)]
    other = write(tmp_path / "other.jsonl", rewards)
    fails(run_in(out, save_every=2, max_steps=4, train_data=str(other)), clha.InputError, f"tokens .*{told}")
    clha.train(run_in(out, save_every=2, max_steps=4))


def other_weights(model: Path) -> None:
    """Adds a little to one weight of a model folder."""
    network = AutoModelForCausalLM.from_pretrained(model)
    network.lm_head.weight.data[0, 0] += 0.1
    network.save_pretrained(model)


def other_rope(model: Path) -> None:
    """Gives a model other positions: its weights stay the same."""
    settings = json.loads((model / "config.json").read_text())
    settings["rope_parameters"]["rope_theta"] *= 2
    (model / "config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("change", [other_weights, other_rope])
def test_another_model_in_the_same_place_is_refused(
    run_in: Callable[..., clha.Config],
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], None],
) -> None:
    shutil.copytree(world / "init", tmp_path / "model")
    run = run_in(tmp_path / "run", model=str(tmp_path / "model"))
    stop(run, 2)
    shutil.move(tmp_path / "model", tmp_path / "moved")
    run.model = str(tmp_path / "moved")
    for module in (transformers, transformers.configuration_utils):
        monkeypatch.setattr(module, "__version__", "9.9.9")
    stop(run, 1)  # the same model elsewhere goes on, also with another version of transformers
    change(tmp_path / "moved")
    told = r"another run's.* \(model_hash \w+ -> \w+\); choose another --output_dir"
    fails(run, clha.InputError, f"run: is {told}")
    (tmp_path / "run/config.json").unlink()  # as in a folder to which only checkpoints were copied
    (tmp_path / "run/metrics.jsonl").unlink()
    fails(run, clha.InputError, f"step-3: is {told}")


def test_a_model_that_takes_images_too_goes_on(
    run_in: Callable[..., clha.Config], world: Path, tmp_path: Path
) -> None:
    # Its weights for images get no gradient, so AdamW has no moments for them.
    tokenizer = clha.load_tokenizer(str(world / "init"))
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": len(tokenizer), "num_key_value_heads": 1, "head_dim": 16}
    image = sizes | {"image_size": 28, "patch_size": 14}
    kind = transformers.Gemma3Config(text_config=text, vision_config=image, mm_tokens_per_image=4)
    model = AutoModelForCausalLM.from_config(kind)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    ends = []
    for name, stops in (("stopped", (2, 1)), ("whole", ())):
        run = run_in(tmp_path / name, model=str(tmp_path / "model"), max_steps=4)
        for after in stops:
            stop(run, after)
        clha.train(run)
        ends.append(AutoModelForCausalLM.from_pretrained(tmp_path / name / "final").state_dict())
    before = model.state_dict()
    for name, weight in ends[0].items():
        assert torch.equal(weight, ends[1][name])
        assert torch.equal(weight, before[name]) == ("vision" in name or "multi_modal" in name)


def test_a_run_that_fails_gives_its_folder_free(
    run_in: Callable[..., clha.Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_in(tmp_path / "run", max_steps=1)
    with monkeypatch.context() as patch, pytest.raises(clha.InputError, match="stop here") as error:
        patch.setattr(clha, "load_policy", Mock(side_effect=clha.InputError("stop here")))
        clha.train(run)
    clha.train(run)
    assert (tmp_path / "run" / "final").is_dir() and error.value


def damage_tensors(newest: Path) -> Iterator[None]:
    """Damages its tensors, in one way after the other."""
    (shard,) = newest.glob("*.safetensors")
    saved = shard.read_bytes()
    shard.write_bytes(saved[:-1000])
    yield
    shard.write_bytes(saved[:-5000] + bytes(4000) + saved[-1000:])  # loads without an error
    yield
    shard.write_bytes(b"")
    yield
    shutil.copy(newest.with_name("step-4") / shard.name, shard)  # of another step
    yield
    shard.unlink()
    yield


def damage_settings(newest: Path) -> Iterator[None]:
    """Damages its run.json, in one way after the other."""
    (newest / "run.json").write_text('{"margin": 0.3,')
    yield
    (newest / "run.json").write_text("[]")
    yield
    (newest / "run.json").unlink()
    yield


@pytest.mark.parametrize("damage", [damage_settings, damage_tensors])
def test_a_damaged_checkpoint_is_named_and_the_one_before_serves(
    run_in: Callable[..., clha.Config], whole: Path, tmp_path: Path, damage: Callable[[Path], Iterator[None]]
) -> None:
    out = tmp_path / "run"
    run = run_in(out, **COSINE, checkpoint_every=2)
    stop(run, 5)
    newest = out / "checkpoints" / "step-5"
    for _ in damage(newest):
        fails(run, clha.InputError, "step-5: damaged .*; remove it to resume from the one before$")
    assert steps(out) == list(range(1, 6))
    shutil.rmtree(newest)
    clha.train(run)
    assert weights_file(out) == weights_file(whole)
    assert log(out) == log(whole)


# Models on the way


def test_a_folder_of_the_user_stays(run_in: Callable[..., clha.Config], tmp_path: Path) -> None:
    notes = tmp_path / "run" / "step-2" / "notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    with suppress(OSError, clha.InputError):
        clha.train(run_in(tmp_path / "run", max_steps=3, save_every=2))
    assert notes.read_text() == "mine" and [path.name for path in notes.parent.iterdir()] == ["notes.txt"]


def test_a_run_with_models_on_the_way_goes_on(
    run_in: Callable[..., clha.Config], whole: Path, tmp_path: Path
) -> None:
    run = run_in(tmp_path / "run", **COSINE, checkpoint_every=3, save_every=5)
    codes = start(tmp_path / "printed", train_and_die, run, "torch.nn.utils.clip_grad_norm_", "", 6)
    assert codes == [-signal.SIGKILL]
    assert (tmp_path / "run" / "step-5").is_dir() and kept(tmp_path / "run") == {"step-3"}
    clha.train(run)
    assert weights_file(tmp_path / "run") == weights_file(whole)


def test_a_checkpoint_has_weights_moments_and_settings(
    run_in: Callable[..., clha.Config], tmp_path: Path
) -> None:
    clha.train(run_in(tmp_path / "run", max_steps=2, checkpoint_every=2))
    folder = tmp_path / "run" / "checkpoints" / "step-2"
    names: set[str] = set()
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            names |= set(file.keys())
    weight = "model.layers.0.mlp.up_proj.weight"
    state = {f"optimizer.{weight}.{key}" for key in ("exp_avg", "exp_avg_sq", "step")}
    assert {f"model.{weight}"} | state <= names
    told = json.loads((folder / "run.json").read_text())
    assert told["run"]["seed"] == 42 and told["run"]["learning_rate"] == 1e-3
    assert told["files"].keys() == {path.name for path in folder.iterdir()} - {"run.json"}
