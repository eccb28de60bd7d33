"""The pictures of the documents are drawn by one command."""

import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import clha
from study import pictures


def test_all_pictures_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pictures.py", "--out", str(tmp_path)])
    pictures.main()
    for name in ("mask", "hinge", "rewards"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_the_way_names_functions_of_clha() -> None:
    diagram = (ROOT / "docs" / "parts.md").read_text().split("```mermaid")[1].split("```")[0]
    functions = re.findall(r"(\w+)\(\)", diagram)
    assert functions == ["rank", "encode", "pack", "Policy", "clha_loss", "run_batch"]
    assert all(hasattr(clha, function) for function in functions)


def test_the_mask_shows_what_a_pack_sees(model_and_tokenizer: tuple[object, clha.Tokenizer]) -> None:
    examples = [
        {"prompt_ids": [5, 6], "response_ids": [[7], [8, 9]]},
        {"prompt_ids": [5], "response_ids": [[6]]},
    ]
    [image] = pictures.mask(examples, model_and_tokenizer[1]).axes[0].images
    seen = [[int(value > 0) for value in row] for row in image.get_array()]
    assert seen == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0],
        [1, 1, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1, 1],
    ]
