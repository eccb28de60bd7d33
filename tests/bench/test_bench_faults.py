"""Of bench.fuzz and bench.chaos: good files are read, odd values get in, a run is told by its files."""

import json
import random
import time
from argparse import Namespace
from pathlib import Path

import pytest

import clha
import reward
from bench import chaos, fuzz


@pytest.mark.parametrize("number", range(len(fuzz.READERS)))
def test_every_reader_takes_its_good_file(number: int, tmp_path: Path) -> None:
    name, reader, _ = fuzz.READERS[number]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(fuzz.seeds()[number][1:])
    assert reader(path)


def test_a_reader_may_refuse_and_not_fall(tmp_path: Path) -> None:
    fuzz.read(b"", tmp_path)
    fuzz.read(bytes([2]) + b"[" * 3000, tmp_path)
    fuzz.read(bytes([6]) + b'{"id": "line 1", "response": 1}', tmp_path)


def test_a_finding_is_named_by_its_line_in_the_project(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(clha, "check_record", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) as error:
        fuzz.read(fuzz.seeds()[0], tmp_path)
    assert fuzz.place(error.value).startswith("ZeroDivisionError-clha-")


def test_an_odd_value_can_get_anywhere() -> None:
    found = set()
    for seed in range(400):
        changed = fuzz.put_odd_value(b'\x02{"a": [1, {"b": 2}]}', random.Random(seed))
        assert changed and changed[:1] == b"\x02"
        found.add(changed[1:].replace(b" ", b"")[:12])
    assert {b'{"a":[1,{"b"', b'{"a":[null,{', b'{"a":null}', b"null"} <= found
    assert fuzz.put_odd_value(b"\x02{", random.Random(0)) is None


def test_a_trial_reads_what_a_run_leaves(tmp_path: Path) -> None:
    trial = chaos.Trial(Namespace(out=tmp_path, processes=2, deterministic=False), "run", 60)
    assert (trial.logged(), trial.saved(), trial.saving()) == ([0], 0, False)
    for name in ("step-9", "step-10", "step-20.partial"):
        (tmp_path / "run" / "checkpoints" / name).mkdir(parents=True)
    lines = "".join(json.dumps({"step": step}) + "\n" for step in (1, 2))
    (tmp_path / "run" / "metrics.jsonl").write_text(lines + '{"step": 3, "lo')
    assert (trial.logged(), trial.saved(), trial.saving()) == ([0, 1, 2], 10, True)
    trial.killed = time.time() + 1
    assert not trial.saving()  # what lies there is of the run that was killed


def test_the_flags_of_a_trial_are_those_of_clha(tmp_path: Path) -> None:
    trial = chaos.Trial(Namespace(out=tmp_path, processes=2, deterministic=False), "run", 60)
    [config] = reward.Parser(clha.Config).parse_args_into_dataclasses(trial.flags)
    assert (config.max_steps, config.checkpoint_every) == (60, 10)
