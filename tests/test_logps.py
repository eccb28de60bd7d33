"""Packs and their log-probabilities: exactly those that each reply has alone, by both ways."""

import gzip
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import golden
from torch import Tensor
from torch.nn.attention import flex_attention
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.integrations import flex_attention as integration

import clha
import fast
from records import InputError

MODELS = [{}, {"num_key_value_heads": 2}, {"tie_word_embeddings": True}]


def query(
    prompt: list[int], *responses: list[int], rewards: list[float] | None = None, chosen: int = 0
) -> clha.Example:
    """An encoded query."""
    replies = list(responses)
    return {"prompt_ids": prompt, "response_ids": replies, "rewards": rewards, "chosen": chosen, "cut": 0}


def random_queries(number: int, seed: int = 0) -> list[clha.Example]:
    """Queries of two to four replies of 1 to 12 tokens, prompts of 1 to 30."""
    generator = torch.Generator().manual_seed(seed)

    def draw(most: int) -> list[int]:
        length = int(torch.randint(1, most, (), generator=generator))
        return torch.randint(3, 64, (length,), generator=generator).tolist()

    replies = torch.randint(2, 5, (number,), generator=generator).tolist()
    return [query(draw(30), *(draw(12) for _ in range(n))) for n in replies]


def tiny(**more: Any) -> LlamaForCausalLM:
    """A random LLaMA of 64 tokens."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**({"vocab_size": 64} | sizes | more))).eval()


def flex_of_plain_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the kernel of flex_attention has no backward pass; made of plain operations it has."""

    def not_compiled(*tensors: Tensor, training: bool, **more: Any) -> Tensor:
        return flex_attention.flex_attention(*tensors, **more)

    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(integration, "compile_friendly_flex_attention", not_compiled)


@pytest.fixture(params=["plain", "fast"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of a pack: clha.py's own, and filled for flex_attention with the LM head in chunks."""
    if request.param == "fast":
        flex_of_plain_operations(monkeypatch)
        monkeypatch.setattr(clha, "pack", partial(clha.pack, fill_to=fast.TILE))
        monkeypatch.setattr(fast, "LOGITS", 64 * 5)


def plain_logps(model: LlamaForCausalLM, example: clha.Example) -> list[Tensor]:
    """Summed log-probability of each reply, a plain forward pass a reply, with transformers' attention."""
    model.set_attn_implementation("sdpa")
    sums, prompt = [], example["prompt_ids"]
    for response in example["response_ids"]:
        logps = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        sums.append(sum(logps[len(prompt) - 1 + t, token] for t, token in enumerate(response)))
    return sums


def padded_logps(model: LlamaForCausalLM, examples: list[clha.Example]) -> Tensor:
    """Summed log-probability of all replies, in one batch of prompt + reply rows, padded on the right."""
    model.set_attn_implementation("sdpa")
    rows = [(e["prompt_ids"], response) for e in examples for response in e["response_ids"]]
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    ids = pad([torch.tensor(prompt + response) for prompt, response in rows])
    real = pad([torch.ones(len(prompt + response)) for prompt, response in rows])
    reply = pad([torch.tensor([0] * len(prompt) + [1] * len(response)) for prompt, response in rows])
    logps = model(ids, attention_mask=real).logits.log_softmax(-1)
    return (logps[:, :-1].gather(2, ids[:, 1:, None])[:, :, 0] * reply[:, 1:]).sum(1)


def test_pack_by_a_worked_example() -> None:
    # The picture in clha.py: <s> P P P with "a a </s>" and "b b b </s>"; <s> Q with "c </s>" and "d </s>".
    batch = clha.pack(
        [
            query([1, 10, 11, 12], [20, 21, 2], [30, 31, 32, 2], rewards=[1.0, -1.0], chosen=1),
            query([1, 13], [40, 2], [50, 2], rewards=[2.0, 0.0]),
        ]
    )
    assert batch["input_ids"].tolist() == [[1, 10, 11, 12, 20, 21, 2, 30, 31, 32, 2, 1, 13, 40, 2, 50, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 0, 1, 2, 3, 2, 3]]
    assert batch["targets"].tolist() == [20, 21, 2, 30, 31, 32, 2, 40, 2, 50, 2]
    assert batch["predict_at"].tolist() == [3, 4, 5, 3, 7, 8, 9, 12, 13, 12, 15]  # 3 and 12 end the prompts
    assert batch["reply"].tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 3]
    assert batch["lengths"].tolist() == [[3, 4], [2, 2]]
    assert batch["last"].tolist() == [[6, 10], [14, 16]]
    assert batch["rewards"].tolist() == [[1.0, -1.0], [2.0, 0.0]]
    assert batch["chosen"].tolist() == [1, 0]
    assert [mask.shape for mask in clha.query_masks(batch)] == [(11, 11), (6, 6)]
    assert clha.query_masks(batch)[1].int().tolist() == [
        [1, 0, 0, 0, 0, 0],  # <s>
        [1, 1, 0, 0, 0, 0],  # Q
        [1, 1, 1, 0, 0, 0],  # c
        [1, 1, 1, 1, 0, 0],  # </s>
        [1, 1, 0, 0, 1, 0],  # d sees the prompt, not c
        [1, 1, 0, 0, 1, 1],  # </s>
    ]


def test_a_query_with_fewer_replies_leaves_its_places_empty() -> None:
    batch = clha.pack([query([1], [2], [3], [4], rewards=[3, 2, 1]), query([1], [2], [3], rewards=[1, 0])])
    assert batch["lengths"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["rewards"].isnan().tolist() == [[False] * 3, [False, False, True]]
    assert batch["reply"].tolist() == [0, 1, 2, 3, 4]  # b * 3 + i, and none for the empty place 5


def test_replies_without_rewards_have_reward_zero() -> None:
    assert clha.pack([query([1], [2], [3])])["rewards"].tolist() == [[0.0, 0.0]]


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("more", MODELS)
def test_log_probs_are_those_of_a_plain_forward_pass(more: dict[str, Any]) -> None:
    model, examples = tiny(**more), random_queries(5)
    sum_logps, lengths = clha.sequence_logps(model, clha.pack(examples))
    for b, example in enumerate(examples):
        plain = plain_logps(model, example)
        for i, response in enumerate(example["response_ids"]):
            assert sum_logps[b, i].item() == pytest.approx(plain[i].item(), abs=1e-5 * len(response))
            assert lengths[b, i] == len(response)
        assert sum_logps[b, len(plain) :].tolist() == [0] * (sum_logps.shape[1] - len(plain))


@pytest.mark.usefixtures("path")
def test_a_log_prob_does_not_depend_on_neighbours_or_other_replies() -> None:
    model, examples = tiny(), random_queries(6)
    together, _ = clha.sequence_logps(model, clha.pack(examples))
    backwards, _ = clha.sequence_logps(model, clha.pack(examples[::-1]))
    for b, example in enumerate(examples):
        alone, _ = clha.sequence_logps(model, clha.pack([example]))
        for i, response in enumerate(example["response_ids"]):
            single, _ = clha.sequence_logps(model, clha.pack([query(example["prompt_ids"], response)]))
            for other in (backwards[5 - b, i], alone[0, i], single[0, 0]):
                assert together[b, i].item() == pytest.approx(other.item(), abs=1e-5)


def gradients(model: LlamaForCausalLM, logps: Tensor) -> list[Tensor]:
    """Gradients of a weighted sum of log-probs, so that each counts differently."""
    return torch.autograd.grad((logps * torch.arange(1, len(logps) + 1)).sum(), list(model.parameters()))


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("more", MODELS)
def test_gradients_are_those_of_a_padded_batch(more: dict[str, Any]) -> None:
    model, examples = tiny(**more), random_queries(4)
    padded = gradients(model, padded_logps(model, examples))
    sum_logps, lengths = clha.sequence_logps(model, clha.pack(examples))
    for ours, theirs in zip(gradients(model, sum_logps[lengths > 0]), padded, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * theirs.abs().max().item(), rtol=0)


def test_the_model_still_generates_after_a_pack() -> None:
    model, ids = tiny(), torch.tensor([[2, 2, 1, 5, 6], [1, 7, 8, 9, 10]])
    mask = (ids != 2).long()  # the first row is padded on the left
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 2}
    before = model.generate(ids, **settings)
    clha.sequence_logps(model, clha.pack(random_queries(2)))
    assert model.config._attn_implementation == "shared_prefix"
    assert model.generate(ids, **settings).tolist() == before.tolist()


def test_attention_that_packs_do_not_have_is_refused() -> None:
    config = MistralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        sliding_window=2,
    )
    with pytest.raises(InputError, match="sliding-window"):
        clha.sequence_logps(MistralForCausalLM(config), clha.pack(random_queries(1)))


@pytest.mark.usefixtures("path")
def test_the_reference_log_probs_are_reproduced(shared: Any) -> None:
    model = LlamaForCausalLM.from_pretrained(shared / "golden/tiny_llama", dtype=torch.float32)
    examples = golden("logprobs.json")["examples"]
    for with_eos in (False, True):
        queries = []
        for example in examples:
            prompt = example["candidates"][0]["prompt_tokens"]
            rows = [c["input_ids"][: c["n_text_tokens"]] + [2] * with_eos for c in example["candidates"]]
            queries.append(query(rows[0][:prompt], *(row[prompt:] for row in rows)))
        sum_logps, lengths = clha.sequence_logps(model, clha.pack(queries))
        for b, example in enumerate(examples):
            for i, candidate in enumerate(example["candidates"]):
                values = candidate["own_float64"]
                expected = values["sum_logp_without_eos"] + with_eos * values["logp_eos_after_last_token"]
                n = lengths[b, i].item()
                assert sum_logps[b, i].item() / n == pytest.approx(expected / n, abs=1e-4)


@pytest.mark.usefixtures("path")
def test_real_replies_have_the_log_probs_they_have_alone(shared: Path) -> None:
    path = shared / "hh/release_format/sampled_dev.json.gz"
    if not path.is_file():
        pytest.skip("../shared/hh/release_format/sampled_dev.json.gz is not here")
    with gzip.open(path, "rt") as file:
        rows = [json.loads(next(file)) for _ in range(4)]
    tokenizer = AutoTokenizer.from_pretrained(shared / "llama_tokenizer")
    examples = []
    for row in rows:
        first_turn = {"role": "user", "content": row["prefix"][0][0].removeprefix("<|prompter|>")}
        examples.append(clha.encode({"prompt": [first_turn], "responses": row["suffix"]}, tokenizer))
    model = tiny(vocab_size=len(tokenizer))
    sum_logps, _ = clha.sequence_logps(model, clha.pack(examples))
    for b, example in enumerate(examples):
        assert [response[-1] for response in example["response_ids"]] == [2, 2]  # nothing was cut: EOS counts
        for i, plain in enumerate(plain_logps(model, example)):
            n = len(example["response_ids"][i])
            assert sum_logps[b, i].item() / n == pytest.approx(plain.item() / n, abs=1e-5)
