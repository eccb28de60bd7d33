"""Generation in batches of one shape, as a GPU wants it, and by vLLM: the replies are those of `generate`."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import clha  # noqa: F401  (it registers the attention of packs)
import evaluate
import program
from program import load_tokenizer
from records import read_records, write_jsonl

# What evaluate.py asks of vLLM, done by transformers, a prompt at a time.
VLLM = """
import os
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM

SamplingParams = SimpleNamespace
engines = []


class LLM:
    def __init__(self, path, max_model_len, **settings):
        assert settings == {"dtype": "float32", "generation_config": "vllm", "skip_tokenizer_init": True}
        assert "RANK" not in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ and not engines
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        self.limit = max_model_len
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=engines.clear))
        engines.append(path)

    def generate(self, inputs, sampling, use_tqdm):
        assert inputs and not sampling.temperature and sampling.ignore_eos and not sampling.detokenize
        outputs = [self.reply(row["prompt_token_ids"], sampling) for row in inputs]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=row)]) for row in outputs]

    def reply(self, ids, sampling):
        assert len(ids) + sampling.max_tokens <= self.limit
        ends = {"eos_token_id": sampling.stop_token_ids, "max_new_tokens": sampling.max_tokens}
        mask = torch.ones(1, len(ids), dtype=torch.long)
        settings = {"attention_mask": mask, "do_sample": False, "pad_token_id": 0}
        return self.model.generate(torch.tensor([ids]), **settings, **ends)[0, len(ids):].tolist()
"""


@pytest.fixture(scope="module")
def lively(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny LLaMA with weights so large that what it says depends on the prompt."""
    model, folder = AutoModelForCausalLM.from_pretrained(world / "init"), tmp_path_factory.mktemp("lively")
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4 if weight.dim() > 1 else 1)
    model.save_pretrained(folder)
    load_tokenizer(str(world / "init")).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("attention", ["sdpa", "shared_prefix"])
@pytest.mark.parametrize("max_prompt_length", [20, 64])  # some batches of 20 have no padding
def test_batches_of_one_shape_give_the_same_replies(
    world: Path, lively: Path, attention: str, max_prompt_length: int
) -> None:
    model = AutoModelForCausalLM.from_pretrained(lively, dtype=torch.float32, attn_implementation=attention)
    prompts = [record["prompt"] for record in read_records(world / "test.jsonl")[:11]]
    seen: set[Any] = set()

    def note(_: Any, args: tuple[Any], inputs: dict[str, Any]) -> None:
        if inputs["input_ids"].shape[1] == 1:  # a step that makes a token, which is what a GPU compiles
            shapes = {name: tuple(value.shape) for name, value in inputs.items() if torch.is_tensor(value)}
            seen.add((*shapes.items(), inputs["past_key_values"].layers[0].keys.shape))

    model.register_forward_pre_hook(note, with_kwargs=True)
    replies, shapes = {}, {}
    for static in (False, True):
        seen.clear()
        settings = {"max_new_tokens": 12, "batch_size": 4, "max_prompt_length": max_prompt_length}
        replies[static] = [
            reply
            for part in (prompts[:8], prompts[8:])  # two calls, the second not of a full batch
            for reply in evaluate.generate(
                model, load_tokenizer(str(lively)), part, **settings, progress=False, static=static
            )
        ]
        shapes[static] = len(seen)
    assert replies[True] == replies[False] and len(set(replies[True])) > 5
    assert shapes[True] == 1 < shapes[False]


def test_a_cpu_keeps_batches_short_unless_told(model_and_tokenizer: Any) -> None:
    seen, prompts = [], [[{"role": "user", "content": "How?"}]]
    model, tokenizer = model_and_tokenizer
    hook = model.register_forward_pre_hook(
        lambda _, args, inputs: seen.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    for static in (None, True):
        evaluate.generate(model, tokenizer, prompts, max_new_tokens=1, progress=False, static=static)
    hook.remove()
    assert seen[0] == (1, len(evaluate.prompt_ids(tokenizer, prompts, 384)[0])) and seen[1] == (32, 384)


@pytest.fixture(scope="module")
def words(world: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The flags of an evaluation by a tiny reward model, without those for --model and --out."""
    folder = tmp_path_factory.mktemp("words")
    judge = AutoModelForSequenceClassification.from_pretrained(world / "init", num_labels=1, pad_token_id=0)
    judge.save_pretrained(folder / "judge")
    load_tokenizer(str(world / "init")).save_pretrained(folder / "judge")
    write_jsonl(folder / "test.jsonl", read_records(world / "test.jsonl")[:9])
    flags = {"--data": folder / "test.jsonl", "--reward_model": folder / "judge", "--max_new_tokens": 8}
    flags |= {"--max_prompt_length": 24, "--batch_size": 1}  # of two processes, one has none of the last part
    return [str(word) for flag in flags.items() for word in flag]


def run_evaluate(*words: Any, processes: int = 1, path: str = "") -> None:
    """Runs evaluate.py as a user starts it, with a folder of modules on the path."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launch if processes > 1 else []), "evaluate.py", *map(str, words)]
    environment = os.environ | {"PYTHONPATH": path}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("processes", [1, 2])
def test_vllm_leaves_the_same_files(
    world: Path, lively: Path, words: list[str], tmp_path: Path, processes: int
) -> None:
    """vLLM itself does not run here, as it needs a GPU: a stand-in answers in its place."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "vllm.py").write_text(VLLM)
    models = ["--model", lively, world / "init"]
    run_evaluate(*models, *words, "--out", tmp_path / "transformers")
    vllm = [*models, *words, "--out", tmp_path / "vllm", "--backend", "vllm"]
    run_evaluate(*vllm, processes=processes, path=str(tmp_path / "modules"))
    for model in (lively.name, "init"):
        for file in ("responses.jsonl", "scores.json"):
            ours, theirs = (tmp_path / backend / model / file for backend in ("transformers", "vllm"))
            assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize(("visible", "gpu"), [(None, "2"), ("4,5,6,7", "6")])
def test_an_engine_has_the_gpu_of_its_process(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, gpu: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("LOCAL_RANK", "2")
    before = dict(os.environ)
    with evaluate.environment_of_engine(torch.device("cuda", 2)):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == gpu and "LOCAL_RANK" not in os.environ
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "{model}"], "--backend vllm: needs vLLM, `pip install .[vllm]` ("),
        (["--responses", "closed.jsonl"], "--backend vllm: makes the replies of a --model"),
    ],
)
def test_what_vllm_can_not_do_is_said_in_a_line(
    lively: Path, words: list[str], tmp_path: Path, flags: list[str], message: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "vllm", None)  # not installed
    flags = [flag.format(model=lively) for flag in flags]
    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["evaluate.py", *flags, *words, "--out", str(out), "--backend", "vllm"])
    with pytest.raises(SystemExit) as end:
        program.run(evaluate.main)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith(f"evaluate.py: {message}") and said.count("\n") == 1
    assert not out.exists()
