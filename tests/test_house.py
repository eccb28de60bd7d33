"""The rules of the house, read from the syntax trees of all Python files outside tests/ and docs/."""

import ast
import subprocess
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name

import pytest
from conftest import ROOT

TOP_LEVEL = {"clha.py", "reward.py", "prepare_data.py", "evaluate.py"}
# 880 lines of clha.py and 6,500 in all are wanted. These are what there is.
MAX_LINES, MAX_PAPER_LINES, MAX_OPTIONS, MAX_DENSITY, MAX_TOTAL = 1273, 480, 32, 13.0, 7500
SMUGGLED = {"sys.modules", "sys.path", "importlib.import_module", "__import__"}


def imported(node: ast.AST, package: str) -> list[str]:
    """The dotted names that a statement may import; of "from a import b" these are a and a.b."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = resolve_name("." * node.level + (node.module or ""), package)
    return [base, *(f"{base}.{alias.name}" for alias in node.names)]


def broken_rules(sources: dict[str, str]) -> list[str]:
    """A line for each rule that these files, {path: text}, break; clha.py is one of them."""
    modules = {path.removesuffix(".py").replace("/", ".").removesuffix(".__init__"): path for path in sources}
    graph: dict[str, set[str]] = {}
    broken = [f"{path}: at the top level" for path in sources if "/" not in path and path not in TOP_LEVEL]
    for module, path in modules.items():
        nodes = list(ast.walk(ast.parse(sources[path])))
        functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        inside = {id(node) for function in functions for node in ast.walk(function)}
        graph[module] = set()
        for node in nodes:
            names = imported(node, path.rpartition("/")[0].replace("/", "."))
            ours = (set(names) & modules.keys()) - {module}
            graph[module] |= ours
            if ours and id(node) in inside:
                broken.append(f"{path}:{node.lineno}: imports {min(ours)} in a function")
            used = [ast.unparse(node)] if isinstance(node, ast.Name | ast.Attribute) else names
            broken += [f"{path}:{node.lineno}: {name}" for name in used if name in SMUGGLED]
        for function in functions:
            arguments = [node for node in ast.iter_child_nodes(function.args) if isinstance(node, ast.arg)]
            untyped = [a for a in arguments if not a.annotation and a.arg not in ("self", "cls")]
            if untyped or not function.returns:
                broken.append(f"{path}:{function.lineno}: {function.name} without types")
    broken += [f"clha.py: imports {module}" for module in sorted(graph["clha"])]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        broken.append(f"a circle: {' < '.join(error.args[1])}")

    lines = sources["clha.py"].splitlines()
    nodes = list(ast.walk(ast.parse(sources["clha.py"])))
    config = next(node for node in nodes if isinstance(node, ast.ClassDef) and node.name == "Config")
    paper = next((n for n, line in enumerate(lines, 1) if line.startswith("# 7. ")), len(lines) + 1)
    measures = [
        ("options", sum(isinstance(node, ast.AnnAssign) for node in config.body), MAX_OPTIONS),
        ("nodes per statement", len(nodes) / sum(isinstance(node, ast.stmt) for node in nodes), MAX_DENSITY),
        ("lines up to section 7", paper, min(MAX_PAPER_LINES, len(lines))),
        ("lines of clha.py", len(lines), MAX_LINES),
        ("lines", sum(len(text.splitlines()) for text in sources.values()), MAX_TOTAL),
    ]
    return broken + [f"{value:.5g} {name}" for name, value, most in measures if value > most]


def test_the_rules_are_kept() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone, so git cannot say which files are the project's")
    command = ["git", "ls-files", "-co", "--exclude-standard", "*.py", ":!tests", ":!docs"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    sources = {path: (ROOT / path).read_text() for path in listing if (ROOT / path).exists()}
    assert "\n".join(broken_rules(sources)) == ""


CONFIG = "class Config:\n    a: int = 1\n"
TYPED = "class A:\n    def f(self, a: int, *b: int, c: int, **d: int) -> None:\n        import json\n"
GOOD = {"clha.py": f"{CONFIG}# 7. \n", "reward.py": "import clha\n", "study/toy.py": TYPED}
BAD = [
    ("tools.py", "", "tools.py: at the top level"),
    ("study/toy.py", "import reward\nimport study.run", "a circle: study.toy < study.run < study.toy"),
    ("bench/x.py", "def f() -> None:\n    from clha import pack", "bench/x.py:2: imports clha in a function"),
    ("clha.py", f"import study.toy\n{CONFIG}# 7. ", "clha.py: imports study.toy"),
    ("evaluate.py", "import sys\nsys.path.append('.')", "evaluate.py:2: sys.path"),
    ("evaluate.py", "from sys import modules", "evaluate.py:1: sys.modules"),
    ("evaluate.py", "def f(*a) -> None: ...", "evaluate.py:1: f without types"),
    ("clha.py", CONFIG + "    a: int\n" * MAX_OPTIONS + "# 7. ", f"{MAX_OPTIONS + 1} options"),
    ("clha.py", f"{CONFIG}x = 1{' + 1' * 30}\n# 7. ", "34 nodes per statement"),
    ("clha.py", CONFIG, "3 lines up to section 7"),
    ("clha.py", CONFIG + "\n" * 478 + "# 7. ", "481 lines up to section 7"),
    ("clha.py", f"{CONFIG}# 7. " + "\n" * (MAX_LINES - 1), f"{MAX_LINES + 1} lines of clha.py"),
    ("evaluate.py", "\n" * MAX_TOTAL, f"{MAX_TOTAL + 8} lines"),
]


@pytest.mark.parametrize(("path", "text", "broken"), BAD)
def test_each_rule_can_be_broken(path: str, text: str, broken: str) -> None:
    assert broken_rules(GOOD | {"study/run.py": "from . import toy\n", path: text}) == [broken]
