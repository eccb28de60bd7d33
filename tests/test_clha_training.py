"""The training loop: it is a plain loop, no division of the work changes it, and what it leaves behind."""

import itertools
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, config
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import clha

FORKS = multiprocessing.get_context("forkserver")  # one start of Python serves many processes
FORKS.set_forkserver_preload(["clha", "test_clha_training", "test_clha_checkpoints"])


@pytest.fixture(scope="module")
def data(world: Path) -> Path:
    """24 queries, three steps an epoch: two or three responses each, random rewards, some of them close."""
    generator = torch.Generator().manual_seed(0)
    records = list(clha.iter_records(world / "train.jsonl"))[:24]
    for i, record in enumerate(records):
        record["responses"] += ["I do not know."] * (i % 2)
        record["rewards"] = torch.randn(len(record["responses"]), generator=generator).tolist()
        record["weights"] = torch.rand(len(record["responses"]), generator=generator).tolist()
    return write(world / "mixed.jsonl", records)


def write(path: Path, records: list[clha.Record]) -> Path:
    """A file of records."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def small(world: Path, data: Path, out: Path, **settings: Any) -> clha.Config:
    """Five steps of eight queries, small enough that rounding stays rounding."""
    common = {"train_data": str(data), "max_steps": 5, "learning_rate": 1e-5}
    settings = common | {"token_cache": str(world / "tokens")} | settings
    made = config(world, out)
    for name, value in settings.items():
        setattr(made, name, value)
    return made


def in_group(
    rank: int, processes: int, port: int, restarts: int, output: Path, work: Callable[..., None], args: Any
) -> None:
    """What a process of `start` does: it finds the variables of torchrun, and prints into a file."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RESTART_COUNT": restarts}
    if processes > 1:
        os.environ.update({name: str(value) for name, value in (ranks | address).items()})
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    clha.run(lambda: work(*args))


def start(
    output: Path, work: Callable[..., None], *args: Any, store: dist.TCPStore | None = None, restarts: int = 0
) -> list[int]:
    """Runs work(*args) in a new process, or with a store in two as torchrun starts them: their exit codes."""
    processes = 2 if store else 1
    port = store.port if store else 0
    children = []
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")])):
        for rank in range(processes):
            settings = (rank, processes, port, restarts, output, work, args)
            children.append(FORKS.Process(target=in_group, args=settings))
            children[-1].start()
    for child in children:
        child.join(120)
        if child.exitcode is None:
            child.kill()
            child.join()
    return [int(child.exitcode or 0) for child in children]


def torchrun_store() -> dist.TCPStore:
    """The store that torchrun keeps for its processes."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def log(out: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what differs from run to run."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    clocks = ("seconds", "tokens_per_second", "time")
    return [{name: row[name] for name in row if name not in clocks} for row in rows]


def weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a Hugging Face folder."""
    return load_file(folder / "model.safetensors")


def assert_same_run(run: Path, other: Path, before: Path) -> None:
    """The same weights and metrics to rounding, after steps that changed the weights by far more."""
    start_weights = weights(before)
    expected = weights(other / "final")
    trained = weights(run / "final")
    assert trained.keys() == expected.keys()
    for name, weight in trained.items():
        torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=0)
    assert max((expected[name] - start_weights[name]).abs().max() for name in expected) > 8e-6
    for ours, theirs in zip(log(run), log(other), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


@pytest.fixture(scope="module")
def one_process(world: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of one process leaves."""
    out = tmp_path_factory.mktemp("one") / "run"
    clha.train(small(world, data, out))
    dist.destroy_process_group()
    return out


# A plain loop: no packs, no shards, no accumulation, nothing of clha but the order of the queries


def plain_logps(model: Any, tokenizer: Any, record: clha.Record) -> tuple[Tensor, Tensor]:
    """Summed and mean log-probability of each response of a record, each computed alone."""
    prompt = clha.render(record["prompt"])
    begin = len(tokenizer(prompt).input_ids)
    sums = []
    means = []
    for response in record["responses"]:
        ids = [*tokenizer(f"{prompt} {response}").input_ids, tokenizer.eos_token_id]
        logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        tokens = torch.stack([logps[place - 1, ids[place]] for place in range(begin, len(ids))])
        sums.append(tokens.sum())
        means.append(tokens.mean())
    return torch.stack(sums), torch.stack(means)


def plain_metrics(model: Any, tokenizer: Any, record: clha.Record, settings: clha.Config) -> dict[str, Any]:
    """What metrics.jsonl has of one query; "loss" carries the gradient."""
    by_reward = sorted(range(len(record["rewards"])), key=lambda i: -record["rewards"][i])
    rewards = [record["rewards"][i] for i in by_reward]
    sums, means = plain_logps(model, tokenizer, record)
    sums = sums[by_reward]
    means = means[by_reward]
    rank_loss = torch.zeros(())
    pairs = [(i, j) for j in range(len(rewards)) for i in range(j)]
    kept = [(i, j) for i, j in pairs if rewards[i] - rewards[j] > settings.min_reward_gap]
    for i, j in kept:
        rank_loss = rank_loss + (means[j] - means[i] + settings.margin * (j - i)).clamp(min=0)
    gate = float(rewards[0] > 0 or not settings.gate)
    alpha = 0.05 * (2 - 1) ** 2 if settings.alpha is None else settings.alpha
    return {
        "loss": rank_loss - alpha * gate * sums[0],
        "loss/rank": rank_loss.item(),
        "loss/sft": -gate * sums[0].item(),
        "rewards/accuracies": sum(float(means[i] > means[j]) for i, j in pairs) / len(pairs),
        "logps/chosen": means[0].item(),
        "logps/rejected": means[-1].item(),
        "pairs_kept": len(kept) / len(pairs),
        "gate_open": gate,
    }


CHANGED = {"margin": 2.0, "min_reward_gap": 0.1, "gate": False, "alpha": 3.0, "weight_decay": 0.5}
COSINE = {"lr_schedule": "cosine", "warmup_steps": 2, "max_grad_norm": 0.7}
RATES = [0.0, 0.5, 1.0, (1 + math.cos(math.pi / 3)) / 2, (1 + math.cos(math.pi * 2 / 3)) / 2]


@pytest.mark.parametrize(
    ("tied", "settings", "rates"),
    [(True, CHANGED | COSINE, RATES), (False, {"max_steps": 2, "activation_checkpointing": "none"}, [1, 1])],
    ids=["all settings changed", "defaults, untied"],
)
def test_a_run_is_a_plain_loop(
    world: Path, data: Path, tmp_path: Path, tied: bool, settings: dict[str, Any], rates: list[float]
) -> None:
    before = tmp_path / "model"
    shutil.copytree(world / "init", before)
    if not tied:
        torch.manual_seed(0)
        untied = LlamaConfig.from_pretrained(before, tie_word_embeddings=False)
        LlamaForCausalLM(untied).save_pretrained(before)
    run = small(world, data, tmp_path / "run", **settings, model=str(before))
    clha.train(run)

    records = list(clha.iter_records(data))
    tokenizer = AutoTokenizer.from_pretrained(before)
    model = AutoModelForCausalLM.from_pretrained(before, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=run.weight_decay)
    steps = zip(clha.data_order(len(records), run), rates, log(tmp_path / "run"), strict=True)
    for number, (indices, rate, row) in enumerate(steps, 1):
        queries = [plain_metrics(model, tokenizer, records[i], run) for i in indices]
        means = {name: sum(query[name] for query in queries) / 8 for name in queries[0]}
        optimizer.zero_grad()
        means["loss"].backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), run.max_grad_norm)
        optimizer.param_groups[0]["lr"] = 1e-5 * rate
        optimizer.step()
        expected = means | {"loss": means["loss"].item(), "grad_norm": norm.item()}
        expected |= {"step": number, "epoch": number * 8 / 24, "learning_rate": 1e-5 * rate}
        assert row == pytest.approx(expected, rel=1e-4)
    trained = weights(tmp_path / "run" / "final")
    start_weights = weights(before)
    parameters = dict(model.named_parameters())
    assert trained.keys() == parameters.keys()  # a tied weight stands there once
    for name, weight in parameters.items():
        torch.testing.assert_close(trained[name], weight.detach(), atol=1e-6, rtol=0)
        assert name.endswith("norm.weight") or (weight - start_weights[name]).abs().max() > 8e-6
    loaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "run" / "final", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    told = json.loads((tmp_path / "run" / "config.json").read_text())
    assert told["alpha"] == (3.0 if tied else 0.05)
    assert told["margin"] == run.margin and told["seed"] == 42


def test_gradients_are_clipped_and_weights_decay(world: Path, data: Path, tmp_path: Path) -> None:
    # Gradients of norm 1e-12 are far below AdamW's epsilon of 1e-8: each step moves a weight by at most
    # 0.1 x 1e-12 / 1e-8 = 1e-5. What is left is the decay: three times by 1 - 0.1 x 0.2 = 0.98.
    settings = {"max_steps": 3, "learning_rate": 0.1, "weight_decay": 0.2, "max_grad_norm": 1e-12}
    clha.train(small(world, data, tmp_path / "run", **settings))
    before = weights(world / "init")
    for name, weight in weights(tmp_path / "run" / "final").items():
        torch.testing.assert_close(weight, before[name] * 0.98**3, atol=5e-5, rtol=0)


# No division of the work changes a run


@pytest.mark.parametrize(
    ("settings", "recomputed"),
    [({"pack_tokens": 60}, True), ({"pack_tokens": 4096, "activation_checkpointing": "none"}, False)],
)
def test_packs_and_checkpointed_layers_change_nothing(
    world: Path,
    data: Path,
    one_process: Path,
    tmp_path: Path,
    settings: dict[str, Any],
    recomputed: bool,
) -> None:
    with mock.patch.object(clha, "checkpoint", wraps=clha.checkpoint) as layers:
        clha.train(small(world, data, tmp_path / "run", **settings))
    assert layers.called == recomputed
    assert_same_run(tmp_path / "run", one_process, world / "init")


def grouped_loss(avg_logps: Tensor, sum_logps: Tensor, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """An objective of two consecutive queries, the first of which counts double, so that order matters."""
    per_query = (avg_logps * weights).nansum(1)  # (B,)
    first, second = per_query.view(-1, 2).unbind(1)
    loss = (2 * first + second).square().mean()
    # A lone response would count as one of two: no query has fewer than two, and NaN stands for the third.
    absent = weights.isnan().float().mean()
    return loss, {"loss": loss.detach(), "rewards/accuracies": absent}


GROUPED = {"fields": ("weights",), "ranked": False, "group": 2}


def no_encoding(*arguments: Any) -> None:
    """In place of clha.encode, where nothing is to be tokenized."""
    raise AssertionError("tokenized again")


def train_several(runs: list[tuple[clha.Config, dict[str, Any]]]) -> None:
    """Several runs, one after the other, in processes that are there already."""
    encode = clha.encode
    encoded: list[str] = []
    clha.encode = lambda record, *rest: encoded.append(record["id"]) or encode(record, *rest)
    for settings, more in runs:
        with mock.patch.object(clha, "save_model", wraps=clha.save_model) as save:
            clha.train(settings, **more)
        ids: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ids, [*encoded])
        together = [*itertools.chain(*ids)]
        assert len({*together}) == len(together)  # one process tokenizes, and the other waits
        encoded.clear()
        policy = save.call_args.args[0]
        held = sum(weight.to_local().numel() for weight in policy.parameters())
        copies = held * dist.get_world_size() / policy.model.num_parameters()
        assert copies == pytest.approx(settings.replicate)  # each copy is sharded over its processes
        assert torch.are_deterministic_algorithms_enabled() or not settings.deterministic


def test_two_processes_train_like_one(world: Path, data: Path, one_process: Path, tmp_path: Path) -> None:
    # One query a step leaves the second process an empty pack, whose pass must count for nothing. Two copies
    # of the model have a shard each; so neither run may take a gradient for more or less than it is.
    lone = {"batch_size": 1, "max_steps": 2}
    grouped = GROUPED | {"loss_fn": grouped_loss}
    dev = {"dev_data": str(data), "eval_every": 2, "max_steps": 3}
    settings: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "two": ({"token_cache": ""}, {}),
        "copies": ({"replicate": 2, "deterministic": True}, {}),
        "lone": (lone, {}),
        "grouped": ({}, grouped),
        "dev": (dev, {}),
    }
    runs = [
        (small(world, data, tmp_path / name, **values), more) for name, (values, more) in settings.items()
    ]
    codes = start(tmp_path / "printed", train_several, runs, store=torchrun_store())
    printed = (tmp_path / "printed").read_text()
    assert codes == [0, 0], printed
    assert printed.count("done    ") == len(runs)  # the first process speaks alone
    for name in ("two", "copies"):
        assert_same_run(tmp_path / name, one_process, world / "init")
    for name in ("lone", "grouped", "dev"):
        values, more = settings[name]
        clha.train(small(world, data, tmp_path / f"one_{name}", **values), **more)
        assert_same_run(tmp_path / name, tmp_path / f"one_{name}", world / "init")


def train_on_own_data(settings: clha.Config) -> None:
    """A run in which each process has a file of its own, as on machines whose copies differ."""
    settings.train_data = settings.train_data.format(os.environ["RANK"])
    clha.train(settings)


def test_processes_that_read_different_data_are_refused(world: Path, data: Path, tmp_path: Path) -> None:
    lines = data.read_text().splitlines(keepends=True)
    (tmp_path / "data-0.jsonl").write_text("".join(lines))
    (tmp_path / "data-1.jsonl").write_text("".join(lines[::-1]))
    settings = small(world, tmp_path / "data-{}.jsonl", tmp_path / "run", token_cache="")
    codes = start(tmp_path / "printed", train_on_own_data, settings, store=torchrun_store())
    assert codes == [2, 2]
    assert "data-0.jsonl: the processes read different data" in (tmp_path / "printed").read_text()
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_copies_must_divide_the_processes(world: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(clha.InputError, match="--replicate 2: must divide the 1 processes"):
        clha.train(small(world, data, tmp_path / "run", replicate=2))
    assert not (tmp_path / "run").exists()


# Another objective


def test_another_objective_gets_its_numbers_and_its_groups(world: Path, data: Path, tmp_path: Path) -> None:
    # Without "rewards" in the file; the responses stand as they do there, and so do the queries of a pair.
    records = list(clha.iter_records(data))
    for record in records:
        del record["rewards"]
    bare = write(tmp_path / "bare.jsonl", records)
    run = small(world, bare, tmp_path / "run", max_steps=1, pack_tokens=200)
    packs = []

    def watched(avg_logps: Tensor, sum_logps: Tensor, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        packs.append(len(weights))
        return grouped_loss(avg_logps, sum_logps, weights)

    clha.train(run, watched, **GROUPED)
    assert len(packs) > 2 and sum(packs) == 8 and all(queries % 2 == 0 for queries in packs)
    model = AutoModelForCausalLM.from_pretrained(world / "init", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(world / "init")
    (indices,) = clha.data_order(len(records), run)
    values = []
    for i in indices:
        _, means = plain_logps(model, tokenizer, records[i])
        values.append((means * torch.tensor(records[i]["weights"])).sum())
    pairs = [(2 * values[k] + values[k + 1]) ** 2 for k in range(0, 8, 2)]
    loss = sum(pairs) / 4
    loss.backward()
    norm = torch.nn.utils.get_total_norm([weight.grad for weight in model.parameters()])
    (row,) = log(tmp_path / "run")
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


# What a run leaves


def with_dropout(world: Path, folder: Path, rate: float = 0.2) -> Path:
    """The tiny LLaMA with dropout."""
    shutil.copytree(world / "init", folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"attention_dropout": rate}))
    return folder


def test_evaluation_has_no_dropout_and_changes_nothing(world: Path, data: Path, tmp_path: Path) -> None:
    common = {"model": str(with_dropout(world, tmp_path / "model")), "max_steps": 3, "learning_rate": 1e-4}
    clha.train(small(world, data, tmp_path / "plain", **common))
    watched = small(world, data, tmp_path / "run", **common, dev_data=str(data), eval_every=2)
    clha.train(watched)
    assert weights_file(tmp_path / "run") == weights_file(tmp_path / "plain")
    assert [row["step"] for row in log(tmp_path / "run") if "eval/loss" in row] == [2, 3]  # and the last
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final").eval()
    tokenizer = AutoTokenizer.from_pretrained(world / "init")
    with torch.no_grad():
        queries = [plain_metrics(model, tokenizer, record, watched) for record in clha.iter_records(data)]
    expected = {f"eval/{name}": float(sum(query[name] for query in queries)) / 24 for name in queries[0]}
    last = log(tmp_path / "run")[-1]
    assert {name: last[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    clha.train(small(world, data, tmp_path / "none", max_steps=3, learning_rate=1e-4))
    assert weights_file(tmp_path / "none") != weights_file(tmp_path / "plain")  # there is dropout


def weights_file(out: Path) -> bytes:
    """The bytes of the weights that a run ended with."""
    return (out / "final" / "model.safetensors").read_bytes()


def test_models_on_the_way_and_in_bfloat16(
    world: Path, data: Path, one_process: Path, tmp_path: Path
) -> None:
    run = small(
        world, data, tmp_path / "run", max_steps=4, dtype="bfloat16", save_every=2, learning_rate=1e-3
    )
    clha.train(run)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"step-2", "step-4", "final", "metrics.jsonl", "config.json", ".lock"}
    last = tmp_path / "run" / "step-4" / "model.safetensors"
    assert last.read_bytes() == weights_file(tmp_path / "run")
    final = weights(tmp_path / "run" / "final")
    middle = weights(tmp_path / "run" / "step-2")
    assert all(weight.dtype == torch.bfloat16 for weight in final.values())
    assert "lm_head.weight" not in final  # tied
    assert not torch.equal(middle["model.embed_tokens.weight"], final["model.embed_tokens.weight"])
    # Generation works, with the same tokens.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final", dtype="auto")
    assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "sdpa"
    text = clha.render([{"role": "user", "content": "How?"}])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "final")
    ids = tokenizer(text).input_ids
    assert ids == AutoTokenizer.from_pretrained(world / "init")(text).input_ids
    generated = model.generate(torch.tensor([ids]), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert generated.shape[1] == len(ids) + 3
    # The first step begins with the same weights and the same queries as one in float32.
    first = log(tmp_path / "run")[0]
    assert first["loss"] == pytest.approx(log(one_process)[0]["loss"], rel=0.02)
    assert first["loss"] != log(one_process)[0]["loss"]


def test_a_finished_run_is_refused(
    world: Path, data: Path, one_process: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in one_process.rglob("*") if path.name != ".lock"}
    with pytest.raises(SystemExit) as end:
        clha.run(lambda: clha.train(small(world, data, one_process)))
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"{one_process}: holds a finished run (final/); choose another --output_dir" in line
    after = {path: path.stat().st_mtime_ns for path in one_process.rglob("*") if path.name != ".lock"}
    assert after == before


def test_another_seed_is_another_run(world: Path, data: Path, one_process: Path, tmp_path: Path) -> None:
    clha.train(small(world, data, tmp_path / "run", seed=43, max_steps=1))
    assert log(tmp_path / "run")[0]["logps/chosen"] != log(one_process)[0]["logps/chosen"]  # other queries


def test_the_file_alone_trains_with_torchrun(
    world: Path, data: Path, one_process: Path, tmp_path: Path
) -> None:
    alone = tmp_path / "alone"
    home = tmp_path / "home"
    alone.mkdir()
    home.mkdir()
    shutil.copy(ROOT / "clha.py", alone)
    flags = f"--model {world / 'init'} --train_data {data} --output_dir out --batch_size 8 --max_steps 5 "
    flags += "--pack_tokens 400 --learning_rate 1e-5 --checkpoint_every 2"
    command = [
        sys.executable,
        *["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "clha.py"],
    ]
    environment = {name: os.environ[name] for name in os.environ if not name.startswith(("PYTHON", "HF_"))}
    environment |= {"HOME": str(home), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*command, *flags.split()], cwd=alone, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert "step    5 of 5, loss " in ended.stdout  # there is no terminal
    assert "24 queries" in ended.stdout and "alpha 0.05" in ended.stdout and "steps 1 to 5" in ended.stdout
    assert ended.stdout.count("done    out/final") == 1  # the first process speaks alone
    assert_same_run(alone / "out", one_process, world / "init")
    # Nothing is written outside the output folder.
    assert {path.name for path in alone.iterdir()} == {"clha.py", "out"} and not list(home.rglob("*"))
    assert {path.name for path in (alone / "out" / "checkpoints").iterdir()} == {"step-2", "step-4"}
    # One process goes on from the checkpoint of the two; without dropout that changes only rounding.
    shutil.rmtree(alone / "out" / "final")
    shutil.rmtree(alone / "out" / "checkpoints" / "step-4")
    clha.train(small(world, data, alone / "out", pack_tokens=60))
    assert_same_run(alone / "out", one_process, world / "init")


# Order and packs


def test_an_epoch_is_a_seeded_permutation_without_its_tail() -> None:
    settings = clha.Config("m", "d", "o", batch_size=4, epochs=2)
    order = clha.data_order(11, settings)
    assert order.shape == (4, 4)
    first, second = order.view(2, 8).tolist()
    assert len(set(first)) == len(set(second)) == 8 and first != second
    assert set(first) | set(second) <= set(range(11))
    assert order.equal(clha.data_order(11, settings))
    # Each epoch has the generator of seed + epoch, so that any step can be found without those before it.
    for epoch, indices in enumerate([first, second]):
        generator = torch.Generator().manual_seed(42 + epoch)
        assert indices == torch.randperm(11, generator=generator)[:8].tolist()
    settings.seed = 7
    assert not order.equal(clha.data_order(11, settings))


@pytest.mark.parametrize(("max_steps", "epochs", "steps"), [(3, 1, 3), (5, 1, 5), (0, 1, 2), (0, 1.5, 3)])
def test_max_steps_overrules_epochs(max_steps: int, epochs: float, steps: int) -> None:
    settings = clha.Config("m", "d", "o", batch_size=4, epochs=epochs, max_steps=max_steps)
    assert len(clha.data_order(11, settings)) == steps


@pytest.mark.parametrize(
    ("queries", "epochs", "message"),
    [(3, 2, "--batch_size 4: more than the 3 queries"), (11, 0.1, "--epochs or --max_steps gives 0 steps")],
)
def test_no_step_at_all_is_refused(queries: int, epochs: float, message: str) -> None:
    settings = clha.Config("m", "d", "o", batch_size=4, epochs=epochs)
    with pytest.raises(clha.InputError, match=message):
        clha.data_order(queries, settings)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_queries_are_spread_once_within_the_limit_and_evenly(processes: int) -> None:
    sizes = torch.randint(10, 200, (57,), generator=torch.Generator().manual_seed(1)).tolist()
    packs = clha.balance(sizes, 500, processes)
    assert sorted(i for indices in packs for i in indices) == list(range(57))
    loads = [sum(sizes[i] for i in indices) for indices in packs]
    assert max(loads) <= 500 and len(packs) % processes == 0
    assert max(loads) - min(loads) < 40  # the longest first, so that the short ones even it out
    assert len(packs) <= math.ceil(sum(sizes) / 500) + processes


def test_a_query_larger_than_a_pack_gets_one_of_its_size() -> None:
    assert sorted(map(sorted, clha.balance([900, 20, 30], 100, 1))) == [[0], [1, 2]]


@pytest.mark.parametrize("group", [1, 2])
def test_each_process_gets_as_many_packs_and_their_shares_are_of_the_step(
    monkeypatch: pytest.MonkeyPatch, group: int
) -> None:
    # Six queries of 5 tokens in packs of at most 12, for four processes.
    examples = [
        {"prompt_ids": [10 + i, 1, 2], "response_ids": [[3], [4]], "size": 5, "rewards": [1.0, float(-i)]}
        for i in range(6)
    ]
    monkeypatch.setattr(clha.dist, "get_world_size", lambda: 4)
    packs = []
    for rank in range(4):
        monkeypatch.setattr(clha.dist, "get_rank", lambda rank=rank: rank)
        packs += clha.make_packs(examples, torch.device("cpu"), 12, False, group)
    assert len(packs) == 4
    assert sum(made.share for made in packs) == pytest.approx(1)
    found = []
    for made in packs:
        queries = [int(token) - 10 for token in made.input_ids[0] if token >= 10]
        assert made.input_ids.shape[1] == 5 * len(queries) <= 12
        assert torch.equal(made.values["rewards"], torch.tensor([[1.0, -i] for i in queries]))
        if made.share:
            assert made.share == pytest.approx(len(queries) / 6)
            found.append(queries)
    assert sorted(i for queries in found for i in queries) == list(
        range(6)
    )  # an empty pack repeats a query, with share 0
    if group == 2:
        assert sorted(found) == [[0, 1], [2, 3], [4, 5]]


# What a run says, and what comes with the model


def test_alpha_follows_the_usual_number_of_responses(
    world: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = list(clha.iter_records(data))
    many = records[0]["responses"] + [f"I do not know {i}." for i in range(18)]
    records[0] |= {"responses": many, "rewards": [i / 8 for i in range(20)], "weights": [1.0] * 20}
    path = write(tmp_path / "odd.jsonl", records[:1] + records[2::2])
    clha.train(small(world, path, tmp_path / "run", max_steps=1))
    printed = capsys.readouterr().out
    assert "queries of 2 responses (at most 20), alpha 0.05\n" in printed
    assert json.loads((tmp_path / "run" / "config.json").read_text())["alpha"] == 0.05


@pytest.mark.parametrize(
    ("rewards", "told"),
    [
        ([[0.3, -0.1], [-0.1, -0.3]], ["--min_reward_gap 0.5 keeps 0.00% of the pairs"]),
        ([[9.0, 3.0], [3.0, 9.0]], ["--gate is open for 100.00% of the queries"]),
        ([[-1.0, -1.2]] * 2, ["--min_reward_gap 0.5 keeps 0.00%", "--gate is open for 0.00% of the queries"]),
        ([[1.0, -1.0], [-1.0, -2.0]], []),
    ],
)
def test_rewards_that_switch_the_method_off_are_told(
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    rewards: list[list[float]],
    told: list[str],
) -> None:
    records = list(clha.iter_records(world / "scored.jsonl"))[:100]
    for i, record in enumerate(records):
        record["rewards"] = rewards[i % 2]
    path = write(tmp_path / "data.jsonl", records)
    clha.train(small(world, path, tmp_path / "run", max_steps=1))
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(warnings) == len(told)
    assert all(text in line for text, line in zip(told, warnings, strict=True))


def test_the_generation_config_of_the_model_goes_with_the_result(
    world: Path, data: Path, tmp_path: Path
) -> None:
    shutil.copytree(world / "init", tmp_path / "model")
    # Invalid as it is, sampling without do_sample: transformers would refuse to save it.
    own = {"eos_token_id": [2, 5], "temperature": 0.7, "top_k": 11}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(own))
    clha.train(small(world, data, tmp_path / "run", model=str(tmp_path / "model"), max_steps=1))
    kept = json.loads((tmp_path / "run" / "final" / "generation_config.json").read_text())
    assert {name: kept[name] for name in own} == own


def test_a_tracker_gets_each_step_and_a_missing_one_is_a_line(
    world: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    clha.train(small(world, data, tmp_path / "run", tracker="tensorboard", max_steps=2))
    events = accumulator.EventAccumulator(str(tmp_path / "run/clha"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert found == [(row["step"], pytest.approx(row["loss"])) for row in log(tmp_path / "run")]
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(clha.InputError, match="--tracker: pip install accelerate wandb"):
        clha.train(small(world, data, tmp_path / "other", tracker="wandb"))
    assert not (tmp_path / "other/final").exists()


def test_a_tracker_that_fails_ends_no_run(
    world: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls = []

    class Tracker:
        """One whose network is down."""

        def log(self, metrics: dict[str, float], step: int) -> None:
            calls.append(step)
            raise ConnectionError("connection reset")

    monkeypatch.setattr(clha, "start_tracker", lambda config: Tracker())
    clha.train(small(world, data, tmp_path / "run", max_steps=2, tracker="wandb"))
    assert calls == [1] and len(log(tmp_path / "run")) == 2
    assert "warning --tracker: connection reset; nothing more is sent" in capsys.readouterr().out


# The token cache


@pytest.fixture
def cached(world: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Loads a file with these settings, after it was tokenized with the usual ones."""
    clha.init_process()
    tokenizer = AutoTokenizer.from_pretrained(world / "init")
    usual = small(world, data, tmp_path / "run", token_cache=str(tmp_path / "tokens"))
    first = clha.load_examples(str(data), tokenizer, usual)
    assert first[0]["rewards"] == sorted(first[0]["rewards"], reverse=True)

    def load(path: Path = data, tokenizer: Any = tokenizer, more: Any = (), **settings: Any) -> Any:
        changed = small(world, data, tmp_path / "other", token_cache=str(tmp_path / "tokens"))
        for name, value in settings.items():
            setattr(changed, name, value)
        return clha.load_examples(str(path), tokenizer, changed, *more)

    return first, load


def test_tokens_are_found_again(
    cached: Any, world: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, load = cached
    monkeypatch.setattr(clha, "iter_records", no_encoding)
    shutil.copy(data, tmp_path / "copy.jsonl")
    used = AutoTokenizer.from_pretrained(world / "init")
    used(["a text", "another"])
    for again in (load(), load(tmp_path / "copy.jsonl"), load(tokenizer=used), load(batch_size=2, seed=3)):
        assert again.to_list() == first.to_list()


def test_tokens_of_other_settings_are_not_taken(cached: Any, world: Path, data: Path, tmp_path: Path) -> None:
    first, load = cached
    rows = first.to_list()
    prompts = load(max_prompt_length=9).to_list()
    assert [row["prompt_ids"] for row in prompts] == [
        [row["prompt_ids"][0], *row["prompt_ids"][-8:]] for row in rows
    ]
    cut = load(max_length=28, max_prompt_length=20).to_list()
    assert max(len(row["prompt_ids"]) + len(ids) for row in cut for ids in row["response_ids"]) == 28
    unranked = load(more=(("rewards",), False)).to_list()
    records = list(clha.iter_records(data))
    assert [row["rewards"] for row in unranked] == [pytest.approx(record["rewards"]) for record in records]
    both = load(more=(("rewards", "weights"), True)).to_list()
    assert sorted(both[1]["weights"]) == pytest.approx(sorted(records[1]["weights"]))
    records[0]["responses"][0] = "Another."
    assert load(write(tmp_path / "other.jsonl", records)).to_list() != rows
    turned = AutoTokenizer.from_pretrained(world / "init", eos_token="a")
    assert turned.eos_token_id != rows[0]["response_ids"][0][-1]
    ends = {row["response_ids"][0][-1] for row in load(tokenizer=turned).to_list()}
    assert ends == {turned.eos_token_id}
