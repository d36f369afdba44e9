"""The shell scripts in runs/, and the set-up that they begin with."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "runs").glob("*.sh"))
ENTRIES = [path for path in SCRIPTS if path.name != "setup.sh"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(path):
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0


@pytest.mark.parametrize("path", ENTRIES, ids=lambda path: path.name)
def test_entry_scripts_are_strict_and_thin(path):
    text = path.read_text()
    assert "set -euo pipefail" in text and "exec python -m" in text
    assert len([line for line in text.splitlines() if line and line[0] != "#"]) < 10


@pytest.fixture
def sandbox(tmp_path):
    """A copy of runs/ beside stand-ins for uv and cargo, so that set-up can be tried without installing."""
    root = tmp_path / "project"
    shutil.copytree(ROOT / "runs", root / "runs")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "mkdir", "cat"):
        (tools / name).symlink_to(shutil.which(name))
    return root, tools


def tool(folder, name, body):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


UV = """case "$1" in
--version) echo uv 1 ;;
sync) echo synced; mkdir -p .venv/bin; echo "PATH=$PWD/.venv/bin:\\$PATH" > .venv/bin/activate
      printf '#!/bin/sh\\necho python "$@" in $NANOCHAT_BASE_DIR\\n' > .venv/bin/python
      /bin/chmod +x .venv/bin/python ;;
esac"""


def speed(root, tools, *flags, **environment):
    return subprocess.run(
        [str(tools / "bash"), str(root / "runs" / "speedrun.sh"), "--seed=1", *flags], capture_output=True,
        text=True, cwd=root.parent, timeout=60,
        env={"PATH": str(tools), "HOME": str(root.parent / "home"), "NANOCHAT_BASE_DIR": "base"} | environment,
    )  # fmt: skip


def test_setup_uses_uv_and_runs_the_plan_with_the_flags(sandbox):
    root, tools = sandbox
    tool(tools, "uv", UV)
    tool(tools, "cargo", "echo cargo 1")
    done = speed(root, tools)
    assert done.returncode == 0, done.stderr
    assert "synced" in done.stdout
    assert f"python -m scripts.speedrun --seed=1 in {root.parent / 'base'}" in done.stdout


def test_setup_installs_uv_with_pip_once(sandbox):
    root, tools = sandbox
    tool(tools, "cargo", "echo cargo 1")
    stored = root.parent / "uv-body"
    stored.write_text(f"#!/bin/sh\n{UV}\n")
    pip = f"""case "$*" in
*--version) ;;
*--target*) echo pip "$@"; mkdir -p "$6/bin"; cat {stored} > "$6/bin/uv"; /bin/chmod +x "$6/bin/uv" ;;
esac"""
    tool(tools, "python3", pip)
    done = speed(root, tools)
    assert done.returncode == 0, done.stderr
    assert (
        "uv is missing; installing it" in done.stdout and "pip -m pip install --quiet --target" in done.stdout
    )
    again = speed(root, tools)
    assert again.returncode == 0 and "uv is missing" not in again.stdout


def test_without_rust_it_says_exactly_what_to_do(sandbox):
    root, tools = sandbox
    tool(tools, "uv", UV)
    done = speed(root, tools)
    assert done.returncode == 2
    assert "cargo was not found" in done.stderr and "https://sh.rustup.rs" in done.stderr
    assert "synced" not in done.stdout


def test_rust_outside_the_path_is_found(sandbox):
    root, tools = sandbox
    tool(tools, "uv", UV)
    tool(root.parent / "home" / ".cargo" / "bin", "cargo", "echo cargo 1")
    assert speed(root, tools).returncode == 0


def test_without_uv_and_pip_it_says_what_to_install(sandbox):
    root, tools = sandbox
    done = speed(root, tools)
    assert done.returncode == 2 and "install uv" in done.stderr


def test_skip_setup_needs_an_environment(sandbox):
    root, tools = sandbox
    done = speed(root, tools, SKIP_SETUP="1")
    assert done.returncode == 2 and "SKIP_SETUP" in done.stderr


def test_a_dry_run_shows_the_plan_and_sets_nothing_up(sandbox):
    root, tools = sandbox
    for name in ("uv", "cargo"):
        tool(tools, name, f"echo called >> {root.parent}/installed; exit 1")
    for flag in ("--dry-run", "--help"):
        shown = speed(root, tools, flag)
        assert shown.returncode == 2 and shown.stderr.count("\n") == 1, shown.stderr
        assert "not installed" in shown.stderr and "bash -e runs/setup.sh" in shown.stderr
    tool(tools, "python", f'exec {sys.executable} "$@"')
    for package in ("nanochat", "scripts"):
        (root / package).symlink_to(ROOT / package)
    shown = speed(root, tools, "--dry-run", "--plan=tinyworld")
    assert shown.returncode == 0 and "dry run: nothing was started" in shown.stdout, shown.stderr
    assert not (root.parent / "installed").exists()
    assert speed(root, tools, "--dry-run=false").returncode and (root.parent / "installed").exists()


def test_help_is_fast():
    for module in ("scripts.speedrun", "scripts.sweep"):
        started = time.monotonic()
        command = [sys.executable, "-m", module, "--help"]
        assert subprocess.run(command, cwd=ROOT, capture_output=True, env=os.environ).returncode == 0
        assert time.monotonic() - started < 2
