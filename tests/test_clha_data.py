"""Records and their token ids: ranked, checked, cut by ids, ended by EOS; packed, balanced, ordered."""

import gzip
import itertools
import json
import math
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import datasets
import pytest
import torch
from conftest import golden
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

import clha
import prepare_data
from clha import Config, Example, InputError, Record

GOOD = {"id": "a", "prompt": [{"role": "user", "content": "How?"}], "responses": ["So.", "No."]}
GOOD["rewards"] = [0.5, -1.0]
PROPERTY = settings(
    derandomize=True,
    deadline=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def toy(model_and_tokenizer: Any) -> PreTrainedTokenizerBase:
    """The toy world's tokenizer."""
    return model_and_tokenizer[1]


@pytest.fixture(params=["toy", "llama"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    """Each of the two."""
    return request.getfixturevalue(request.param)


def limits(max_length: int, max_prompt_length: int, **more: Any) -> Config:
    """Settings of which only these two count."""
    return Config("", "", "", max_length=max_length, max_prompt_length=max_prompt_length, **more)


WIDE = limits(10**6, 10**6 - 1)


def write(path: Path, *rows: Record) -> str:
    """A file with a line per row."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ------------------------------------------------------------------------------------------------------------
# Records


TURNS = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Why?")]
DIALOGUE = [{"role": role, "content": content} for role, content in TURNS]


def test_a_dialogue_is_rendered_as_in_hh() -> None:
    text = "\n\nSystem: Be brief.\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"
    assert clha.render(DIALOGUE) == text


def test_all_that_goes_with_the_responses_is_ranked_and_nothing_else() -> None:
    record = GOOD | {"responses": ["a", "b", "c", "d"], "rewards": [0, 2.0, 0, 3.0], "chosen": 2}
    record |= {"reference_logps": [1.0, 2.0, 3.0, 4.0], "subset": "helpful", "prompt": DIALOGUE}
    ranked = clha.rank(record)
    assert ranked["responses"] == ["d", "b", "a", "c"]  # the equal ones, a and c, keep their order
    assert ranked["rewards"] == [3.0, 2.0, 0, 0] and ranked["reference_logps"] == [4.0, 2.0, 1.0, 3.0]
    assert ranked["chosen"] == 3 and ranked["responses"][3] == "c"
    assert [ranked[name] for name in ("id", "prompt", "subset")] == ["a", DIALOGUE, "helpful"]
    assert record["responses"] == ["a", "b", "c", "d"]


@pytest.mark.parametrize(("rewards", "chosen"), [([0.5, -1.0], 0), ([-1.0, 0.5], 1)])
def test_the_first_response_of_a_file_is_the_chosen_one_if_a_record_does_not_say(
    rewards: list[float], chosen: int
) -> None:
    assert clha.rank(GOOD | {"rewards": rewards})["chosen"] == chosen


def test_lines_are_numbered_from_one_and_gzip_changes_nothing(tmp_path: Path) -> None:
    rows = [GOOD, {"text": "one\u2028two\x85é"}, {}]  # U+2028 and U+0085 end no line of JSON
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    (tmp_path / "data.jsonl").write_bytes(text)
    (tmp_path / "data.jsonl.gz").write_bytes(gzip.compress(text))
    for name in ("data.jsonl", "data.jsonl.gz"):
        assert list(clha.read_jsonl(tmp_path / name)) == [(1, rows[0]), (2, rows[1]), (3, rows[2])]


def test_a_record_without_id_is_named_by_its_line(tmp_path: Path) -> None:
    anonymous = {name: value for name, value in GOOD.items() if name != "id"}
    path = write(tmp_path / "data.jsonl", GOOD, anonymous)
    assert [record["id"] for record in clha.iter_records(path)] == ["a", "line 2"]
    with open(path, "a") as file:
        print("", json.dumps(GOOD | {"id": 7}), " ", sep="\n", file=file)  # blank lines are no records
    assert [record["id"] for record in clha.iter_records(path)] == ["a", "line 2", "7"]


def test_only_what_is_needed_must_be_there() -> None:
    unscored = {name: value for name, value in GOOD.items() if name != "rewards"}
    assert clha.check_record(unscored) is None
    assert clha.check_record(unscored, ["rewards"]).startswith('no "rewards"')
    assert clha.check_record(GOOD, ["rewards", "chosen"]).startswith('"chosen" must be the index')
    assert clha.check_record(GOOD | {"chosen": 1}, ["rewards", "chosen"]) is None


ANYTHING = st.sampled_from([-1, 0, 1, 2, True, None, "", " ", "2", [], {}, math.nan, 1e39, 10**40, "\u2003"])


@st.composite
def damaged_records(draw: st.DrawFn) -> Record:
    """A good record in which anything stands in one place, or nothing."""
    record = json.loads(json.dumps(GOOD | {"chosen": 1}))
    container: Any = record
    key: Any = draw(st.sampled_from(sorted(record)))
    while isinstance(container[key], list | dict) and draw(st.booleans()):
        container = container[key]
        keys = sorted(container) if isinstance(container, dict) else range(len(container))
        key = draw(st.sampled_from(keys))
    if draw(st.booleans()):
        del container[key]
    else:
        container[key] = draw(ANYTHING)
    return record


@PROPERTY
@given(damaged_records())
@example(GOOD | {"prompt": [{"role": ["user"], "content": "x"}]})
@example(GOOD | {"chosen": -1})
@example(GOOD | {"prompt": [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So"}]})
@example(GOOD | {"responses": ["So.", "\u2003"]})
@example(GOOD | {"rewards": [10**4000, 1]})
@example(GOOD | {"rewards": [3e38, -3e38]})  # in float32 their gap would be infinite
def test_what_is_not_wrong_with_a_record_can_be_trained_on(
    toy: PreTrainedTokenizerBase, record: Record
) -> None:
    wrong = clha.check_record(record, ["rewards"])
    if wrong is None:
        ranked = clha.rank(record)
        encoded = clha.encode({"id": ""} | ranked, toy, WIDE) | {"rewards": ranked["rewards"]}
        keep, _ = clha.rescore(clha.pack([encoded]).values["rewards"], 0.0)
        assert keep.sum() <= 1 and clha.render(record["prompt"]).endswith("\n\nAssistant:")
    else:
        assert json.loads(json.dumps(record)) != GOOD | {"chosen": 1} and "\n" not in wrong


# ------------------------------------------------------------------------------------------------------------
# Tokens


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


@pytest.mark.parametrize("text", ["Hi", "a</s>b <s>", "", "tell me " * 99])
def test_what_looks_like_a_special_token_is_none(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    turns = [{"role": "user", "content": text}]
    ids = clha.dialogue_ids(turns, tokenizer)
    assert ids == tokenizer(f"\n\nHuman: {text}\n\nAssistant:", split_special_tokens=True).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(ids[1:])
    answer = {"role": "assistant", "content": text}
    assert clha.dialogue_ids([*turns, answer], tokenizer)[-1] == tokenizer.eos_token_id


def test_what_a_tokenizer_was_saved_with_cuts_and_pads_nothing(
    toy: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    turns = [{"role": "user", "content": "tell me " * 20}]
    toy.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    saved = json.loads(path.read_text())
    saved["truncation"] = {"max_length": 5, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    saved["padding"] = {"strategy": {"Fixed": 99}, "direction": "Right", "pad_to_multiple_of": None}
    saved["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"}
    path.write_text(json.dumps(saved))
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert again.backend_tokenizer.truncation and again.backend_tokenizer.padding
    assert clha.dialogue_ids(turns, again) == clha.dialogue_ids(turns, toy)


def test_eos_ends_each_response_that_is_not_cut(toy: PreTrainedTokenizerBase) -> None:
    record = GOOD | {"responses": ["Yes.", "Yes. " * 40]}
    encoded = clha.encode(record, toy, limits(40, 20))
    prompt = encoded["prompt_ids"]
    short, long = encoded["response_ids"]
    assert toy.decode(prompt + short) == "<s>\n\nHuman: How?\n\nAssistant: Yes.</s>"
    assert len(prompt) + len(long) == 40 and toy.eos_token_id not in long
    assert encoded["id"] == "a" and encoded["longest"] == 40 and encoded["size"] == 40 + len(short)


@pytest.mark.parametrize("spare", [2, 1, 0, -1])
def test_a_response_is_whole_if_its_eos_fits_too(toy: PreTrainedTokenizerBase, spare: int) -> None:
    # `spare` is the room after the last token of the longer response's text; its EOS needs one token of it.
    record = GOOD | {"responses": ["Yes, do it.", "No"]}
    whole = clha.encode(record, toy, WIDE)
    room = len(whole["response_ids"][0]) - 1 + spare
    prompt = len(whole["prompt_ids"])
    encoded = clha.encode(record, toy, limits(prompt + room, prompt))
    assert encoded["response_ids"] == [whole["response_ids"][0][:room], whole["response_ids"][1]]


def test_a_long_prompt_is_cut_by_ids_and_leaves_room_for_the_responses(toy: PreTrainedTokenizerBase) -> None:
    record = GOOD | {"prompt": [{"role": "user", "content": "tell me " * 50}]}
    whole = clha.encode(record, toy, WIDE)
    encoded = clha.encode(record, toy, limits(512, 20))
    assert encoded["prompt_ids"] == [toy.bos_token_id, *whole["prompt_ids"][-19:]]
    assert encoded["response_ids"] == whole["response_ids"]
    both = clha.encode(record, toy, limits(21, 20))  # one token for each response
    assert both["response_ids"] == [ids[:1] for ids in whole["response_ids"]]


def test_a_tokenizer_that_merges_across_the_start_of_a_response_is_refused() -> None:
    characters = sorted(set(clha.render(GOOD["prompt"]) + " So.No"))
    vocabulary = {text: i for i, text in enumerate([*characters, ": ", "</s>"])}
    # The prompt ends with ":", which becomes another token, ": ", with the blank before a response.
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[(":", " ")]))
    backend.pre_tokenizer = pre_tokenizers.Sequence([])
    merging = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    with pytest.raises(InputError, match=r"^response 0: dialogue does not begin with its prompt"):
        clha.encode(GOOD, merging, WIDE)


def test_the_reference_token_ids_are_reproduced(llama: PreTrainedTokenizerBase) -> None:
    checked = 0
    for reference in golden("logprobs.json")["examples"]:
        if reference["prompt_tokens_before_cut"] > 384:
            continue  # the release cuts text and encodes it again; here ids are cut
        turns = [turn.split("|>", 1) for turn in reference["prefix"][:-1]]
        roles = {"<|prompter": "user", "<|assistant": "assistant"}
        prompt = [{"role": roles[tag], "content": text} for tag, text in turns]
        record = {"id": "", "prompt": prompt, "responses": reference["suffix"]}
        encoded = clha.encode(record, llama, limits(512, 384))
        for response_ids, candidate in zip(encoded["response_ids"], reference["candidates"], strict=True):
            length = candidate["n_text_tokens"]
            assert (encoded["prompt_ids"] + response_ids)[:length] == candidate["input_ids"][:length]
            checked += 1
    assert checked >= 6


def test_real_dialogues_keep_their_text_after_a_prefix_that_is_the_prompt(
    shared: Path, llama: PreTrainedTokenizerBase
) -> None:
    rows = clha.read_jsonl(shared / "hh" / "raw" / "harmless-base" / "test.jsonl.gz")
    for _, row in itertools.islice(rows, 60):
        record = {"id": ""} | prepare_data.hh_record(row)
        prompt = clha.render(record["prompt"])
        encoded = clha.encode(record, llama, WIDE)
        assert encoded["prompt_ids"] == clha.dialogue_ids(record["prompt"], llama)
        for response, ids in zip(record["responses"], encoded["response_ids"], strict=True):
            text = llama.decode(encoded["prompt_ids"] + ids, clean_up_tokenization_spaces=False)
            assert text == f"<s> {prompt} {response}</s>"  # LLaMA begins each text with a blank


ODD = [
    *("</s>", "<s>", "<pad>", "<unk>", "<0x0A>", "<|assistant|>", "<|endoftext|>"),
    *("Human:", "\n\nAssistant:", "\n", " ", ":", "\\ud800", "\r\n", "\u2028", "\x85", "\0", "\ufeff"),
    *("\u2581", "e\u0301", "\U0001f469\u200d\U0001f467", "\u202e\u05e9\u05dc\u05d5\u05dd"),
]
TEXT = st.lists(st.sampled_from(ODD) | st.text(max_size=6), max_size=6).map("".join)
TURN = st.fixed_dictionaries({"role": st.sampled_from(list(clha.ROLES)), "content": TEXT})
PROMPT = st.lists(TURN, min_size=1, max_size=3).filter(lambda turns: turns[-1]["role"] != "assistant")
RESPONSES = st.lists(TEXT.filter(str.strip), min_size=2, max_size=4)


@PROPERTY
@given(PROMPT, RESPONSES, st.integers(1, 40), st.integers(1, 40))
def test_ids_keep_their_limits_and_end_with_eos_where_nothing_is_cut(
    tokenizer: PreTrainedTokenizerBase, prompt: list[clha.Turn], responses: list[str], limit: int, room: int
) -> None:
    text = clha.render(prompt)
    encoded = clha.encode(
        {"id": "", "prompt": prompt, "responses": responses}, tokenizer, limits(limit + room, limit)
    )
    whole = tokenizer(text, split_special_tokens=True).input_ids
    ids = encoded["prompt_ids"]
    assert ids == (whole if len(whole) <= limit else [whole[0], *whole[len(whole) - limit + 1 :]])
    left = limit + room - len(ids)
    for response, response_ids in zip(responses, encoded["response_ids"], strict=True):
        full = [*tokenizer(f"{text} {response}", split_special_tokens=True).input_ids, tokenizer.eos_token_id]
        assert full[: len(whole)] == whole and response_ids == full[len(whole) :][:left]
        ended = len(full) - len(whole) <= left
        assert len(response_ids) >= 1 and response_ids.count(tokenizer.eos_token_id) == ended
    assert encoded["size"] == len(ids) + sum(map(len, encoded["response_ids"]))


@PROPERTY
@given(PROMPT, RESPONSES)
def test_uncut_ids_are_the_text_and_no_special_tokens_of_it(
    toy: PreTrainedTokenizerBase, prompt: list[clha.Turn], responses: list[str]
) -> None:
    encoded = clha.encode({"id": "", "prompt": prompt, "responses": responses}, toy, WIDE)
    for response, ids in zip(responses, encoded["response_ids"], strict=True):
        text = toy.decode(encoded["prompt_ids"] + ids, clean_up_tokenization_spaces=False)
        assert text == f"<s>{clha.render(prompt)} {response}</s>"


# ------------------------------------------------------------------------------------------------------------
# Tokenized files


@pytest.fixture
def group() -> None:
    """A process group of one."""
    clha.init_process()


def scored(world: Path, number: int = 12) -> list[Record]:
    """Records with ids and with two or three responses."""
    records = []
    for i, record in enumerate(itertools.islice(clha.iter_records(world / "scored.jsonl"), number)):
        responses = [*record["responses"], "I do not </s> know."][: 2 + i % 2]
        rewards = [0.5, i / 7 - 0.4, 1.0][: 2 + i % 2]
        references = [float(i), -1.0, -2.0][: 2 + i % 2]
        more = {"responses": responses, "rewards": rewards, "reference_logps": references}
        records.append(record | more | {"id": f"number {i}", "chosen": 0})
    return records


FIELDS = ("rewards", "reference_logps")


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("ranked", [True, False])
def test_examples_are_those_of_encode_and_memory_mapped(
    world: Path, tmp_path: Path, toy: PreTrainedTokenizerBase, ranked: bool
) -> None:
    records = scored(world)
    path = write(tmp_path / "data.jsonl", *records)
    config = limits(40, 16, token_cache=str(tmp_path / "cache"))
    examples = clha.load_examples(path, toy, config, FIELDS, ranked)
    expected = []
    for record in map(clha.rank, records) if ranked else records:
        values = {name: record[name] for name in FIELDS}
        expected.append(clha.encode(record, toy, config) | values)
    assert examples.to_list() == expected
    assert examples["size"] == [example["size"] for example in expected]
    assert isinstance(examples.data, datasets.table.MemoryMappedTable)
    assert not list(tmp_path.glob("tokens"))


@pytest.mark.usefixtures("group")
def test_what_was_tokenized_is_found_again_and_a_change_is_seen(
    world: Path, tmp_path: Path, toy: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = scored(world)
    made = []
    encode = clha.encode
    monkeypatch.setattr(clha, "encode", lambda *given: made.append(1) or encode(*given))

    def load(name: str = "data", tokenizer: Any = toy, **more: Any) -> list[Example]:
        made.clear()
        ours = {key: more.pop(key) for key in ("fields", "ranked") if key in more}
        config = Config("", "", str(tmp_path / "out"), **more)
        path = str(tmp_path / f"{name}.jsonl")
        return clha.load_examples(path, tokenizer, config, **ours).to_list()

    write(tmp_path / "data.jsonl", *records)
    write(tmp_path / "copy.jsonl", *records)
    first = load()
    assert len(made) == len(records)
    assert load("copy", margin=7.0, batch_size=3) == first and not made  # found by content, not by name
    for change in ({"max_length": 400}, {"max_prompt_length": 9}, {"ranked": False}, {"fields": FIELDS}):
        load(**change)
        assert made, change
    records[3]["rewards"][0] += 1
    write(tmp_path / "data.jsonl", *records)
    assert load() != first and made
    other = PreTrainedTokenizerFast.from_pretrained(world / "init")
    other.eos_token = other.bos_token
    assert load("copy", other) != first and made
    assert load("copy") == first and not made


@pytest.mark.usefixtures("group")
def test_examples_of_several_files_are_all_there(
    world: Path, tmp_path: Path, toy: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "data.jsonl", *scored(world))
    whole = clha.load_examples(path, toy, Config("", "", str(tmp_path / "one")))
    monkeypatch.setattr(datasets.config, "MAX_SHARD_SIZE", "1KB")  # 500 MB, after which a new file begins
    monkeypatch.setattr(datasets.config, "DEFAULT_MAX_BATCH_SIZE", 5)
    parts = clha.load_examples(path, toy, Config("", "", str(tmp_path / "parts")))
    assert len(parts.cache_files) > 1 == len(whole.cache_files)
    assert parts.to_list() == whole.to_list()


@pytest.mark.usefixtures("group")
def test_data_that_change_while_they_are_read_are_not_used(
    world: Path, tmp_path: Path, toy: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = scored(world)
    path = write(tmp_path / "data.jsonl", *records)
    encode = clha.encode

    def changed_meanwhile(record: Record, *settings: Any) -> Example:
        write(tmp_path / "data.jsonl", *records[:-1])
        return encode(record, *settings)

    monkeypatch.setattr(clha, "encode", changed_meanwhile)
    with pytest.raises(InputError, match=r"data.jsonl: changed while it was read"):
        clha.load_examples(path, toy, Config("", "", str(tmp_path)))


@pytest.mark.usefixtures("group")
def test_a_wrong_record_is_named_each_time_and_leaves_no_examples(
    world: Path, tmp_path: Path, toy: PreTrainedTokenizerBase
) -> None:
    path = write(tmp_path / "data.jsonl", *scored(world), GOOD | {"responses": ["a"]})
    for _ in range(2):
        with pytest.raises(InputError, match=r"data.jsonl, line 13: .*two or more") as caught:
            clha.load_examples(path, toy, Config("", "", str(tmp_path)))
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.arrow"))


# ------------------------------------------------------------------------------------------------------------
# Packs, and the order of the data


@st.composite
def queries(draw: st.DrawFn) -> Example:
    """A query as token ids."""
    ids = st.lists(st.integers(0, 9), min_size=1, max_size=4)
    responses = draw(st.lists(ids, min_size=2, max_size=4))
    rewards = draw(st.lists(st.floats(-8, 8, width=32), min_size=len(responses), max_size=len(responses)))
    return {"prompt_ids": draw(ids), "response_ids": responses, "rewards": rewards}


@PROPERTY
@given(st.lists(queries(), min_size=1, max_size=4))
def test_a_pack_has_each_token_once_where_its_documentation_says(examples: list[Example]) -> None:
    pack = clha.pack(examples)
    width = max(len(query["response_ids"]) for query in examples)
    tokens = [  # (query, response or -1, position, id)
        (b, i - 1, position if i == 0 else len(query["prompt_ids"]) + position, token)
        for b, query in enumerate(examples)
        for i, ids in enumerate([query["prompt_ids"], *query["response_ids"]])
        for position, token in enumerate(ids)
    ]
    assert pack.input_ids.tolist() == [[token for *_, token in tokens]]
    assert pack.position_ids.tolist() == [[position for _, _, position, _ in tokens]]
    predicted = [n for n, (_, i, _, _) in enumerate(tokens) if i >= 0]
    assert pack.targets.tolist() == [tokens[n][3] for n in predicted]
    assert pack.owners.tolist() == [tokens[n][0] * width + tokens[n][1] for n in predicted]
    # A token is predicted where what comes before it stands: in its own query, in the prompt or its response.
    for n, source in zip(predicted, pack.sources.tolist(), strict=True):
        b, i, position, _ = tokens[n]
        assert tokens[source][:3] in [(b, -1, position - 1), (b, i, position - 1)]
    for b, query in enumerate(examples):
        own = torch.tensor([i for query_index, i, *_ in tokens if query_index == b])
        sees = [[c <= r and own[c] in (-1, own[r]) for c in range(len(own))] for r in range(len(own))]
        assert pack.mask[b].tolist() == sees
        absent = [0] * (width - len(query["response_ids"]))
        assert pack.lengths[b].tolist() == [*map(len, query["response_ids"]), *absent]
        rewards = torch.tensor([*query["rewards"], *(math.nan for _ in absent)])
        torch.testing.assert_close(pack.values["rewards"][b], rewards, rtol=0, atol=0, equal_nan=True)


def test_the_filling_of_a_pack_for_flex_attention_counts_nowhere() -> None:
    query = {"prompt_ids": [1, 5], "response_ids": [[6, 2], [7, 8, 2]], "rewards": [1.0, 0.0]}
    plain = clha.pack([query, query])
    filled = clha.pack([query, query], length=128)
    assert filled.input_ids.shape == filled.position_ids.shape == (1, 128)
    assert filled.input_ids[:, :14].equal(plain.input_ids)
    assert filled.position_ids[:, :14].equal(plain.position_ids)
    for name in ("targets", "sources", "owners", "lengths"):
        assert getattr(filled, name).equal(getattr(plain, name)), name
    places = torch.arange(128)
    sees = filled.mask.mask_mod(0, 0, places[:, None], places)
    assert sees[:14, :14].equal(torch.block_diag(*plain.mask).bool())
    assert not sees[:14, 14:].any() and not sees[14:, :14].any()


@PROPERTY
@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.integers(1, 900), st.integers(1, 8))
@example([7, 5, 4, 4], 10, 1)  # 20 tokens, but this rule finds no two packs of 10: there are three
@example([7, 5, 4, 4], 10, 2)  # not three for two processes, but four
@example([5], 1, 8)  # seven of the packs are empty
def test_items_are_packed_once_evenly_and_within_the_limit(
    sizes: list[int], limit: int, processes: int
) -> None:
    packs = clha.balance(sizes, limit, processes)
    assert sorted(itertools.chain(*packs)) == list(range(len(sizes)))
    loads = [sum(sizes[i] for i in indices) for indices in packs]
    most = max(limit, *sizes)
    assert max(loads) <= most and max(loads) - min(loads) <= max(sizes)
    assert len(packs) % processes == 0 and len(packs) < 2 * sum(sizes) / most + 2 * processes


def test_items_of_over_half_a_pack_are_packed_in_few_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [540 + i * 7 % 460 for i in range(2000)]  # a pack each, though their sum fills three quarters
    attempts = Mock(side_effect=sorted)
    monkeypatch.setattr(clha, "sorted", attempts, raising=False)
    assert 2000 <= len(clha.balance(sizes, 1024, 1)) <= 2100
    assert attempts.call_count < 10


def test_the_longest_items_are_placed_first() -> None:
    assert clha.balance([1, 1, 2], 2, 1) == [[2], [0, 1]]  # in the given order there would be three packs


@PROPERTY
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 3), st.integers(0, 9), st.integers(0, 5))
def test_each_epoch_has_each_query_once_in_an_order_of_its_own(
    number: int, batch_size: int, epochs: int, max_steps: int, seed: int
) -> None:
    config = Config("", "", "", batch_size=batch_size, epochs=epochs, max_steps=max_steps, seed=seed)
    per_epoch = number // batch_size
    steps = max_steps or epochs * per_epoch
    if not per_epoch or not steps:
        with pytest.raises(InputError, match="--epochs" if per_epoch else f"--batch_size {batch_size}: "):
            clha.data_order(number, config)
        return
    order = clha.data_order(number, config)
    assert order.shape == (steps, batch_size)
    for start in range(0, steps, per_epoch):
        shown = order[start : start + per_epoch].flatten().tolist()
        assert len(set(shown)) == len(shown) and set(shown) <= set(range(number))
    longer = clha.data_order(
        number, Config("", "", "", batch_size=batch_size, max_steps=steps + 3, seed=seed)
    )
    assert longer[:steps].equal(order)


def test_seeds_and_epochs_differ_in_their_order_and_a_part_of_an_epoch_counts() -> None:
    config = Config("", "", "", batch_size=4, epochs=2.5, seed=1)
    order = clha.data_order(42, config)
    assert len(order) == 25 and order.equal(clha.data_order(42, config))
    assert not order[:10].equal(order[10:20])
    assert not order.equal(clha.data_order(42, Config("", "", "", batch_size=4, epochs=2.5, seed=7)))
