"""docs/walkthrough.ipynb runs from top to bottom and prints what it shows."""

import json
import sys

import matplotlib
import pytest
from conftest import ROOT


def assert_same_text(printed: str, shown: str) -> None:
    """Compares words, and numbers up to rounding."""
    for word, other in zip(printed.split(), shown.split(), strict=True):
        try:
            assert float(word) == pytest.approx(float(other), rel=1e-3, abs=2e-3)
        except ValueError:
            assert word == other


def test_the_walk_through(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    cells = json.loads((ROOT / "docs" / "walkthrough.ipynb").read_text())["cells"]
    monkeypatch.chdir(ROOT / "docs")
    monkeypatch.setattr(sys, "path", list(sys.path))
    matplotlib.use("Agg")
    names: dict[str, object] = {}
    pictures = 0
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
            streams = [output for output in cell["outputs"] if output["output_type"] == "stream"]
            shown = "".join("".join(output["text"]) for output in streams)
            assert_same_text(capsys.readouterr().out, shown)
            pictures += sum("image/png" in output.get("data", {}) for output in cell["outputs"])
    assert pictures == 4
