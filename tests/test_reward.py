"""Reward models: Eq. 1 by hand, scores that packing does not change, training, work that can be stopped."""

import argparse
import json
import math
import multiprocessing
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import clha
import reward
from clha import InputError, Record, Turn

# ------------------------------------------------------------------------------------------------------------
# Tiny models, and records for them

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}


def make_tokenizer(specials: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes: a text begins with <s>."""
    tokens = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if "<s>" in specials:
        bos = [("<s>", specials.index("<s>"))]
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=bos)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer(["<pad>", "<s>", "</s>"])
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"})
    return tokenizer


@pytest.fixture(scope="module")
def base(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaMA, to train reward models from."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SIZES)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifier(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaMA reward model."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=0, **SIZES)
    model = LlamaForSequenceClassification(config)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_records(number: int) -> list[Record]:
    """Queries of two or three responses of many lengths; the chosen one begins with "Good"."""
    records = []
    for i in range(number):
        prompt = [{"role": "user", "content": f"Say {'a ' * (i % 7)}{i}"}]
        responses = [f"No {i}", f"Not {i * i}", "None"][: 2 + (i % 3 == 0)]
        chosen = i % len(responses)
        responses[chosen] = f"Good {i % 5}" * (1 + i % 2)
        records.append({"prompt": prompt, "responses": responses, "chosen": chosen, "id": f"q{i}"})
    return records


def shuffled_responses(number: int) -> tuple[list[list[Turn]], list[str]]:
    """Prompts with responses, a prompt per response, in mixed order."""
    pairs = [(record["prompt"], text) for record in make_records(number) for text in record["responses"]]
    pairs = pairs[::2] + pairs[1::2]
    return [prompt for prompt, _ in pairs], [response for _, response in pairs]


# ------------------------------------------------------------------------------------------------------------
# Parts of scoring, by hand


def log_sigmoid(x: float) -> float:
    """log(1 / (1 + e^-x))"""
    return -math.log1p(math.exp(-x))


def test_eq_1_by_hand() -> None:
    # Query 1 has three responses, the second is chosen: the mean of -log s(2 - 1) and -log s(2 - -1); its
    # mean square is (1 + 4 + 1) / 3 = 2. Query 2 has two, the first chosen: -log s(0 - 1), mean square 0.5.
    losses = [
        reward.reward_loss(torch.tensor([1.0, 2.0, -1.0]), 1, 0.1),
        reward.reward_loss(torch.tensor([0.0, 1.0]), 0, 0.1),
    ]
    first = -(log_sigmoid(1) + log_sigmoid(3)) / 2 + 0.1 * 2
    second = -log_sigmoid(-1) + 0.1 * 0.5
    assert [loss.item() for loss in losses] == pytest.approx([first, second])


def test_texts_share_what_they_begin_with_and_keep_a_token_each() -> None:
    query = reward.share_prefix([[1, 2, 3, 4], [1, 2, 5], [1, 2, 3]])
    assert query == {"prompt_ids": [1, 2], "response_ids": [[3, 4], [5], [3]], "size": 6, "longest": 4}
    assert reward.share_prefix([[1, 2], [1, 2]])["response_ids"] == [[2], [2]]
    assert reward.share_prefix([[1, 2, 3], [1]])["response_ids"] == [[1, 2, 3], [1]]
    assert reward.share_prefix([[7, 8]])["prompt_ids"] == [7]


def test_chunks_hold_all_queries_and_keep_to_the_budget_even_when_padded() -> None:
    sizes = [5, 50, 9, 9, 120, 30]
    parts = list(reward.chunks(sizes, 60))
    assert parts == [[0, 2, 3], [5], [1], [4]]  # 3 x 9 fit, 4 x 30 do not
    assert list(reward.chunks([], 60)) == []
    assert list(reward.chunks([20, 20, 20], 60)) == [[0, 1, 2]]


def test_filled_packs_have_few_lengths() -> None:
    gpu = torch.device("cuda")
    lengths = [reward.filled_length(n, gpu) for n in (1, 128, 129, 256, 257, 8192)]
    assert lengths == [128, 128, 256, 256, 512, 8192]
    assert reward.filled_length(5, torch.device("cpu")) == 0


# ------------------------------------------------------------------------------------------------------------
# Scores


def test_scores_are_those_of_a_plain_forward_pass_in_the_given_order(classifier: Path) -> None:
    model = reward.load_reward_model(str(classifier), pack_tokens=200)
    prompts, responses = shuffled_responses(12)
    scores = model.score(prompts, responses)
    plain = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    for prompt, response, score in zip(prompts, responses, scores, strict=True):
        ids = model.tokenizer(f"\n\nHuman: {prompt[0]['content']}\n\nAssistant: {response}</s>")
        assert ids.input_ids[0] == 1 and ids.input_ids[-1] == 2
        assert plain(torch.tensor([ids.input_ids])).logits.item() == pytest.approx(score, abs=1e-5)
    assert len({round(score, 4) for score in scores}) > 10
    assert model.score([], []) == []


def test_a_prompt_is_computed_once_wherever_its_responses_are(
    classifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = reward.load_reward_model(str(classifier))
    prompts, responses = shuffled_responses(4)
    computed = []
    forward = clha.hidden_states

    def counted(decoder: Any, pack: clha.Pack) -> Tensor:
        computed.append(pack.input_ids.numel())
        return forward(decoder, pack)

    monkeypatch.setattr(clha, "hidden_states", counted)
    model.score(prompts, responses)
    apart = sum(len(ids) for ids in model.encode(prompts, responses))
    shared = 0
    for record in make_records(4):
        texts = model.encode([record["prompt"]] * len(record["responses"]), record["responses"])
        shared += reward.share_prefix(texts)["size"]
    assert sum(computed) == shared < apart / 1.5


def test_packs_filled_for_flex_attention_give_the_same_scores(
    classifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = reward.load_reward_model(str(classifier), pack_tokens=300)
    prompts, responses = shuffled_responses(4)
    expected = model.score(prompts, responses)
    gpu = torch.device("cuda")
    length = reward.filled_length  # as on a GPU, but nothing is compiled
    monkeypatch.setattr(reward, "filled_length", lambda tokens, _: length(tokens, gpu))
    with torch.compiler.set_stance("force_eager"):
        assert model.score(prompts, responses) == pytest.approx(expected, abs=1e-5)


def test_an_encoder_scores_the_same_in_any_batch(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=0, **SIZES)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = reward.load_reward_model(str(tmp_path), pack_tokens=300)
    prompts, responses = shuffled_responses(6)
    one_by_one = [model.score([p], [r])[0] for p, r in zip(prompts, responses, strict=True)]
    assert len(set(one_by_one)) > 6
    assert model.score(prompts, responses) == pytest.approx(one_by_one, abs=1e-5)
    with pytest.raises(InputError, match="is an encoder"):
        reward.start_from(str(tmp_path), max_length=256, pack_tokens=1000)


def test_a_long_text_fits_the_positions_of_a_roberta(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = RobertaConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=1, **SIZES)
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = reward.load_reward_model(str(tmp_path), max_length=2048)
    assert model.max_length == SIZES["max_position_embeddings"] - 2  # two are of padding
    [score] = model.score([[{"role": "user", "content": "Why? " * 200}]], ["So."])
    assert math.isfinite(score)


WRONG = {
    "alibi": {"model_type": "bloom"},
    "a window shorter than a text": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 20},
    "a state": {"model_type": "qwen3_next", "layer_types": ["linear_attention", "full_attention"]},
    "sinks": {
        "model_type": "gpt_oss",
        "num_key_value_heads": 2,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    },
}


@pytest.mark.parametrize("settings", WRONG.values(), ids=WRONG)
def test_architectures_that_packs_would_score_wrongly_are_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, settings: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        **settings, vocab_size=len(tokenizer), num_labels=1, initializer_range=0.3, **SIZES
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = reward.load_reward_model(str(tmp_path))
    with pytest.raises(
        InputError, match=f"^{settings['model_type']}: (not supported|a text is longer)"
    ) as caught:
        model.score(*shuffled_responses(6))
    assert "\n" not in str(caught.value)


def test_one_text_longer_than_the_window_is_refused_whatever_the_others_are(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    sizes = SIZES | {"num_key_value_heads": 2, "sliding_window": 64, "num_labels": 1}
    config = AutoConfig.for_model("mistral", vocab_size=len(tokenizer), **sizes)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = reward.load_reward_model(str(tmp_path))
    ids = list(range(5, 55))
    group = [[*ids, token] for token in range(60, 65)]  # together longer than the one text
    assert len(model.score_ids(group, [[0, 1, 2, 3, 4]])) == 5
    with pytest.raises(
        InputError,
        match="mistral: a text is longer than the sliding_window; choose a --max_length of at most 64",
    ):
        model.score_ids([*group, ids + ids], [[0, 1, 2, 3, 4], [5]])


def with_template(classifier: Path, folder: Path, template: str) -> Path:
    """A copy of a model folder with a chat template."""
    shutil.copytree(classifier, folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def test_a_chat_template_is_used_where_a_model_has_one(classifier: Path, tmp_path: Path) -> None:
    template = "<s>{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}</s>"
    chat = reward.load_reward_model(str(with_template(classifier, tmp_path / "chat", template)))
    (ids,) = chat.encode([[{"role": "user", "content": "Hi"}]], ["Yes"])
    assert chat.tokenizer.decode(ids) == "<s>user=Hi;assistant=Yes;</s>"
    assert ids.count(1) == 1  # BOS is the template's, and not added again


@pytest.mark.parametrize("template", ["{{ raise_exception('roles') }}", "{% if %}", "{{ 1 / 0 }}"])
def test_a_chat_template_that_fails_is_named_when_the_model_is_loaded(
    classifier: Path, tmp_path: Path, template: str
) -> None:
    folder = with_template(classifier, tmp_path / "chat", template)
    with pytest.raises(InputError, match=r"chat: the chat template does not take \[{'role': 'user',"):
        reward.load_reward_model(str(folder))


def test_rewards_that_are_no_numbers_are_refused(classifier: Path) -> None:
    model = reward.load_reward_model(str(classifier))
    model.model.score.weight.data.fill_(math.nan)
    with pytest.raises(InputError, match="gives a text a reward that is not finite"):
        model.score(*shuffled_responses(1))


def test_a_model_without_a_reward_head_is_refused(base: Path, classifier: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has 2 outputs, not one"):
        reward.load_reward_model(str(base))
    shutil.copytree(base, tmp_path / "no_head")
    settings = json.loads((base / "config.json").read_text())
    settings |= {"id2label": {"0": "r"}, "label2id": {"r": 0}}
    (tmp_path / "no_head" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"no weights for score\.weight"):
        reward.load_reward_model(str(tmp_path / "no_head"))
    with pytest.raises(InputError, match="nowhere: neither a model folder"):
        reward.load_reward_model("nowhere")


def more_tokens(folder: Path) -> None:
    settings = json.loads((folder / "tokenizer.json").read_text())
    settings["model"]["vocab"]["new"] = len(settings["model"]["vocab"])
    (folder / "tokenizer.json").write_text(json.dumps(settings))


def bare_sentencepiece(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (more_tokens, "the tokenizer has 260 tokens, the model 259"),
        (bare_sentencepiece, "tokenizer.model alone gives wrong ids; it needs a tokenizer.json"),
    ],
)
def test_a_model_that_would_give_wrong_scores_is_refused(
    classifier: Path, tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    shutil.copytree(classifier, tmp_path / "rm")
    change(tmp_path / "rm")
    with pytest.raises(InputError, match=re.escape(message)):
        reward.load_reward_model(str(tmp_path / "rm"))


# ------------------------------------------------------------------------------------------------------------
# Open-Assistant's format, as transformers 4.28 saved it

TAGS = ["<|endoftext|>", "<|padding|>", "<|system|>", "<|prompter|>", "<|assistant|>"]
OASST_CONFIG = {
    "architectures": ["GPTNeoXRewardModel"],
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "gelu",
    "hidden_size": 32,
    "intermediate_size": 64,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 96,
    "model_type": "gpt_neox_reward_model",
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "pad_token_id": 1,
    "pooling": "last",
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.28.1",
    "use_parallel_residual": True,
    "vocab_size": 261,
}


def oasst_weights() -> dict[str, Tensor]:
    """Random weights under the names of an Open-Assistant checkpoint, in float16."""
    linear = {"attention.query_key_value": (96, 32), "attention.dense": (32, 32)}
    linear |= {"mlp.dense_h_to_4h": (64, 32), "mlp.dense_4h_to_h": (32, 64)}
    shapes: dict[str, tuple[int, ...]] = {"gpt_neox.embed_in.weight": (261, 32)}
    norms = ["gpt_neox.final_layer_norm"]
    layers = {"out_proj": (1, 32)}
    for layer in range(2):
        norms += [f"gpt_neox.layers.{layer}.{name}_layernorm" for name in ("input", "post_attention")]
        layers |= {f"gpt_neox.layers.{layer}.{name}": shape for name, shape in linear.items()}
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.weight": (32,), f"{name}.bias": (32,)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).mul(0.3).half() for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def oasst(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Open-Assistant reward model: float16 in a .bin, with buffers that newer versions do not have."""
    folder = tmp_path_factory.mktemp("oasst")
    (folder / "config.json").write_text(json.dumps(OASST_CONFIG))
    tokenizer = make_tokenizer(TAGS)
    tokenizer.add_special_tokens(
        {
            "bos_token": TAGS[0],
            "eos_token": TAGS[0],
            "pad_token": TAGS[1],
            "additional_special_tokens": TAGS[2:],
        }
    )
    tokenizer.save_pretrained(folder)
    stale = {}
    for layer in range(2):
        name = f"gpt_neox.layers.{layer}.attention"
        stale |= {f"{name}.bias": torch.ones(1, 1, 96, 96).tril().bool()}
        stale |= {f"{name}.masked_bias": torch.tensor(-1e9), f"{name}.rotary_emb.inv_freq": torch.ones(2)}
    torch.save(oasst_weights() | stale, folder / "pytorch_model.bin")
    return folder


def neox_reward(ids: list[int]) -> float:
    """GPT-NeoX and the head on its last token, written out: one text, no cache, no library."""
    weights = {name: weight.float() for name, weight in oasst_weights().items()}
    heads, width, rotary = 2, 16, 4  # a quarter of each head is rotated

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def rotate(x: Tensor) -> Tensor:  # (heads, n, width)
        frequency = 10000.0 ** (-torch.arange(0, rotary, 2) / rotary)
        angle = torch.outer(torch.arange(x.shape[1]), frequency)  # (n, rotary / 2)
        a, b, rest = x.split([rotary // 2, rotary // 2, width - rotary], dim=-1)
        turned = [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), rest]
        return torch.cat(turned, dim=-1)

    x = weights["gpt_neox.embed_in.weight"][ids]
    future = torch.ones(len(ids), len(ids)).triu(1).bool()
    for layer in range(2):
        name = f"gpt_neox.layers.{layer}"
        states = linear(norm(x, f"{name}.input_layernorm"), f"{name}.attention.query_key_value")
        q, k, v = states.view(-1, heads, 3, width).permute(2, 1, 0, 3)  # (heads, n, width) each
        logits = rotate(q) @ rotate(k).transpose(1, 2) / width**0.5
        attended = logits.masked_fill(future, -math.inf).softmax(-1) @ v
        attention = linear(attended.transpose(0, 1).reshape(len(ids), -1), f"{name}.attention.dense")
        inner = F.gelu(linear(norm(x, f"{name}.post_attention_layernorm"), f"{name}.mlp.dense_h_to_4h"))
        x = x + attention + linear(inner, f"{name}.mlp.dense_4h_to_h")  # in parallel
    return linear(norm(x, "gpt_neox.final_layer_norm"), "out_proj")[-1].item()


def test_open_assistant_scores_by_hand(oasst: Path) -> None:
    model = reward.load_reward_model(str(oasst))
    prompt = [
        {"role": "system", "content": "Be"},
        {"role": "user", "content": "Hi\nthere "},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "é?"},
    ]
    responses = ["So.", "So it is."]
    expected = []
    for response in responses:
        text = f"<|system|>Be{TAGS[0]}<|prompter|>Hi\nthere {TAGS[0]}<|assistant|>Hello{TAGS[0]}"
        ids = model.tokenizer(f"{text}<|prompter|>é?{TAGS[0]}<|assistant|>{response}{TAGS[0]}").input_ids
        assert ids[0] == 2 and ids[-1] == 0 and ids.count(0) == 5  # no BOS, an EOS after each turn
        expected.append(neox_reward(ids))
    assert abs(expected[0] - expected[1]) > 0.01
    assert model.score([prompt] * 2, responses) == pytest.approx(expected, abs=1e-4)


def test_a_long_text_loses_its_beginning(oasst: Path) -> None:
    model = reward.load_reward_model(str(oasst))
    assert model.max_length == 96  # of its positions
    long = [{"role": "user", "content": "why " * 40}]
    responses = ["because.", "because of this and that."]  # they leave different parts of the prompt
    rows = model.encode([long] * 2, responses)
    for response, ids in zip(responses, rows, strict=True):
        whole = model.tokenizer(
            f"<|prompter|>{'why ' * 40}{TAGS[0]}<|assistant|>{response}{TAGS[0]}"
        ).input_ids
        assert len(whole) > 96 and ids == whole[-96:]
    expected = [neox_reward(ids) for ids in rows]
    assert model.score([long] * 2, responses) == pytest.approx(expected, abs=1e-4)


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
    assert len(scores) == 24
    assert scores == pytest.approx([case["score"] for case in cases], abs=2e-5)


# ------------------------------------------------------------------------------------------------------------
# What scored records look like

SCORED = [  # gaps 1.5, 2.25, .75; 0; .5; 3.25
    {"rewards": [-1.5, 0.0, 0.75], "chosen": 2},
    {"rewards": [0.0, 0.0], "chosen": 1},
    {"rewards": [0.25, 0.75], "chosen": 0},
    {"rewards": [-4.0, -0.75]},
]
SUMMARY = """\
4 queries, rewards -0.500 +- 1.490; the best response is above 0 (gate open) in 50.0% \
of them, and is the chosen one in 66.7%

| reward gap | > 0 | > 0.1 | > 0.25 | > 0.5 | > 1 | > 2 | > 3 |
| --- | --- | --- | --- | --- | --- | --- | --- |
| pairs | 83.3% | 83.3% | 83.3% | 66.7% | 50.0% | 33.3% | 16.7% |"""


def test_reward_gaps_by_hand() -> None:
    assert sorted(reward.reward_gaps(SCORED).tolist()) == pytest.approx([0, 0.5, 0.75, 1.5, 2.25, 3.25])


def test_the_summary_by_hand() -> None:
    # A gap of exactly 0.5 is not above it; a best reward of exactly 0 does not open the gate. Of the three
    # labelled queries the chosen response is the best in the first and (a tie) the second.
    assert reward.summary(SCORED) == SUMMARY
    assert "chosen" not in reward.summary(SCORED[3:])
    assert reward.summary([{"rewards": [1, 2]}]).startswith("1 queries, rewards 1.500 +- 0.707; ")


# ------------------------------------------------------------------------------------------------------------
# Training


def settings_of_training(base: Path, data: Path, out: Path, **more: Any) -> argparse.Namespace:
    """Settings of a training run that is done in seconds."""
    settings = {"model": str(base), "data": str(data), "out": str(out), "epochs": 2.0, "batch_size": 16}
    settings |= {
        "learning_rate": 5e-3,
        "norm_penalty": 0.001,
        "max_length": 256,
        "pack_tokens": 1024,
        "template": "auto",
        "seed": 0,
    }
    return argparse.Namespace(**(settings | more))


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A reward model trained for a few seconds; the prompts of its updates, and those it was measured on."""
    out = tmp_path_factory.mktemp("trained")
    reward.write_jsonl(out / "pairs.jsonl", make_records(200))
    prompts: dict[bool, set[str]] = {True: set(), False: set()}
    rewards = reward.RewardModel.rewards

    def noted(model: reward.RewardModel, queries: list[clha.Example]) -> Tensor:
        texts = [model.tokenizer.decode(query["prompt_ids"] + query["response_ids"][0]) for query in queries]
        prompts[torch.is_grad_enabled()] |= {text.split("\n\n")[1] for text in texts}
        return rewards(model, queries)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            reward.RewardModel, "score_ids", lambda *_: []
        )  # the check of packs, on a training query
        patch.setattr(reward.RewardModel, "rewards", noted)
        reward.train(settings_of_training(base, out / "pairs.jsonl", out / "rm"))
    return {"path": out / "rm", "trained_on": prompts[True], "measured_on": prompts[False]}


def test_training_finds_what_is_preferred_on_queries_it_has_not_seen(trained: dict[str, Any]) -> None:
    assert len(trained["measured_on"]) == 10 and len(trained["trained_on"]) == 190
    assert not trained["measured_on"] & trained["trained_on"]
    report = json.loads((trained["path"] / "training.json").read_text())
    assert report["accuracy"] > 0.9 and report["batch_size"] == 16
    assert not [path for path in trained["path"].parent.iterdir() if path.name not in ("rm", "pairs.jsonl")]


@pytest.mark.parametrize(
    ("same", "settings", "message"),
    [
        (False, {"learning_rate": 1e30}, r"--learning_rate 1e\+30: the loss of step \d+ is nan"),
        (True, {"epochs": 1}, "held-out rewards have a standard deviation of"),
    ],
)
def test_training_that_fails_saves_no_model(
    same: bool, settings: dict[str, Any], message: str, base: Path, tmp_path: Path
) -> None:
    records = make_records(60)
    if same:  # which tell nothing
        records = [records[0] | {"id": str(i), "responses": ["So."] * 2, "chosen": 0} for i in range(60)]
    reward.write_jsonl(tmp_path / "pairs.jsonl", records)
    with pytest.raises(InputError, match=message):
        reward.train(settings_of_training(base, tmp_path / "pairs.jsonl", tmp_path / "rm", **settings))
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_the_report_is_what_the_saved_model_gives_in_units_of_its_deviation(
    trained: dict[str, Any], tmp_path: Path
) -> None:
    report = json.loads((trained["path"] / "training.json").read_text())
    held_out = []
    for record in make_records(200):
        if f"Human: {record['prompt'][0]['content']}" in trained["measured_on"]:
            held_out.append(record)
    right = 0
    pairs = 0
    rewards = []
    reward.write_scores(reward.load_reward_model(str(trained["path"])), held_out, tmp_path / "scored.jsonl")
    for record in reward.read_records(tmp_path / "scored.jsonl"):
        best = record["rewards"][record["chosen"]]
        right += sum(best > other for other in record["rewards"])
        pairs += len(record["rewards"]) - 1
        rewards += record["rewards"]
    rewards = torch.tensor(rewards)
    assert (report["accuracy"], report["pairs"]) == (right / pairs, pairs)
    assert rewards.std().item() == pytest.approx(1, abs=1e-4) and abs(report["scale"] - 1) > 0.1
    assert rewards.mean().item() == pytest.approx(report["mean_reward"], abs=1e-4)


def test_other_programs_get_the_same_scores_from_a_padded_batch(trained: dict[str, Any]) -> None:
    model = reward.load_reward_model(str(trained["path"]))
    prompts, responses = shuffled_responses(4)
    texts = [f"{clha.render(p)} {r}</s>" for p, r in zip(prompts, responses, strict=True)]
    plain = AutoModelForSequenceClassification.from_pretrained(trained["path"]).eval()
    logits = plain(**model.tokenizer(texts, return_tensors="pt", padding=True)).logits[:, 0]
    assert logits.tolist() == pytest.approx(model.score(prompts, responses), abs=1e-4)


def test_a_chat_model_that_pads_with_eos_is_scored_as_it_was_trained(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "chat")
    tokenizer = clha.load_tokenizer(str(base))
    tokenizer.pad_token = tokenizer.eos_token
    turn = "{{ turn.role }}: {{ turn.content }}{{ eos_token }}"
    tokenizer.chat_template = "{{ bos_token }}{% for turn in messages %}" + turn + "{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "chat")
    reward.write_jsonl(tmp_path / "pairs.jsonl", make_records(20))
    settings = {"epochs": 1.0, "batch_size": 19}
    reward.train(
        settings_of_training(tmp_path / "chat", tmp_path / "pairs.jsonl", tmp_path / "rm", **settings)
    )
    model = reward.load_reward_model(str(tmp_path / "rm"))
    prompts, responses = shuffled_responses(1)
    (ids,) = model.encode(prompts[:1], responses[:1])
    turns = [*prompts[0], {"role": "assistant", "content": responses[0]}]
    assert ids == tokenizer.apply_chat_template(turns, return_dict=False)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    logit = plain(torch.tensor([ids])).logits.item()  # at EOS, which is not taken for padding
    assert logit == pytest.approx(model.score(prompts[:1], responses[:1])[0], abs=1e-5)


def test_an_update_does_not_depend_on_the_packs(base: Path) -> None:
    weights = []
    for pack_tokens in (60, 100000):
        torch.manual_seed(0)
        model = reward.start_from(str(base), 256, pack_tokens)
        batch = [reward.labeled_query(model, record) for record in make_records(7)]
        optimizer = torch.optim.SGD(model.model.parameters(), 0.1)
        with torch.no_grad():
            rows = [model.rewards([query])[0] for query in batch]
        losses = [reward.reward_loss(row, q["chosen"], 0.1) for row, q in zip(rows, batch, strict=True)]
        expected = torch.stack(losses).mean().item()
        assert reward.train_step(model, optimizer, batch, 0.1) == pytest.approx(expected, abs=1e-5)
        weights.append(torch.nn.utils.parameters_to_vector(model.model.parameters()))
    torch.testing.assert_close(weights[0], weights[1], atol=1e-6, rtol=0)
    start = torch.nn.utils.parameters_to_vector(reward.start_from(str(base), 256, 60).model.parameters())
    assert (weights[0] - start).norm() > 0.01


# ------------------------------------------------------------------------------------------------------------
# Long work


class Stopped(Exception):
    """Stands for what ends a program in the middle of its work."""


def stop_at(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends the program when rows are gathered for this time."""
    gather = reward.gather
    calls = []

    def stopping(mine: list[Any], total: int) -> list[Any]:
        calls.append(total)
        if len(calls) == call:
            raise Stopped
        return gather(mine, total)

    monkeypatch.setattr(reward, "gather", stopping)


def multiply(out: Path, factor: int, done: list[int] | None = None, first: int = 0) -> None:
    """Long work in parts of two: six numbers times a factor; `done` gets the places it worked on."""

    def work(share: list[Any], start: int) -> list[Record]:
        if done is not None:
            done.extend(range(start, start + len(share)))
        return [{"n": item * factor} for item in share]

    reward.write_in_parts(out, list(range(first, first + 6)), ["times", factor], work, 2, "test")


def numbers(path: Path) -> list[int]:
    return [row["n"] for _, row in clha.read_jsonl(path)]


def test_scoring_goes_on_where_it_was_stopped(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = reward.load_reward_model(str(classifier))
    records = [{"prompt": [{"role": "user", "content": "?"}], "responses": [str(i), "b"]} for i in range(600)]
    scored = []

    def lengths(_: Any, responses: list[str]) -> list[float]:
        scored.append(len(responses))
        return [float(len(response)) for response in responses]

    monkeypatch.setattr(model, "score", lengths)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(2, patch)
        reward.write_scores(model, records, tmp_path / "out.jsonl")
    (partial,) = tmp_path.glob("out.jsonl.*.partial")
    assert len(partial.read_text().splitlines()) == 512 and not (tmp_path / "out.jsonl").exists()
    with partial.open("a") as file:
        file.write('{"of": "a part that was not finished"}\n{"torn": ')
    reward.write_scores(model, records, tmp_path / "out.jsonl")
    assert scored == [1024, 176, 176]  # the first part only once
    expected = [record | {"rewards": [float(len(str(i))), 1.0]} for i, record in enumerate(records)]
    assert [row for _, row in clha.read_jsonl(tmp_path / "out.jsonl")] == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def scorer(name: str, max_length: int, value: float) -> Any:
    """Stands for a reward model that gives every response the same reward."""
    model = SimpleNamespace(name_or_path=name)
    return SimpleNamespace(model=model, max_length=max_length, score=lambda _, texts: [value] * len(texts))


@pytest.mark.parametrize(("name", "max_length"), [("a/model", 100), ("b/model", 200)])
def test_scores_of_another_model_or_of_shorter_texts_are_not_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, max_length: int
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(2, patch)
        reward.write_scores(scorer("a/model", 200, 1.0), make_records(513), tmp_path / "out.jsonl")
    reward.write_scores(scorer(name, max_length, 2.0), make_records(513), tmp_path / "out.jsonl")
    rewards = {reward for _, row in clha.read_jsonl(tmp_path / "out.jsonl") for reward in row["rewards"]}
    assert rewards == {2.0}


def test_work_of_other_settings_or_on_other_items_is_neither_taken_over_nor_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(3, patch)
        multiply(out, 3)
    done: list[int] = []
    multiply(out, 5, done)
    assert numbers(out) == [0, 5, 10, 15, 20, 25] and done == [0, 1, 2, 3, 4, 5]
    done.clear()
    multiply(out, 3, done, first=1)
    assert numbers(out) == [3, 6, 9, 12, 15, 18] and done == [0, 1, 2, 3, 4, 5]
    done.clear()
    multiply(out, 3, done)
    assert numbers(out) == [0, 3, 6, 9, 12, 15] and done == [4, 5]
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_two_programs_do_not_write_the_same_file(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"

    def work(share: list[Any], _: int) -> list[Any]:
        for factor in (1, 2):  # the same work, and other work
            with pytest.raises(InputError, match=r"out\.jsonl: another program is writing it"):
                multiply(out, factor)
        return [{"n": item} for item in share]

    reward.write_in_parts(out, [7, 8], ["times", 1], work, 1, "first")
    assert numbers(out) == [7, 8]
    multiply(out, 2)  # the lock went with the program that had it
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_nothing_to_do_is_an_empty_file(tmp_path: Path) -> None:
    reward.write_in_parts(tmp_path / "a" / "out.jsonl", [], [], lambda share, start: [], 2, "test")
    assert (tmp_path / "a" / "out.jsonl").read_text() == ""


def test_a_model_that_was_saved_again_is_another_one(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    before = reward.fingerprint(tmp_path / "model")
    assert reward.fingerprint(tmp_path / "model") == before
    (tmp_path / "model" / "config.json").write_text("a longer text")
    assert reward.fingerprint(tmp_path / "model") != before
    assert reward.fingerprint("owner/name") == ["owner/name"]


def in_two_processes(target: Callable[..., None], *args: Any) -> None:
    """Runs target(rank, *args) in two forked processes of one group."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=target, args=(rank, *args)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0, 0]


def test_score_standardizes_from_end_to_end(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reward.write_jsonl(tmp_path / "data.jsonl", make_records(9))
    found = {}
    for name, flags in (("raw", []), ("train", ["--standardize", str(tmp_path / "scale.json")])):
        words = ["score", "--model", str(classifier), "--data", str(tmp_path / "data.jsonl")]
        monkeypatch.setattr(sys, "argv", ["reward.py", *words, "--out", str(tmp_path / name), *flags])
        reward.main()
        rows = reward.read_records(tmp_path / name, need=["rewards"])
        found[name] = torch.tensor([value for row in rows for value in row["rewards"]])
    expected = (found["raw"] - found["raw"].mean()) / found["raw"].std()
    torch.testing.assert_close(found["train"], expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "raw", "scale.json", "train"]


def score_in_group(rank: int, folder: Path, classifier: Path) -> None:
    """One of two processes of `reward.py score`, then one of other work."""
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    sys.argv = ["reward.py", "score", "--model", str(classifier), "--data", str(folder / "data.jsonl")]
    sys.argv += ["--out", str(folder / "scored.jsonl"), "--plot", str(folder / "gaps.png")]
    with (folder / f"{rank}.txt").open("w") as sys.stdout:
        reward.main()
    multiply(folder / "out.jsonl", 3)


def test_two_processes_do_the_work_of_one(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    records = make_records(31)
    reward.write_jsonl(tmp_path / "data.jsonl", records)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(2, patch)
        multiply(tmp_path / "out.jsonl", 3)  # begun by one process, finished by two
    dist.destroy_process_group()  # it is not to be forked
    in_two_processes(score_in_group, tmp_path, classifier)
    reward.write_scores(reward.load_reward_model(str(classifier)), records, tmp_path / "alone.jsonl")
    alone = reward.read_records(tmp_path / "alone.jsonl", need=["rewards"])
    together = reward.read_records(tmp_path / "scored.jsonl", need=["rewards"])
    for a, b in zip(alone, together, strict=True):
        assert a["id"] == b["id"] and a["rewards"] == pytest.approx(b["rewards"], abs=1e-5)
    assert numbers(tmp_path / "out.jsonl") == [0, 3, 6, 9, 12, 15]
    assert (tmp_path / "0.txt").read_text().startswith("31 queries, rewards ")
    assert (tmp_path / "1.txt").read_text() == ""
    assert (tmp_path / "gaps.png").stat().st_size > 5000


# ------------------------------------------------------------------------------------------------------------
# Wrong input

GOOD = {"prompt": [{"role": "user", "content": "How?"}], "responses": ["So.", "No."]}
SCORE = "score --model {rm} --data {file} --out {out}"
TRAIN = "train --model {base} --data {file} --out {out}"
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("", GOOD, "required: command"),
    (SCORE + " --what", GOOD, "unrecognized arguments: --what"),
    (SCORE + " --pack_tokens -5", GOOD, "--pack_tokens -5: must be"),
    (SCORE + " --max_length 0", GOOD, "--max_length 0: must be"),
    (SCORE + " --out {base}", GOOD, "already exists"),
    (SCORE + " --out {file}/x.jsonl", GOOD, "data.jsonl is a file"),
    (SCORE + " --plot {out}/gaps.xyz", GOOD, "gaps.xyz: the name must end in one of "),
    (SCORE + " --plot {file}/gaps.png", GOOD, "data.jsonl is a file"),
    (SCORE + " --model {base}", GOOD, "has 2 outputs, not one"),
    (SCORE, {"prompt": "How?"}, 'data.jsonl, line 1: "prompt" must be a list'),
    (TRAIN, GOOD, 'data.jsonl, line 1: "chosen" must be the index'),
    (TRAIN, GOOD | {"chosen": 2}, '"chosen" must be the index of a response'),
    (
        TRAIN,
        GOOD | {"chosen": 1},
        "data.jsonl: 0 records to train on (5 % are held out) make no step of --batch_size 64",
    ),
    (TRAIN + " --out {base}", GOOD, "already exists"),
    (TRAIN + " --batch_size 0", GOOD, "--batch_size 0: must be"),
    (TRAIN + " --epochs -1", GOOD, "--epochs -1.0: must be "),
    (TRAIN + " --norm_penalty nan", GOOD, "--norm_penalty nan: must be"),
    (TRAIN + f" --seed {2**64}", GOOD, f"--seed {2**64}: must be"),
    (
        TRAIN + " --model {torn}",
        GOOD | {"chosen": 0},
        "torn: has no weights for model.layers.0.mlp.up_proj.weight ...",
    ),
]


@pytest.fixture(scope="module")
def torn(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model one of whose weights is missing."""
    folder = tmp_path_factory.mktemp("models") / "torn"
    model = LlamaForCausalLM.from_pretrained(base)
    weights = model.state_dict()
    weights.pop("model.layers.0.mlp.up_proj.weight")
    model.save_pretrained(folder, state_dict=weights)
    clha.load_tokenizer(str(base)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("words", "record", "message"), WRONG)
def test_wrong_input_is_told_in_a_line_and_leaves_nothing(
    base: Path,
    classifier: Path,
    torn: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: str,
    record: dict[str, Any],
    message: str,
) -> None:
    file = tmp_path / "data.jsonl"
    reward.write_jsonl(file, [record])
    names = {"base": base, "rm": classifier, "torn": torn, "file": file, "out": tmp_path / "out"}
    monkeypatch.setattr(sys, "argv", ["reward.py", *words.format(**names).split()])
    with pytest.raises(InputError, match=re.escape(message)) as error:
        reward.main()
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]
