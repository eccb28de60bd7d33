"""Evaluation: the paper's BLEU, intervals, greedy replies, and tables that say what the replies say."""

import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import golden
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

import clha
import evaluate
import toy
from program import load_tokenizer
from records import InputError, Record, read_jsonl, read_records, write_jsonl


def test_the_released_bleu_is_reproduced() -> None:
    pairs = golden("bleu.json")["pairs"]
    assert len(pairs) == 35
    values = evaluate.char_bleu([pair["hyp"] for pair in pairs], [pair["ref"] for pair in pairs])
    assert values == pytest.approx([100 * pair["authors_bleu"] for pair in pairs], abs=1e-9)


def test_char_bleu_by_hand() -> None:
    # hypothesis "the cat", reference "the bat": characters 6 of 7; pairs "th", "he", "e ", "at" 4 of 6;
    # triples "the", "he " 2 of 5; quadruples "the " 1 of 4. Both are 7 long: no brevity penalty.
    (value,) = evaluate.char_bleu([" the cat\n"], ["the bat"])
    assert value == pytest.approx(100 * (6 / 7 * 4 / 6 * 2 / 5 * 1 / 4) ** 0.25)
    # "the b" is how the reference begins: all n-grams are right; it is 5 long, not 7: exp(1 - 7 / 5).
    assert evaluate.char_bleu(["the b"], ["the bat"])[0] == pytest.approx(100 * math.exp(1 - 7 / 5))


def test_word_bleu_counts_words_over_all_sentences() -> None:
    # One of two sentences is right: precisions 5/9, 3/7, 2/5, 1/3 when the other shares its last word only.
    hypotheses, references = ["a b c d e", "f g h i"], ["a b c d e", "k l m i"]
    value = evaluate.word_bleu(hypotheses, references)
    assert value == pytest.approx(100 * (6 / 9 * 4 / 7 * 3 / 5 * 2 / 3) ** 0.25)


@pytest.mark.parametrize(
    ("text", "reply"),
    [
        (" Yes. ", "Yes."),
        (" Yes.\n\nHuman: and", "Yes."),
        ("No assistant: x", "No"),
        ("Human: hi", ""),
        ("humans are", "humans are"),
    ],
)
def test_a_reply_ends_where_the_model_speaks_for_another(text: str, reply: str) -> None:
    assert evaluate.cut_reply(text) == reply


def test_the_interval_is_seeded_and_narrows_with_more_data() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).tolist()
    low, high = evaluate.interval(values)
    assert (low, high) == evaluate.interval(values)
    # The standard error is 1 / sqrt(400) = 0.05: about 1.96 of them on both sides of the mean.
    assert high - low == pytest.approx(2 * 1.96 * 0.05, rel=0.15) and low < sum(values) / 400 < high
    few = evaluate.interval(values[:25])
    assert few[1] - few[0] > 3 * (high - low)
    assert evaluate.interval([2.0, 2.0]) == (2.0, 2.0)


def rows() -> list[Record]:
    """Three scored replies of two subsets."""
    texts = {"response": "so it is", "reference": "so it is"}
    return [
        {"subset": "b", "reward": 20.0, "char_bleu": 10.0, "gold": 1.0, **texts},
        {"subset": "a", "reward": 40.0, "char_bleu": 20.0, "gold": 2.0, **texts},
        {"subset": "b", "reward": 60.0, "char_bleu": 60.0, "gold": -1.5, **texts},
    ]


def test_the_total_is_the_mean_over_items_not_over_subsets() -> None:
    summary = evaluate.summarise(rows())
    assert list(summary) == ["a", "b", "Total"] and [summary[s]["n"] for s in summary] == [1, 2, 3]
    assert summary["b"]["reward"]["mean"] == 40 and summary["Total"]["reward"]["mean"] == 40
    assert summary["Total"]["char_bleu"]["mean"] == 30 and summary["Total"]["gold"]["mean"] == 0.5


def test_the_table_shows_means_and_intervals() -> None:
    table = evaluate.table({"clha": evaluate.summarise(rows()[1:2])}).splitlines()
    assert table[0] == "| model | subset | n | char BLEU | word BLEU | reward | gold |"
    words = evaluate.word_bleu(["so it is"], ["so it is"])
    assert table[2] == (
        f"| clha | a | 1 | 20.00 (20.00 to 20.00) | {words:.2f} "
        "| 40.00 (40.00 to 40.00) | 2.00 (2.00 to 2.00) |"
    )


def test_greedy_replies_do_not_depend_on_the_batch(world: Path, model_and_tokenizer: Any) -> None:
    model, tokenizer = model_and_tokenizer
    prompts = [record["prompt"] for record in read_records(world / "test.jsonl")[:7]]
    replies = evaluate.generate(model, tokenizer, prompts, max_new_tokens=12, batch_size=3, progress=False)
    assert replies == evaluate.generate(
        model, tokenizer, prompts, max_new_tokens=12, batch_size=7, progress=False
    )
    for prompt, reply in zip(prompts, replies, strict=True):
        ids = tokenizer(clha.render(prompt)).input_ids
        start = len(ids)
        while len(ids) < start + 12 and ids[-1] != tokenizer.eos_token_id:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert evaluate.cut_reply(tokenizer.decode(ids[start:], skip_special_tokens=True)) == reply


def test_a_whole_evaluation_and_its_tables(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = load_tokenizer(str(world / "init"))
    torch.manual_seed(0)
    judge = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_labels=1,
    )
    LlamaForSequenceClassification(judge).save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    write_jsonl(tmp_path / "test.jsonl", read_records(world / "test.jsonl")[:24])
    for number in (10, 20):
        (tmp_path / f"step-{number}").symlink_to(world / "init")

    def run(*arguments: Any) -> str:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        evaluate.main()
        return capsys.readouterr().out

    common = [
        "--data",
        tmp_path / "test.jsonl",
        "--reward_model",
        tmp_path / "judge",
        "--max_new_tokens",
        8,
        "--gold",
    ]
    printed = run("--model", world / "init", "--out", tmp_path / "eval", *common)
    scored = [row for _, row in read_jsonl(tmp_path / "eval" / "responses.jsonl")]
    assert (tmp_path / "eval" / "table.md").read_text().strip() in printed
    assert len(scored) == 24
    for name in ("reward", "char_bleu", "gold"):
        mean = sum(row[name] for row in scored) / 24
        assert f"{mean:.2f} (" in printed.splitlines()[-1]
    sizes = Counter(row["subset"] for row in scored)
    summary = json.loads((tmp_path / "eval" / "scores.json").read_text())
    assert {subset: row["n"] for subset, row in summary.items()} == {**sizes, "Total": 24}
    assert all(0 < row["reward"] < 100 for row in scored)

    steps = tmp_path / "steps"
    run(
        "--model",
        tmp_path / "step-10",
        tmp_path / "step-20",
        "--out",
        steps,
        *common,
        "--plot",
        tmp_path / "p.png",
    )
    assert (steps / "best.txt").read_text().strip() == str(tmp_path / "step-10")  # the first of equals
    assert (tmp_path / "p.png").stat().st_size > 5000
    lines = run("table", "--total", steps / "step-10", steps / "step-20", tmp_path / "eval").splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["step-10", "step-20", "eval"]
    assert len({line.split("|", 2)[2] for line in lines[2:]}) == 1  # the same model, so the same row
    dist.destroy_process_group()


def test_replies_from_a_file_are_scored_like_those_of_a_model(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = read_records(world / "test.jsonl")[:4]
    rows = [{"id": r["id"], "response": f" {r['responses'][0]}\n\nHuman: And?"} for r in reversed(records)]
    write_jsonl(tmp_path / "closed.jsonl", rows)
    write_jsonl(tmp_path / "data.jsonl", records)
    assert evaluate.read_replies(str(tmp_path / "closed.jsonl"), records) == [
        record["responses"][0] for record in records
    ]
    judge = tmp_path / "judge"
    model = AutoModelForSequenceClassification.from_pretrained(world / "init", num_labels=1)
    model.save_pretrained(judge)
    load_tokenizer(str(world / "init")).save_pretrained(judge)
    words = ["--data", tmp_path / "data.jsonl", "--reward_model", judge, "--out", tmp_path / "out", "--gold"]
    closed = ["--responses", tmp_path / "closed.jsonl"]
    monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, [*closed, *words])])
    evaluate.main()
    total = evaluate.read_summary(tmp_path / "out")["Total"]
    assert total["n"] == 4 and total["char_bleu"]["mean"] == pytest.approx(100)  # the references themselves
    golds = [toy.gold(record["prompt"], record["responses"][0]) for record in records]
    assert total["gold"]["mean"] == pytest.approx(sum(golds) / 4)
    with pytest.raises(InputError, match=r"closed.jsonl: has no reply to 1 of the records, such as dev-0"):
        evaluate.read_replies(str(tmp_path / "closed.jsonl"), [*records, {"id": "dev-0"}])


def test_a_model_of_hindsight_is_asked_for_its_good_answer(
    world: Path, model_and_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = model_and_tokenizer
    prompt, seen = [{"role": "user", "content": "How?"}], []
    said = tokenizer(" So. Bad answer: No.", add_special_tokens=False).input_ids

    def generate(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        seen.append(tokenizer.decode(input_ids[0], skip_special_tokens=True))
        return torch.cat([input_ids, torch.tensor([said])], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    assert evaluate.generate(model, tokenizer, [prompt], hindsight=True, progress=False) == ["So."]
    assert evaluate.generate(model, tokenizer, [prompt], progress=False) == ["So. Bad answer: No."]
    assert seen == ["\n\nHuman: How?\n\nAssistant: Good answer:", "\n\nHuman: How?\n\nAssistant:"]


def test_sampling_follows_the_seed(world: Path, model_and_tokenizer: Any) -> None:
    prompts = [[{"role": "user", "content": "How do I make tea?"}]] * 4

    def sample(seed: int) -> list[str]:
        torch.manual_seed(seed)
        settings = {"max_new_tokens": 8, "temperature": 1.0, "progress": False}
        return evaluate.generate(*model_and_tokenizer, prompts, **settings)

    assert sample(0) == sample(0) != sample(1) and len(set(sample(0))) > 1
