"""Nothing of a dialogue is lost, what is left out is counted, and no dev query is in the test set."""

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import golden

import prepare_data
from records import InputError, read_jsonl, read_records, write_jsonl


def hh_text(*turns: str) -> str:
    """HH text of alternating turns, the human's first."""
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {turn}" for i, turn in enumerate(turns))


def bare(text: str) -> str:
    """A text without turn headers and white space: what must not be lost."""
    return re.sub(r"\s+", "", re.sub(r"(?:\n\n|\A\s*)(?:Human|Assistant):", "", text))


@pytest.mark.parametrize(
    ("text", "turns"),
    [
        (hh_text("Hi", "Hello"), [("user", "Hi"), ("assistant", "Hello")]),
        (
            hh_text("Hi", "One.\n\nTwo.\n\n\nThree."),
            [("user", "Hi"), ("assistant", "One.\n\nTwo.\n\n\nThree.")],
        ),
        ("\n\nHuman: a\nHuman: b\n\nAssistant: c", [("user", "a\nHuman: b"), ("assistant", "c")]),
        ("Human: Hi\n\nAssistant:", [("user", "Hi"), ("assistant", "")]),
        (
            "\n\nHuman: a\n\nAssistant: b\n\nAssistant: c",
            [("user", "a"), ("assistant", "b\n\nc")],
        ),
        ("Once\n\nHuman: a\n\nAssistant: b", [("user", "Once\n\na"), ("assistant", "b")]),
        ("\n\nAssistant: b", [("assistant", "b")]),
        ("No turn at all", [("user", "No turn at all")]),
        (" \n", []),
        (
            hh_text("Say Human: or Assistant:", "No"),
            [("user", "Say Human: or Assistant:"), ("assistant", "No")],
        ),
    ],
)
def test_a_dialogue_is_split_where_a_turn_begins_and_nowhere_else(
    text: str, turns: list[tuple[str, str]]
) -> None:
    assert [(turn["role"], turn["content"]) for turn in prepare_data.split_dialogue(text)] == turns


def test_nothing_of_the_real_dialogues_is_lost(shared: Path) -> None:
    pairs = cut_by_the_release = 0
    for _, row in read_jsonl(shared / "hh/raw/harmless-base/test.jsonl.gz"):
        for text in (row["chosen"], row["rejected"]):
            contents = "".join(turn["content"] for turn in prepare_data.split_dialogue(text))
            assert re.sub(r"\s+", "", contents) == bare(text)
        # The released parser keeps a paragraph only if it begins with a turn header.
        paragraphs = (row["chosen"] + row["rejected"]).split("\n\n")
        cut_by_the_release += not all(p.startswith(("Human:", "Assistant:")) for p in paragraphs if p.strip())
        pairs += 1
    assert (pairs, cut_by_the_release) == (2312, 185)


def test_the_lines_that_the_released_parser_cuts_stay_whole() -> None:
    cut = 0
    for item in golden("parse.json")["items"]:
        for name in ("chosen", "rejected"):
            text = item["raw"][name]
            released = "".join(content for _, content in item[f"split_{name}"])
            ours = "".join(turn["content"] for turn in prepare_data.split_dialogue(text))
            assert re.sub(r"\s+", "", ours) == bare(text)
            cut += len(re.sub(r"\s+", "", released)) < len(bare(text))
    assert cut > 0  # the reference items do have some that lose text there


def test_raw_rows_become_records_or_a_reason() -> None:
    parse = prepare_data.hh_record
    record = parse({"chosen": hh_text("Q", "A", "R", "good"), "rejected": hh_text("Q", "A", "R", "bad")})
    assert record == {
        "prompt": [
            {"role": "user", "content": "Q"},
            {"role": "assistant", "content": "A"},
            {"role": "user", "content": "R"},
        ],
        "responses": ["good", "bad"],
        "chosen": 0,
    }
    assert "different" in parse({"chosen": hh_text("Q", "A"), "rejected": hh_text("P", "A")})
    assert "last turn" in parse({"chosen": hh_text("Q", "A", "R"), "rejected": hh_text("Q", "A")})
    assert "last turn" in parse({"chosen": "", "rejected": hh_text("Q", "A")})


def make_raw(folder: Path, name: str, rows: int, broken: int = 0) -> None:
    """A raw HH file of `rows` pairs, `broken` of which have an empty reply."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(folder / f"{name}.jsonl.gz", "wt") as file:
        for i in range(rows):
            reply = "" if i < broken else f"reply {i}"
            pair = {"chosen": hh_text(f"{name} {i}", reply), "rejected": hh_text(f"{name} {i}", "other")}
            file.write(json.dumps(pair) + "\n")


def run(monkeypatch: pytest.MonkeyPatch, capsys: Any, *arguments: Any) -> str:
    """What prepare_data.py prints."""
    monkeypatch.setattr("sys.argv", ["prepare_data.py", *map(str, arguments)])
    prepare_data.main()
    return capsys.readouterr().out


def test_raw_files_become_three_sets_that_share_no_query(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_raw(tmp_path, "helpful-base/train", 20, broken=3)
    make_raw(tmp_path, "helpful-base/test", 12)
    make_raw(tmp_path, "harmless-base/test", 9, broken=1)
    printed = run(
        monkeypatch, capsys, "hh", "--source", tmp_path, "--out", tmp_path / "data", "--dev_items", 5
    )
    sets = {split: read_records(tmp_path / "data" / f"{split}.jsonl") for split in ("train", "dev", "test")}
    assert {split: len(records) for split, records in sets.items()} == {"train": 17, "dev": 5, "test": 15}
    prompts = Counter(json.dumps(record["prompt"]) for record in sets["dev"] + sets["test"])
    assert len(prompts) == 20 and set(prompts.values()) == {1}
    assert "41 queries read, 4 of them left out\n  4: an empty reply" in printed
    counts = Counter(record["subset"] for record in sets["test"])
    dev = Counter(record["subset"] for record in sets["dev"])
    assert (
        f"| helpful-base | 17 | {dev['helpful-base']} | {counts['helpful-base']} | 43,835 | 2,354 |"
        in printed
    )
    assert "not found:" in printed and "helpful-online" in printed
    again = run(
        monkeypatch, capsys, "hh", "--source", tmp_path, "--out", tmp_path / "again", "--dev_items", 5
    )
    assert again == printed
    assert (tmp_path / "again/dev.jsonl").read_bytes() == (tmp_path / "data/dev.jsonl").read_bytes()


def release_row(prompt: str, rewards: list[float], subset: str = "helpful-base") -> dict[str, Any]:
    """A row of the authors' files, with a reply for each reward."""
    prefix = ["<|prompter|>Hi", "<|assistant|>Hello", f"<|prompter|>{prompt}", "<|assistant|>"]
    return {
        "prefix": [prefix] * len(rewards),
        "suffix": [f"reply {i} to {prompt}" for i in range(len(rewards))],
        "reward": rewards,
        "sft_index": 0,
        "meta": {"path": f"../raw_data/{subset}/dev.jsonl"},
    }


def test_the_authors_files_keep_their_rewards_and_dev_leaves_the_test_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    test = [release_row(f"q{i}", [1.5, -0.5]) for i in range(6)]
    files = {
        "hh_train_len3/train.json": [release_row("t", [2.0, 1.0, -1.0], "helpful-online")],
        "hh_dev/sampled_dev.json": [test[2], test[4], release_row("elsewhere", [0.5, 0.25])],
        "hh_test/helpful_base.json": test,
    }
    for name, rows in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    printed = run(monkeypatch, capsys, "release", "--source", tmp_path, "--out", tmp_path / "data")
    sets = {split: read_records(tmp_path / "data" / f"{split}.jsonl") for split in ("train", "dev", "test")}
    assert {split: len(records) for split, records in sets.items()} == {"train": 1, "dev": 3, "test": 4}
    assert "3 dev queries, which took 2 out of the test set" in printed and "10 queries read, 0" in printed
    assert sets["train"][0]["rewards"] == [2.0, 1.0, -1.0] and sets["train"][0]["subset"] == "helpful-online"
    assert [turn["content"] for turn in sets["dev"][0]["prompt"]] == ["Hi", "Hello", "q2"]
    assert sets["dev"][0]["responses"] == ["reply 0 to q2", "reply 1 to q2"]


def test_the_real_files_of_the_authors_are_read(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = run(monkeypatch, capsys, "release", "--source", shared / "hh/release_format", "--out", tmp_path)
    assert "4,946 queries read, 9 of them left out\n  9: an empty reply" in printed
    dev, test = (read_records(tmp_path / f"{split}.jsonl", need=["rewards"]) for split in ("dev", "test"))
    assert len(dev) == 279 and not {*map(prepare_data.same_query, dev)} & {
        *map(prepare_data.same_query, test)
    }


def test_replies_are_added_once_and_old_rewards_dropped() -> None:
    record = {"prompt": [], "responses": ["a", "b"], "rewards": [1.0, 2.0], "chosen": 1, "id": "x"}
    longer = prepare_data.add_replies(record, [" c ", "b", "", "c"])
    assert longer == {"prompt": [], "responses": ["a", "b", "c"], "chosen": 1, "id": "x"}
    assert record["responses"] == ["a", "b"]


def augment(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    """`prepare_data.py augment` with these words."""
    monkeypatch.setattr("sys.argv", ["prepare_data.py", "augment", *map(str, words)])
    prepare_data.main()


def test_a_third_reply_from_a_file(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = read_records(world / "dev.jsonl")[:2]
    write_jsonl(tmp_path / "two.jsonl", [first, second])
    write_jsonl(tmp_path / "extra.jsonl", [{"id": second["id"], "response": "Ask Ann."}])
    flags = ["--data", tmp_path / "two.jsonl", "--extra", tmp_path / "extra.jsonl"]
    augment(monkeypatch, *flags, "--out", tmp_path / "out.jsonl")
    one, two = read_records(tmp_path / "out.jsonl")
    assert one["responses"] == first["responses"]
    assert two["responses"] == [*second["responses"], "Ask Ann."]
    write_jsonl(tmp_path / "extra.jsonl", [{"id": "nobody", "response": "Ask Ann."}])
    with pytest.raises(InputError, match=r'extra.jsonl, line 1: needs "response"'):
        augment(monkeypatch, *flags, "--out", tmp_path / "other.jsonl")
    with pytest.raises(InputError, match=r"out.jsonl: exists already"):
        augment(monkeypatch, *flags, "--out", tmp_path / "out.jsonl")


def test_sampled_replies_are_the_same_after_a_stop(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [row for _, row in read_jsonl(world / "rm_train.jsonl")][:300]  # a part of 256, and 44
    write_jsonl(tmp_path / "data.jsonl", records)
    flags = ["--data", tmp_path / "data.jsonl", "--model", world / "init", "--max_new_tokens", 3]
    augment(monkeypatch, *flags, "--out", tmp_path / "whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_bytes()
    for record, longer in zip(records, read_records(tmp_path / "whole.jsonl"), strict=True):
        assert longer["responses"][:2] == record["responses"] and longer["prompt"] == record["prompt"]
    assert sum(len(r["responses"]) == 3 for r in read_records(tmp_path / "whole.jsonl")) > 200

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):  # stopped at its second part
        manual_seed = torch.manual_seed
        patch.setattr("torch.manual_seed", lambda seed: manual_seed(seed) if seed == 42 else 1 / 0)
        augment(patch, *flags, "--out", tmp_path / "again.jsonl")
    (left,) = tmp_path.glob("again.jsonl.*.partial")
    left.write_bytes(whole[: left.stat().st_size + 100])  # stopped within a line
    seeds, manual_seed = [], torch.manual_seed
    monkeypatch.setattr("torch.manual_seed", lambda seed: seeds.append(seed) or manual_seed(seed))
    augment(monkeypatch, *flags, "--out", tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == whole
    assert seeds == [42 + 256]  # the first part was not sampled again
    assert not list(tmp_path.glob("*.partial"))
