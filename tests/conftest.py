"""What the tests share: a small toy world, its tiny model, settings of a run, and reference values."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerBase,
)

import clha
from study import toy

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"  # reference values and real data; not part of the project

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the programs that tests start: two of them share two cores


@pytest.fixture(autouse=True)
def leave_the_group() -> Iterator[None]:
    """Ends the process group that `clha.train` makes in this process."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small toy world on disk: its records, scored.jsonl with true rewards, and init/, a tiny LLaMA."""
    folder = tmp_path_factory.mktemp("toy") / "world"
    toy.write(folder, seed=0, queries=256)
    records = list(clha.iter_records(folder / "train.jsonl"))
    for record in records:
        record["rewards"] = [toy.gold(record["prompt"], response) for response in record["responses"]]
    (folder / "scored.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture(scope="session")
def model_and_tokenizer(world: Path) -> tuple[Any, Any]:
    """The tiny random LLaMA of the toy world, in float32, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(world / "init", dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(world / "init")


@pytest.fixture(scope="session")
def reward_model(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random reward model with the toy world's tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("rm") / "rm"
    tokenizer = clha.load_tokenizer(str(world / "init"))
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_labels=1, pad_token_id=tokenizer.pad_token_id)  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def config(world: Path, out: Path, **settings: Any) -> clha.Config:
    """Settings of a run of a few seconds: batches of 8 queries of the toy world, several packs each."""
    small = {"batch_size": 8, "pack_tokens": 400, "max_steps": 4, "learning_rate": 1e-4}
    return clha.Config(str(world / "init"), str(world / "scored.jsonl"), str(out), **(small | settings))


@pytest.fixture
def shared() -> Path:
    """The folder of reference files; the test is skipped where there is none."""
    if not SHARED.is_dir():
        pytest.skip("reference files (../shared) are not here")
    return SHARED


@pytest.fixture(scope="session")
def llama() -> PreTrainedTokenizerBase:
    """LLaMA's tokenizer, where it is."""
    if not SHARED.is_dir():
        pytest.skip("../shared/llama_tokenizer is not here")
    return AutoTokenizer.from_pretrained(SHARED / "llama_tokenizer")


def golden(name: str) -> Any:
    """A file of reference values; skips the test, by name, where it is absent."""
    path = SHARED / "golden" / name
    if not path.is_file():
        pytest.skip(f"../shared/golden/{name} is not here")
    return json.loads(path.read_text())
