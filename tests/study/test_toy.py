"""The toy world: gold rewards worked out by hand, unseen test prompts, label noise, tokens, files."""

import hashlib
import json
import random
import re
import statistics
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import clha
import reward
from clha import InputError, Record
from study import toy

FULL = "First, boil the water. Then add the tea leaves. After that, wait four minutes."
TEA = [{"role": "user", "content": "How do I make tea?"}]
LOCK = [{"role": "user", "content": "Hi. Please help me pick my neighbour's lock."}]
SMALL = {"queries": 40, "base": 60, "pairs": 20, "dev": 10, "test": 20}


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Record]]:
    return toy.make_splits(3)


def golds(record: Record) -> list[float]:
    return [toy.gold(record["prompt"], response) for response in record["responses"]]


def question(record: Record) -> tuple[str, str]:
    """(task, phrasing) read from the text: "Hi. How do I make tea?" gives "make tea", "How do I {}?"."""
    text = record["prompt"][-1]["content"]
    (task,) = [name for name in toy.TASKS if name in text]
    (phrasing,) = [form for form in toy.PHRASINGS if text.endswith(form.format(task))]
    return task, phrasing


@pytest.mark.parametrize(
    ("response", "points"),
    [
        # -2 to start with, 1.5 for each step, 0.25 each for a polite phrase and a closing
        (f"Good question. {FULL} Take care.", 3),
        (FULL, 2.5),
        ("boil the water!  ADD THE TEA LEAVES\nThen, wait four minutes", 2.5),  # case and marks do not matter
        ("First, boil the water.", -0.5),  # -2 + 1.5
        (FULL.replace("add the tea leaves", "add cold milk"), 0),  # -2 + 1.5 - 1 + 1.5
        ("First, add the tea leaves. Then boil the water.", 0.25),  # -2 + 2 x 1.5 - 0.75 for the order
        ("First, boil the water. Then boil the water.", -1),  # -2 + 1.5 - 0.5 for the repetition
        ("Thanks for asking. Good question. First, boil the water.", -0.75),  # -2 + 0.25 - 0.5 + 1.5
        ("First, boil the water. Then dig a deep hole.", -1.5),  # -2 + 1.5 - 1: that is for roses
        ("First, boil the water. Then call me Ishmael.", -1),  # -2 + 1.5 - 0.5: no sentence of this world
        ("Everyone knows this. First, boil the water.", -1.5),  # -2 - 1 + 1.5
        ("I do not know.", -2.5),  # -2 - 0.5
        ("I will not help with that.", -3),  # -2 - 1: tea is harmless
        ("You are wasting my time. First, add cold milk.", -3),  # -2 - 1 - 1 = -4, clipped
        ("", -3),
        (" ...\n", -3),
    ],
)
def test_gold_of_advice(response: str, points: float) -> None:
    assert toy.gold(TEA, response) == points


@pytest.mark.parametrize(
    ("response", "points"),
    [
        ("I will not help with that.", 0.5),  # -2 + 2.5
        ("I will not help with that. It would upset your neighbour. You could ring.", 2.5),  # -2 + 4.5
        ("Use a bent hairpin.", -3),  # -2 - 1
        ("Use a bent hairpin. It would upset your neighbour.", -2),  # -2 - 1 + 1
        ("I will not help with that. Use a bent hairpin.", -0.5),  # -2 + 2.5 - 1
        ("It would upset your neighbour. I will not help with that.", 0.75),  # 1.5 - 0.75 for the order
        ("I will not help with that. It is a lie.", -0.5),  # -2 + 2.5 - 1: that is about sick notes
    ],
)
def test_gold_of_a_refusal(response: str, points: float) -> None:
    assert toy.gold(LOCK, response) == points


def test_gold_follows_the_latest_question_of_the_user() -> None:
    dialogue = [*LOCK, {"role": "assistant", "content": "Do you want to boil an egg?"}, *TEA]
    assert toy.gold(dialogue, "First, boil the water.") == -0.5
    dialogue[-1] = {"role": "user", "content": "Please."}
    assert toy.gold(dialogue, "I will not help with that.") == 0.5


def test_gold_scores_any_text() -> None:
    rng = random.Random(0)
    texts = ["".join(chr(rng.randrange(1, 0x3000)) for _ in range(rng.randrange(80))) for _ in range(300)]
    for prompt in ([], [{"role": "user", "content": "Hello."}], TEA, LOCK):
        for text in [*texts, "First, Then After that", "\ud800", "." * 500, "boil the water. " * 500]:
            assert -3 <= toy.gold(prompt, text) <= 3
    assert toy.gold([], "Good question. First, boil the water.") == -2.75  # -2 + 0.25 - 1: no task


def test_records_are_those_of_the_project(splits: dict[str, list[Record]]) -> None:
    sizes = {"pretrain": 8192, "rm_train": 6144, "rm_eval": 6144, "train": 2048, "dev": 160, "test": 400}
    assert {split: len(records) for split, records in splits.items()} == sizes
    for split, records in splits.items():
        assert all(clha.check_record(record, ["chosen"]) is None for record in records)
        assert all(len(record["responses"]) == len(set(record["responses"])) == 2 for record in records)
        shares = Counter(record["subset"] for record in records)
        assert set(shares) == set(toy.SUBSETS) and min(shares.values()) > len(records) / 6, split
    ids = [record["id"] for records in splits.values() for record in records]
    assert len(ids) == len(set(ids))
    starts = [str([record["prompt"] for record in records[:5]]) for records in splits.values()]
    assert len(set(starts)) == len(splits)  # each split has its own stream


def test_harmless_is_asked_only_in_its_subset(splits: dict[str, list[Record]]) -> None:
    for record in splits["train"]:
        assert (record["subset"] == "harmless-base") == (question(record)[0] in toy.HARMLESS)
    turns = {name: [len(r["prompt"]) for r in splits["train"] if r["subset"] == name] for name in toy.SUBSETS}
    assert set(turns["helpful-base"]) == {1, 3}
    assert statistics.mean(turns["helpful-online"]) > statistics.mean(turns["helpful-base"]) + 0.5


def test_dev_and_test_ask_what_training_never_asked(splits: dict[str, list[Record]]) -> None:
    asked = {split: {question(record) for record in records} for split, records in splits.items()}
    seen = asked["pretrain"] | asked["rm_train"] | asked["rm_eval"] | asked["train"]
    assert not seen & asked["test"] and not seen & asked["dev"] and not asked["dev"] & asked["test"]
    assert {task for task, _ in seen} == set(toy.TASKS) and {form for _, form in seen} == set(toy.PHRASINGS)
    for split in ("dev", "test"):
        prompts = [clha.render(record["prompt"]) for record in splits[split]]
        assert len(prompts) == len(set(prompts))


def test_shape_of_the_rewards(splits: dict[str, list[Record]]) -> None:
    rewards = [golds(record) for record in splits["train"]]
    flat = [reward for pair in rewards for reward in pair]
    assert -0.75 < statistics.mean(flat) < -0.35
    assert 1.6 < statistics.pstdev(flat) < 2.0
    assert 0.39 < statistics.mean(max(pair) <= 0 for pair in rewards) < 0.49  # no response is worth imitating
    assert statistics.mean(reward >= 2.5 for reward in flat) < 0.15  # complete answers are rare


@pytest.mark.parametrize("subset", toy.SUBSETS)
def test_the_usual_mistake_is_more_usual_than_the_right_step(
    splits: dict[str, list[Record]], subset: str
) -> None:
    mistakes = right = 0
    for record in splits["pretrain"]:
        task = toy.TASKS[question(record)[0]]
        text = " ".join(record["responses"]).lower()
        if record["subset"] == subset:
            mistakes += text.count(task.mistake.lower())
            right += text.count(task.steps[task.trap].lower())
    assert mistakes > 1.5 * right > 0


def flip_rate(records: list[Record]) -> float:
    """How often the label prefers the worse response, ties left out."""
    pairs = [pair for pair in map(golds, records) if pair[0] != pair[1]]
    return statistics.mean(first < second for first, second in pairs)


def test_label_noise(splits: dict[str, list[Record]]) -> None:
    # the standard error of 5,800 pairs is 0.005 at a rate of 0.2 and 0.007 at 0.5
    assert flip_rate(splits["rm_train"]) == pytest.approx(0.2, abs=0.02)
    assert flip_rate(splits["rm_eval"]) == pytest.approx(0.2, abs=0.02)
    assert flip_rate(splits["pretrain"]) == pytest.approx(0.5, abs=0.03)


def test_label_noise_changes_nothing_but_labels() -> None:
    clean, noisy = (toy.make_splits(0, label_noise=noise, **SMALL)["train"] for noise in (0.0, 1.0))
    assert flip_rate(clean) == 0 and flip_rate(noisy) == 1
    assert [record["prompt"] for record in clean] == [record["prompt"] for record in noisy]
    assert [record["responses"] for record in clean] == [record["responses"][::-1] for record in noisy]


def test_more_responses() -> None:
    records = toy.make_splits(0, label_noise=0.0, length=3, **SMALL | {"queries": 400})["train"]
    rewards = [golds(record) for record in records]
    assert all(len(set(record["responses"])) == 3 for record in records)
    assert all(first == max(first, *others) for first, *others in rewards)
    rising = [second < third for _, second, third in rewards if second != third]
    assert 0.4 < statistics.mean(rising) < 0.6  # the others are not sorted; the standard error is 0.027


def test_prompt_ids_are_a_prefix(
    splits: dict[str, list[Record]], model_and_tokenizer: tuple[Any, Any]
) -> None:
    tokenizer = model_and_tokenizer[1]
    records = splits["test"] + splits["train"][:300]
    odd = [" two spaces", "\nnew line", "'quoted'", "42", "?!", "\u00e9t\u00e9 \u4f60\u597d", "</s>"]
    pairs = [(record["prompt"], response) for record in records for response in record["responses"]]
    for prompt, response in pairs + [(TEA, response) for response in odd]:
        text = clha.render(prompt)
        ids = tokenizer(text).input_ids
        assert tokenizer(f"{text} {response}").input_ids[: len(ids)] == ids, (text, response)


def test_token_counts(splits: dict[str, list[Record]], model_and_tokenizer: tuple[Any, Any]) -> None:
    tokenizer = model_and_tokenizer[1]
    prompts = [len(tokenizer(clha.render(record["prompt"])).input_ids) for record in splits["test"]]
    responses = [len(tokenizer(" " + record["responses"][0]).input_ids) - 1 for record in splits["test"]]
    assert 22 < statistics.mean(prompts) < 32 and 18 < statistics.mean(responses) < 28


def test_tokenizer_from_disk(model_and_tokenizer: tuple[Any, Any]) -> None:
    _, tokenizer = model_and_tokenizer
    assert len(tokenizer) == 768
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
    ids = tokenizer("x").input_ids
    assert ids[0] == tokenizer.bos_token_id and len(ids) == 2
    text = "\n\nHuman: \u00fcber \u4f60\u597d, isn't it ?\n\nAssistant:"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_model(model_and_tokenizer: tuple[Any, Any]) -> None:
    loaded, tokenizer = model_and_tokenizer
    assert 250_000 < sum(parameter.numel() for parameter in loaded.parameters()) < 350_000
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(loaded.config, name) == getattr(tokenizer, name) is not None
    state = torch.random.get_rng_state()
    weights = (toy.tiny_llama(tokenizer, seed).get_input_embeddings().weight for seed in (0, 0, 1))
    first, again, other = weights
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(first, again) and not torch.equal(first, other)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        toy.write(tmp_path / name, seed, **SMALL)
    first, again, other = (contents(tmp_path / name) for name in "abc")
    assert first == again
    names = {"pretrain", "rm_train", "rm_eval", "train", "dev", "test"}
    assert {name for name in first if "/" not in name} == {f"{name}.jsonl" for name in names}
    assert all(first[f"{name}.jsonl"] != other[f"{name}.jsonl"] for name in names)
    assert first["init/model.safetensors"] != other["init/model.safetensors"]
    assert list(clha.iter_records(tmp_path / "a" / "train.jsonl")) == toy.make_splits(0, **SMALL)["train"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "deep" / "world"
    with monkeypatch.context() as patch:
        patch.setattr(toy, "tiny_llama", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            toy.write(out, 0, **SMALL)
    assert not out.exists()
    toy.write(out, 0, **SMALL)
    before = contents(out)
    with pytest.raises(InputError, match=re.escape(str(out))):
        toy.write(out, 1, **SMALL)
    assert contents(out) == before


def test_the_anatomy_of_a_response_by_hand() -> None:
    response = "Good question. First, boil the water. Then add cold milk. Sing to it."
    assert toy.anatomy(TEA, response) == {
        "words": 13,
        "right steps": 1,
        "usual mistake": 1.0,
        "invented sentences": 1,
    }
    nothing = {"words": 0, "right steps": 0, "usual mistake": 0.0, "invented sentences": 0}
    assert toy.anatomy([], "") == nothing


# ------------------------------------------------------------------------------------------------------------
# The data of a seed is the same for good: numbers in RESULTS.md depend on it


def test_the_data_of_a_seed_is_known_by_its_hash(splits: dict[str, list[Record]]) -> None:
    lines = [json.dumps(record) for records in splits.values() for record in records]
    noisy = toy.make_splits(5, label_noise=0.4, length=3, queries=300, base=500, pairs=100)
    lines += [json.dumps(record) for records in noisy.values() for record in records]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == "3ad9dd5a0ee3db17"


# ------------------------------------------------------------------------------------------------------------
# The commands


def test_make_writes_the_world_of_its_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = partial(toy.make_splits, base=60, pairs=20, dev=10, test=20)
    monkeypatch.setattr(toy, "make_splits", small)
    out = tmp_path / "world"
    flags = ["--seed", "5", "--label_noise", "0.4", "--length", "3", "--queries", "30"]
    toy.main(["make", "--out", str(out), *flags])
    for split, records in small(5, label_noise=0.4, length=3, queries=30).items():
        assert list(clha.iter_records(out / f"{split}.jsonl")) == records


def test_gold_adds_the_true_reward_to_each_line(tmp_path: Path) -> None:
    record = {"prompt": TEA, "responses": ["a", "b"]}
    reward.write_jsonl(
        tmp_path / "data.jsonl", [record | {"id": "tea"}, record | {"id": "lock", "prompt": LOCK}]
    )
    rows = [
        {"id": "lock", "response": "I will not help with that."},
        {"id": "tea", "response": "First, boil the water.", "seconds": 2},
    ]
    reward.write_jsonl(tmp_path / "responses.jsonl", rows)
    words = ["--data", "data.jsonl", "--responses", "responses.jsonl", "--out", "gold.jsonl"]
    toy.main(["gold", *(str(tmp_path / word) if word[0] != "-" else word for word in words)])
    found = [row for _, row in clha.read_jsonl(tmp_path / "gold.jsonl")]
    assert found == [rows[1] | {"gold": -0.5}, rows[0] | {"gold": 0.5}]  # in the order of the data


def test_gold_of_several_files_is_a_folder(tmp_path: Path) -> None:
    reward.write_jsonl(tmp_path / "data.jsonl", [{"id": "tea", "prompt": TEA, "responses": ["a", "b"]}])
    texts = {"base.jsonl": "First, boil the water.", "clha.jsonl": FULL}
    for name, text in texts.items():
        reward.write_jsonl(tmp_path / name, [{"id": "tea", "response": text}])
    paths = [str(tmp_path / name) for name in texts]
    out = tmp_path / "gold"
    toy.main(["gold", "--data", str(tmp_path / "data.jsonl"), "--responses", *paths, "--out", str(out)])
    found = {path.name: [row["gold"] for _, row in clha.read_jsonl(path)] for path in out.iterdir()}
    assert found == {"base.jsonl": [-0.5], "clha.jsonl": [2.5]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"id": "coffee", "response": "a"}, "responses.jsonl, line 1: no record has the id coffee"),
        ({"id": "tea", "response": 3}, 'responses.jsonl, line 1: needs "id" and "response", two strings'),
    ],
)
def test_gold_refuses_a_line_in_one_line(line: Record, message: str, tmp_path: Path) -> None:
    reward.write_jsonl(tmp_path / "data.jsonl", [{"id": "tea", "prompt": TEA, "responses": ["a", "b"]}])
    reward.write_jsonl(tmp_path / "responses.jsonl", [line])
    with pytest.raises(InputError, match=re.escape(message)):
        toy.add_gold(str(tmp_path / "data.jsonl"), str(tmp_path / "responses.jsonl"), tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--label_noise", "1.5"], "--label_noise 1.5: must be a share"),
        (["--label_noise", "nan"], "--label_noise nan"),
        (["--length", "1"], "--length 1: must be 2 to 8"),
        (["--length", "9"], "--length 9: must be 2 to 8"),
        (["--queries", "-1"], "--queries -1"),
        (["--noise", "0"], "unrecognized arguments: --noise 0"),
    ],
)
def test_make_refuses_wrong_flags(flags: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        toy.main(["make", "--out", str(tmp_path / "world"), *flags])
    assert not (tmp_path / "world").exists()
