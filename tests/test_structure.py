"""The shape of the repository: layers, sizes, start-up, one way to do a thing."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import pytest

import nanochat

ROOT = Path(__file__).parent.parent
LAYERS = {"nanochat": set(), "tasks": {"nanochat"}, "scripts": {"nanochat", "tasks"}}
SCRIPTS = sorted(
    path.stem
    for path in (ROOT / "scripts").glob("*.py")
    if "configurator import" in path.read_text(encoding="utf-8")
)
# Machines that train have no more than this (and the standard library).
TRAINING_NEEDS = {"torch", "numpy", "pyarrow", "tiktoken", "rustbpe", "nanochat", "tasks", "scripts"}


def layers() -> list[list[str]]:
    """The map in the library's docstring: a line of modules per layer, longer ones continued with an indent."""
    lines = (nanochat.__doc__ or "").split("\n\n", 1)[1].splitlines()
    found: list[list[str]] = []
    for line in lines:
        if line[:1].isalpha():
            found.append(line.split()[1:])
        elif line.strip():
            found[-1] += line.split()
    return found


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, at top level) of every import; `if TYPE_CHECKING` does not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = set()
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            top.add(node)
    checking = {
        inner for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }  # fmt: skip
    found = []
    for node in ast.walk(tree):
        if node in checking:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, node in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.append((node.module, node in top))
    return found


@pytest.mark.parametrize("package", LAYERS)
def test_imports_point_one_way(package):
    for path in (ROOT / package).rglob("*.py"):
        ours = {name.split(".")[0] for name, _ in imports(path)} & LAYERS.keys()
        assert ours <= LAYERS[package] | {package}, f"{path} imports {ours}"


def test_the_map_of_the_library_is_whole_and_its_layers_point_down():
    modules = {
        path.relative_to(ROOT / "nanochat").parts[0].removesuffix(".py")
        for path in (ROOT / "nanochat").rglob("*.py")
    }
    assert sorted(chain(*layers())) == sorted(modules - {"__init__"})
    level = {module: i for i, layer in enumerate(layers()) for module in layer}
    wrong = []
    for path in (ROOT / "nanochat").rglob("*.py"):
        name = path.relative_to(ROOT / "nanochat").parts[0].removesuffix(".py")
        for module, at_top in imports(path):
            parts = module.split(".")
            if at_top and parts[0] == "nanochat" and len(parts) > 1 and level[parts[1]] > level.get(name, 99):
                wrong.append(f"{name} -> {parts[1]}")
    assert not wrong, wrong


@pytest.mark.parametrize("script", ["base_train", "mid_train", "chat_sft", "chat_dpo", "chat_rl"])
def test_training_needs_nothing_but_the_essentials(script):
    """Every other import of the training path is made where an optional feature is used."""
    seen, todo = set(), [ROOT / "scripts" / f"{script}.py"]
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        for module, at_top in imports(path):
            name = module.split(".")[0]
            if at_top or path.parent.name == "scripts":
                assert name in TRAINING_NEEDS or name in sys.stdlib_module_names, f"{path} imports {module}"
            if at_top and name in LAYERS:
                target = ROOT / Path(*module.split("."))
                todo += [p for p in (target.with_suffix(".py"), target / "__init__.py") if p.exists()]


def test_files_stay_small():
    long = {
        str(path.relative_to(ROOT)): count
        for folder in ("nanochat", "scripts", "tasks", "tests", "dev", "rustbpe/src", "runs")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".rs", ".sh", ".js", ".css", ".html")
        and (count := len(path.read_text(encoding="utf-8").splitlines())) > 500
    }
    assert not long, long


def test_nothing_runs_at_import():
    """Modules define; only scripts guarded by __name__ act."""
    allowed = (
        ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.If, ast.Try,
    )  # fmt: skip
    for package in LAYERS:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
                assert docstring or isinstance(node, allowed), f"{path}:{node.lineno} runs at import"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_instant_and_complete(script):
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", f"scripts.{script}", "--help"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0 and "usage: python -m" in done.stdout, done.stderr[-500:]
    # The clock of a busy machine says little; what may not happen is that a heavy library is imported.
    for heavy in ("torch", "pyarrow", "matplotlib", "fastapi", "datasets"):
        assert f"| {heavy}\n" not in done.stderr.replace("   ", " ").replace("  ", " "), (
            f"{script} imports {heavy}"
        )
    assert time.perf_counter() - started < 20


def test_every_script_of_the_specification_exists():
    wanted = {
        "tok_train", "tok_eval", "tok_convert", "base_train", "base_loss", "base_eval", "mid_train", "chat_sft", "chat_rl",
        "chat_eval", "chat_cli", "chat_web",
    }  # fmt: skip
    assert wanted <= set(SCRIPTS)


def test_there_is_one_training_loop():
    """Only the loop and RL call backward, and what tries how large their batches may be."""
    callers = {
        path.name for package in ("nanochat", "scripts") for path in (ROOT / package).rglob("*.py")
        if ".backward()" in path.read_text(encoding="utf-8")
    }  # fmt: skip
    assert callers == {"trainer.py", "rl.py", "batch_fit.py"}
