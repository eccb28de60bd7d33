"""The documents: every command in them is one that its program takes, and what they show as code runs."""

import contextlib
import importlib.util
import inspect
import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

PAGES = [*(ROOT / "docs").glob("*.md"), ROOT / "bench/README.md", ROOT / "README.md"]
BLOCK = re.compile(r"```bash\n(.*?)```", re.DOTALL)
PROGRAM = re.compile(r"(\w+)\.py|-m ((?:study|bench)\.\w+)")
OTHERS = ("bash", "sbatch", "vllm", "source", "pip")


def commands() -> list[tuple[str, str]]:
    """(page, command) of each line of each block, without comments and what is left out as "..."."""
    found = []
    for page in PAGES:
        for block in BLOCK.findall(page.read_text()):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words = words[1:]
                if words and words[0] not in OTHERS:
                    found.append((page.name, shlex.join(words)))
        text = page.read_text()
        found += [(page.name, text[m.start(1) : m.end(1)]) for m in re.finditer(r"`(python [^`\n]*)`", text)]
    return found


def help_of(module: str, subcommand: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """What --help says."""
    program = importlib.import_module(module)
    monkeypatch.setattr(sys, "argv", [f"{module}.py", *subcommand, "--help"])
    main = getattr(program, "main", None) or program.parse_args
    takes_flags = len(inspect.signature(main).parameters) > 0
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        main(*[sys.argv[1:]] * takes_flags)
    return out.getvalue()


def test_the_programs_take_every_flag_that_the_documents_name(monkeypatch: pytest.MonkeyPatch) -> None:
    helps: dict[str, str] = {}
    checked = 0
    for page, command in commands():
        found = PROGRAM.search(command)
        assert found, f"{page}: {command}: of no program here"
        module = found[1] or found[2]
        words = shlex.split(command[found.end() :])
        subcommand = [word for word in words[:1] if re.fullmatch("[a-z]+", word)]
        flags = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert importlib.util.find_spec(module), f"{page}: {command}: no {module}"
        key = " ".join([module, *subcommand])
        if flags and key not in helps:
            helps[key] = help_of(module, subcommand, monkeypatch)
            if module == "bench.rates":  # hands what it does not know to clha.py
                helps[key] += help_of("clha", [], monkeypatch)
        unknown = [flag for flag in flags if not re.search(rf"{flag}\b", helps[key])]
        assert not unknown, f"{page}: {command}: no {', '.join(unknown)}"
        checked += 1
    assert checked > 50


def test_links_lead_to_files() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


def python_blocks() -> list[str]:
    """The code in docs/parts.md."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs/parts.md").read_text(), re.DOTALL)


def test_from_records_to_a_gradient(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "world").symlink_to(world)
    (tmp_path / "mine.jsonl").write_text("".join((world / "scored.jsonl").open().readlines()[:3]))
    names: dict[str, Any] = {}
    exec(python_blocks()[1], names)
    assert names["loss"].item() > 0
    assert all(weight.grad.isfinite().all() for weight in names["policy"].parameters())


def test_the_loss_of_ten_lines_trains(world: Path, tmp_path: Path) -> None:
    code, _ = python_blocks()
    (tmp_path / "my_loss.py").write_text(code)
    flags = {"model": world / "init", "train_data": world / "scored.jsonl", "output_dir": tmp_path / "run"}
    flags |= {"batch_size": 4, "max_steps": 2}
    argv = [f"--{name}={value}" for name, value in flags.items()]
    command = [sys.executable, str(tmp_path / "my_loss.py"), *argv]
    subprocess.run(command, env={"PYTHONPATH": str(ROOT), "PATH": ""}, check=True, capture_output=True)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(row["loss"] > 0 for row in rows)
