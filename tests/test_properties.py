"""What must hold for every input: texts, files, rewards and log-probs that Hypothesis makes up.

The examples are the same in each run (`derandomize`). What bench/fuzz.py has found stands here as `@example`.
"""

import copy
import gzip
import itertools
import json
import math
import re
from collections import defaultdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHARED
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoTokenizer

import clha
import prepare_data
from records import (
    ROLES,
    InputError,
    Record,
    check_record,
    read_jsonl,
    read_records,
    write_in_parts,
    write_jsonl,
)

NAN = float("nan")
PROPERTY = settings(
    derandomize=True,
    deadline=None,
    max_examples=200,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# ------------------------------------------------------------------------------------------------------------
# Texts, JSON, records

ODD = [
    *("</s>", "<s>", "<pad>", "<unk>", "<0x0A>", "<|assistant|>", "<|endoftext|>"),
    *("Human:", "Assistant:", "\n\nHuman:", "\n\nAssistant:", "\nHuman:", "\n", " ", ":", "\\ud800"),
    *("\r\n", "\u2028", "\x85", "\0", "\ufeff", "\u2581", "e\u0301", "\U0001f469\u200d\U0001f467"),
    "\u202e\u05e9\u05dc\u05d5\u05dd",  # right to left
]
TEXT = st.lists(st.sampled_from(ODD) | st.text(max_size=6), max_size=6).map("".join)
HALVES = st.text(st.characters(categories=["Cs", "Lu"]), max_size=3)  # with halves of characters
NUMBER = st.integers(-(10**40), 10**40) | st.floats() | st.sampled_from([0, 1, 1e38, -1e39])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBER | TEXT | HALVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
REPLY = TEXT.filter(str.strip)
REWARD = st.sampled_from([-1.0, 0.0, 0.5, 1.0, 3.0, 1e30, -1e30]) | st.floats(-8, 8, width=32)
GOOD = {"prompt": [{"role": "user", "content": "How?"}], "responses": ["So.", "No."], "rewards": [0.5, -1]}


@st.composite
def records(draw: st.DrawFn) -> Record:
    """A good record, scored or not."""
    turn = st.fixed_dictionaries({"role": st.sampled_from(list(ROLES)), "content": TEXT})
    responses = draw(st.lists(REPLY, min_size=2, max_size=4))
    scores = st.lists(REWARD, min_size=len(responses), max_size=len(responses))
    return {
        "prompt": draw(st.lists(turn, min_size=1, max_size=3)),
        "responses": responses,
        "rewards": draw(st.none() | scores),
        "chosen": draw(st.integers(0, len(responses) - 1)),
    }


@st.composite
def damaged_records(draw: st.DrawFn) -> Record:
    """A good record in which anything stands in one place, or nothing."""
    root = [copy.deepcopy(GOOD) | {"chosen": 1, "id": "a"}]
    container, key = root[0], draw(st.sampled_from(sorted(root[0])))
    while isinstance(container[key], list | dict) and draw(st.booleans()):
        container = container[key]
        key = draw(
            st.sampled_from(sorted(container) if isinstance(container, dict) else range(len(container)))
        )
    if draw(st.booleans()):
        del container[key]
    else:
        container[key] = draw(JSON | st.sampled_from([-1, 0, 2, True, "", " ", "2", [], {}]))
    return root[0]


@pytest.fixture(params=["toy", "llama"])
def tokenizer(request: pytest.FixtureRequest, model_and_tokenizer: Any) -> Any:
    """The toy world's tokenizer, and LLaMA's where it is."""
    if request.param == "toy":
        return model_and_tokenizer[1]
    if not (SHARED / "llama_tokenizer").is_dir():
        pytest.skip("../shared/llama_tokenizer is not here")
    return AutoTokenizer.from_pretrained(SHARED / "llama_tokenizer")


# ------------------------------------------------------------------------------------------------------------
# Dialogues


def split_slowly(text: str) -> list[tuple[str, str]]:
    """(role, content) of a dialogue's turns, by going through its characters."""
    if text.lstrip().startswith(("Human:", "Assistant:")):
        text = "\n\n" + text.lstrip()
    sections = [("Human", "")]
    while text:
        name = next((name for name in ("Human", "Assistant") if text.startswith(f"\n\n{name}:")), "")
        if name:
            sections.append((name, ""))
        else:
            sections[-1] = (sections[-1][0], sections[-1][1] + text[0])
        text = text[len(name) + 3 if name else 1 :]
    turns: list[tuple[str, str]] = []
    for name, content in sections if sections[0][1].strip() else sections[1:]:
        role = "user" if name == "Human" else "assistant"
        if turns and turns[-1][0] == role:
            content = turns.pop()[1] + "\n\n" + content.strip()
        turns.append((role, content.strip()))
    return turns


@PROPERTY
@given(TEXT)
@example(" \n\nHuman: \n\nHuman:a\n\nHuman:\n\nHuman: b\n\nAssistant:")
@example("a\n\n\nHuman: Assistant: b\n\n\n\nAssistant:\nHuman: c\n\nHuman:")
def test_a_dialogue_is_split_where_a_turn_begins_and_nothing_is_lost(text: str) -> None:
    turns = prepare_data.split_dialogue(text)
    assert [(turn["role"], turn["content"]) for turn in turns] == split_slowly(text)


def has_tag(text: str) -> bool:
    """Whether a turn of HH-RLHF begins in a text."""
    return "\n\nHuman:" in text or "\n\nAssistant:" in text


CONTENT = TEXT.map(str.strip).filter(lambda text: not has_tag(text))


@PROPERTY
@given(st.lists(CONTENT, min_size=1, max_size=4), st.tuples(CONTENT, CONTENT))
@example(["a " * 500_000 + "b"], ("Human: x", "\n\n".join("ab" * 1000)))
def test_a_rendered_dialogue_is_split_into_the_same_turns(
    contents: list[str], replies: tuple[str, str]
) -> None:
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    text = clha.render(turns).removesuffix("\n\nAssistant:")
    assert prepare_data.split_dialogue(text) == turns
    chosen, rejected = (f"{text}\n\nAssistant: {reply}" for reply in replies)
    record = prepare_data.hh_record({"chosen": chosen, "rejected": rejected})
    if len(turns) % 2:  # the last turn is the human's
        assert record == {"prompt": turns, "responses": list(replies), "chosen": 0}


RELEASED = CONTENT.filter(lambda text: "<|" not in text)


@PROPERTY
@given(st.lists(RELEASED, min_size=1, max_size=4), st.lists(RELEASED, min_size=2, max_size=3))
def test_a_tagged_row_keeps_its_texts(contents: list[str], replies: list[str]) -> None:
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    tags = {"user": "<|prompter|>", "assistant": "<|assistant|>"}
    prefix = [*(f"{tags[turn['role']]} {turn['content']}\n" for turn in turns), "<|assistant|>"]
    row = {
        "prefix": [prefix] * 2,
        "suffix": [f" {reply}<|endoftext|>" for reply in replies],
        "reward": [0, 1],
    }
    record = prepare_data.release_record(row)
    assert record == {"prompt": turns, "responses": replies, "rewards": [0, 1], "chosen": 0}


ROW = {
    "prefix": ["<|prompter|>Hi", "<|assistant|>"],
    "suffix": ["So.", "No."],
    "reward": [1, 0],
    "sft_index": 0,
}


@PROPERTY
@given(st.sampled_from([*ROW, "meta"]), JSON)
@example("meta", None)
@example("meta", {"path": 1})
@example("suffix", ["So.", ["No."]])
@example("suffix", "So")
@example("prefix", ["lost", "<|prompter|>Hi", "<|assistant|>"])
def test_a_tagged_row_of_another_form_is_named_or_loses_nothing(
    tmp_path: Path, name: str, value: Any
) -> None:
    path, row = tmp_path / "helpful_base.json", ROW | {name: value}
    path.write_text(json.dumps(row))
    try:
        splits, _ = prepare_data.collect(prepare_data.read_release(str(path)), prepare_data.release_record)
    except InputError as error:
        assert str(error).startswith(f"{path}, line 1: ")
        return
    for record in splits["test"]:
        contents = [turn["content"] for turn in record["prompt"]] + record["responses"]
        texts = (row["prefix"][0] if isinstance(row["prefix"][0], list) else row["prefix"]) + row["suffix"]
        bare = re.sub(r"<\|(prompter|assistant|endoftext)\|>", "", "".join(texts))
        assert "".join("".join(contents).split()) == "".join(bare.split())  # but for blanks
        assert record["subset"] == "helpful-base"


# ------------------------------------------------------------------------------------------------------------
# Files


@PROPERTY
@given(st.lists(st.dictionaries(TEXT, JSON, max_size=3), max_size=4))
@example([{"text": "\u2028\r" * 500_000}])
def test_a_written_file_is_read_back_equal_and_a_bad_one_is_not_written(
    tmp_path: Path, rows: list[Record]
) -> None:
    path = tmp_path / "data.jsonl"
    path.unlink(missing_ok=True)
    try:
        text = json.dumps(rows, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half a character
        with pytest.raises(UnicodeEncodeError):
            write_jsonl(path, rows)
        assert not any(tmp_path.iterdir())
        return
    write_jsonl(path, rows)
    (tmp_path / "data.jsonl.gz").write_bytes(gzip.compress(path.read_bytes(), 1))
    for file in (path, tmp_path / "data.jsonl.gz"):
        numbers, read = zip(*read_jsonl(file), strict=True) if rows else ((), ())
        assert json.dumps(read, ensure_ascii=False).encode() == text  # equal, NaN too
        assert numbers == tuple(range(1, len(rows) + 1))
        file.unlink()


LINE = json.dumps(GOOD).encode()
PACKED = gzip.compress(LINE * 9)


@st.composite
def damaged_bytes(draw: st.DrawFn) -> bytes:
    """A good file, zipped or not, with other bytes somewhere."""
    data = draw(st.sampled_from([LINE + b"\n" + LINE, PACKED]))
    start, length = draw(st.integers(0, len(data))), draw(st.integers(0, 9))
    return data[:start] + draw(st.binary(max_size=9)) + data[start + length :]


@PROPERTY
@given(st.binary() | damaged_bytes() | JSON.map(lambda value: json.dumps(value).encode()))
@example(b'{"a": ' + b"[" * 100_000)
@example(b'{"a": ' + b"9" * 5000 + b"}")
@example(b'{"a": "\\ud800"}')
@example(b'{"\\ud83d": "\\ude00"}')
@example(b"\xef\xbb\xbf{}")
@example(b"\0" * 1_000_000)
@example(PACKED[:20] + bytes(9) + PACKED[29:])
@example(PACKED + b"more")
@example('"one\u2028two"'.encode())
def test_any_bytes_are_records_or_an_error_of_one_line_with_the_name(tmp_path: Path, data: bytes) -> None:
    for path in (tmp_path / "data.jsonl", tmp_path / "data.jsonl.gz"):
        path.write_bytes(data)
        try:
            rows = [row for _, row in read_jsonl(path)]
        except InputError as error:
            assert str(error).startswith(str(path)) and len(str(error).splitlines()) == 1
            with pytest.raises(InputError):
                read_records(path)
        else:
            json.dumps(rows, ensure_ascii=False).encode()  # texts that files and tokenizers take


@PROPERTY
@given(damaged_records(), st.sets(st.sampled_from(["rewards", "chosen"])))
@example(GOOD | {"prompt": [{"role": [], "content": "x"}]}, set())
@example(GOOD | {"chosen": -1}, set())
@example(GOOD | {"responses": ["So.", "\u2003"]}, set())
@example(GOOD | {"rewards": [10**4000, 1]}, set())
@example(GOOD | {"rewards": [3e38, -3e38]}, set())  # in float32 their gap is infinite
def test_what_is_not_wrong_with_a_record_can_be_encoded(
    tmp_path: Path, model_and_tokenizer: Any, record: Record, need: set[str]
) -> None:
    wrong = check_record(record, need)
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(record))
    try:
        (read,) = read_records(path, need)
    except InputError as error:
        assert wrong is None or str(error) == f"{path}, line 1: {' '.join(wrong.splitlines())}"
        return
    assert wrong is None and all(read.get(name) is not None for name in need)
    assert all(map(str.strip, read["responses"]))
    encoded = clha.encode(read, model_and_tokenizer[1])
    pairs, _ = clha.rescore(clha.reply_matrix([encoded]), None)
    assert pairs.sum() == math.comb(len(read["responses"]), 2)


@PROPERTY
@given(st.lists(TEXT, max_size=9), st.integers(1, 4), st.data())
def test_work_that_was_stopped_goes_on_at_a_whole_part(
    tmp_path_factory: pytest.TempPathFactory, items: list[str], part: int, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("parts")
    asked: list[str] = []

    def work(share: list[str], start: int) -> list[Record]:
        assert share == items[start : start + part]
        asked.extend(share)
        return [{"text": text} for text in share]

    def stop(share: list[str], start: int) -> list[Record]:
        return work(share, start) if start + part < len(items) else 1 / 0

    write_in_parts(folder / "whole.jsonl", items, "s", work, part, "")
    whole = (folder / "whole.jsonl").read_bytes()
    assert [row["text"] for _, row in read_jsonl(folder / "whole.jsonl")] == items
    if items:
        with pytest.raises(ZeroDivisionError):
            write_in_parts(folder / "out.jsonl", items, "s", stop, part, "")
        (left,) = folder.glob("out.jsonl.*.partial")
        torn = data.draw(st.integers(0, len(whole)))
        left.write_bytes(whole[:torn] + b"\0" * data.draw(st.sampled_from([0, 5, 999])))  # as a power cut may
        asked.clear()
        write_in_parts(folder / "out.jsonl", items, "s", work, part, "")
        assert (folder / "out.jsonl").read_bytes() == whole
        assert asked == items[whole[:torn].count(b"\n") // part * part :]  # nothing is done twice
        assert not list(folder.glob("*.partial"))


# ------------------------------------------------------------------------------------------------------------
# Tokens


@PROPERTY
@given(records(), st.integers(1, 40), st.integers(1, 40))
def test_ids_keep_their_limits_and_end_with_eos_where_nothing_was_cut(
    tokenizer: Any, record: Record, limit: int, room: int
) -> None:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    text = clha.render(record["prompt"])
    encoded = clha.encode(record, tokenizer, limit + room, limit, ranking="given")
    whole = tokenizer(text, split_special_tokens=True).input_ids
    ids, cut = encoded["prompt_ids"], 0
    assert ids[0] == bos and len(ids) == min(limit, len(whole))
    assert ids[1:] == (whole[len(whole) - limit + 1 :] if len(whole) > limit else whole[1:])
    assert not {bos, eos} & set(ids[1:])
    cut += len(whole) > limit
    for reply, response in zip(record["responses"], encoded["response_ids"], strict=True):
        full = [*tokenizer(f"{text} {reply}", split_special_tokens=True).input_ids, eos]
        fits = len(full) - len(whole) <= limit + room - len(ids)
        assert whole + response == full if fits else response == full[len(whole) :][: limit + room - len(ids)]
        assert len(response) >= 1 and response.count(eos) == fits and (response[-1] == eos) == fits
        cut += not fits
    assert encoded["cut"] == cut


@PROPERTY
@given(records())
def test_uncut_ids_are_the_text_and_no_special_tokens_of_it(model_and_tokenizer: Any, record: Record) -> None:
    tokenizer = model_and_tokenizer[1]
    encoded = clha.encode(record, tokenizer, 10**6, 10**6 - 1, ranking="given")
    for reply, response in zip(record["responses"], encoded["response_ids"], strict=True):
        text = f"<s>{clha.render(record['prompt'])} {reply}</s>"
        assert tokenizer.decode(encoded["prompt_ids"] + response, clean_up_tokenization_spaces=False) == text


@PROPERTY
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 12), st.none() | st.integers(0, 9)
)
def test_a_cut_prompt_is_its_end_after_bos(ids: list[int], limit: int, bos: int | None) -> None:
    cut = clha.cut_prompt(ids, limit, bos)
    assert len(cut) == min(limit, len(ids)) and (ids[0] != bos or cut[0] == bos)
    kept = cut[1:] if ids[0] == bos else cut
    assert kept == ids[len(ids) - len(kept) :]


@PROPERTY
@given(st.lists(REWARD | st.integers(-3, 3), min_size=2, max_size=6), st.data())
def test_replies_stand_by_reward_and_ties_by_their_place(
    model_and_tokenizer: Any, rewards: list[float], data: st.DataObject
) -> None:
    tokenizer, replies = model_and_tokenizer[1], [f"reply {i}" for i in range(len(rewards))]
    chosen = data.draw(st.integers(0, len(rewards) - 1))
    record = GOOD | {"responses": replies, "rewards": rewards, "chosen": chosen}
    encoded = clha.encode(record, tokenizer)
    order = [int(tokenizer.decode(ids[:-1])[-1]) for ids in encoded["response_ids"]]
    for i, j in itertools.pairwise(order):
        assert rewards[i] > rewards[j] or (rewards[i] == rewards[j] and i < j)
    assert encoded["rewards"] == [rewards[i] for i in order] and order[encoded["chosen"]] == chosen


# ------------------------------------------------------------------------------------------------------------
# Packs


@st.composite
def examples(draw: st.DrawFn) -> clha.Example:
    """A query as token ids."""
    ids = st.lists(st.integers(0, 9), min_size=1, max_size=4)
    responses = draw(st.lists(ids, min_size=2, max_size=4))
    scores = st.lists(REWARD, min_size=len(responses), max_size=len(responses))
    return {
        "prompt_ids": draw(ids),
        "response_ids": responses,
        "rewards": draw(st.none() | scores),
        "chosen": draw(st.integers(0, len(responses) - 1)),
    }


@PROPERTY
@given(st.lists(examples(), min_size=1, max_size=4))
def test_a_pack_has_each_token_once_where_its_documentation_says(queries: list[clha.Example]) -> None:
    batch, width = clha.pack(queries), max(len(query["response_ids"]) for query in queries)
    tokens = [  # (query, reply or -1, position, id)
        (b, i - 1, position if i == 0 else len(query["prompt_ids"]) + position, token)
        for b, query in enumerate(queries)
        for i, ids in enumerate([query["prompt_ids"], *query["response_ids"]])
        for position, token in enumerate(ids)
    ]
    assert batch["input_ids"].tolist() == [[token for *_, token in tokens]]
    assert batch["position_ids"].tolist() == [[position for *_, position, _ in tokens]]
    # Token n is predicted where what comes before it stands: in its own query, in the prompt or its reply.
    before = {
        n: [m for m, (b2, j, at, _) in enumerate(tokens) if (b2, at) == (b, position - 1) and j in (-1, i)]
        for n, (b, i, position, _) in enumerate(tokens)
        if i >= 0
    }
    assert batch["targets"].tolist() == [tokens[n][3] for n in before]
    assert [[m] for m in batch["predict_at"].tolist()] == list(before.values())
    assert batch["reply"].tolist() == [tokens[n][0] * width + tokens[n][1] for n in before]
    for b, query in enumerate(queries):
        own = [i for b2, i, *_ in tokens if b2 == b]
        sees = [
            [column <= row and own[column] in (-1, i) for column in range(len(own))]
            for row, i in enumerate(own)
        ]
        assert clha.query_masks(batch)[b].tolist() == sees
        empty = [0] * (width - len(query["response_ids"]))
        assert batch["lengths"][b].tolist() == [*map(len, query["response_ids"]), *empty]
        ends = [
            max(n for n, token in enumerate(tokens) if token[:2] == (b, i)) for i in range(width - len(empty))
        ]
        assert batch["last"][b].tolist() == ends + empty
        rewards = query["rewards"] or [0.0] * len(query["response_ids"])
        stored = torch.tensor(rewards + [NAN] * len(empty))
        torch.testing.assert_close(batch["rewards"][b], stored, rtol=0, atol=0, equal_nan=True)
    assert batch["chosen"].tolist() == [query["chosen"] for query in queries]


@PROPERTY
@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.integers(1, 900), st.integers(1, 8))
@example([7, 5, 4, 4], 10, 1)  # 20 tokens, but no deal of 10 and 10 by this rule: three packs
def test_queries_are_dealt_once_evenly_and_within_the_limit(
    sizes: list[int], pack_tokens: int, processes: int
) -> None:
    packs = clha.deal(sizes, pack_tokens, processes)
    assert sorted(itertools.chain(*packs)) == list(range(len(sizes)))
    loads = [sum(sizes[i] for i in part) for part in packs]
    assert max(loads) <= max(pack_tokens, *sizes) and max(loads) - min(loads) <= max(sizes)
    assert (
        len(packs) % processes == 0 and len(packs) < 2 * sum(sizes) / max(pack_tokens, *sizes) + 2 * processes
    )


def test_64_replies_of_one_token_after_a_prompt_that_fills_the_length(model_and_tokenizer: Any) -> None:
    model, tokenizer = model_and_tokenizer
    replies = [chr(ord("0") + i) for i in range(64)]
    record = {"prompt": [{"role": "user", "content": "tell me " * 99}], "responses": replies}
    encoded = clha.encode(record, tokenizer, 48, 47)
    assert len(encoded["prompt_ids"]) == 47 and encoded["cut"] == 65
    assert all(len(ids) == 1 for ids in encoded["response_ids"])
    with torch.no_grad():
        sums, lengths = clha.sequence_logps(model, clha.pack([encoded]))
        alone = model(torch.tensor([encoded["prompt_ids"]])).logits[0, -1].log_softmax(0)
    assert lengths.tolist() == [[1] * 64]
    torch.testing.assert_close(sums[0], alone[[ids[0] for ids in encoded["response_ids"]]])


# ------------------------------------------------------------------------------------------------------------
# Rescoring and the losses

Losses = tuple[Tensor, Tensor, Tensor, Tensor]  # avg_logps, sum_logps, rewards (B, l); target (B,)
GAP = st.none() | st.sampled_from([0.0, 0.5, 1.0, 2.5])
OPTIONS = st.fixed_dictionaries(
    {
        "margin": st.sampled_from([0.0, 0.25, 1.0, 3.0]),
        "min_reward_gap": GAP,
        "alpha": st.sampled_from([0.0, 0.05, 1.0]),
        "reduction": st.sampled_from(["query", "release"]),
        "sft_reduction": st.sampled_from(["sum", "mean"]),
        "contrast": st.booleans(),
    }
)


@st.composite
def batches(draw: st.DrawFn) -> Losses:
    """A batch in float64, of queries with two replies or more."""
    queries, width = draw(st.integers(1, 4)), draw(st.integers(2, 5))
    rows = st.lists(st.floats(-20, 0), min_size=width, max_size=width)
    avg_logps = torch.tensor([draw(rows) for _ in range(queries)], dtype=torch.float64)
    lengths = torch.tensor([draw(st.integers(1, 9)) for _ in range(queries * width)]).view(queries, width)
    rewards, target = torch.full((queries, width), NAN, dtype=torch.float64), []
    for row in rewards:
        scores = draw(st.lists(REWARD, min_size=2, max_size=width))
        row[: len(scores)] = torch.tensor(scores).sort(descending=draw(st.booleans())).values
        target.append(draw(st.integers(0, len(scores) - 1)))
    return avg_logps, avg_logps * lengths, rewards, torch.tensor(target)


@PROPERTY
@given(batches(), GAP, st.integers(-4, 4))
def test_rescoring_looks_at_the_size_of_gaps_alone(batch: Losses, gap: float | None, shift: int) -> None:
    rewards, target = batch[2].float(), batch[3]
    keep, gate = clha.rescore(rewards, gap, target)
    for row, kept in zip(rewards.tolist(), keep, strict=True):
        for (i, a), (j, b) in itertools.product(enumerate(row), repeat=2):
            exist = i < j and not math.isnan(a + b)  # by exact numbers, not by float32's difference
            assert kept[i, j] == (exist and (gap is None or abs(Fraction(a) - Fraction(b)) > gap))
    imitated = [row[i] for row, i in zip(rewards.tolist(), target.tolist(), strict=True)]
    assert gate.tolist() == [gap is None or reward > 0 for reward in imitated]
    assert torch.equal(clha.rescore(-rewards, gap)[0], keep)
    whole = rewards.clamp(-8, 8).round()  # to these, adding is exact
    assert torch.equal(clha.rescore(whole + shift, gap)[0], clha.rescore(whole, gap)[0])
    wider = clha.rescore(rewards, (gap or 0) + 0.5)[0]
    assert not (wider & ~keep).any()
    ties = torch.where(rewards.isnan(), NAN, rewards[:, :1])
    assert gap is None or not clha.rescore(ties, gap)[0].any()


def paper_loss(
    avg_logps: Tensor, sum_logps: Tensor, rewards: Tensor, target: list[int], options: dict[str, Any]
) -> tuple[float, float]:
    """The pairwise and the SFT term as the paper writes them, pair by pair and query by query."""
    margin, gap = options["margin"], options["min_reward_gap"]
    terms: dict[int, list[float]] = defaultdict(list)  # of the kept pairs, by j - i
    sft = 0.0
    logps = sum_logps if options["sft_reduction"] == "sum" else avg_logps
    for p, s, r, best in zip(avg_logps.tolist(), logps.tolist(), rewards.tolist(), target, strict=True):
        for i, j in itertools.combinations(range(len(r)), 2):
            if math.isnan(r[i] + r[j]) or (gap is not None and abs(r[i] - r[j]) <= gap):  # k = 1
                continue
            terms[j - i].append(max(0, p[j] - p[i] + margin * (j - i)))
        if gap is None or r[best] > 0:  # lambda = 0
            sft -= s[best]
    if options["reduction"] == "query":
        rank = sum(map(sum, terms.values())) / len(target)
    else:
        rank = sum(sum(values) / len(values) for values in terms.values())
    return rank * options["contrast"], sft / len(target)


@PROPERTY
@given(batches(), OPTIONS, st.booleans())
def test_the_loss_is_the_papers_pair_by_pair(batch: Losses, options: dict[str, Any], chosen: bool) -> None:
    *scores, target = batch
    loss, metrics = clha.clha_loss(*scores, **options, target=target if chosen else None)
    rank, sft = paper_loss(*scores, target.tolist() if chosen else [0] * len(target), options)
    assert rank >= 0 and sft >= 0
    for value, expected in zip(
        (loss, metrics["loss/rank"], metrics["loss/sft"]),
        (rank + options["alpha"] * sft, rank, sft),
        strict=True,
    ):
        assert value.item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@PROPERTY
@given(st.lists(st.integers(0, 16), min_size=1, max_size=63), st.sampled_from([0.0, 0.25, 3.0]))
@example([0] * 63, 3.0)
def test_replies_that_lead_by_the_margin_have_no_loss(slack: list[int], margin: float) -> None:
    steps = torch.tensor(slack, dtype=torch.float64) / 8 + margin  # p_i - p_{i+1}, exact
    avg_logps = -torch.cat([steps.new_zeros(1), steps.cumsum(0)])[None]
    rewards = -torch.arange(len(slack) + 1.0)[None]
    options = {"margin": margin, "min_reward_gap": 0.5, "alpha": 0.0}
    assert clha.clha_loss(avg_logps, avg_logps, rewards, **options)[0].item() == 0
    avg_logps[0, -1] += slack[-1] / 8 + 0.125  # now the last one is too near to the one before it
    assert clha.clha_loss(avg_logps, avg_logps, rewards, **options)[0].item() >= 0.125


@PROPERTY
@given(batches(), OPTIONS)
def test_bfloat16_rounds_the_loss_by_few_of_its_bits(batch: Losses, options: dict[str, Any]) -> None:
    """Within 2^-7, bfloat16's eps, of the sizes that are added up."""
    avg_logps, sum_logps, rewards, _ = batch
    low = avg_logps.bfloat16(), sum_logps.bfloat16()
    loss, _ = clha.clha_loss(*low, rewards.float(), **options)
    exact, _ = clha.clha_loss(*(values.float() for values in low), rewards.float(), **options)
    span = rewards.shape[1] - 1
    pairs = (span + 1) * span / 2 * (2 * avg_logps.abs().max() + options["margin"] * span)
    size = options["contrast"] * pairs + options["alpha"] * sum_logps.abs().max()
    assert abs(loss.item() - exact.item()) <= 2**-7 * size.item()


@PROPERTY
@given(batches(), OPTIONS, st.data())
def test_parts_in_any_order_with_absent_replies_add_up(
    batch: Losses, options: dict[str, Any], data: st.DataObject
) -> None:
    *scores, target = batch
    whole, metrics = clha.clha_loss(*scores, **options, target=target)
    counts = clha.loss_counts(clha.rescore(scores[2], options["min_reward_gap"])[0], options["reduction"])
    order = data.draw(st.permutations(range(len(target))))
    absent, place = data.draw(st.integers(0, 2)), data.draw(st.integers(0, len(order)))
    if options["reduction"] == "query":
        wide = counts.new_full((len(counts) + absent,), len(order))
    else:
        wide = torch.cat([counts, counts.new_ones(absent)])
    padded = [
        torch.nn.functional.pad(values[order], (0, absent), value=value)
        for values, value in zip(scores, (-7.0, -99.0, NAN), strict=True)
    ]
    parts = [
        clha.clha_loss(
            *(values[part] for values in padded), **options, target=target[order][part], counts=wide
        )
        for part in (slice(place), slice(place, None))
    ]
    assert sum(loss for loss, _ in parts).item() == pytest.approx(whole.item(), rel=1e-9, abs=1e-9)
    for name, value in metrics.items():
        total = sum(part[name] for _, part in parts).item()
        assert total == pytest.approx(value.item(), rel=1e-5, abs=1e-5)


@PROPERTY
@given(batches(), OPTIONS)
def test_gradients_lift_the_best_lower_the_worst_and_leave_the_absent(
    batch: Losses, options: dict[str, Any]
) -> None:
    avg_logps, sum_logps, rewards, _ = batch
    avg_logps.requires_grad_()
    options |= {"alpha": 0.0, "contrast": True}
    loss, _ = clha.clha_loss(avg_logps, sum_logps, rewards, **options)
    (gradient,) = torch.autograd.grad(loss, avg_logps)
    for row, real in zip(gradient, ~rewards.isnan(), strict=True):
        assert row[0] <= 0 <= row[real][-1] and (row[~real] == 0).all()
        assert row.sum().item() == pytest.approx(0, abs=1e-12)
    before, _ = clha.clha_loss(avg_logps - 1e-7 * gradient, sum_logps, rewards, **options)
    assert before <= loss  # a step against the gradient is a step down
