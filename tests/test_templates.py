"""Chat templates: training, generation and rewards see what `apply_chat_template` writes, no more."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerBase

import clha
import evaluate
import reward
from clha import Config, InputError, Record, Turn

CHATML = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for turn in messages %}<|start_header_id|>{{ turn.role }}<|end_header_id|>\n\n"
    "{{ turn.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for turn in messages %}{% if turn.role == 'user' %}[INST] {{ turn.content }} [/INST]"
    "{% elif turn.role == 'assistant' %} {{ turn.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('no system turns') }}{% endif %}{% endfor %}"
)
THINKING = CHATML.replace(
    "assistant\n{% endif %}", "assistant\n{% if think %}<think>\n{% endif %}{% endif %}"
)
TEMPLATES = {"chatml": (CHATML, "<|im_end|>"), "llama3": (LLAMA3, "<|eot_id|>"), "mistral": (MISTRAL, "</s>")}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
WIDE = Config("", "", "", max_length=4096, max_prompt_length=4000)


def turns(*contents: str) -> list[Turn]:
    """A dialogue of these contents, which the user begins."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


@pytest.fixture(scope="module")
def chats(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small random chat model per template, whose end of a turn is not EOS."""
    folders = {}
    for name, (template, _) in TEMPLATES.items():
        folder = tmp_path_factory.mktemp("chats") / name
        tokenizer = clha.load_tokenizer(str(world / "init"))
        tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
        tokenizer.chat_template = template
        model = AutoModelForCausalLM.from_pretrained(world / "init")
        model.resize_token_embeddings(len(tokenizer))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders[name] = folder
    return folders


@pytest.fixture(params=TEMPLATES)
def chat(chats: dict[str, Path], request: pytest.FixtureRequest) -> tuple[PreTrainedTokenizerBase, str]:
    """The tokenizer of a chat model, and what ends its turns."""
    return clha.load_tokenizer(str(chats[request.param])), TEMPLATES[request.param][1]


def records(world: Path, number: int = 20) -> list[Record]:
    """Records of the toy world, every other one in the middle of a dialogue."""
    found = reward.read_records(world / "scored.jsonl")[:number]
    for record in found[::2]:
        record["prompt"] = [*turns("Hello", "Hi! What can I do?"), *record["prompt"]]
    return found


def test_ids_are_those_of_the_template_up_to_the_end_of_the_turn(
    world: Path, chat: tuple[PreTrainedTokenizerBase, str]
) -> None:
    tokenizer, end = chat
    for record in records(world):
        encoded = clha.encode(record, tokenizer, WIDE)
        apply = tokenizer.apply_chat_template
        assert encoded["prompt_ids"] == apply(record["prompt"], add_generation_prompt=True, return_dict=False)
        for response, ids in zip(record["responses"], encoded["response_ids"], strict=True):
            whole = apply([*record["prompt"], {"role": "assistant", "content": response}], return_dict=False)
            assert whole[: len(encoded["prompt_ids"] + ids)] == encoded["prompt_ids"] + ids
            assert tokenizer.decode(whole[len(encoded["prompt_ids"] + ids) :]) in ("", "\n")
            assert tokenizer.decode(ids).strip() == response.strip() + end


@pytest.mark.parametrize(
    "typed", ["a<|im_end|>b", "<|eot_id|><|im_start|>system\n", "</s> [/INST] <s>", "a\ufdd0b"]
)
def test_what_someone_typed_stays_characters(chat: tuple[PreTrainedTokenizerBase, str], typed: str) -> None:
    tokenizer, end = chat
    special = clha.special_tokens(tokenizer)
    plain = [i for i in clha.dialogue_ids(turns("x", "y"), tokenizer) if i in special]
    ids = clha.dialogue_ids(turns(typed, typed), tokenizer)
    assert [i for i in ids if i in special] == plain
    if "\ufdd0" not in typed:
        assert tokenizer.decode(ids).count(typed.strip()) == 2
    encoded = clha.encode({"id": "", "prompt": turns("x"), "responses": [typed, "b"]}, tokenizer, WIDE)
    assert encoded["response_ids"][0][-1] == tokenizer.convert_tokens_to_ids(end)


def test_a_long_chat_loses_its_oldest_turns_but_not_its_system_turn(chats: dict[str, Path]) -> None:
    tokenizer = clha.load_tokenizer(str(chats["chatml"]))
    system = {"role": "system", "content": "Be kind."}
    long = [system, *turns("one " * 9, "two " * 9, "three " * 9, "four", "five")]
    sizes = [len(clha.dialogue_ids([system, *long[start:]], tokenizer)) for start in (1, 3, 5)]
    for limit, start in ((sizes[0], 1), (sizes[0] - 1, 3), (sizes[1], 3), (sizes[1] - 1, 5), (sizes[2], 5)):
        assert clha.recent_turns(long, tokenizer, limit) == [system, *long[start:]]
    assert clha.recent_turns(long, tokenizer, sizes[2] - 1) == []
    record = {"id": "", "prompt": long, "responses": ["a", "b"]}
    limits = Config("", "", "", max_length=999, max_prompt_length=sizes[2])
    kept = clha.encode(record | {"prompt": [system, long[5]]}, tokenizer, limits)
    assert clha.encode(record, tokenizer, limits) == kept
    limits = Config("", "", "", max_length=999, max_prompt_length=sizes[2] - 1)
    assert clha.encode(record, tokenizer, limits) is None


def test_a_template_that_rewrites_the_prompt_is_refused_and_can_be_given_its_arguments(
    chats: dict[str, Path], tmp_path: Path
) -> None:
    model = str(tmp_path / "thinking")
    thinking = clha.load_tokenizer(str(chats["chatml"]))
    thinking.chat_template = THINKING
    shutil.copytree(chats["chatml"], model)
    thinking.save_pretrained(model)
    record = {"id": "number 7", "prompt": turns("Why?"), "responses": ["a", "b"]}
    thinks = clha.load_tokenizer(model, "think=true")
    with pytest.raises(InputError, match=r"^response 0: dialogue does not begin .*--template"):
        clha.encode(record, thinks, WIDE)
    thinks.save_pretrained(model)  # as a run leaves it; what is said now counts
    not_now = clha.load_tokenizer(model, "think=false")
    assert not_now.chat_template.count("set think") == 1
    plain = clha.load_tokenizer(str(chats["chatml"]))
    assert clha.encode(record, not_now, WIDE) == clha.encode(record, plain, WIDE)
    assert clha.load_tokenizer(model, "hh").chat_template is None
    thinking.chat_template = {"default": CHATML, "tool_use": MISTRAL}
    thinking.save_pretrained(model)
    named = clha.load_tokenizer(model)
    assert clha.encode(record, named, WIDE) == clha.encode(record, plain, WIDE)


def train(model: Path, data: Path, out: Path, **more: Any) -> None:
    """One step of clha.py."""
    small = {"batch_size": 4, "max_steps": 1, "max_length": 200, "max_prompt_length": 150}
    clha.train(Config(str(model), str(data), str(out), **small | more))


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_model_is_trained_sampled_from_and_served_in_its_template(
    world: Path, chats: dict[str, Path], tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = records(world)
    found[3]["prompt"] = turns("much too long " * 99)
    reward.write_jsonl(tmp_path / "train.jsonl", found)
    train(chats[name], tmp_path / "train.jsonl", tmp_path / "run")
    out = capsys.readouterr().out
    assert (
        "1 queries exceed --max_prompt_length" in out and f"{TEMPLATES[name][1]}'" in out.split("loss on ")[1]
    )
    policy, tokenizer = evaluate.load(str(tmp_path / "run/final"), torch.device("cpu"))
    assert tokenizer.chat_template == TEMPLATES[name][0]
    prompt = found[0]["prompt"]
    seen: list[torch.Tensor] = []

    def say_hi(input_ids: torch.Tensor, generation_config: Any, **_: Any) -> torch.Tensor:
        seen.append(input_ids[0])
        end = tokenizer.convert_tokens_to_ids(TEMPLATES[name][1])
        assert (
            end in generation_config.eos_token_id and tokenizer.eos_token_id in generation_config.eos_token_id
        )
        said = tokenizer("Human: hi", add_special_tokens=False).input_ids
        return torch.cat([input_ids, torch.tensor([[*said, end]])], dim=1)

    policy.generate = say_hi
    assert evaluate.generate(policy, tokenizer, [prompt]) == ["Human: hi"]  # only HH text is cut there
    assert evaluate.generate(policy, tokenizer, [prompt], response_prefix="So") == ["Human: hi"]
    apply = tokenizer.apply_chat_template
    asked = apply(prompt, add_generation_prompt=True, return_dict=False)
    assert seen[0].tolist() == asked
    answered = apply([*prompt, {"role": "assistant", "content": "So"}], return_dict=False)
    assert seen[1].tolist() == answered[: len(seen[1])] and tokenizer.decode(seen[1]).endswith("So")
    with pytest.raises(InputError, match="--max_prompt_length 9: too few tokens"):
        evaluate.generate(policy, tokenizer, [prompt], max_prompt_length=9)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_reward_model_scores_what_the_template_writes(
    world: Path, chats: dict[str, Path], tmp_path: Path, name: str
) -> None:
    plain = AutoModelForSequenceClassification.from_pretrained(chats[name], num_labels=1)
    tokenizer = clha.load_tokenizer(str(chats[name]))
    plain.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    model = reward.load_reward_model(str(tmp_path / "rm"), "cpu")
    for record in records(world, 6):
        scores = model.score([record["prompt"]] * 2, record["responses"][:2])
        for response, score in zip(record["responses"], scores, strict=False):
            whole = [*record["prompt"], {"role": "assistant", "content": response}]
            ids = tokenizer.apply_chat_template(whole, return_tensors="pt", return_dict=False)
            states = plain.eval().model(ids).last_hidden_state
            assert score == pytest.approx(plain.score(states[0, -1]).item(), abs=1e-5)
            assert ids.tolist()[0].count(tokenizer.bos_token_id) == (name != "chatml")


def test_standardized_rewards_keep_the_scale_of_the_training_file(tmp_path: Path) -> None:
    train_data = [{"rewards": [1.0, 3.0]}, {"rewards": [5.0, 7.0]}]
    path = tmp_path / "scale.json"
    scaled = reward.standardized(train_data, path, "rm")
    scale = json.loads(path.read_text())
    assert scale == {"model": "rm", "mean": 4.0, "deviation": pytest.approx((20 / 3) ** 0.5)}
    assert sum(reward for row in scaled for reward in row["rewards"]) == pytest.approx(0)
    [dev] = reward.standardized([{"rewards": [4.0, 4.0 + scale["deviation"]]}], path, "rm")
    assert dev["rewards"] == pytest.approx([0.0, 1.0])
    with pytest.raises(InputError, match=r"scale\.json: is the scale of rm's rewards; choose another"):
        reward.standardized(train_data, path, "other")
    path.write_text('{"mean": 4, "deviation": 2, "model": "rm"}')  # by hand
    assert reward.standardized(train_data, path, "rm")[1]["rewards"] == [0.5, 1.5]
    path.write_text('{"mean": 1.0, "deviation": 0.0, "model": "rm"}')
    with pytest.raises(InputError, match=r"scale\.json: not a reward scale"):
        reward.standardized(train_data, path, "rm")


PHI = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}"
)


def test_what_a_template_writes_after_the_end_of_the_turn_is_not_trained_on(
    chats: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "phi.jinja").write_text(PHI)
    tokenizer = clha.load_tokenizer(str(chats["chatml"]), str(tmp_path / "phi.jinja"))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert clha.turn_end(tokenizer, tokenizer.chat_template) == end
    encoded = clha.encode({"prompt": turns("Why?"), "responses": ["So.", "No."]}, tokenizer, WIDE)
    assert [ids[-1] for ids in encoded["response_ids"]] == [end, end]
    assert all(ids.count(end) == 1 for ids in encoded["response_ids"])
    asked = evaluate.prompt_ids(turns("Why?"), "So", tokenizer, 99)
    assert tokenizer.decode(asked).endswith("assistant\nSo")


def test_a_typed_special_token_changes_no_token_of_the_template(llama: PreTrainedTokenizerBase) -> None:
    llama = copy.deepcopy(llama)
    llama.add_special_tokens({"additional_special_tokens": SPECIAL[:2]})
    llama.chat_template = CHATML
    plain, typed = [clha.dialogue_ids(turns(f"Hi {word} there"), llama) for word in ("or", "</s>")]
    place = next(i for i, (one, two) in enumerate(zip(plain, typed, strict=False)) if one != two)
    tail = next(i for i, (one, two) in enumerate(zip(plain[::-1], typed[::-1], strict=False)) if one != two)
    assert (
        "there" in llama.decode(plain[place:]) and tail >= 6
    )  # the end of the turn, and the next one's header
    assert llama.eos_token_id not in typed and "</s>" in llama.decode(typed).replace(" ", "")
    encoded = clha.encode({"prompt": turns("Hi"), "responses": ["Yes </s> no", "b"]}, llama, WIDE)
    assert encoded["response_ids"][0].count(llama.convert_tokens_to_ids("<|im_end|>")) == 1


@pytest.mark.parametrize(
    "template", ["think:false", "=1", "thin=true", "think=flase", "add_generation_prompt=maybe", "atuo"]
)
def test_arguments_that_a_template_would_ignore_are_refused(chats: dict[str, Path], template: str) -> None:
    with pytest.raises(InputError, match=r"^--template .*: must be auto, hh, a file, or NAME=VALUE"):
        clha.load_tokenizer(str(chats["chatml"]), template)
