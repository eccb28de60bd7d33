"""RLHF by TRL: what goes to the reward model, and, where TRL is installed, a run from end to end."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM

import clha
import evaluate
import reward
from clha import InputError, Turn
from study import rlhf

FLAGS = ("--max_steps", "2", "--batch_size", "2", "--num_generations", "2", "--max_new_tokens", "8")


def command(world: Path, reward_model: Path, out: Path) -> list[str]:
    """The arguments of a run of two steps."""
    paths = {"model": world / "init", "train_data": world / "train.jsonl", "reward_model": reward_model}
    words = [word for name, path in paths.items() for word in (f"--{name}", str(path))]
    return [*words, "--output_dir", str(out), *FLAGS]


def refusal(arguments: list[str]) -> str:
    """The one line with which study/rlhf.py refuses these arguments."""
    with pytest.raises(InputError) as refused:
        rlhf.train(rlhf.parse_args(arguments))
    return str(refused.value)


def test_without_trl_one_line_names_the_extra(
    world: Path, reward_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    assert refusal(command(world, reward_model, tmp_path / "out")) == "needs TRL: pip install .[rlhf]"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--model", "nowhere"), "nowhere: neither a model folder"),
        (("--train_data", "nothing.jsonl"), "nothing.jsonl"),
        (("--batch_size", "0"), "--batch_size 0: must be"),
        (("--batch_size", "257"), "--batch_size 257: must be 1 to 256 (prompts)"),
        (("--batch_size", "many"), "invalid int value: 'many'"),
        (("--num_generations", "1"), "--num_generations 1: must be 2 or more"),
        (("--max_new_tokens", "0"), "--max_new_tokens 0: must be"),
        (("--max_steps", "-1"), "--max_steps -1: must be"),
        (("--beta", "1"), "unrecognized arguments: --beta 1"),
        (("--output_dir", "{finished}"), "holds a finished run (final/)"),
    ],
)
def test_wrong_input_is_one_line(
    change: tuple[str, ...],
    message: str,
    world: Path,
    reward_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "trl" not in sys.modules:  # none of these gets as far as using it
        monkeypatch.setitem(sys.modules, "trl", type(sys)("trl"))
    (tmp_path / "finished" / "final").mkdir(parents=True)
    changed = [word.format(finished=tmp_path / "finished") for word in change]
    line = refusal([*command(world, reward_model, tmp_path / "out"), *changed])
    assert message in line and "\n" not in line
    assert not (tmp_path / "out").exists()


def test_several_processes_are_refused(
    world: Path, reward_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "trl" not in sys.modules:
        monkeypatch.setitem(sys.modules, "trl", type(sys)("trl"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "runs as one process" in refusal(command(world, reward_model, tmp_path / "out"))


def test_a_missing_reward_model_is_one_line(world: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    line = refusal(command(world, tmp_path / "none", tmp_path / "out"))
    assert "none: neither a model folder" in line
    assert not (tmp_path / "out").exists()


def test_the_reward_is_that_of_the_cut_responses_in_their_order() -> None:
    class Lengths:
        """A reward model that gives the length of a response, and remembers what it was asked."""

        asked: list[Any]

        def score(self, prompts: list[list[Turn]], responses: list[str]) -> list[float]:
            self.asked = [*zip(prompts, responses, strict=True)]
            return [float(len(response)) for response in responses]

    lengths = Lengths()
    first = [{"role": "user", "content": "Tea?"}]
    second = [{"role": "user", "content": "Rice?"}]
    values = rlhf.reward_function(lengths)(  # type: ignore[arg-type]
        prompts=["", "", ""],
        completions=[" Boil it.\n", " No.\n\nHuman: And then?", " \n"],
        dialogue=[first, second, second],
        completion_ids=[[1], [2], [3]],
        trainer_state=None,
    )
    assert lengths.asked == [(first, "Boil it."), (second, "No."), (second, "")]
    assert values == [8.0, 3.0, 0.0]


def test_the_reward_is_the_raw_score_of_the_model(world: Path, reward_model: Path) -> None:
    model = reward.load_reward_model(str(reward_model))
    records = list(clha.iter_records(world / "train.jsonl"))[:4]
    prompts = [record["prompt"] for record in records]
    responses = [record["responses"][0] for record in records]
    texts = [f" {response}\n" for response in responses]
    values = rlhf.reward_function(model)(completions=texts, dialogue=prompts)
    assert values == pytest.approx(model.score(prompts, responses), abs=1e-6)
    [empty] = rlhf.reward_function(model)(completions=[" "], dialogue=prompts[:1])
    assert math.isfinite(empty)


def test_a_long_prompt_keeps_its_end(world: Path) -> None:
    tokenizer = clha.load_tokenizer(str(world / "init"))
    short = [{"role": "user", "content": "How do I make tea?"}]
    assert rlhf.prompt_text(short, tokenizer) == clha.render(short)
    long = [{"role": "user", "content": "boil the water " * 300}, *short]
    text = rlhf.prompt_text(long, tokenizer)
    limit = clha.Config.max_prompt_length
    assert clha.render(long).endswith(text) and "<s>" not in text
    assert tokenizer(text).input_ids == clha.cut_prompt(tokenizer(clha.render(long)).input_ids, limit, 0)


def test_two_steps_end_in_a_usual_folder(world: Path, reward_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    out = tmp_path / "out"
    arguments = [*command(world, reward_model, out), "--learning_rate", "1e-3"]
    words = [sys.executable, "-m", "study.rlhf", *arguments]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    names = {"config.json", "generation_config.json", "model.safetensors"}
    assert {path.name for path in (out / "final").iterdir()} == names | {
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert {path.name for path in out.iterdir()} == {"final", "metrics.jsonl"}
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 2

    before, after = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (world / "init", out / "final")
    )
    moved = [not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert all(moved)
    tokenizer = clha.load_tokenizer(str(out / "final"))
    text = clha.render([{"role": "user", "content": "How do I make tea?"}])
    assert tokenizer(text).input_ids == clha.load_tokenizer(str(world / "init"))(text).input_ids
    prompt = next(clha.iter_records(world / "test.jsonl"))["prompt"]
    [response] = evaluate.generate(after, tokenizer, [prompt], max_new_tokens=4)
    assert isinstance(response, str)
    assert "finished run" in refusal(arguments)
