"""Long work that is stopped goes on where it was: scoring, generation and sampling."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from transformers import AutoModelForSequenceClassification

import clha
import evaluate
import prepare_data
import records
import reward
from records import InputError, read_jsonl, read_records, write_in_parts, write_jsonl


@pytest.fixture(scope="module")
def judge(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model with a random head."""
    folder = tmp_path_factory.mktemp("judge") / "rm"
    model = AutoModelForSequenceClassification.from_pretrained(world / "init", num_labels=1, pad_token_id=0)
    model.save_pretrained(folder)
    clha.load_tokenizer(str(world / "init")).save_pretrained(folder)
    return folder


class Stopped(Exception):
    """Stands for what ends a program in the middle of its work."""


def stop_at(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends the program when parts are put together for this time."""
    gather, calls = records.gather, []

    def stopping(mine: list[Any], total: int) -> list[Any]:
        calls.append(total)
        if len(calls) == call:
            raise Stopped
        return gather(mine, total)

    monkeypatch.setattr(records, "gather", stopping)


def stopped_and_gone_on(work: Any, out: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Does work that is stopped in its second part, tears a line, and does it again: the partial's lines."""
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(2, patch)
        work(out)
    (partial,) = out.parent.glob(f"{out.name}.*.partial")
    assert not out.exists()
    lines = partial.read_text().splitlines()
    with partial.open("a") as file:
        file.write('{"torn": ')
    work(out)
    assert not list(out.parent.glob("*.partial"))
    return lines


def test_scoring(world: Path, judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, scored = reward.load_reward_model(str(judge)), []
    data = read_records(world / "pretrain.jsonl")[:600]
    score = model.score

    def counted(prompts: list[Any], responses: list[str]) -> list[float]:
        scored.append(len(prompts))
        return score(prompts, responses)

    monkeypatch.setattr(model, "score", counted)
    reward.write_scores(model, data, tmp_path / "whole.jsonl")
    whole = list(scored)
    lines = stopped_and_gone_on(
        lambda out: reward.write_scores(model, data, out), tmp_path / "out.jsonl", monkeypatch
    )
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert len(lines) == 512 and scored[len(whole) :] == [*whole, whole[-1]]  # the first part only once
    assert [json.loads(line) for line in lines] == read_records(tmp_path / "whole.jsonl")[:512]


def test_generation(world: Path, judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "data.jsonl", read_records(world / "test.jsonl")[:10])

    def work(out: Path) -> None:
        command = (
            f"evaluate.py --model {world / 'init'} --data {tmp_path / 'data.jsonl'} --reward_model {judge}"
        )
        command += f" --out {out.parent} --batch_size 2 --max_new_tokens 6"
        monkeypatch.setattr(sys, "argv", command.split())
        evaluate.main()

    work(tmp_path / "whole" / "responses.jsonl")
    lines = stopped_and_gone_on(work, tmp_path / "again" / "responses.jsonl", monkeypatch)
    assert len(lines) == 8
    for name in ("responses.jsonl", "scores.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_work_of_other_settings_is_not_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items, out = [{"n": n} for n in range(6)], tmp_path / "out.jsonl"

    def work(factor: int) -> None:
        def times(share: list[Any], _: int) -> list[Any]:
            return [{"n": item["n"] * factor} for item in share]

        write_in_parts(out, items, [factor], times, 2, "test")

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(3, patch)
        work(3)
    work(5)
    assert [row["n"] for _, row in read_jsonl(out)] == [0, 5, 10, 15, 20, 25]
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_a_model_that_was_made_anew_is_another_one(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    before = records.fingerprint(tmp_path / "model")
    assert records.fingerprint(tmp_path / "model") == before
    (tmp_path / "model" / "config.json").write_text("a longer text")
    assert records.fingerprint(tmp_path / "model") != before


def test_what_one_process_began_two_finish(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Sampled replies, whose seeds are of the part and the process.
    data = tmp_path / "data.jsonl"
    write_jsonl(data, read_records(world / "pretrain.jsonl")[:300])
    flags = f"--data {data} --model {world / 'init'} --max_new_tokens 4"

    def alone(out: Path) -> None:
        monkeypatch.setattr(sys, "argv", f"prepare_data.py augment {flags} --out {out}".split())
        prepare_data.main()

    alone(tmp_path / "whole.jsonl")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(2, patch)
        alone(tmp_path / "out.jsonl")
    launch = (
        f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node 2 prepare_data.py augment"
    )
    command = f"{launch} {flags} --out {tmp_path / 'out.jsonl'}".split()
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    ours, theirs = (read_records(tmp_path / f"{name}.jsonl") for name in ("out", "whole"))
    assert ours[:256] == theirs[:256] and len(ours) == len(theirs) == 300
    assert ours[256::2] != theirs[256::2] and all(len(record["responses"]) > 1 for record in ours)


def test_two_programs_do_not_write_the_same_file(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"

    def work(share: list[Any], _: int) -> list[Any]:
        with pytest.raises(InputError, match=r"out\.jsonl\.\w+\.partial: another program is at work in it"):
            write_in_parts(out, [{"n": 1}], [], work, 1, "second")
        return share

    write_in_parts(out, [{"n": 1}], [], work, 1, "first")
    assert [row["n"] for _, row in read_jsonl(out)] == [1]
