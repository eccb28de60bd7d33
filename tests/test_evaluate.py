"""Evaluation: greedy responses whatever the model's folder says, the paper's BLEU, files and tables."""

import functools
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

import clha
import evaluate
import reward
from clha import InputError, Record

Program = Callable[..., str]  # arguments of evaluate.py -> what it prints

# ------------------------------------------------------------------------------------------------------------
# Tiny models: a token is a byte, and what they say depends on the prompt


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the 256 bytes, <s> before each text, and </s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def save_model(kind: type, folder: Path) -> Path:
    """A folder with a random LLaMA of 2 layers, for which weights of this size make lively responses."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.4,
        num_labels=1,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    kind(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def make_records(count: int = 11) -> list[Record]:
    """Records with prompts of different lengths; the second of the two responses is the chosen one."""
    return [
        {
            "id": f"item-{i}",
            "subset": "ab"[i % 2],
            "prompt": [{"role": "user", "content": f"{'Why? ' * (i * 5 % 7)}How many are {i}?"}],
            "responses": ["I do not know.", f"There are {i} of them."],
            "chosen": 1,
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(LlamaForCausalLM, tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(LlamaForSequenceClassification, tmp_path_factory.mktemp("rm"))


@pytest.fixture(scope="module")
def policy(policy_folder: Path) -> tuple[Any, Any]:
    return evaluate.load(str(policy_folder), torch.device("cpu"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    reward.write_jsonl(tmp_path / "data.jsonl", make_records())
    return tmp_path / "data.jsonl"


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Program:
    """Runs evaluate.py in this process."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        capsys.readouterr()
        evaluate.main()
        return capsys.readouterr().out

    return run


def read(path: Path) -> list[Record]:
    """The lines of a JSON-lines file."""
    return [row for _, row in clha.read_jsonl(path)]


PROMPTS = [record["prompt"] for record in make_records()]
SHORT = {"max_new_tokens": 10, "batch_size": 4}

# ------------------------------------------------------------------------------------------------------------
# Generation


@pytest.mark.parametrize(
    ("text", "response"),
    [
        (" Yes. ", "Yes."),
        (" Yes.\n\nHuman: and", "Yes."),
        ("Yes, human: and", "Yes,"),
        ("No.\n\nAssistant: x", "No."),
        ("No assistant: x", "No"),
        ("So assistant: x Human: y", "So"),
        ("So Human: x assistant: y", "So"),
        ("Human: hi", ""),
        ("humans are Human beings", "humans are Human beings"),
    ],
)
def test_a_response_ends_where_the_model_speaks_for_another(text: str, response: str) -> None:
    assert evaluate.cut_response(text) == response


def test_stop_strings_are_texts_not_patterns() -> None:
    assert evaluate.cut_response("a.b (c) d", ("(c)", ".c")) == "a.b"


def test_greedy_responses_are_the_likeliest_tokens_in_any_batch(policy: tuple[Any, Any]) -> None:
    model, tokenizer = policy
    responses = evaluate.generate(model, tokenizer, PROMPTS, **SHORT)
    assert len(set(responses)) > 8
    assert evaluate.generate(model, tokenizer, PROMPTS, max_new_tokens=10, batch_size=11) == responses
    for prompt, response in zip(PROMPTS, responses, strict=True):
        ids = tokenizer(clha.render(prompt)).input_ids
        start = len(ids)
        while len(ids) < start + 10 and ids[-1] != tokenizer.eos_token_id:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert evaluate.cut_response(tokenizer.decode(ids[start:], skip_special_tokens=True)) == response


HOSTILE = {  # of a generation_config.json; most would change greedy responses, or end in an error
    "num_beams": 3,
    "num_return_sequences": 3,
    "no_repeat_ngram_size": 1,
    "repetition_penalty": 5.0,
    "do_sample": True,
    "temperature": 7.0,
    "min_new_tokens": 10,
    "max_time": 1e-9,
    "return_dict_in_generate": True,
    "output_scores": True,
    "stop_strings": ["a", "e", "i"],
    "forced_eos_token_id": 5,
    "suppress_tokens": list(range(2, 200)),
    "eos_token_id": list(range(2, 200)),
    "cache_implementation": "static",
}


@pytest.mark.parametrize("settings", [*([name] for name in HOSTILE), list(HOSTILE)])
def test_no_setting_of_generation_config_counts(
    policy: tuple[Any, Any], settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = policy
    expected = evaluate.generate(model, tokenizer, PROMPTS[:3], max_new_tokens=6)
    own = GenerationConfig()
    for name in settings:
        setattr(own, name, HOSTILE[name])
    monkeypatch.setattr(model, "generation_config", own)
    assert evaluate.generate(model, tokenizer, PROMPTS[:3], max_new_tokens=6) == expected
    assert model.generation_config is own


def test_a_models_generation_config_is_not_read(policy_folder: Path, policy: Any, tmp_path: Path) -> None:
    for file in policy_folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    (tmp_path / "generation_config.json").write_text(json.dumps(HOSTILE | {"num_beams": "many"}))
    same = evaluate.load(str(tmp_path), torch.device("cpu"))
    assert evaluate.generate(*same, PROMPTS, **SHORT) == evaluate.generate(*policy, PROMPTS, **SHORT)


def test_a_model_with_weights_that_are_not_finite_is_refused(policy_folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(policy_folder)
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = math.nan
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight has values that are not finite"):
        evaluate.load(str(tmp_path), torch.device("cpu"))


@pytest.mark.parametrize("max_prompt_length", [20, 70])  # some batches of 20 have no padding
def test_batches_of_one_shape_give_the_same_responses(policy_folder: Path, max_prompt_length: int) -> None:
    model, tokenizer = evaluate.load(str(policy_folder), torch.device("cpu"))
    steps: set[Any] = set()

    def note(_: Any, args: tuple[Any], inputs: dict[str, Any]) -> None:
        if inputs["input_ids"].shape[1] == 1:  # a step that makes a token, which is what a GPU compiles
            shapes = {name: tuple(value.shape) for name, value in inputs.items() if torch.is_tensor(value)}
            steps.add((*shapes.items(), inputs["past_key_values"].layers[0].keys.shape))

    model.register_forward_pre_hook(note, with_kwargs=True)
    responses = {}
    shapes = {}
    for static in (False, True):
        steps.clear()
        responses[static] = []
        for part in (PROMPTS[:8], PROMPTS[8:]):  # two calls, the second not of a full batch
            settings = SHORT | {"max_prompt_length": max_prompt_length, "static": static}
            responses[static] += evaluate.generate(model, tokenizer, part, **settings)
        shapes[static] = len(steps)
    assert responses[True] == responses[False] and len(set(responses[True])) > 5
    assert shapes[True] == 1 < shapes[False]


def test_a_cpu_keeps_batches_short_unless_told(policy: tuple[Any, Any]) -> None:
    model, tokenizer = policy
    seen = []
    hook = model.register_forward_pre_hook(
        lambda _, args, inputs: seen.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    for static in (None, True):
        evaluate.generate(model, tokenizer, PROMPTS[:1], max_new_tokens=1, static=static)
    hook.remove()
    assert seen == [(1, 1 + len(clha.render(PROMPTS[0]))), (32, 384)]


def said(policy: tuple[Any, Any], text: str, **settings: Any) -> tuple[list[str], list[str]]:
    """The responses if the model says `text`, and the prompts as the model sees them."""
    _, tokenizer = policy
    new_ids = tokenizer(text, add_special_tokens=False).input_ids
    seen: list[str] = []

    def generate(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        seen.append(tokenizer.decode(input_ids[0]))
        return torch.cat([input_ids, torch.tensor([new_ids], dtype=torch.long)], dim=1)

    model = SimpleNamespace(generate=generate, generation_config=None, device=torch.device("cpu"))
    prompt = [{"role": "user", "content": "How?"}]
    return evaluate.generate(model, tokenizer, [prompt], **settings), seen


def test_a_process_may_have_no_share_of_a_part(policy: tuple[Any, Any], reward_folder: Path) -> None:
    assert evaluate.generate(*policy, []) == []
    assert evaluate.score_responses([], [], reward.load_reward_model(str(reward_folder), "cpu")) == []


def test_a_long_prompt_loses_its_beginning_but_not_bos(policy: tuple[Any, Any]) -> None:
    assert said(policy, "Yes", max_prompt_length=13) == (["Yes"], ["<s>\n\nAssistant:"])


def test_a_response_prefix_is_continued_and_left_out(policy: tuple[Any, Any]) -> None:
    text = " So. Bad answer: No. Human: why"
    stop_strings = ("Good answer:", "Bad answer:")
    asked = said(policy, text, response_prefix="Good answer:", stop_strings=stop_strings)
    assert asked == (["So."], ["<s>\n\nHuman: How?\n\nAssistant: Good answer:"])
    assert said(policy, text) == (["So. Bad answer: No."], ["<s>\n\nHuman: How?\n\nAssistant:"])


def test_special_tokens_that_a_prompt_spells_out_stay_characters(policy: tuple[Any, Any]) -> None:
    model, tokenizer = policy
    seen = []
    hook = model.register_forward_pre_hook(
        lambda _, args, inputs: seen.append(inputs["input_ids"][0].tolist()), with_kwargs=True
    )
    evaluate.generate(model, tokenizer, [[{"role": "user", "content": "</s><s>"}]], max_new_tokens=1)
    hook.remove()
    assert seen[0].count(0) == 1 and 1 not in seen[0]


def test_sampling_follows_the_seed_and_the_temperature(policy: tuple[Any, Any]) -> None:
    def sample(seed: int, temperature: float, count: int = 4) -> list[str]:
        torch.manual_seed(seed)
        settings = {"max_new_tokens": 8, "temperature": temperature}
        return evaluate.generate(*policy, PROMPTS[:1] * count, **settings)

    assert sample(0, 1.0) == sample(0, 1.0) != sample(1, 1.0) and len(set(sample(0, 1.0))) == 4
    assert set(sample(0, 1e-4)) == set(sample(0, 0.0))


def test_samples_are_of_the_whole_distribution(
    policy: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' own default would draw from the 50 likeliest tokens."""
    model, tokenizer = policy
    seen = []

    def decode(new: list[int], **_: Any) -> str:
        seen.append(new[0])
        return ""

    monkeypatch.setattr(tokenizer, "decode", decode)
    torch.manual_seed(0)
    settings = {"max_new_tokens": 1, "temperature": 1000.0, "batch_size": 500}
    evaluate.generate(model, tokenizer, PROMPTS[:1] * 1000, **settings)
    assert len(set(seen)) > 240  # 1,000 draws of 258 equally likely tokens leave out 5


# ------------------------------------------------------------------------------------------------------------
# `generate`: a file that is the same wherever the run was stopped


def interrupt(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, after: int) -> list[int]:
    """Ctrl-C in the call of a function after `after` calls; the returned list grows with each call."""
    function = getattr(module, name)
    calls: list[int] = []

    def stopped(*args: Any, **kwargs: Any) -> Any:
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(1)
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, stopped)
    return calls


@pytest.mark.parametrize("flags", ["", "--temperature 1 --num_responses 2"])
def test_generate_goes_on_where_it_was_stopped(
    policy_folder: Path, data: Path, tmp_path: Path, program: Program, flags: str
) -> None:
    lines = 22 if flags else 11
    whole = tmp_path / "whole.jsonl"
    resumed = tmp_path / "resumed.jsonl"
    model = ["generate", "--model", policy_folder, "--data", data, "--batch_size", 1, "--max_new_tokens", 6]
    command = [*model, *flags.split(), "--out"]
    program(*command, whole)
    with pytest.MonkeyPatch.context() as monkeypatch:  # a part is four batches; the second is begun
        interrupt(monkeypatch, evaluate, "sample", after=1)
        with pytest.raises(KeyboardInterrupt):
            program(*command, resumed)
        assert not resumed.exists()
    torch.manual_seed(99)  # as in another process
    with pytest.MonkeyPatch.context() as monkeypatch:
        calls = interrupt(monkeypatch, evaluate, "sample", after=99)
        program(*command, resumed)
    assert len(calls) == math.ceil(lines / 4) - 1
    assert resumed.read_bytes() == whole.read_bytes()
    rows = read(whole)
    assert [row["id"] for row in rows] == [f"item-{i // (lines // 11)}" for i in range(lines)]
    assert all(list(row) == ["id", "response", "finished"] for row in rows)
    if flags:
        assert any(rows[i]["response"] != rows[i + 1]["response"] for i in range(0, 22, 2))


def test_generate_does_not_go_on_with_other_settings(
    policy_folder: Path, data: Path, tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["generate", "--model", policy_folder, "--data", data, "--batch_size", 1, "--max_new_tokens", 4]
    out = tmp_path / "out.jsonl"
    command += ["--temperature", 1, "--out", out]
    calls = interrupt(monkeypatch, evaluate, "sample", after=99)
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, evaluate, "sample", after=1)
        with pytest.raises(KeyboardInterrupt):
            program(*command)
    outputs = set()
    for flag in ("--seed", "--max_new_tokens"):
        calls.clear()
        program(*command, flag, 3)
        assert len(calls) == 3  # all parts are made
        outputs.add(out.read_bytes())
        out.unlink()
    calls.clear()
    program(*command)
    assert len(calls) == 2  # the part made before is still there
    assert len(outputs | {out.read_bytes()}) == 3
    with pytest.raises(InputError, match="already exists"):
        program(*command)


def test_a_response_that_is_cut_is_not_finished(policy: tuple[Any, Any]) -> None:
    _, tokenizer = policy
    prompt = [{"role": "user", "content": "How?"}]
    for text, finished in (("So", False), ("So</s>", True), ("So. Human: and", True)):
        new_ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])

        def say(input_ids: torch.Tensor, new: torch.Tensor = new_ids, **_: Any) -> torch.Tensor:
            return torch.cat([input_ids, new], dim=1)

        model = SimpleNamespace(generate=say, generation_config=None, device=torch.device("cpu"))
        [row] = evaluate.sample(model, tokenizer, [prompt])
        assert row["finished"] == finished and row["response"].startswith("So")


def test_generate_passes_its_flags_on(
    policy_folder: Path, data: Path, tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def sample(model: Any, tokenizer: Any, prompts: list[Any], **settings: Any) -> list[Record]:
        seen.append(settings)
        return [{"response": "so", "finished": True}] * len(prompts)

    monkeypatch.setattr(evaluate, "sample", sample)
    flags = [
        [],
        ["--max_new_tokens", 5, "--max_prompt_length", 50, "--batch_size", 99, "--temperature", 0.5],
        ["--response_prefix", "Good answer:", "--stop_strings", "Good answer:", "Bad answer:"],
    ]
    for number, own in enumerate(flags):
        out = tmp_path / f"{number}.jsonl"
        program("generate", "--model", policy_folder, "--data", data, "--out", out, *own)
    first = {"max_new_tokens": 128, "max_prompt_length": 384, "batch_size": 64, "temperature": 0.0}
    first |= {"response_prefix": "", "stop_strings": ()}
    second = {"max_new_tokens": 5, "max_prompt_length": 50, "batch_size": 99, "temperature": 0.5}
    more = ("Good answer:", "Bad answer:")
    assert seen == [first, first | second, first | {"response_prefix": "Good answer:", "stop_strings": more}]


def test_of_several_models_those_whose_responses_are_there_are_kept(
    policy_folder: Path, data: Path, tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    shutil.copytree(policy_folder, other)
    out = tmp_path / "responses"
    out.mkdir()
    kept = out / f"{evaluate.model_name(policy_folder)}.jsonl"
    kept.write_text("of a run before\n")
    command = ["generate", "--model", policy_folder, other, "--data", data, "--max_new_tokens", 2]
    assert f"kept    {kept}: already there" in program(*command, "--out", out)
    assert kept.read_text() == "of a run before\n"
    assert len((out / "other.jsonl").read_text().splitlines()) == len(make_records())
    program(*command, "--out", tmp_path / "new")
    with pytest.raises(InputError, match=r"new: was made with other settings \(max_new_tokens 2 -> 3\)"):
        program(*command[:-1], 3, "--out", tmp_path / "new")
    monkeypatch.setattr(clha, "init_process", lambda: (1, 2, torch.device("cpu")))  # the second of two
    assert program(*command, "--out", out) == ""


# ------------------------------------------------------------------------------------------------------------
# Files of responses


def test_a_request_of_openais_batch_format(data: Path, tmp_path: Path, program: Program) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2+2?"}]
    record = {"prompt": turns, "responses": ["4", "5"]}  # without an id, it is called by its line
    reward.write_jsonl(data, [make_records(1)[0], record])
    out = tmp_path / "new" / "requests.jsonl"
    assert (
        program("requests", "--data", data, "--model", "gpt-4o-mini", "--out", out)
        == f"2 requests in {out}\n"
    )
    first, second = out.read_text().splitlines()
    assert json.loads(second) == {
        "custom_id": "line 2",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": "gpt-4o-mini",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "What is 2+2?"},
            ],
            "max_completion_tokens": 128,
            "temperature": 0,
        },
    }
    assert json.loads(first)["custom_id"] == "item-0"
    out = tmp_path / "other.jsonl"
    program("requests", "--data", data, "--model", "m", "--out", out, "--max_new_tokens", 9)
    assert json.loads(out.read_text().splitlines()[0])["body"]["max_completion_tokens"] == 9


OPENAI = (  # a line as OpenAI's batches have it
    '{"id": "batch_req_123", "custom_id": "item-1", "response": {"status_code": 200, "request_id": "req_123",'
    ' "body": {"id": "chatcmpl-123", "object": "chat.completion", "created": 1711652795,'
    ' "model": "gpt-4o-mini-2024-07-18", "choices": [{"index": 0, "message": {"role": "assistant",'
    ' "content": "Hello. Human: x", "refusal": null}, "logprobs": null, "finish_reason": "stop"}],'
    ' "usage": {"prompt_tokens": 22, "completion_tokens": 2, "total_tokens": 24},'
    ' "system_fingerprint": "fp_123"}}, "error": null}'
)
VLLM = (  # and as `vllm run-batch` writes it
    '{"id":"vllm-383d1c59835645aeb2e07d004d62a826","custom_id":"item-0","response":{"status_code":200,'
    '"request_id":"vllm-batch-3580bf4d4ae54d52b67eee266a6eab20","body":{"id":"cmpl-61c020e54b964d5a98fa7527b",'
    '"object":"chat.completion","created":1715633336,"model":"meta-llama/Meta-Llama-3-8B-Instruct","choices":'
    '[{"index":0,"message":{"role":"assistant","content":" Hi! "},"logprobs":null,"finish_reason":"stop",'
    '"stop_reason":null}],"usage":{"prompt_tokens":25,"total_tokens":56,"completion_tokens":31}}},"error":null}'
)
EXPIRED = (
    '{"id": "batch_req_1", "custom_id": "item-0", "response": null, "error": {"code": "batch_expired", '
    '"message": "This request could not be executed before the completion window expired."}}'
)
FAILED = (
    '{"id":"vllm-1","custom_id":"item-0","response":{"status_code":400,"request_id":"vllm-batch-1","body":null},'
    '"error":{"object":"error","message":"The model `x` does not exist.","type":"NotFoundError","code":404}}'
)
REFUSED = OPENAI.replace('"Hello. Human: x", "refusal": null', 'null, "refusal": "I can not."')


def test_batch_output_and_lines_of_ours_are_read_alike(tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    ours = {
        "id": "item-2",
        "response": " So.\n\nHuman: And?",
        "gold": 2,
        "tokens": 1.5,
        "note": "x",
        "ok": True,
    }
    path.write_text("\n".join([OPENAI, json.dumps(ours), VLLM]) + "\n")
    assert evaluate.read_responses(str(path), make_records(3)) == [
        {"id": "item-0", "response": "Hi!"},
        {"id": "item-1", "response": "Hello."},
        {"id": "item-2", "response": "So.", "gold": 2, "tokens": 1.5},
    ]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([OPENAI], "has no response to 1 of the records, such as item-0"),
        ([OPENAI, VLLM, VLLM], "line 3: a second response to item-0; score needs one per record"),
        ([OPENAI.replace("item-1", "item-9")], "line 1: no record has the id item-9"),
        ([OPENAI, EXPIRED], 'line 2: needs "id" and "response", two strings, or a successful line of OpenAI'),
        ([OPENAI, EXPIRED], "This request could not be executed before the completion window expired."),
        ([FAILED], "The model `x` does not exist."),
        ([REFUSED], "OpenAI's batch output, not {"),
        ([OPENAI.replace('"choices": [{', '"choice": [{')], "line 1: needs"),
        ([OPENAI.replace('"custom_id": "item-1"', '"custom_id": 1')], "line 1: no record has the id 1"),
        ([OPENAI.replace('"custom_id": "item-1"', '"custom_id": true')], "line 1: needs"),
        (['{"id": "item-0"}'], "line 1: needs"),
        (['{"id": 0, "response": "x"}'], "line 1: no record has the id 0"),
        (['{"id": 0.5, "response": "x"}'], "line 1: needs"),
        (['{"id": "item-0", "response": null}'], "line 1: needs"),
        (['{"id": "item-0", "response": "x", "gold": NaN}'], '"gold" must be a finite number, not nan'),
        (['{"id": "item-0", "response": "x", "gold": 1e999}'], '"gold" must be a finite number, not inf'),
        (["[]"], "not a JSON object"),
    ],
)
def test_wrong_responses(lines: list[str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError) as error:
        evaluate.read_responses(str(path), make_records(2))
    assert message in str(error.value) and str(error.value).startswith(f"{path}")


# ------------------------------------------------------------------------------------------------------------
# Scores


@pytest.mark.parametrize(
    ("hypothesis", "reference", "bleu"),
    [  # what the released evaluation, nltk's sentence_bleu of two strings, gives for them
        ("Café ☕ — naïve 😀 漢字かな", "Cafe ☕ - naive 😀 漢字カナ", 0.4547722460981925),
        ("one  two  three", "one two three", 0.7121043131712586),
        ("Yes", "Yes", 0.0),
        ("the", "they are there", 0.0),
        ("abcxyz", "zyxcba", 0.0),
        ("HELLO THERE GENERAL", "hello there general", 0.0),
        ("same here", "same here", 1.0),
        ("", "something", 0.0),
        ("something", "", 0.0),
    ],
)
def test_char_bleu_of_the_release(hypothesis: str, reference: str, bleu: float) -> None:
    assert evaluate.char_bleu([hypothesis], [reference]) == pytest.approx([100 * bleu], abs=1e-9)


def test_char_bleu_by_hand() -> None:
    # hypothesis "the cat", reference "the bat": characters 6 of 7; pairs "th", "he", "e ", "at" 4 of 6;
    # triples "the", "he " 2 of 5; quadruples "the " 1 of 4. Both are 7 long: no brevity penalty.
    (value,) = evaluate.char_bleu([" the cat\n"], ["the bat"])
    assert value == pytest.approx(100 * (6 / 7 * 4 / 6 * 2 / 5 * 1 / 4) ** 0.25)
    # "the b" is how the reference begins: all n-grams are right; it is 5 long, not 7: exp(1 - 7 / 5).
    # "abababab" against "abab": counts are clipped; 4 of 8, 3 of 7, 2 of 6, 1 of 5; longer: no penalty.
    values = evaluate.char_bleu(["the b", "abababab"], ["the bat", "abab"])
    assert values[0] == pytest.approx(100 * math.exp(1 - 7 / 5))
    assert values[1] == pytest.approx(100 * (4 / 8 * 3 / 7 * 2 / 6 * 1 / 5) ** 0.25)


def test_word_bleu_counts_words_over_all_sentences() -> None:
    # One of two sentences is right, the other shares its last word only: 6 of 9 words, 4 of 7 pairs, ...
    value = evaluate.word_bleu(["a b c d e", "f g h i"], ["a b c d e", "k l m i"])
    assert value == pytest.approx(100 * (6 / 9 * 4 / 7 * 3 / 5 * 2 / 3) ** 0.25)


def test_the_interval_is_seeded_and_narrows_with_more_data() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).tolist()
    low, high = evaluate.interval(values)
    assert (low, high) == evaluate.interval(values)
    # The standard error is 1 / sqrt(400) = 0.05: about 1.96 of them on both sides of the mean.
    assert high - low == pytest.approx(2 * 1.96 * 0.05, rel=0.15) and low < sum(values) / 400 < high
    few = evaluate.interval(values[:25])
    assert few[1] - few[0] > 3 * (high - low)
    assert evaluate.interval([2.0, 2.0]) == (2.0, 2.0)


def scored_rows() -> list[Record]:
    """Three scored responses in two subsets; all have "gold", one has "more"."""
    texts = {"response": "so it is", "reference": "so it is"}
    return [
        {"subset": "b", "reward": 20.0, "char_bleu": 10.0, "gold": 1.0, "more": 5, **texts},
        {"subset": "a", "reward": 40.0, "char_bleu": 20.0, "gold": 2, **texts},
        {"subset": "b", "reward": 60.0, "char_bleu": 60.0, "gold": -1.5, **texts},
    ]


def test_the_total_is_the_mean_over_items_not_over_subsets() -> None:
    rows = scored_rows()
    rows[0]["reward"] = 5.0
    summary = evaluate.summarise(rows)
    assert list(summary) == ["a", "b", "Total"] and [summary[s]["n"] for s in summary] == [1, 2, 3]
    assert summary["b"]["reward"]["mean"] == 32.5 and summary["Total"]["reward"]["mean"] == 35
    assert summary["Total"]["char_bleu"]["mean"] == 30 and summary["Total"]["gold"]["mean"] == 0.5
    assert list(summary["b"]) == ["n", "word_bleu", "char_bleu", "reward", "gold"]
    assert summary["Total"]["gold"]["interval"] == evaluate.interval([1.0, 2.0, -1.5])


def test_the_table_shows_means_and_intervals() -> None:
    plain = [{name: row[name] for name in row if name not in ("gold", "more")} for row in scored_rows()]
    summaries = {"clha": evaluate.summarise(scored_rows()[1:2]), "base": evaluate.summarise(plain[1:2])}
    words = evaluate.word_bleu(["so it is"], ["so it is"])
    cells = f"1 | 20.00 (20.00 to 20.00) | {words:.2f} | 40.00 (40.00 to 40.00)"
    assert evaluate.table(summaries) == (
        "| model | subset | n | char BLEU | word BLEU | reward | gold |\n"
        "| --- | --- | --- | --- | --- | --- | --- |\n"
        f"| clha | Total | {cells} | 2.00 (2.00 to 2.00) |\n"
        f"| base | Total | {cells} |  |\n"
    )


def test_no_cell_can_break_a_table_or_reach_the_terminal() -> None:
    assert reward.markdown([["a|b", "é"], ["\x1b]0;x\x07", "1\n2"]]) == (
        "| a\\|b | é |\n| --- | --- |\n|  ]0;x  | 1 2 |\n"
    )


@pytest.fixture
def responses(tmp_path: Path) -> list[Path]:
    """Files of responses to the records of `data`: base.jsonl in their order, step-20.jsonl reversed."""
    records = make_records()
    base = [{"id": record["id"], "response": f"I see {record['id']}"} for record in records]
    step = [{"id": record["id"], "response": f" {record['responses'][1]} Human: x"} for record in records]
    for i, row in enumerate(step):
        row["gold"] = i
    reward.write_jsonl(tmp_path / "base.jsonl", base)
    reward.write_jsonl(tmp_path / "step-20.jsonl", step[::-1])
    return [tmp_path / "base.jsonl", tmp_path / "step-20.jsonl"]


def test_files_are_scored_against_the_chosen_responses(
    responses: list[Path],
    data: Path,
    reward_folder: Path,
    tmp_path: Path,
    program: Program,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = interrupt(monkeypatch, reward, "load_reward_model", after=1)
    out = tmp_path / "eval"
    command = ["score", "--responses", *responses, "--data", data, "--reward_model", reward_folder]
    printed = program(*command, "--out", out)
    assert len(loaded) == 1  # once for all files

    monkeypatch.undo()
    records = make_records()
    rows = {name: read(out / name / "responses.jsonl") for name in ("base", "step-20")}
    model = reward.load_reward_model(str(reward_folder), "cpu")
    for name, scored in rows.items():
        assert [row["id"] for row in scored] == [record["id"] for record in records]
        values = model.score([row["prompt"] for row in scored], [row["response"] for row in scored])
        for row, record, value in zip(scored, records, values, strict=True):
            assert row["reward"] == pytest.approx(100 / (1 + math.exp(-value)), rel=1e-5)
            assert row["reference"] == record["responses"][1] and row["subset"] == record["subset"]
            assert row["char_bleu"] == evaluate.char_bleu([row["response"]], [row["reference"]])[0]
        summary = json.loads((out / name / "scores.json").read_text())
        assert summary == json.loads(json.dumps(evaluate.summarise(scored)))
        assert (out / name / "table.md").read_text() == evaluate.table({name: summary})
    assert all(row["char_bleu"] == pytest.approx(100) for row in rows["step-20"])  # the references themselves
    assert all(row["char_bleu"] < 50 for row in rows["base"])
    assert [row["gold"] for row in rows["step-20"]] == list(range(11)) and "gold" not in rows["base"][0]
    both = {name: evaluate.read_summary(out / name) for name in rows}
    assert printed == evaluate.table(both) == program("table", out / "base", out / "step-20")
    (out / "base" / "scores.json").unlink()  # as a run that was stopped leaves it
    again = program(*command, "--out", out)
    assert again == f"kept    step-20 in {out}: already there\n{printed}"
    shutil.copytree(reward_folder, tmp_path / "another")
    with pytest.raises(clha.InputError, match=r"base: was made with other settings \(reward_model .*another"):
        program(*command[:-1], tmp_path / "another", "--out", out)
    alone = ["score", "--responses", responses[0], *command[command.index("--data") :], "--out", out]
    with pytest.raises(clha.InputError, match=r"scores.json: already exists"):
        program(*alone)


def test_score_goes_on_where_it_was_stopped(
    data: Path, reward_folder: Path, tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = make_records(300)
    reward.write_jsonl(data, records)
    reward.write_jsonl(tmp_path / "m.jsonl", [{"id": r["id"], "response": r["id"]} for r in records])
    command = ["score", "--responses", tmp_path / "m.jsonl", "--data", data, "--reward_model", reward_folder]
    program(*command, "--out", tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, evaluate, "score_responses", after=1)
        with pytest.raises(KeyboardInterrupt):
            program(*command, "--out", tmp_path / "eval")
    assert not (tmp_path / "eval" / "m" / "scores.json").exists()
    shutil.copytree(reward_folder, tmp_path / "other")
    calls = interrupt(monkeypatch, evaluate, "score_responses", after=99)
    program(*command, "--out", tmp_path / "eval")
    assert len(calls) == 1
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, evaluate, "score_responses", after=1)
        with pytest.raises(KeyboardInterrupt):
            program(*command, "--out", tmp_path / "again")
    calls.clear()
    program(*command[:-1], tmp_path / "other", "--out", tmp_path / "again")
    assert len(calls) == 2  # the part that another reward model scored is not taken for this one's
    for file in ("responses.jsonl", "scores.json", "table.md"):
        whole, resumed = [(tmp_path / out / "m" / file).read_bytes() for out in ("whole", "eval")]
        assert whole == resumed


# ------------------------------------------------------------------------------------------------------------
# Tables and the best


@functools.cache
def whole_summary() -> str:
    """The summary of `scored_rows` as JSON: its mean reward is 40, its mean gold 0.5."""
    return json.dumps(evaluate.summarise(scored_rows()))


def scored_folder(folder: Path, mean: float, gold: bool = True) -> Path:
    """A folder as `score` leaves it, of a model with this mean reward."""
    summary = json.loads(whole_summary())
    for scores in summary.values():
        scores["reward"]["mean"] += mean - 40
        if not gold:
            del scores["gold"]
    folder.mkdir(parents=True)
    (folder / "scores.json").write_text(json.dumps(summary))
    return folder


def test_a_model_path_leads_to_no_output_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run" / "final").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run")
    assert (
        evaluate.model_name("final/..") == evaluate.model_name(".") == evaluate.model_name("final") == "run"
    )
    assert evaluate.model_name("..") == tmp_path.name


def test_the_best_has_the_highest_reward(tmp_path: Path, program: Program) -> None:
    folders = [scored_folder(tmp_path / f"step-{i}", mean) for i, mean in enumerate((30, 55, 20, 55))]
    assert program("best", *folders) == f"{folders[1]}\n"  # the first of equals
    assert program("best", *folders[::-1]) == f"{folders[3]}\n"
    assert program("best", folders[2]) == f"{folders[2]}\n"


def test_a_table_of_folders(tmp_path: Path, program: Program) -> None:
    folders = [scored_folder(tmp_path / "x" / "clha", 30), scored_folder(tmp_path / "base", 20, gold=False)]
    whole = program("table", *folders).splitlines()
    total = program("table", "--total", *folders).splitlines()
    assert len(whole) == 2 + 2 * 3 and len(total) == 2 + 2
    assert [line.split(" | ")[:2] for line in total[2:]] == [["| clha", "Total"], ["| base", "Total"]]
    assert "| 30.00 (" in total[2] and "| 20.00 (" in total[3]
    again = program("table", "--total", folders[0], scored_folder(tmp_path / "y" / "clha", 1)).splitlines()
    assert [line.split(" | ")[0] for line in again[2:]] == [f"| {tmp_path}/x/clha", f"| {tmp_path}/y/clha"]


def test_the_picture_has_the_steps_in_order(
    tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = []
    save = reward.save_picture
    monkeypatch.setattr(
        reward, "save_picture", lambda figure, path: (figures.append(figure), save(figure, path))
    )
    steps = {"step-20": 50, "base": 10, "step-100": 70, "step-5": 20}
    folders = [scored_folder(tmp_path / name, mean) for name, mean in steps.items()]
    program("table", *folders, "--plot", tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 5000
    left, right = figures[0].axes
    assert left.lines[0].get_xydata().tolist() == [[0, 10], [5, 20], [20, 50], [100, 70]]
    assert [left.get_ylabel(), right.get_ylabel()] == ["mean sigmoid reward, %", "mean gold"]
    program(
        "table", *folders, scored_folder(tmp_path / "step-6", 5, gold=False), "--plot", tmp_path / "q.png"
    )
    assert len(figures[1].axes) == 1  # not all of them have "gold"


# ------------------------------------------------------------------------------------------------------------
# Wrong input: one line, before the work, and nothing written

GENERATE = "generate --model {policy} --data {data}"
SCORE = "score --data {data} --reward_model {rm} --out {out} --responses"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (f"{GENERATE} --out {{folder}}", "folder: already exists"),
        (f"{GENERATE} --out {{data}}/x", "data.jsonl is a file"),
        (f"{GENERATE} --out {{out}} --num_responses 2", "--num_responses: greedy responses are all the same"),
        (f"{GENERATE} --out {{out}} --num_responses 0", "--num_responses 0: must be"),
        (f"{GENERATE} --out {{out}} --batch_size 0", "--batch_size 0: must be"),
        (f"{GENERATE} --out {{out}} --max_new_tokens 0", "--max_new_tokens 0: must be"),
        (f"{GENERATE} --out {{out}} --temperature -1", "--temperature -1.0: must be"),
        (f"{GENERATE} --out {{out}} --temperature nan", "--temperature nan: must be"),
        (f"{GENERATE} --out {{out}} --stop_strings=", "--stop_strings: an empty text"),
        (f"{GENERATE} --out {{out}} --batch 3", "unrecognized arguments: --batch 3"),
        ("generate --model {folder} --data {data} --out {out}", "/folder: "),
        ("generate --model {policy} --data {twins} --out {out}", "two records have the id item-0"),
        ("generate --model {policy} --data {nowhere} --out {out}", "nowhere"),
        ("requests --model m --data {number} --out {out}", '"id" must be a string or integer'),
        ("requests --model m --data {twins} --out {out}", "two records have the id item-0"),
        ("requests --model m --data {data} --out {folder}", "folder: already exists"),
        (f"{SCORE} {{data}}", 'line 1: needs "id" and "response"'),
        (f"{SCORE} {{good}} {{folder}}/good.jsonl", "/good is taken; rename the file"),
        (f"{SCORE} {{folder}}/...jsonl", "/.. is taken; rename the file"),
        (f"{SCORE} {{good}} {{nowhere}}", "nowhere"),
        (f"{SCORE} {{good}} --reward_model {{folder}}", "/folder: "),
        (f"{SCORE} {{good}} --out {{data}}", "data.jsonl: is a file"),
        ("score --data {data} --out {out} --reward_model {rm}", "required: --responses"),
        ("table {folder}", "folder: no scores.json in it"),
        ("table {torn}", "scores.json: not readable as JSON"),
        ("table {no_total}", "scores.json: not the scores of an evaluation, with Total"),
        ("table {texts}", "scores.json: not the scores of an evaluation"),
        ("table {huge}", "scores.json: not the scores of an evaluation"),
        ("best {folder}", "folder: no scores.json in it"),
        ("best {texts}", "scores.json: not the scores of an evaluation"),
        ("table {folder} --plot x.nothing", "--plot x.nothing: the name must end in one of"),
        ("nothing", "invalid choice: 'nothing'"),
        ("", "required: command"),
    ],
)
def test_wrong_input(
    command: str,
    message: str,
    policy_folder: Path,
    reward_folder: Path,
    data: Path,
    tmp_path: Path,
    program: Program,
) -> None:
    paths = {"policy": policy_folder, "rm": reward_folder, "data": data}
    names = ["folder", "torn", "no_total", "texts", "huge", "twins", "number", "good.jsonl", "out", "nowhere"]
    for name in names:
        paths[name.removesuffix(".jsonl")] = tmp_path / name
    reward.write_jsonl(paths["twins"], make_records(1) * 2)
    reward.write_jsonl(paths["number"], [make_records(1)[0] | {"id": [7]}])
    reward.write_jsonl(paths["good"], [{"id": record["id"], "response": "x"} for record in make_records()])
    huge = '{"Total": {"n": 2, "reward": {"mean": ' + "9" * 400 + ', "interval": [1, 2]}}}'
    texts = {"torn": "{", "no_total": "{}", "texts": '{"Total": {"n": "x"}}', "huge": huge}
    for name, text in texts.items():
        paths[name].mkdir()
        (paths[name] / "scores.json").write_text(text)
    paths["folder"].mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError) as error:
        program(*command.format(**paths).split())
    assert message in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before
