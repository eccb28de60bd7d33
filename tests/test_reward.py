"""Reward models: Eq. 1 by hand, exact scores from packs, and training that finds what is preferred."""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

import clha
import reward
from program import load_tokenizer
from records import InputError, read_records, write_jsonl


def log_sigmoid(x: float) -> float:
    """log(1 / (1 + e^-x))"""
    return -math.log1p(math.exp(-x))


def test_eq_1_by_hand() -> None:
    # Query 1 has three replies, the second is chosen: the mean of -log s(2 - 1) and -log s(2 - -1); its mean
    # square is (1 + 4 + 1) / 3 = 2. Query 2 has two, the first chosen: -log s(0 - 1), mean square 0.5.
    rewards = torch.tensor([[1.0, 2.0, -1.0], [0.0, 1.0, 9.0]])
    present = torch.tensor([[True, True, True], [True, True, False]])
    losses = reward.reward_loss(rewards, torch.tensor([1, 0]), present, 0.1)
    assert losses.tolist() == pytest.approx(
        [
            -(log_sigmoid(1) + log_sigmoid(3)) / 2 + 0.1 * 2,
            -log_sigmoid(-1) + 0.1 * 0.5,
        ]
    )


def test_texts_share_what_they_begin_with_and_keep_a_token_each() -> None:
    query = reward.share_prefix([[1, 2, 3, 4], [1, 2, 5], [1, 2, 3]])
    assert query["prompt_ids"] == [1, 2] and query["response_ids"] == [[3, 4], [5], [3]]
    assert reward.share_prefix([[1, 2], [1, 2]])["response_ids"] == [[2], [2]]
    assert reward.share_prefix([[1, 2, 3], [1]]) | {"prompt_ids": []} == reward.share_prefix([[1, 2, 3], [1]])
    assert reward.share_prefix([[7, 8]])["prompt_ids"] == [7]


def test_chunks_hold_all_queries_and_keep_to_the_budget_even_when_padded() -> None:
    queries = [([i], reward.share_prefix([list(range(n))])) for i, n in enumerate([5, 50, 9, 9, 120, 30])]
    parts = list(reward.chunks(queries, 60))
    assert sorted(i for part in parts for members, _ in part for i in members) == list(range(6))
    for part in parts:
        assert len(part) == 1 or len(part) * max(clha.size(query) for _, query in part) <= 60


@pytest.fixture(scope="module")
def classifier(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaMA reward model in a folder, with the toy world's tokenizer."""
    folder = tmp_path_factory.mktemp("classifier")
    tokenizer = load_tokenizer(str(world / "init"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForSequenceClassification(config)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def dialogues(world: Path, number: int) -> tuple[list[reward.Messages], list[str]]:
    """Prompts with responses, a prompt for each response, in a mixed order."""
    records = read_records(world / "train.jsonl")[:number]
    pairs = [(record["prompt"], response) for record in records for response in record["responses"]]
    pairs = pairs[::2] + pairs[1::2]
    return [prompt for prompt, _ in pairs], [response for _, response in pairs]


def test_scores_are_those_of_a_plain_forward_pass_in_the_given_order(world: Path, classifier: Path) -> None:
    model = reward.load_reward_model(str(classifier), pack_tokens=200)
    prompts, responses = dialogues(world, 12)
    scores = model.score(prompts, responses)
    plain = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    for prompt, response, score in zip(prompts, responses, scores, strict=True):
        text = f"{clha.render(prompt)} {response}</s>"
        assert plain(**model.tokenizer(text, return_tensors="pt")).logits.item() == pytest.approx(
            score, abs=1e-5
        )
    one_by_one = [model.score([p], [r])[0] for p, r in zip(prompts, responses, strict=True)]
    assert scores == pytest.approx(one_by_one, abs=1e-5)
    assert model.score([], []) == []


def test_an_encoder_scores_the_same_in_any_batch(world: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(world / "init"))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = reward.load_reward_model(str(tmp_path), pack_tokens=300)
    prompts, responses = dialogues(world, 6)
    one_by_one = [model.score([p], [r])[0] for p, r in zip(prompts, responses, strict=True)]
    assert len(set(one_by_one)) > 6
    assert model.score(prompts, responses) == pytest.approx(one_by_one, abs=1e-5)


def test_a_chat_template_is_used_where_a_model_brings_one(
    world: Path, classifier: Path, tmp_path: Path
) -> None:
    model = reward.load_reward_model(str(classifier))
    model.model.save_pretrained(tmp_path)
    model.tokenizer.chat_template = "<s>{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}</s>"
    model.tokenizer.save_pretrained(tmp_path)
    chat = reward.load_reward_model(str(tmp_path))
    (ids,) = chat.encode([[{"role": "user", "content": "Hi"}]], ["Yes"])
    assert chat.tokenizer.decode(ids) == "<s>user=Hi;assistant=Yes;</s>"


def test_open_assistant_scores_are_reproduced(shared: Path) -> None:
    path = shared / "tiny_oasst_rm"
    model = reward.load_reward_model(str(path))
    roles = {"<|prompter": "user", "<|assistant": "assistant"}
    cases = json.loads((path / "golden_scores.json").read_text())["cases"]
    prompts = []
    for case in cases:
        turns = [turn.split("|>", 1) for turn in case["prefix"][:-1]]
        prompts.append([{"role": roles[tag], "content": text} for tag, text in turns])
    scores = model.score(prompts, [case["response"] for case in cases])
    assert scores == pytest.approx([case["score"] for case in cases], abs=1e-4)


def test_a_long_text_loses_its_beginning(shared: Path) -> None:
    model = reward.load_reward_model(str(shared / "tiny_oasst_rm"))
    long = [{"role": "user", "content": "why " * 3000}]
    responses = ["because.", "because of this and that."]  # they leave different parts of the prompt
    for response, ids in zip(responses, model.encode([long] * 2, responses), strict=True):
        assert len(ids) == 1024
        hidden = model.model.gpt_neox(torch.tensor([ids])).last_hidden_state[0, -1]
        expected = model.model.out_proj(hidden).item()
        assert model.score([long] * 2, responses)[responses.index(response)] == pytest.approx(
            expected, abs=1e-5
        )


def test_a_model_without_a_reward_head_is_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no weights for score\.weight|outputs"):
        reward.load_reward_model(str(world / "init"))
    LlamaForCausalLM.from_pretrained(world / "init").save_pretrained(tmp_path)
    load_tokenizer(str(world / "init")).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text()) | {
        "id2label": {"0": "r"},
        "label2id": {"r": 0},
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"no weights for score\.weight"):
        reward.load_reward_model(str(tmp_path))


def test_rewards_that_are_no_numbers_are_refused(world: Path, classifier: Path) -> None:
    model = reward.load_reward_model(str(classifier))
    model.model.score.weight.data.fill_(math.nan)
    with pytest.raises(InputError, match="the reward nan"):
        model.score(*dialogues(world, 1))


@pytest.fixture(scope="module")
def trained(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model of the toy world, trained for a few seconds on labels without noise."""
    import toy

    out = tmp_path_factory.mktemp("trained")
    pairs = toy.make_splits(seed=3, label_noise=0.0)["rm_train"][:2000]
    write_jsonl(out / "pairs.jsonl", pairs)
    reward.train(
        argparse.Namespace(
            model=str(world / "init"),
            data=str(out / "pairs.jsonl"),
            out=str(out / "rm"),
            epochs=1,
            batch_size=32,
            learning_rate=2e-3,
            norm_penalty=0.001,
            max_length=512,
            pack_tokens=4096,
            seed=0,
        )
    )
    return out / "rm"


def test_training_finds_what_is_preferred_and_scales_rewards(trained: Path, world: Path) -> None:
    report = json.loads((trained / "training.json").read_text())
    assert report["pairs"] == 100 and report["accuracy"] > 0.65
    records = reward.score_records(
        reward.load_reward_model(str(trained)), read_records(world / "rm_eval.jsonl")[:300]
    )
    rewards = torch.tensor([record["rewards"] for record in records])
    assert rewards.std().item() == pytest.approx(1, abs=0.3) and abs(rewards.mean().item()) < 0.7


def test_other_programs_get_the_same_scores_from_a_padded_batch(trained: Path, world: Path) -> None:
    model = reward.load_reward_model(str(trained))
    prompts, responses = dialogues(world, 4)
    texts = [f"{clha.render(p)} {r}</s>" for p, r in zip(prompts, responses, strict=True)]
    plain = AutoModelForSequenceClassification.from_pretrained(trained).eval()
    logits = plain(**model.tokenizer(texts, return_tensors="pt", padding=True)).logits[:, 0]
    assert logits.tolist() == pytest.approx(model.score(prompts, responses), abs=1e-4)


def test_two_processes_score_like_one(world: Path, classifier: Path, tmp_path: Path) -> None:
    records = read_records(world / "train.jsonl")[:31]
    write_jsonl(tmp_path / "data.jsonl", records)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "reward.py",
        "score",
        "--model",
        classifier,
        "--data",
        tmp_path / "data.jsonl",
        "--out",
        tmp_path / "out.jsonl",
        "--plot",
        tmp_path / "gaps.png",
    ]
    result = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    alone = reward.score_records(reward.load_reward_model(str(classifier)), records)
    together = read_records(tmp_path / "out.jsonl", need=["rewards"])
    for a, b in zip(alone, together, strict=True):
        assert a["id"] == b["id"] and a["rewards"] == pytest.approx(b["rewards"], abs=1e-5)
    assert "31 queries" in result.stdout and (tmp_path / "gaps.png").stat().st_size > 5000


def test_reward_gaps_by_hand() -> None:
    gaps = reward.reward_gaps([{"rewards": [1.0, 3.0, 0.0]}, {"rewards": [2.0, 2.5]}])
    assert sorted(gaps.tolist()) == pytest.approx([0.5, 1, 2, 3])


def test_an_out_folder_that_exists_is_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exists already"):
        reward.train(argparse.Namespace(out=str(tmp_path), seed=0))
