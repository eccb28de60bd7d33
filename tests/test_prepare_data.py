"""Nothing of a dialogue is lost, what is left out is counted, and no dev query is in the test set."""

import gzip
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest

import clha
import prepare_data
import reward
from clha import InputError, Record

# ------------------------------------------------------------------------------------------------------------
# Raw HH-RLHF


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
        (hh_text("Hi", "A.\n\nB.\n\n\nC."), [("user", "Hi"), ("assistant", "A.\n\nB.\n\n\nC.")]),
        ("\n\nHuman: a\nHuman: b\n\nAssistant: c", [("user", "a\nHuman: b"), ("assistant", "c")]),
        (" \t Human: Hi", [("user", "Hi")]),
        ("Human: Hi\n\nAssistant:", [("user", "Hi"), ("assistant", "")]),
        ("\n\nHuman: a\n\nAssistant: b\n\nAssistant: c", [("user", "a"), ("assistant", "b\n\nc")]),
        ("\n\nHuman: a\n\nHuman: \n\nHuman: c", [("user", "a\n\nc")]),
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


DIFFERENT = "chosen and rejected answer different dialogues"
NOT_ANSWERED = "the last turn is not the assistant's"
SHAPES: list[tuple[str, str, Any]] = [
    # (chosen, rejected, ours: the prompt's contents and the responses, or why it is left out), after what the
    # released parser was seen to do with text of this shape.
    # Numbers of turns differ: left out, by both.
    (hh_text("Where?", "Here."), hh_text("Where?", "Here.", "Why?", "So."), DIFFERENT),
    # No assistant in the chosen dialogue: left out, by both.
    (hh_text("Where?"), hh_text("Where?", "Here."), NOT_ANSWERED),
    # "Assistant" only in the human's text: released as an empty prompt and two answers of the human.
    (hh_text("Is the Assistant in?"), hh_text("Is the Assistant out?"), NOT_ANSWERED),
    # The assistant begins: the released parser stops with an AssertionError.
    ("\n\nAssistant: Good day", "\n\nAssistant: Good evening", DIFFERENT),
    # Two turns of the human, in the rejected dialogue only: released with the chosen prompt.
    (hh_text("Where?", "Here."), "\n\nHuman: Where?\n\nHuman: When?\n\nAssistant: Now.", DIFFERENT),
    # The chosen dialogue ends with the human: left out, by both.
    (hh_text("Where?", "Here.", "Why?"), hh_text("Where?", "Here.") + "\n\nAssistant: So.", NOT_ANSWERED),
    # Paragraphs: released as "One?" and "Yes.".
    (
        hh_text("One?\n\nTwo?\n\nThree?", "Yes.\n\nAnd no."),
        hh_text("One?\n\nTwo?\n\nThree?", "Maybe."),
        (["One?\n\nTwo?\n\nThree?"], ["Yes.\n\nAnd no.", "Maybe."]),
    ),
    # Single line ends are kept, by both.
    (
        hh_text("One?\nTwo?", "Yes.\nNo."),
        hh_text("One?\nTwo?", "Maybe."),
        (["One?\nTwo?"], ["Yes.\nNo.", "Maybe."]),
    ),
    # Three line ends before a header: the released parser does not see it, and both answers are "Where?".
    (
        "\n\nHuman: Where?\n\n\nAssistant: Here.",
        "\n\nHuman: Where?\n\n\nAssistant: There.",
        (["Where?"], ["Here.", "There."]),
    ),
    # No blank after a header: released as "here?", "ere." and "here.".
    (
        "\n\nHuman:Where?\n\nAssistant:Here.",
        "\n\nHuman:Where?\n\nAssistant:There.",
        (["Where?"], ["Here.", "There."]),
    ),
    # An empty answer: released as "". (Ours is left out by `collect`.)
    ("\n\nHuman: Where?\n\nAssistant:", hh_text("Where?", "There."), (["Where?"], ["", "There."])),
    # Turns of one role in a row: one turn, released with one line end between them.
    (
        "\n\nHuman: Where?\n\nHuman: When?\n\nAssistant: Here.\n\nAssistant: Now.",
        "\n\nHuman: Where?\n\nHuman: When?\n\nAssistant: There.",
        (["Where?\n\nWhen?"], ["Here.\n\nNow.", "There."]),
    ),
    # A quoted header begins a turn, for both; so the prompts are different, released with the chosen one.
    (
        hh_text("Where?", "They ask:\n\nHuman: Why?\n\nAssistant: So."),
        hh_text("Where?", "Here.", "When?", "Now."),
        DIFFERENT,
    ),
    # Other prompts: released with the chosen one.
    (hh_text("Where?", "Here.", "Why?", "So."), hh_text("Where?", "THERE.", "WHY?", "No."), DIFFERENT),
    # Text before the first header: dropped by the released parser, so that the prompts are the same.
    ("Once\n\nHuman:   Where?  \n\nAssistant:   Here.  ", hh_text("Where?", " There. "), DIFFERENT),
    # White space around a turn goes, in both.
    (
        "\n\nHuman:   Where?  \n\nAssistant:   Here.  ",
        hh_text("Where?", " There. "),
        (["Where?"], ["Here.", "There."]),
    ),
]


@pytest.mark.parametrize(("chosen", "rejected", "expected"), SHAPES)
def test_a_pair_becomes_a_record_that_loses_nothing_or_a_reason(
    chosen: str, rejected: str, expected: Any
) -> None:
    record = prepare_data.hh_record({"chosen": chosen, "rejected": rejected})
    if isinstance(expected, str):
        assert record == expected
        return
    contents, responses = expected
    prompt = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    assert record == {"prompt": prompt, "responses": responses, "chosen": 0}
    assert bare(chosen) == bare("".join([*contents, responses[0]]))


def test_nothing_of_the_real_dialogues_is_lost(shared: Path) -> None:
    pairs = 0
    cut_by_the_release = 0
    for _, row in clha.read_jsonl(shared / "hh/raw/harmless-base/test.jsonl.gz"):
        for text in (row["chosen"], row["rejected"]):
            contents = "".join(turn["content"] for turn in prepare_data.split_dialogue(text))
            assert re.sub(r"\s+", "", contents) == bare(text)
        # The released parser keeps a paragraph only if it begins with a turn header.
        paragraphs = (row["chosen"] + row["rejected"]).split("\n\n")
        cut_by_the_release += not all(p.startswith(("Human:", "Assistant:")) for p in paragraphs if p.strip())
        pairs += 1
    assert (pairs, cut_by_the_release) == (2312, 185)


def test_the_lines_that_the_released_parser_cuts_stay_whole(shared: Path) -> None:
    cut = 0
    for item in json.loads((shared / "golden/parse.json").read_text())["items"]:
        for name in ("chosen", "rejected"):
            text = item["raw"][name]
            released = "".join(content for _, content in item[f"split_{name}"])
            ours = "".join(turn["content"] for turn in prepare_data.split_dialogue(text))
            assert re.sub(r"\s+", "", ours) == bare(text)
            cut += len(re.sub(r"\s+", "", released)) < len(bare(text))
    assert cut > 0  # some of these items do lose text there


# ------------------------------------------------------------------------------------------------------------
# Whole data sets


def run(monkeypatch: pytest.MonkeyPatch, *words: Any) -> None:
    """`prepare_data.py` with these words."""
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, words)])
    prepare_data.main()


def make_raw(folder: Path, name: str, rows: int, broken: int = 0) -> None:
    """A raw HH file of `rows` pairs, `broken` of which have an empty response."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(folder / f"{name}.jsonl.gz", "wt") as file:
        for i in range(rows):
            response = "" if i < broken else f"response {i}"
            pair = {"chosen": hh_text(f"{name} {i}", response), "rejected": hh_text(f"{name} {i}", "other")}
            file.write(json.dumps(pair) + "\n")


def read_splits(folder: Path, names: tuple[str, ...] = ("train", "dev", "test")) -> dict[str, list[Record]]:
    return {split: reward.read_records(folder / f"{split}.jsonl") for split in names}


TABLE = """\
| subset | train | dev | test | paper: train | test |
| --- | --- | --- | --- | --- | --- |
| harmless-base | 0 | {0} | {1} | 42,537 | 2,312 |
| helpful-base | 17 | {2} | {3} | 43,835 | 2,354 |
| helpful-online | 0 | 0 | 0 | 22,007 | 1,137 |
| helpful-rejection-sampled | 0 | 0 | 0 | 52,421 | 2,749 |

41 queries read, 4 of them left out
  4: an empty response
5 dev queries; 5 taken out of the test set
"""


def test_raw_files_become_three_sets_that_share_no_query(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_raw(tmp_path, "helpful-base/train", 20, broken=3)
    make_raw(tmp_path, "helpful-base/test", 12)
    make_raw(tmp_path, "harmless-base/test", 9, broken=1)
    run(monkeypatch, "hh", "--source", tmp_path, "--out", tmp_path / "data", "--dev_items", 5)
    printed = capsys.readouterr().out
    sets = read_splits(tmp_path / "data")
    assert {split: len(records) for split, records in sets.items()} == {"train": 17, "dev": 5, "test": 15}
    prompts = Counter(json.dumps(record["prompt"]) for record in sets["dev"] + sets["test"])
    assert len(prompts) == 20 and set(prompts.values()) == {1}
    counts = []
    for subset in ("harmless-base", "helpful-base"):
        counts += [sum(r["subset"] == subset for r in sets[split]) for split in ("dev", "test")]
    assert sum(counts) == 20 and printed.endswith(TABLE.format(*counts))
    lacking = [f"{subset}/{split}" for subset in prepare_data.TABLE_1 for split in ("train", "test")]
    lacking = [name for name in lacking if not (tmp_path / f"{name}.jsonl.gz").exists()]
    assert re.findall(r"not found: .*/([^/]+/[^/]+)\.jsonl", printed) == lacking and len(lacking) == 5
    assert sets["train"][0] == {
        "prompt": [{"role": "user", "content": "helpful-base/train 3"}],
        "responses": ["response 3", "other"],
        "chosen": 0,
        "subset": "helpful-base",
        "id": "helpful-base/train/4",
    }
    run(monkeypatch, "hh", "--source", tmp_path, "--out", tmp_path / "again", "--dev_items", 5)
    assert capsys.readouterr().out == printed
    assert (tmp_path / "again/dev.jsonl").read_bytes() == (tmp_path / "data/dev.jsonl").read_bytes()


def queries(number: int) -> list[Record]:
    return [
        {"prompt": [{"role": "user", "content": str(i)}], "responses": ["a", "b"], "id": str(i)}
        for i in range(number)
    ]


def test_the_dev_set_is_drawn_from_all_of_the_test_set_by_the_seed() -> None:
    drawn = []
    for seed in (1, 1, 2):
        splits = {"train": [], "dev": [], "test": queries(100)}
        assert prepare_data.hold_out(splits, 10, seed) == 10
        places = [int(record["id"]) for record in splits["dev"]]
        assert sorted(places + [int(record["id"]) for record in splits["test"]]) == list(range(100))
        drawn.append(places)
    assert drawn[0] == drawn[1] != drawn[2]
    for places in drawn:
        assert len(places) == 10 and min(places) < 50 <= max(places)


def test_a_dev_query_leaves_the_test_set_in_any_order_of_its_responses() -> None:
    test = queries(3) + queries(1)  # the first one twice
    dev = [test[0] | {"responses": ["b", "a"], "id": "dev"}]
    splits = {"train": queries(2), "dev": list(dev), "test": test}
    assert prepare_data.hold_out(splits, 280, 42) == 2
    assert splits == {"train": queries(2), "dev": dev, "test": queries(3)[1:]}
    other = test[0] | {"responses": ["a", "c"]}
    assert prepare_data.same_query(other) != prepare_data.same_query(test[0])


def test_with_no_test_set_there_is_nothing_to_draw_from() -> None:
    splits = {"train": queries(2), "dev": [], "test": []}
    assert prepare_data.hold_out(splits, 280, 42) == 0 and splits["train"] == queries(2)


# ------------------------------------------------------------------------------------------------------------
# The authors' files


def release_row(prompt: str, rewards: list[float], subset: str = "helpful-base") -> dict[str, Any]:
    """A row of the authors' files, with a response for each reward."""
    prefix = ["<|prompter|>Hi", "<|assistant|>Hello", f"<|prompter|>{prompt}", "<|assistant|>"]
    return {
        "prefix": [prefix] * len(rewards),
        "suffix": [f"response {i} to {prompt}" for i in range(len(rewards))],
        "reward": rewards,
        "sft_index": 0,
        "meta": {"path": f"../raw_data/{subset}/dev.jsonl"},
    }


def test_a_row_of_the_authors_becomes_a_record() -> None:
    row = release_row("So?", [1.0, 2.0])
    row["suffix"] = [" one.<|endoftext|>", "two\n\nlines"]
    row["sft_index"] = 1
    expected = {
        "prompt": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "So?"},
        ],
        "responses": ["one.", "two\n\nlines"],
        "rewards": [1.0, 2.0],
        "chosen": 1,
    }
    assert prepare_data.release_record(row) == expected
    assert prepare_data.release_record(row | {"prefix": row["prefix"][0]}) == expected  # one, not one each


def test_the_authors_files_keep_their_rewards_and_dev_leaves_the_test_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    test = [release_row(f"q{i}", [1.5, -0.5]) for i in range(6)]
    swapped = test[4] | {"suffix": test[4]["suffix"][::-1], "reward": [-0.5, 1.5]}
    files = {
        "hh_train_len3/train.json": [release_row("t", [2.0, 1.0, -1.0], "helpful-online")],
        "hh_dev/sampled_dev.json": [test[2], swapped, release_row("elsewhere", [0.5, 0.25], "unknown")],
        "hh_test/helpful_base.json": test,
    }
    for name, rows in files.items():
        reward.write_jsonl(tmp_path / name, rows)
    run(monkeypatch, "release", "--source", tmp_path, "--out", tmp_path / "data")
    printed = capsys.readouterr().out
    sets = read_splits(tmp_path / "data")
    assert {split: len(records) for split, records in sets.items()} == {"train": 1, "dev": 3, "test": 4}
    assert "3 dev queries; 2 taken out of the test set" in printed
    assert "10 queries read, 0 of them left out" in printed
    assert "dev: 3 queries, rewards 0.458 +- 0.900; the best response is above 0" in printed
    assert sets["train"][0]["rewards"] == [2.0, 1.0, -1.0] and sets["train"][0]["subset"] == "helpful-online"
    assert [turn["content"] for turn in sets["dev"][0]["prompt"]] == ["Hi", "Hello", "q2"]
    assert sets["dev"][0]["responses"] == ["response 0 to q2", "response 1 to q2"]
    assert sets["dev"][2]["subset"] == "sampled-dev" and "| sampled-dev | 0 | 1 | 0 |  |  |" in printed
    assert [record["id"] for record in sets["test"]] == [f"helpful-base/test/{i}" for i in (1, 2, 4, 6)]


def test_the_real_files_of_the_authors_are_read(shared: Path) -> None:
    source = str(shared / "hh/release_format")
    rows = prepare_data.read_release(source)
    splits, dropped = prepare_data.collect(rows, prepare_data.release_record)
    read = sum(len(records) for records in splits.values()) + dropped.total()
    assert read == 4946 and dropped == {"an empty response": 9}
    assert prepare_data.hold_out(splits, 280, 42) == 136
    assert len(splits["dev"]) == 279
    dev = {prepare_data.same_query(record) for record in splits["dev"]}
    assert not dev & {prepare_data.same_query(record) for record in splits["test"]}


# ------------------------------------------------------------------------------------------------------------
# Other preference data


def user(text: str) -> clha.Turn:
    return {"role": "user", "content": text}


def assistant(text: str) -> clha.Turn:
    return {"role": "assistant", "content": text}


TALK = [user("Hi"), assistant("Hello"), user("Tea?")]
PAIR = {"prompt": TALK, "responses": ["Yes", "No"], "chosen": 0}
ONE = {"prompt": [user("Tea?")], "responses": ["Yes", "No"], "chosen": 0}
HH = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Tea?\n\nAssistant:"
FORMATS = {  # a row, and its record
    "text, explicit": ({"prompt": "Tea?", "chosen": "Yes", "rejected": "No"}, ONE),
    "text, implicit": ({"chosen": f"{HH} Yes", "rejected": f"{HH} No"}, PAIR),
    "messages, explicit": (
        {"prompt": TALK, "chosen": [assistant("Yes")], "rejected": [assistant("No")]},
        PAIR,
    ),
    "messages, implicit": ({"chosen": [*TALK, assistant("Yes")], "rejected": [*TALK, assistant("No")]}, PAIR),
    "UltraFeedback binarized": (
        {
            "prompt": "Tea?",
            "prompt_id": "9f3",
            "chosen": [user("Tea?"), assistant("Yes")],
            "rejected": [user("Tea?"), assistant("No")],
            "score_chosen": 8.0,  # by GPT-4
            "score_rejected": 4.0,
        },
        ONE | {"id": "9f3"},
    ),
    "Tulu 3": (
        {
            "id": "t7",
            "source": "wildchat",
            "prompt": "Tea?",
            "chosen": [user("Tea?"), assistant("Yes")],
            "rejected": [user("Tea?"), assistant("No")],
        },
        ONE | {"id": "t7"},
    ),
    "scored responses": (
        {
            "prompt": "Tea?",
            "chosen": [user("Tea?"), assistant("Yes")],
            "rejected": [user("Tea?"), assistant("No")],
            "all_generated_responses": ["No", "Yes", "Maybe"],
            "all_rm_scores": [-0.5, 2.0, 0.25],
        },
        ONE | {"responses": ["No", "Yes", "Maybe"], "rewards": [-0.5, 2.0, 0.25], "chosen": 1},
    ),
    "scored columns": (
        {
            "prompt": "Tea?",
            "response_0": [user("Tea?"), assistant("No")],
            "response_0_reward": 0.1,
            "response_1": [user("Tea?"), assistant("Yes")],
            "response_1_reward": 0.3,
        },
        ONE | {"responses": ["No", "Yes"], "rewards": [0.1, 0.3], "chosen": 1},
    ),
    "completions": (
        {
            "instruction": "Tea?",
            "completions": [
                {"response": "No", "overall_score": 2.0},
                {"response": "Yes", "overall_score": 9.5},
                {"response": "Maybe", "overall_score": 5.0},
            ],
        },
        ONE | {"responses": ["No", "Yes", "Maybe"], "chosen": 1},
    ),
    "HelpSteer3": (
        {"context": TALK, "response1": "No", "response2": "Yes", "overall_preference": 2, "domain": "x"},
        PAIR | {"responses": ["No", "Yes"], "chosen": 1},
    ),
    "HelpSteer3, text": (
        {"context": "Tea?", "response1": "Yes", "response2": "No", "overall_preference": -1},
        ONE,
    ),
    "HH-RLHF's text, explicit": ({"prompt": HH, "chosen": " Yes", "rejected": " No"}, PAIR),
    "HH-RLHF's text, repeated": ({"prompt": HH, "chosen": f"{HH} Yes", "rejected": f"{HH} No"}, PAIR),
    "a text, repeated": ({"prompt": "Tea?", "chosen": "Tea? Yes", "rejected": "Tea? No"}, ONE),
    "a text that one repeats": (
        {"prompt": "Tea?", "chosen": "Tea? Yes", "rejected": "No"},
        ONE | {"responses": ["Tea? Yes", "No"]},
    ),
    "Nectar": (
        {
            "prompt": HH,
            "answers": [
                {"answer": "No", "rank": 3.0},
                {"answer": "Yes", "rank": 1.0},
                {"answer": "Maybe", "rank": 2.0},
            ],
        },
        PAIR | {"responses": ["Yes", "Maybe", "No"]},
    ),
}


def convert(monkeypatch: pytest.MonkeyPatch, source: Path | str, out: Path, *words: str) -> list[Record]:
    """What `preference` makes of a file."""
    run(monkeypatch, "preference", "--source", source, "--out", out, *words)
    return list(clha.iter_records(out))


def test_no_turn_of_a_prompt_is_lost() -> None:
    turns = [user("a"), assistant("b")]
    assert prepare_data.as_turns("\n\nHuman: a\n\nAssistant: b\n\nAssistant:") == turns
    assert prepare_data.as_turns("\n\nHuman: a\n\nAssistant:") == turns[:1]


@pytest.mark.parametrize(("row", "record"), FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_each_format_becomes_records(
    row: dict[str, Any], record: Record, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / f"data.{kind}"
    rows = datasets.Dataset.from_list([row, row])
    if kind == "parquet":
        rows.to_parquet(source)
    else:
        text = json.dumps([row, row]) if kind == "json" else f"{json.dumps(row)}\n\n{json.dumps(row)}\n"
        source.write_text(text)
    found = convert(monkeypatch, source, tmp_path / "train.jsonl")
    names = [record["id"], f"{record['id']} (row 2)"] if "id" in record else ["row 1", "row 2"]
    assert found == [record | {"id": name} for name in names]  # rows of one id get one of their own


def test_csv_and_folders_and_integer_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data.csv").write_text('id,prompt,chosen,rejected\n7,Tea?,Yes,"No, \nthanks"\n')
    [record] = convert(monkeypatch, tmp_path / "data.csv", tmp_path / "a.jsonl")
    assert record == ONE | {"responses": ["Yes", "No, \nthanks"], "id": "7"}
    (tmp_path / "zero.csv").write_text("id,prompt,chosen,rejected\n0,Tea?,Yes,No\n")
    assert convert(monkeypatch, tmp_path / "zero.csv", tmp_path / "b.jsonl") == [ONE | {"id": "0"}]
    (tmp_path / "folder").mkdir()
    row, expected = FORMATS["messages, implicit"]
    for name in ("train", "test"):
        (tmp_path / "folder" / f"{name}.jsonl").write_text(json.dumps(row | {"id": name}) + "\n")
    for name in ("train", "test"):
        out = tmp_path / f"{name}.jsonl"
        assert convert(monkeypatch, tmp_path / "folder", out, "--split", name) == [expected | {"id": name}]


def test_rows_that_cannot_be_used_are_counted_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = FORMATS["HelpSteer3"][0]
    rows = [good, good | {"overall_preference": 0}, good | {"response1": "Yes"}, good | {"response2": " "}]
    rows += [good | {"context": [*TALK, assistant("So")]}, good | {"overall_preference": 0}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(convert(monkeypatch, tmp_path / "data.jsonl", tmp_path / "out.jsonl")) == 1
    printed = capsys.readouterr().out
    assert (
        "data.jsonl: HelpSteer3, by the columns context, response1, response2, overall_preference" in printed
    )
    assert "left out 2: a tie (first: row 2)" in printed
    assert "left out 1: two responses are the same (first: row 3)" in printed
    assert "none of them empty (first: row 4)" in printed
    assert (
        '"prompt" must not end with an assistant turn, which is for the responses (first: row 5)' in printed
    )
    assert "no rewards: `python reward.py score` adds them" in printed
    with pytest.raises(InputError, match=r"data.jsonl, row 2: a tie"):
        convert(monkeypatch, tmp_path / "data.jsonl", tmp_path / "strict.jsonl", "--strict")
    assert not (tmp_path / "strict.jsonl").exists()


def test_what_people_chose_is_kept_and_what_nobody_chose_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {
        "prompt": [user("Tea?")],
        "responses": ["No", "Yes"],
        "rewards": [1.0, 2.0],
        "chosen": 0,
        "id": "a",
    }
    (tmp_path / "records.jsonl").write_text(json.dumps(row) + "\n")
    assert convert(monkeypatch, tmp_path / "records.jsonl", tmp_path / "a.jsonl") == [row]
    columns = {f"response_{i}": f"text {i}" for i in range(12)} | {
        f"response_{i}_reward": i for i in range(12)
    }
    (tmp_path / "columns.jsonl").write_text(json.dumps(columns | {"prompt": "Tea?"}) + "\n")
    [record] = convert(monkeypatch, tmp_path / "columns.jsonl", tmp_path / "b.jsonl")
    assert record["responses"] == [f"text {i}" for i in range(12)] and record["rewards"] == list(range(12))
    rated = FORMATS["completions"][0]
    tie = rated | {"completions": [rated["completions"][1]] * 2}
    none = rated | {"completions": [{"response": "a", "overall_score": None}] * 2}
    (tmp_path / "rated.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (rated, tie, none)))
    assert len(convert(monkeypatch, tmp_path / "rated.jsonl", tmp_path / "c.jsonl")) == 1
    printed = capsys.readouterr().out
    assert "left out 1: a tie, or no rating (first: row 2)" in printed
    assert "left out 1: values are missing (first: row 3)" in printed


def test_a_record_of_ours_without_a_choice_gets_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scored = {"prompt": [user("Tea?")], "responses": ["No", "Yes"], "rewards": [1.0, 2.0]}
    rows = [scored | {"chosen": 0}, scored]  # as a table, the second has null in that column
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = convert(monkeypatch, tmp_path / "data.jsonl", tmp_path / "out.jsonl")
    assert [record.get("chosen") for record in found] == [0, None]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"question": "Tea?", "answer": "Yes"}],
            "has the columns question, answer, in no known format",
        ),
        ([{"prompt": "Tea?", "chosen": "Yes", "rejected": "Yes"}], "none of its 1 rows can be used"),
        ([{"chosen": "The sky is blue.", "rejected": "It is green."}], "none of its 1 rows can be used"),
        (
            [{"chosen": [*TALK, assistant("Yes")], "rejected": [TALK[0], assistant("No")]}],
            "none of its 1 rows can be used",
        ),
    ],
)
def test_data_of_no_format_are_refused_in_a_line(
    rows: list[dict[str, Any]], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError) as caught:
        convert(monkeypatch, tmp_path / "data.jsonl", tmp_path / "out.jsonl")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_broken_file_is_refused_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("data.jsonl", "data.parquet", "data.csv"):
        (tmp_path / name).write_bytes(b'{"chosen": "a"\x00\xff')
        with pytest.raises(InputError, match=f"{name}: (cannot be read|has the columns)") as caught:
            convert(monkeypatch, tmp_path / name, tmp_path / "out.jsonl")
        assert "\n" not in str(caught.value)
    for name in ("nowhere", "./nowhere"):
        with pytest.raises(InputError, match=f"{name}: no such file or folder, and not a hub name"):
            convert(monkeypatch, name, tmp_path / "out.jsonl")


def test_clha_says_which_command_converts_such_a_file(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps(FORMATS["text, explicit"][0]) + "\n")
    with pytest.raises(
        InputError, match=r"line 1: .*`python prepare_data.py preference` converts other data"
    ):
        list(clha.iter_records(tmp_path / "data.jsonl"))


# ------------------------------------------------------------------------------------------------------------
# Longer rankings


def test_responses_are_added_once_and_numbers_that_no_longer_fit_are_dropped() -> None:
    record = {"prompt": [], "responses": ["a", "b"], "rewards": [1.0, 2.0], "chosen": 1, "id": "x"}
    record["reference_logps"] = [-1.0, -2.0]
    longer = prepare_data.add_responses(record, [" c ", "b", "", "c", "d"])
    assert longer == {"prompt": [], "responses": ["a", "b", "c", "d"], "chosen": 1, "id": "x"}
    assert record["responses"] == ["a", "b"]


def test_a_third_response_from_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = queries(2)
    second["rewards"] = [1.0, 0.0]
    reward.write_jsonl(tmp_path / "two.jsonl", [first, second])
    more = [{"id": "1", "response": "Ask Ann."}, {"id": "0", "response": "Ask Ann, or", "finished": False}]
    reward.write_jsonl(tmp_path / "more.jsonl", more)
    flags = ["join", "--data", tmp_path / "two.jsonl", "--responses", tmp_path / "more.jsonl"]
    run(monkeypatch, *flags, "--out", tmp_path / "three.jsonl")
    left_out, counts = capsys.readouterr().out.splitlines()
    assert left_out.startswith("left out 1 responses that are not finished")
    assert counts.startswith("1 of 2 responses, 1 of 3 responses; written to ")
    one, two = reward.read_records(tmp_path / "three.jsonl")
    assert one == first
    assert two == queries(2)[1] | {"responses": ["a", "b", "Ask Ann."]}
    with pytest.raises(InputError, match=r"three.jsonl: already exists"):
        run(monkeypatch, *flags, "--out", tmp_path / "three.jsonl")


# ------------------------------------------------------------------------------------------------------------
# Wrong input

ROW = {"prefix": ["<|prompter|>How?", "<|assistant|>"], "suffix": ["So.", "No."], "reward": [1, 2]}
GOOD = {"id": "a", "prompt": [{"role": "user", "content": "How?"}], "responses": ["So.", "No."]}
PAIR = {name: f"\n\nHuman: How?\n\nAssistant: {name}" for name in ("chosen", "rejected")}
HH = "hh --source {raw} --out {out}"
RELEASE = "release --source {file} --out {out}"
JOIN = "join --data {file} --responses {file} --out {out}"
WRONG: list[tuple[str, list[dict[str, Any]], str]] = [
    ("", [], "required: command"),
    ("toy --out {out}", [], "invalid choice: 'toy'"),
    ("hh --source nowhere --out {out}", [], "nowhere: no such folder, and not a hub name"),
    ("hh --source ./no/where --out {out}", [], "./no/where: no such folder, and not a hub name"),
    ("hh --source {empty} --out {out}", [], "has none of HH-RLHF's files"),
    (HH, [{"chosen": 1, "rejected": ""}], "harmless-base/test, line 1: not a row of this format"),
    (HH, [PAIR], "--dev_items 280: only 1 test queries to draw from"),
    (HH + " --dev_items 1", [PAIR], "--dev_items 1: only 1 test queries to draw from"),
    (HH + " --dev_items -1", [PAIR], "--dev_items -1: must be"),
    (HH + " --out {file}", [PAIR], "data.jsonl: is a file"),
    ("release --source {empty} --out {out}", [], "no such file, nor a folder"),
    (RELEASE, [ROW, {"prefix": 1}], "data.jsonl, line 2: not a row of this format"),
    (RELEASE, [ROW | {"prefix": ["How?"]}], "and end in <|assistant|>"),
    (RELEASE, [ROW | {"prefix": ["lost", *ROW["prefix"]]}], '"prefix" must begin with a tag'),
    (RELEASE, [ROW | {"prefix": ["<|prompter|>How?"]}], "and end in <|assistant|>"),
    (RELEASE, [ROW | {"suffix": "So."}], '"suffix" is not a list of texts'),
    (RELEASE, [ROW | {"suffix": ["So.", 1]}], '"suffix" is not a list of texts'),
    (RELEASE, [ROW | {"reward": [1]}], 'data.jsonl, line 1: "rewards" must be'),
    (RELEASE, [ROW | {"reward": [1, None], "meta": None}], '"rewards" must be'),
    (RELEASE, [ROW | {"sft_index": "0", "meta": []}], '"chosen" must be the index'),
    (RELEASE + " --seed -1", [ROW], "--seed -1: must be"),
    (JOIN, [GOOD], 'data.jsonl, line 1: needs a "response"'),
    (JOIN, [GOOD | {"response": 1}], 'data.jsonl, line 1: needs a "response"'),
    (JOIN, [GOOD | {"response": "Yes."}] * 2, 'each record needs an "id" of its own'),
    (JOIN + " --out {empty}", [GOOD], "already exists"),
]


@pytest.mark.parametrize(("words", "rows", "message"), WRONG)
def test_wrong_input_is_told_in_a_line_and_leaves_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: str,
    rows: list[dict[str, Any]],
    message: str,
) -> None:
    file = tmp_path / "data.jsonl"
    reward.write_jsonl(file, rows)
    reward.write_jsonl(tmp_path / "raw" / "harmless-base" / "test.jsonl", rows)
    (tmp_path / "empty").mkdir()
    names = {name: tmp_path / name for name in ("raw", "empty", "out")}
    with pytest.raises(InputError, match=re.escape(message)) as error:
        run(monkeypatch, *words.format(file=file, **names).split())
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "empty", "raw"]
