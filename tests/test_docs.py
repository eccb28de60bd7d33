"""The documents: their commands run here, or it says why not; flags exist, and links lead somewhere."""

import contextlib
import glob
import importlib.util
import inspect
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from conftest import ROOT

PAGES = [*(ROOT / "docs").glob("*.md"), ROOT / "bench/README.md", ROOT / "README.md"]
BLOCK = re.compile(r"```bash\n(.*?)```", re.DOTALL)
PROGRAM = re.compile(r"(\w+)\.py|-m ((?:study|bench)\.\w+)")
OTHERS = ("bash", "sbatch", "vllm", "source", "pip")


def test_the_version_is_the_newest_of_the_changelog() -> None:
    [version] = re.findall(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    newest = re.search(r"^## (.*)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest and newest[1] == version


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


def test_the_results_in_the_readme_are_those_of_the_report() -> None:
    report = (ROOT / "RESULTS.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in (ROOT / "README.md").read_text().splitlines()]
    shown = [row for row in rows if len(row) > 3 and "±" in row[1]]
    assert 8 <= len(shown) <= 12
    table = [line.strip("|").split("|") for line in report.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line] for line in table]
    for name, gold, reward, bleu, *lead in shown:
        [row] = [row for row in cells if row[:4] == [name, gold, reward, bleu]]
        assert row[5] == (lead[0] if lead else "")  # after word BLEU
    words = (ROOT / "README.md").read_text()
    verdicts = re.findall(r"\*\*(Holds|Fails|Equal within 0.1|Not shown)\*\*", words)
    assert verdicts and all(f"**{verdict.lower()}**" in report for verdict in verdicts)
    [level] = re.findall(r"CLHA minus it: (\S+ ± \S+), 20 seeds", words)
    assert f"*PRO, eight more* {level};" in report
    golds = {row[0].strip("*"): float(row[1].split()[0]) for row in cells if len(row) == 9 and "±" in row[1]}
    changes = {
        name: golds[f"{name}, eight more"] - golds[name] for name in ("CLHA", "RRHF", "ODPO", "LiPO-lambda")
    }
    assert "eight more do nothing for CLHA and RRHF; with\n  ODPO and LiPO-lambda they look better" in words
    assert max(map(abs, [changes.pop("CLHA"), changes.pop("RRHF")])) < 0.1 and max(changes.values()) < -0.3
    [rlhf] = [row for row in cells if row[0] == "RLHF (RLOO)" and len(row) == 9]
    assert rlhf[7] == "12.1" and "RLHF takes about twelve times CLHA's time" in words
    [edges] = re.findall(r"that a better one may lie beyond: (.*?)\. \(Of", report)
    [named] = re.findall(r"The choices of (.*?) also lie at an edge of four or more", words)
    of_edges = re.findall(r"(?:^|, )([^()]+?)(?: \(RLOO\))? \(", edges)
    assert of_edges == re.split(", | and ", named)
    assert "lists without one of the seeds: DPO; LiPO-lambda; ODPO." in report
    exploratory = re.findall(r"(the gate|the filter) (adds|costs) (\d\.\d\d ± \d\.\d\d)", words)
    assert len(exploratory) == 2
    assert "- *gate*: **raises** gold in: none. **Lowers** it in: none." in report
    [(gains, losses)] = re.findall(
        r"- \*filter\*: \*\*raises\*\* gold in: (.*?)\. \*\*Lowers\*\* it in: (.*)\.", report
    )
    assert (len(gains.split("; ")), len(losses.split("; "))) == (2, 1)
    for name, verb, number in exploratory:
        assert f"| {name}, alpha 0.05 | {'+' if verb == 'adds' else '-'}{number} | 20 |" in report


STAND_INS = {
    "MODEL": "init",
    "BASE": "init",
    "RM": "rm",
    "RM_TRAIN": "rm",
    "RM_EVAL": "rm",
    "DATA": "pairs.json",
}
SMALL = {  # flags that end a command in a second
    "clha": "--batch_size 4 --max_steps 1",
    "study.baselines": "--batch_size 4 --max_steps 1",
    "study.rlhf": "--max_steps 1 --batch_size 1 --num_generations 2 --max_new_tokens 4",
    "evaluate generate": "--max_new_tokens 4",
    "reward train": "--batch_size 8 --max_length 256",
}
NOT_RUN = {  # why a command cannot run here
    "bench": "is run by tests/bench, at a small size",
    "...": "is not a whole command",
    "Anthropic/hh-rlhf": "needs the hub",
    "Qwen/Qwen3-0.6B": "needs the hub",
    "--push_to_hub": "needs the hub",
    "--tracker wandb": "needs an account",
}


def run(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a command of the documents here, in one process, with stand-ins for its models and data."""
    found = PROGRAM.search(command)
    module = found[1] or found[2]
    words = [STAND_INS.get(word, word) for word in shlex.split(command[found.end() :])]
    words = [path for word in words for path in (glob.glob(word) if "*" in word else [word])]
    subcommand = words[0] if re.fullmatch("[a-z]+", words[0]) else ""
    words += SMALL.get(f"{module} {subcommand}".strip(), "").split()
    monkeypatch.setattr(sys, "argv", [f"{module}.py", *words])
    program = importlib.import_module(module)
    if module == "study.rlhf":
        program.train(program.parse_args(words))
    elif inspect.signature(program.main).parameters:
        program.main(words)
    else:
        program.main()


@pytest.mark.parametrize("page", ["README.md", "docs/commands.md", "docs/engines.md", "docs/in_place_of.md"])
def test_the_commands_run_in_their_order(
    page: str, world: Path, reward_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = {name: (world / f"{name}.jsonl").read_text().splitlines()[:24] for name in ("scored", "test")}
    pairs = [json.loads(line) for line in lines["scored"]]
    pairs = [
        {"prompt": row["prompt"][-1]["content"]}
        | dict(zip(("chosen", "rejected"), row["responses"], strict=True))
        for row in pairs
    ]
    done = 0
    for number, block in enumerate(BLOCK.findall((ROOT / page).read_text())):
        folder = tmp_path / str(number)
        for name in ("data", "responses", "out"):
            (folder / name).mkdir(parents=True)
        monkeypatch.chdir(folder)
        Path("init").symlink_to(world / "init")
        Path("rm").symlink_to(reward_model)
        Path("pairs.json").write_text(json.dumps(pairs))
        for name in ("data", "dev_data", "pairs", "train", "data/train"):
            Path(f"{name}.jsonl").write_text("\n".join(lines["scored"]))
        for name in ("test", "data/test"):
            Path(f"{name}.jsonl").write_text("\n".join(lines["test"]))
        for command in [line.split("#")[0].strip() for line in block.replace("\\\n", " ").splitlines()]:
            words = shlex.split(command)
            if not words or words[0] not in ("python", "torchrun") or any(why in command for why in NOT_RUN):
                continue
            if "study.rlhf" in command and not importlib.util.find_spec("trl"):
                continue
            prepare(command)
            run(command, monkeypatch)
            done += 1
    assert (
        done >= {"README.md": 6, "docs/commands.md": 17, "docs/engines.md": 2, "docs/in_place_of.md": 2}[page]
    )


def prepare(command: str) -> None:
    """Removes a stand-in that a command is to make, and makes what an engine or another block has made."""
    out = re.search(r"--out (\S+\.jsonl)", command)
    if out:
        Path(out[1]).unlink(missing_ok=True)
    if "evaluate.py generate" in command and "out/final" in command and not Path("out/final").exists():
        Path("out/final").symlink_to(Path("init").resolve())
    if "--output_dir out" in command and Path("out").exists():
        shutil.rmtree("out")
    if "evaluate.py score" in command and not Path("responses/clha.jsonl").exists():
        rows = [json.loads(line) for line in Path("data/test.jsonl").read_text().splitlines()]
        found = [json.dumps({"id": row["id"], "response": row["responses"][0]}) for row in rows]
        Path("responses/clha.jsonl").write_text("\n".join(found))
    if "study.people" in command:
        for name in ("sft", "pro", "clha"):
            if not Path(f"eval/{name}").exists():
                rows = [json.loads(line) for line in Path("data/test.jsonl").read_text().splitlines()]
                found = [
                    json.dumps({"id": row["id"], "response": f"{name} {row['responses'][0]}"}) for row in rows
                ]
                Path(f"responses/{name}.jsonl").write_text("\n".join(found))
                words = (
                    f"--responses responses/{name}.jsonl --data data/test.jsonl --reward_model rm --out eval"
                )
                with mock.patch.object(sys, "argv", ["evaluate.py", "score", *words.split()]):
                    importlib.import_module("evaluate").main()


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
