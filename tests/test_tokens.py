"""Records and their token ids: checked where they are read, cut by ids, ended by EOS."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import golden
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

import clha
from program import load_tokenizer
from records import InputError, read_jsonl, read_records, write_jsonl

GOOD = {"prompt": [{"role": "user", "content": "How?"}], "responses": ["So.", "No."], "rewards": [0.5, -1.0]}


def write(path: Path, *rows: Any) -> Path:
    """A file with a line a row; text stands as it is."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: not a JSON object"),
        ({}, '"prompt" must be a list'),
        (GOOD | {"prompt": []}, '"prompt" must be a list'),
        (GOOD | {"prompt": [{"role": "bot", "content": "x"}]}, '"prompt" must be a list'),
        (GOOD | {"prompt": "How?"}, '"prompt" must be a list'),
        (GOOD | {"responses": ["one"]}, "two or more"),
        (GOOD | {"responses": ["a", " "]}, "an empty reply"),
        (GOOD | {"responses": ["a", None]}, "an empty reply"),
        (GOOD | {"rewards": [1.0]}, "a list of 2 numbers"),
        (GOOD | {"rewards": [1.0, float("nan")]}, "finite"),
        (GOOD | {"rewards": [1.0, True]}, "finite"),
        (GOOD | {"rewards": [1.0, "2"]}, "finite"),
        (GOOD | {"rewards": None}, 'no "rewards" yet; `python reward.py score` adds them'),
        (GOOD | {"chosen": 2}, "0 to 1, not 2"),
        (GOOD | {"chosen": None}, "not None"),
    ],
)
def test_a_bad_record_is_named_with_file_and_line(tmp_path: Path, bad: Any, message: str) -> None:
    path = write(tmp_path / "data.jsonl", GOOD, bad)
    with pytest.raises(InputError) as error:
        read_records(path, need=["rewards"])
    assert str(error.value).startswith(f"{path}, line 2: ") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_choice_is_named_where_it_is_needed(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", GOOD | {"chosen": 1}, GOOD)
    assert len(read_records(path)) == 2
    with pytest.raises(InputError, match=r'line 2: no "chosen" yet$'):
        read_records(path, need=["rewards", "chosen"])


def test_files_that_are_missing_empty_or_broken_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_records(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="no records"):
        read_records(write(tmp_path / "empty.jsonl"))
    (tmp_path / "latin.jsonl").write_bytes(b'{"a": "\xe9"}\n')
    with pytest.raises(InputError, match="not readable as UTF-8"):
        read_records(tmp_path / "latin.jsonl")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(json.dumps(GOOD).encode() * 99)[:-20])
    with pytest.raises(InputError, match=r"cut.jsonl.gz"):
        read_records(tmp_path / "cut.jsonl.gz")


def test_gzipped_files_are_read_like_others(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "data.jsonl.gz", "wt") as file:
        file.write(json.dumps(GOOD) + "\n")
    assert read_records(tmp_path / "data.jsonl.gz") == [GOOD]


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "data.jsonl"
    with pytest.raises(TypeError):
        write_jsonl(path, [GOOD, {"bad": object()}])
    assert not path.exists()
    write_jsonl(path, [GOOD, {"text": "é\u2028"}])
    assert [row for _, row in read_jsonl(path)] == [GOOD, {"text": "é\u2028"}]
    assert [p.name for p in path.parent.iterdir()] == ["data.jsonl"]


def test_a_failed_write_leaves_the_earlier_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    write_jsonl(path, [GOOD])
    with pytest.raises(TypeError):
        write_jsonl(path, [{"new": 1}, {"bad": object()}])
    assert read_records(path) == [GOOD]


def test_a_dialogue_is_rendered_as_in_hh() -> None:
    prompt = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Why?"},
    ]
    assert clha.render(prompt) == "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"


@pytest.mark.parametrize(
    ("ids", "bos", "cut"),
    [
        ([1, 5, 6, 7, 8], 1, [1, 7, 8]),
        ([5, 6, 7, 8], 1, [6, 7, 8]),
        ([1, 5, 6], 1, [1, 5, 6]),
        ([5, 6, 7, 8], None, [6, 7, 8]),
    ],
)
def test_a_prompt_is_cut_from_the_left_and_keeps_its_bos(
    ids: list[int], bos: int | None, cut: list[int]
) -> None:
    assert clha.cut_prompt(ids, 3, bos) == cut


def test_eos_ends_every_reply_that_was_not_cut(model_and_tokenizer: Any) -> None:
    tokenizer = model_and_tokenizer[1]
    record = GOOD | {"responses": ["Yes.", "Yes. " * 40]}
    short, long = clha.encode(record, tokenizer, max_length=40)["response_ids"]
    assert short[-1] == tokenizer.eos_token_id and short.count(tokenizer.eos_token_id) == 1
    assert tokenizer.eos_token_id not in long
    encoded = clha.encode(record, tokenizer, max_length=40)
    assert len(encoded["prompt_ids"]) + len(long) == 40 and encoded["cut"] == 1
    assert tokenizer.decode(encoded["prompt_ids"] + short) == "<s>\n\nHuman: How?\n\nAssistant: Yes.</s>"


@pytest.mark.parametrize(
    ("spare", "cut", "ended"), [(2, 0, True), (1, 0, True), (0, 1, False), (-1, 1, False)]
)
def test_a_reply_is_whole_if_its_eos_fits_too(
    model_and_tokenizer: Any, spare: int, cut: int, ended: bool
) -> None:
    # `spare` is the room after the last token of the longer reply's text: one token of room is for its EOS.
    tokenizer = model_and_tokenizer[1]
    record = GOOD | {"responses": ["Yes, do it.", "No"]}
    whole = clha.encode(record, tokenizer)
    text = whole["response_ids"][0][:-1]
    encoded = clha.encode(record, tokenizer, max_length=len(whole["prompt_ids"]) + len(text) + spare)
    assert encoded["cut"] == cut
    assert encoded["response_ids"][0] == (
        [*text, tokenizer.eos_token_id] if ended else text[: len(text) + spare]
    )
    assert encoded["response_ids"][1] == whole["response_ids"][1]


def test_a_long_prompt_is_cut_by_ids(model_and_tokenizer: Any) -> None:
    tokenizer = model_and_tokenizer[1]
    record = GOOD | {"prompt": [{"role": "user", "content": "tell me " * 50}]}
    whole = clha.encode(record, tokenizer)
    encoded = clha.encode(record, tokenizer, max_prompt_length=20)
    assert encoded["prompt_ids"] == [tokenizer.bos_token_id, *whole["prompt_ids"][-19:]]
    assert encoded["response_ids"] == whole["response_ids"] and encoded["cut"] == 1 and whole["cut"] == 0
    # What is left of max_length is for the reply: 21 - 20 = 1 token. Prompt and both replies are cut now.
    both = clha.encode(record, tokenizer, max_length=21, max_prompt_length=20)
    assert both["response_ids"] == [ids[:1] for ids in whole["response_ids"]] and both["cut"] == 3


def test_replies_are_ordered_by_reward_and_ties_stay_in_order(model_and_tokenizer: Any) -> None:
    tokenizer = model_and_tokenizer[1]
    record = GOOD | {"responses": ["a", "b", "c", "d"], "rewards": [0, 2.0, 0, 3.0], "chosen": 2}
    encoded = clha.encode(record, tokenizer)
    assert [tokenizer.decode(ids[:-1]).strip() for ids in encoded["response_ids"]] == ["d", "b", "a", "c"]
    assert encoded["rewards"] == [3.0, 2.0, 0.0, 0.0] and encoded["chosen"] == 3
    given = clha.encode(record, tokenizer, ranking="given")
    assert [tokenizer.decode(ids[:-1]).strip() for ids in given["response_ids"]] == ["a", "b", "c", "d"]
    assert given["rewards"] == [0.0, 2.0, 0.0, 3.0] and given["chosen"] == 2


def test_replies_without_rewards_stay_in_the_order_of_the_file(model_and_tokenizer: Any) -> None:
    tokenizer = model_and_tokenizer[1]
    encoded = clha.encode({"prompt": GOOD["prompt"], "responses": ["b", "a"], "chosen": 1}, tokenizer)
    assert [tokenizer.decode(ids[:-1]).strip() for ids in encoded["response_ids"]] == ["b", "a"]
    assert encoded["rewards"] is None and encoded["chosen"] == 1


def test_a_tokenizer_that_merges_over_the_start_of_a_reply_is_refused() -> None:
    characters = sorted(set(clha.render(GOOD["prompt"]) + " So.No"))
    vocabulary = {text: i for i, text in enumerate([*characters, ": ", "</s>"])}
    # The prompt ends with ":", and with the blank before a reply that becomes ": ", another token.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[(":", " ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([])
    with pytest.raises(InputError, match="record 7: the tokenizer merges"):
        clha.encode(GOOD | {"id": 7}, PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>"))


def test_a_tokenizer_without_eos_is_refused(tmp_path: Path, model_and_tokenizer: Any) -> None:
    (tmp_path / "config.json").write_text("{}")
    backend = model_and_tokenizer[1].backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no EOS"):
        load_tokenizer(str(tmp_path))


def test_a_llama_tokenizer_that_drops_bos_is_refused(tmp_path: Path) -> None:
    # What transformers 5 makes of a LLaMA tokenizer without the post-processor of a right tokenizer.json.
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "\u2581": 4}
    LlamaTokenizer(vocab=vocabulary, merges=[]).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match="drops BOS"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("settings", [None, {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}])
def test_a_tokenizer_model_without_tokenizer_json_is_refused(
    tmp_path: Path, settings: dict[str, Any] | None
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"sentencepiece")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    if settings:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"needs a tokenizer\.json"):
        load_tokenizer(str(tmp_path))


def test_the_reference_token_ids_are_reproduced(shared: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "llama_tokenizer")
    checked = 0
    for example in golden("logprobs.json")["examples"]:
        if example["prompt_tokens_before_cut"] > 384:
            continue  # the release cuts text and encodes it again; here ids are cut
        turns = [turn.split("|>", 1) for turn in example["prefix"][:-1]]
        roles = {"<|prompter": "user", "<|assistant": "assistant"}
        prompt = [{"role": roles[tag], "content": text} for tag, text in turns]
        encoded = clha.encode({"prompt": prompt, "responses": example["suffix"]}, tokenizer)
        for response_ids, candidate in zip(encoded["response_ids"], example["candidates"], strict=True):
            text = (encoded["prompt_ids"] + response_ids)[: candidate["n_text_tokens"]]
            assert text == candidate["input_ids"][: candidate["n_text_tokens"]]
            checked += 1
    assert checked >= 6
