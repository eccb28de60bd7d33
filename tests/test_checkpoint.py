"""Checkpoints: a run that is stopped, killed or out of disk ends with the weights of one that was not."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import checkpoint
import clha
from records import InputError, claim, read_jsonl, read_records, write_jsonl

SMALL = {"max_steps": 12, "batch_size": 4, "learning_rate": 1e-3, "pack_tokens": 400}


@pytest.fixture(scope="module")
def data(world: Path) -> Path:
    """Training records of the toy world with rewards."""
    generator = torch.Generator().manual_seed(0)
    records = read_records(world / "train.jsonl")[:48]
    for record in records:
        record["rewards"] = torch.randn(len(record["responses"]), generator=generator).tolist()
    write_jsonl(world / "checkpoint.jsonl", records)
    return world / "checkpoint.jsonl"


@pytest.fixture(scope="module")
def start(world: Path) -> Path:
    """The tiny LLaMA with dropout, so that the random states matter."""
    folder = world / "dropout"
    shutil.copytree(world / "init", folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"attention_dropout": 0.2}))
    return folder


def config(start: Path, data: Path, out: Path, **more: Any) -> clha.Config:
    """Twelve steps of four queries."""
    return clha.Config(str(start), str(data), str(out), **SMALL | more)


def launch(start: Path, data: Path, out: Path, *flags: str, processes: int = 1, restarts: int = 0) -> Any:
    """Starts clha.py as a user does."""
    settings = SMALL | {"model": start, "train_data": data, "output_dir": out}
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--max_restarts={restarts}"]
    command = [sys.executable, *([*torchrun, f"--nproc_per_node={processes}"] if processes > 1 else [])]
    command += ["clha.py", *(word for name, value in settings.items() for word in (f"--{name}", value))]
    words = list(map(str, [*command, *flags]))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, cwd=ROOT, start_new_session=True, **pipes)


def wait_for_step(process: Any, out: Path, step: int) -> None:
    """Waits until a run has logged a step."""
    for _ in range(1200):
        log = out / "metrics.jsonl"
        if log.exists() and log.read_bytes().count(b"\n") >= step:
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    raise AssertionError("no such step in a minute")


def weights(folder: Path) -> bytes:
    """The bytes of the weights that a run ended with."""
    return (folder / "final" / "model.safetensors").read_bytes()


def log(out: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [row for _, row in read_jsonl(out / "metrics.jsonl")]


def steps(out: Path) -> list[int]:
    """The steps in metrics.jsonl."""
    return [row["step"] for row in log(out)]


def stop_after(out: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a run in this process get a SIGTERM in this step."""
    end_step = checkpoint.Run.end_step

    def interrupted(self: checkpoint.Run, at: int, *arguments: Any, **more: Any) -> None:
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)
        end_step(self, at, *arguments, **more)

    monkeypatch.setattr(checkpoint.Run, "end_step", interrupted)


@pytest.fixture(scope="module")
def whole(start: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves that was never stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    clha.train(config(start, data, out))
    dist.destroy_process_group()
    return out


def test_dropout_is_part_of_this_test(whole: Path, start: Path, data: Path, tmp_path: Path) -> None:
    clha.train(config(start, data, tmp_path, seed=43))
    clha.train(config(start, data, tmp_path / "again"))
    assert weights(tmp_path / "again") == weights(whole) != weights(tmp_path)


@pytest.mark.parametrize(
    "settings", [{}, {"lr_schedule": "cosine", "warmup_steps": 3}, {"eval_every": 1}, {"objective": "dpo"}]
)
def test_a_stopped_run_goes_on_to_the_same_bits(
    start: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    if "eval_every" in settings:
        settings["dev_data"] = str(data)
    clha.train(config(start, data, tmp_path / "whole", **settings))
    run = config(start, data, tmp_path / "run", **settings)
    for step in (3, 4, 9):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
            stop_after(tmp_path / "run", step, patch)
            clha.train(run)
        assert end.value.code == 128 + signal.SIGTERM
        assert (tmp_path / "run" / "checkpoints" / "latest").resolve().name == f"step-{step}"
    clha.train(run)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert steps(tmp_path / "run") == list(range(1, 13))
    for ours, theirs in zip(log(tmp_path / "run"), log(tmp_path / "whole"), strict=True):
        assert ours == theirs | {"tokens_per_second": ours["tokens_per_second"]}


def test_two_processes_one_of_which_is_killed(start: Path, data: Path, tmp_path: Path) -> None:
    # torchrun brings both back without help.
    flags, out = ("--checkpoint_every", "2", "--max_steps", "60"), tmp_path / "run"
    assert launch(start, data, tmp_path / "whole", *flags, processes=2).wait(120) == 0
    process = launch(start, data, out, *flags, processes=2, restarts=3)
    wait_for_step(process, out, 3)
    while not (out / "checkpoints" / "latest").exists():
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "resume  from" in printed
    assert weights(out) == weights(tmp_path / "whole") and steps(out) == list(range(1, 61))


def test_torchrun_is_killed_and_its_processes_save(
    start: Path, data: Path, whole: Path, tmp_path: Path
) -> None:
    flags = ("--max_steps", "200", "--checkpoint_every", "0")
    process = launch(start, data, tmp_path, *flags, processes=2)
    wait_for_step(process, tmp_path, 3)
    process.kill()
    process.wait()
    for _ in range(600):
        if (tmp_path / "checkpoints" / "latest").exists():
            break
        time.sleep(0.05)
    newest = int((tmp_path / "checkpoints" / "latest").resolve().name[5:])
    assert 3 <= newest < 200 and steps(tmp_path) == list(range(1, newest + 1))
    for _ in range(200):  # and then nobody is at work any more
        with suppress(InputError):
            return claim(tmp_path).close()
        time.sleep(0.05)
    raise AssertionError("its processes live on")


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on_to_the_same_numbers(
    world: Path, data: Path, tmp_path: Path, before: int, after: int
) -> None:
    # Twenty more steps. Without dropout, whose draws are each process's own.
    flags = ("--max_steps", "26", "--checkpoint_every", "6", "--learning_rate", "1e-4")
    first, second = tmp_path / "whole", tmp_path / "run"
    assert (
        launch(world / "init", data, first, *flags, "--keep_checkpoints", "9", processes=before).wait(120)
        == 0
    )
    (second / "checkpoints").mkdir(parents=True)
    shutil.copytree(first / "checkpoints" / "step-6", second / "checkpoints" / "step-6")
    process = launch(world / "init", data, second, *flags, processes=after)
    assert "6 steps done" in process.communicate(timeout=120)[0] and process.returncode == 0
    ours, theirs = (load_file(out / "final" / "model.safetensors") for out in (second, first))
    for name, weight in theirs.items():
        assert (ours[name] - weight).norm() <= 1e-6 * weight.norm(), name


def test_a_signal_in_the_real_program_leaves_a_checkpoint_and_says_so(
    start: Path, data: Path, whole: Path, tmp_path: Path
) -> None:
    process = launch(start, data, tmp_path / "run")
    wait_for_step(process, tmp_path / "run", 2)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    if process.returncode:  # it may have been at its last step
        assert process.returncode == 128 + signal.SIGINT and "Traceback" not in errors
        assert "SIGINT: stopped after step" in printed and "the same command goes on from" in printed
        assert launch(start, data, tmp_path / "run").wait(60) == 0
    assert weights(tmp_path / "run") == weights(whole)


def interrupted_run(start: Path, data: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **more: Any) -> None:
    """A run that a signal stopped after step 5."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_after(out, 5, patch)
        clha.train(config(start, data, out, **more))


def test_another_configuration_is_refused_by_name(
    start: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted_run(start, data, tmp_path, monkeypatch)
    other = {"margin": 0.7, "seed": 3}
    with pytest.raises(InputError, match=r"\(margin 0.3 -> 0.7, seed 42 -> 3\).*--resume_anyway margin,seed"):
        clha.train(config(start, data, tmp_path, **other))
    with pytest.raises(InputError, match=r"\(seed 42 -> 3\)"):
        clha.train(config(start, data, tmp_path, **other, resume_anyway="margin"))
    with pytest.raises(InputError, match=r"unfinished run \(step-5\)"):
        clha.train(config(start, data, tmp_path, resume="never"))
    changed = tmp_path / "changed.jsonl"
    write_jsonl(changed, read_records(data)[1:])
    with pytest.raises(InputError, match=r"train_data .*records .* -> "):
        clha.train(config(start, changed, tmp_path))
    clha.train(config(start, data, tmp_path, **other, resume_anyway="margin, seed", keep_checkpoints=5))
    assert steps(tmp_path) == list(range(1, 13))


def test_the_newest_and_the_best_are_kept(start: Path, data: Path, tmp_path: Path) -> None:
    # The dev data want the other order: the better the run learns its own, the worse they are.
    reverse = [r | {"rewards": [-value for value in r["rewards"]]} for r in read_records(data)]
    write_jsonl(tmp_path / "dev.jsonl", reverse)
    more = {"dev_data": str(tmp_path / "dev.jsonl"), "eval_every": 2, "checkpoint_every": 3, "alpha": 0.0}
    clha.train(config(start, data, tmp_path, **more))
    losses = {step: row["eval/loss"] for step, row in enumerate(log(tmp_path), 1) if "eval/loss" in row}
    best = min(losses, key=lambda step: losses[step])
    found = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert found == {"step-9", "step-12", f"step-{best}", "latest", "best"} and best < 9
    assert (tmp_path / "checkpoints" / "best").resolve().name == f"step-{best}"
    assert (tmp_path / "checkpoints" / "latest").resolve().name == "step-12"


@pytest.mark.parametrize("policy", ["stop", "go_on"])
def test_what_can_t_be_saved(
    start: Path,
    data: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    policy: str,
) -> None:
    end_step, folder = checkpoint.Run.end_step, tmp_path / "checkpoints"

    def in_the_way(self: checkpoint.Run, step: int, *arguments: Any, **more: Any) -> None:
        if step == 6:
            (folder / "step-6.partial").write_text("a file where a folder is to be")
        end_step(self, step, *arguments, **more)

    run = config(start, data, tmp_path, checkpoint_every=3, on_save_error=policy)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Run, "end_step", in_the_way)
        if policy == "stop":
            with pytest.raises(
                InputError, match=r"can't save: .*File exists.* checkpoint is .*step-3\. Once"
            ):
                clha.train(run)
        else:
            clha.train(run)
            assert "step-3; going on" in capsys.readouterr().err
    if policy == "stop":
        assert (folder / "latest").resolve().name == "step-3"
        (folder / "step-6.partial").unlink()
        dist.destroy_process_group()
        clha.train(run)
    assert weights(tmp_path) == weights(whole)


def test_a_full_disk(start: Path, data: Path, whole: Path, tmp_path: Path) -> None:
    # A file system of 8 MiB, whose third checkpoint of 3.4 MiB has no room.
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", tmp_path], capture_output=True
    ).returncode:
        pytest.skip("only root can mount a file system")
    try:
        process = launch(start, data, tmp_path / "run", "--checkpoint_every", "3", "--keep_checkpoints", "9")
        errors = process.communicate(timeout=60)[1]
        assert process.returncode == 2 and "Traceback" not in errors
        assert "No space left on device; the newest checkpoint is" in errors.strip().splitlines()[-1]
        found = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
        assert found == {"step-3", "step-6", "latest"}
        subprocess.run(["mount", "-o", "remount,size=64m", "tmpfs", tmp_path], check=True)
        assert (
            launch(start, data, tmp_path / "run", "--checkpoint_every", "3", "--keep_checkpoints", "9").wait(
                60
            )
            == 0
        )
        assert weights(tmp_path / "run") == weights(whole)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def spoiled_model(world: Path, data: Path, folder: Path) -> tuple[Path, set[str]]:
    """A model to which one word is not a number, and the ids of the queries that have it."""
    settings = LlamaConfig.from_pretrained(world / "init", tie_word_embeddings=False)
    torch.manual_seed(0)
    model, tokenizer = LlamaForCausalLM(settings), clha.load_tokenizer(str(world / "init"))
    examples = [clha.encode(record, tokenizer) for record in read_records(data)]
    tokens = [set(e["prompt_ids"]).union(*(ids[:-1] for ids in e["response_ids"])) for e in examples]
    counts = {token: sum(token in found for found in tokens) for token in set().union(*tokens)}
    rare = min(token for token, count in counts.items() if count == 2)
    with torch.no_grad():
        model.get_input_embeddings().weight[rare] = torch.nan
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, {e["id"] for e, found in zip(examples, tokens, strict=True) if rare in found}


def test_a_step_that_is_not_finite_is_skipped_and_its_queries_named(
    world: Path, data: Path, tmp_path: Path, capsys: Any
) -> None:
    model, guilty = spoiled_model(world, data, tmp_path / "model")
    clha.train(config(model, data, tmp_path / "run"))
    rows = [row for _, row in read_jsonl(tmp_path / "run" / "skipped.jsonl")]
    assert {query for row in rows for query in row["queries"]} == guilty
    errors = capsys.readouterr().err
    assert (
        f"step {rows[0]['step']}: skipped: loss nan, gradient norm nan; queries {rows[0]['queries'][0]}"
        in errors
    )
    logged = log(tmp_path / "run")
    assert [row["step"] for row in logged if row["loss"] is None] == [row["step"] for row in rows]
    assert logged[-1]["skipped"] == len(rows) and 0 < len(rows) < 12
    trained = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert trained["lm_head.weight"].isfinite().all()


def test_too_many_of_them_in_a_row_end_the_run(world: Path, data: Path, tmp_path: Path) -> None:
    model, guilty = spoiled_model(world, data, tmp_path / "model")
    bad = [record for record in read_records(data) if record["id"] in guilty]
    good = [record for record in read_records(data) if record["id"] not in guilty]
    write_jsonl(tmp_path / "bad.jsonl", good[:10] + bad * 10)
    run = config(
        model, tmp_path / "bad.jsonl", tmp_path / "run", batch_size=3, max_bad_steps=2, checkpoint_every=1
    )
    with pytest.raises(InputError, match=r"2 steps in a row were not finite .* last good checkpoint is"):
        clha.train(run)
    assert not (tmp_path / "run" / "final").exists()


def test_a_checkpoint_becomes_a_hugging_face_folder(
    start: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clha.train(config(start, data, tmp_path / "run", checkpoint_every=4))
    newest = tmp_path / "run" / "checkpoints" / "latest"
    monkeypatch.setattr(sys, "argv", ["checkpoint.py", str(newest), "--out", str(tmp_path / "model")])
    checkpoint.main()
    ours, theirs = (
        load_file(p / "model.safetensors") for p in (tmp_path / "model", tmp_path / "run" / "final")
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    clha.load_tokenizer(str(tmp_path / "model"))


def test_a_damaged_checkpoint_is_named(
    start: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted_run(start, data, tmp_path, monkeypatch, checkpoint_every=2)
    newest = tmp_path / "checkpoints" / "step-5"
    shard = next(newest.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(InputError, match=r"step-5: a damaged checkpoint .*; without it, the one before"):
        clha.train(config(start, data, tmp_path, checkpoint_every=2))
    shutil.rmtree(newest)
    clha.train(config(start, data, tmp_path, checkpoint_every=2))
    assert steps(tmp_path) == list(range(1, 13))


def test_the_log_keeps_what_the_checkpoint_has(start: Path, data: Path, tmp_path: Path) -> None:
    rows = [{"step": step, "loss": 1.0} for step in range(1, 8)]
    lines = [json.dumps(row) + "\n" for row in rows]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 8, "lo')
    assert checkpoint.Log(tmp_path, config(start, data, tmp_path), 5).write(6, {"loss": torch.nan}) is None
    assert log(tmp_path) == [*rows[:5], {"step": 6, "loss": None}]


def test_two_runs_do_not_share_a_folder(start: Path, data: Path, tmp_path: Path) -> None:
    with claim(tmp_path), pytest.raises(InputError, match="another program is at work in it"):
        clha.train(config(start, data, tmp_path))
    dist.destroy_process_group()
    clha.train(config(start, data, tmp_path, max_steps=2))
    claim(tmp_path).close()


def test_a_log_on_a_full_disk_stays_whole(start: Path, data: Path, tmp_path: Path) -> None:
    # A limit on the size of files is a disk that is full in the middle of a line.
    log_file = checkpoint.Log(tmp_path, config(start, data, tmp_path), 0)
    log_file.board = None
    assert log_file.write(1, {"loss": 1.0}) is None
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len((tmp_path / "metrics.jsonl").read_bytes()) + 9, limits[1]))
    try:
        assert log_file.write(2, {"loss": 1.0}) and log_file.write(3, {"loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert log_file.write(4, {"loss": 1.0}) is None
    assert steps(tmp_path) == [1, 4]


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_another_learning_rate_is_taken(
    start: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: str
) -> None:
    whole, run = (tmp_path / name for name in ("whole", "run"))
    clha.train(config(start, data, whole, lr_schedule=schedule, learning_rate=5e-4))
    interrupted_run(start, data, run, monkeypatch, lr_schedule=schedule)
    more = {"lr_schedule": schedule, "learning_rate": 5e-4, "resume_anyway": "learning_rate"}
    clha.train(config(start, data, run, **more))
    rates = [[row["learning_rate"] for row in log(out)] for out in (run, whole)]
    assert rates[0][5:] == pytest.approx(rates[1][5:]) and rates[0][4] == pytest.approx(2 * rates[1][4])


def test_fewer_steps_than_are_done_are_refused(
    start: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted_run(start, data, tmp_path, monkeypatch)
    with pytest.raises(InputError, match="has done 5 steps already, more than the 4 wanted"):
        clha.train(config(start, data, tmp_path, max_steps=4, resume_anyway="max_steps"))


def test_the_best_is_one_that_is_saved(
    start: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The second evaluation is the best, but its save fails; the third is better than the first.
    scores, run_batch = iter([3.0, 1.0, 2.0, 2.5]), clha.run_batch

    def scored(*arguments: Any, train: bool) -> dict[str, float]:
        metrics = run_batch(*arguments, train=train)
        return metrics if train else metrics | {"loss": next(scores)}

    end_step = checkpoint.Run.end_step

    def in_the_way(self: checkpoint.Run, step: int, *arguments: Any, **more: Any) -> None:
        if step == 4:
            (tmp_path / "checkpoints" / "step-4.partial").write_text("a file where a folder is to be")
        end_step(self, step, *arguments, **more)

    monkeypatch.setattr(clha, "run_batch", scored)
    monkeypatch.setattr(checkpoint.Run, "end_step", in_the_way)
    more = {"max_steps": 8, "dev_data": str(data), "eval_every": 2, "on_save_error": "go_on"}
    clha.train(config(start, data, tmp_path, **more, keep_checkpoints=1))
    assert (tmp_path / "checkpoints" / "best").resolve().name == "step-6"
