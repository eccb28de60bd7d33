"""Tokenised data on disk: the same examples, made once, whole or not at all, and never all in memory."""

import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

import clha
import tokens
from program import load_tokenizer
from records import InputError, read_records, write_jsonl


@pytest.fixture(scope="module")
def data(world: Path) -> Path:
    """Records with rewards, ids, and two or three replies."""
    records = [
        record | {"rewards": [0.5, i / 7 - 2, 1.0][: 2 + i % 2], "id": f"number {i}"}
        for i, record in enumerate(read_records(world / "train.jsonl"))
    ]
    for record in records:
        record["responses"] += ["I do not </s> know."] * (len(record["rewards"]) - 2)
    write_jsonl(world / "with_rewards.jsonl", records)
    return world / "with_rewards.jsonl"


@pytest.fixture
def tokenizer(world: Path) -> PreTrainedTokenizerBase:
    """The toy world's tokenizer, in a process group of one."""
    clha.init_process()
    return load_tokenizer(str(world / "init"))


def config(data: Path, out: Path, **more: Any) -> clha.Config:
    """A configuration whose tokens go below `out`."""
    return clha.Config("", str(data), str(out), **more)


def files(folder: Path) -> set[Path]:
    """The files that there are."""
    return set(folder.rglob("*.*"))


def test_the_examples_are_those_of_encode(
    data: Path, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "TOGETHER", 100)  # in three parts
    records = read_records(data)
    examples = clha.load_examples(
        str(data), tokenizer, config(data, tmp_path, max_length=40, max_prompt_length=16)
    )
    expected = [clha.encode(record, tokenizer, 40, 16) for record in records]
    assert len(examples) == 256 and list(examples) == expected
    assert examples.sizes == [clha.size(example) for example in expected]
    for outline, example in zip(examples.outlines(), expected, strict=True):
        assert [outline[name] for name in ("rewards", "chosen", "cut")] == [
            example[name] for name in ("rewards", "chosen", "cut")
        ]
        assert len(outline["response_ids"]) == len(example["response_ids"])
    with pytest.raises(IndexError):
        examples[256]
    examples.more["reference_logps"] = [[float(i)] for i in range(256)]
    assert examples[7]["reference_logps"] == [7.0]


def test_many_texts_have_the_ids_that_they_have_alone(data: Path, tokenizer: Any) -> None:
    texts = [text for record in read_records(data)[:20] for text in clha.texts(record)]
    alone = [tokenizer(text, split_special_tokens=True).input_ids for text in texts]
    assert tokens.token_ids(tokenizer, texts) == alone
    assert all(row[0] == tokenizer.bos_token_id and tokenizer.eos_token_id not in row for row in alone)


def test_what_a_tokenizer_was_saved_with_cuts_and_pads_nothing(
    world: Path, data: Path, tmp_path: Path, tokenizer: Any
) -> None:
    texts = clha.texts(read_records(data)[0])
    expected = tokens.token_ids(tokenizer, texts)
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=99)
    tokenizer.save_pretrained(tmp_path)
    assert '"max_length": 5' in (tmp_path / "tokenizer.json").read_text()
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert tokens.token_ids(again, texts) == expected


def test_records_without_ids_and_rewards_are_named_by_their_line(tmp_path: Path, tokenizer: Any) -> None:
    record = {"prompt": [{"role": "user", "content": "Hi"}], "responses": ["a", "b"]}
    write_jsonl(tmp_path / "data.jsonl", [record] * 3)
    plain = config(tmp_path, tmp_path / "out", rescore=False, ranking="given")
    examples = clha.load_examples(str(tmp_path / "data.jsonl"), tokenizer, plain)
    assert [example["id"] for example in examples] == ["line 1", "line 2", "line 3"]
    assert [example["rewards"] for example in examples] == [None] * 3


def test_what_was_tokenised_is_found_again_and_a_change_is_seen(
    data: Path, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, written, write = tmp_path / "shared", [], tokens.write_examples
    monkeypatch.setattr(tokens, "write_examples", lambda *args: written.append(args) or write(*args))

    def load(path: Path, **more: Any) -> list[clha.Example]:
        settings = config(path, tmp_path / f"run{len(written)}", token_cache=str(shared), **more)
        return list(clha.load_examples(str(path), tokenizer, settings))

    first = load(data)
    (tmp_path / "copy.jsonl").write_bytes(data.read_bytes())
    assert load(tmp_path / "copy.jsonl", margin=7.0) == first and len(written) == 1  # by content, not by name
    assert load(data, max_length=40, max_prompt_length=16) != first and len(written) == 2
    assert load(data, ranking="given") != first and len(written) == 3
    records = read_records(data)
    records[3]["rewards"][0] += 1
    write_jsonl(tmp_path / "other.jsonl", records)
    assert load(tmp_path / "other.jsonl") != first and len(written) == 4
    tokenizer.eos_token = tokenizer.bos_token
    assert load(data) != first and len(written) == 5
    assert len(files(shared)) == 5 and not list(tmp_path.glob("run*"))


def test_chain_of_hindsight_has_examples_of_its_own(data: Path, tmp_path: Path, tokenizer: Any) -> None:
    both = [
        clha.load_examples(str(data), tokenizer, config(data, tmp_path, objective=name))[0]["response_ids"]
        for name in ("clha", "coh")
    ]
    assert both[0] != both[1] and len(files(tmp_path)) == 2


def test_wrong_records_leave_nothing(data: Path, tmp_path: Path, tokenizer: Any) -> None:
    records = read_records(data)
    write_jsonl(tmp_path / "data.jsonl", [*records, {"prompt": records[0]["prompt"], "responses": ["a"]}])
    with pytest.raises(InputError, match=r"line 257: .*two or more"):
        clha.load_examples(str(tmp_path / "data.jsonl"), tokenizer, config(data, tmp_path / "out"))
    assert not files(tmp_path / "out")


def test_memory_does_not_grow_with_the_data(data: Path, tmp_path: Path, tokenizer: Any) -> None:
    records, peaks = read_records(data), []
    for times in (8, 32):
        path = tmp_path / f"{times}.jsonl"
        write_jsonl(path, records * times)
        tracemalloc.start()
        examples = clha.load_examples(str(path), tokenizer, config(path, tmp_path / f"out{times}"))
        peaks.append(tracemalloc.get_traced_memory()[1] / 2**20)
        tracemalloc.stop()
        assert len(examples) == 256 * times
    assert peaks[1] < 1.3 * peaks[0]  # MiB
