"""Facts about git, machine and code: right where they exist, absent where they do not."""

from __future__ import annotations

import subprocess

import pytest

from nanochat import environment
from nanochat.common import UserError
from nanochat.environment import Git, Gpu


def _git(root, *arguments):
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path):
    _git(tmp_path, "init", "-b", "trunk")
    (tmp_path / "odd name ü.py").write_text("x = 'äö'\n", encoding="utf-8")
    (tmp_path / "data.bin").write_bytes(b"\xff" * 100)
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "-m", "first line\n\nbody")
    return tmp_path


def test_git_facts_of_a_clean_and_a_dirty_checkout(checkout):
    facts = environment.git_facts(checkout)
    assert (facts.branch, facts.dirty, facts.message) == ("trunk", False, "first line")
    assert len(facts.commit) >= 7
    (checkout / "new.py").write_text("")
    assert environment.git_facts(checkout).dirty


def test_outside_a_checkout_git_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment.git_facts(tmp_path) == Git()


def test_without_git_installed_facts_are_unknown_and_code_is_still_counted(checkout, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert environment.git_facts(checkout) == Git()
    assert environment.bloat_facts(checkout).files == 1


def test_bloat_counts_characters_of_tracked_code_not_bytes(checkout):
    (checkout / "untracked.py").write_text("y\n")
    (checkout / "uv.lock").write_text("a\nb\n")
    bloat = environment.bloat_facts(checkout)
    assert (bloat.files, bloat.lines, bloat.characters) == (1, 1, len("x = 'äö'\n"))
    assert (bloat.tokens, bloat.uv_lock_lines) == (2, 2)


def test_bloat_of_this_project_sees_this_file():
    assert environment.bloat_facts(environment.project_root()).files > 5
    assert (environment.project_root() / "nanochat" / "environment.py").exists()


@pytest.mark.parametrize(
    ("name", "count", "usd"),
    [
        ("NVIDIA H100 80GB HBM3", 8, 24.0),
        ("NVIDIA A100-SXM4-80GB", 2, 3.58),
        ("Tesla V100", 1, 0.55),
        ("NVIDIA B200", 1, 5.5),
        ("Something New", 1, 2.0),
        ("NVIDIA L40S", 1, 1.0),
        ("NVIDIA L4", 1, 0.7),
    ],
)
def test_hourly_price(name, count, usd, monkeypatch):
    monkeypatch.delenv("NANOCHAT_GPU_HOURLY_USD", raising=False)
    assert environment.hourly_usd((Gpu(name, 1),) * count) == pytest.approx(usd)


def test_price_is_unknown_without_gpus_and_can_be_overridden(monkeypatch):
    assert environment.hourly_usd(()) is None
    monkeypatch.setenv("NANOCHAT_GPU_HOURLY_USD", "1.25")
    assert environment.hourly_usd((Gpu("NVIDIA H100", 1),) * 4) == 5.0
    monkeypatch.setenv("NANOCHAT_GPU_HOURLY_USD", "cheap")
    with pytest.raises(UserError, match="NANOCHAT_GPU_HOURLY_USD"):
        environment.hourly_usd((Gpu("NVIDIA H100", 1),))


def test_hardware_and_software_of_this_machine():
    hardware, software = environment.hardware_facts(), environment.software_facts()
    assert hardware.usable_cores >= 1
    assert hardware.memory_bytes is None or hardware.memory_bytes > 2**28
    assert software.python.startswith("3.")
    assert software.nanochat != "unknown"


def test_wandb_run_is_reported_unless_it_is_the_dummy(monkeypatch):
    monkeypatch.setenv("WANDB_RUN", "dummy")
    assert environment.software_facts().wandb_run is None
    monkeypatch.setenv("WANDB_RUN", "mine")
    assert environment.software_facts().wandb_run == "mine"
