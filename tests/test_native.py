"""C++ is compiled once, into the user's cache, or done without."""

from __future__ import annotations

import shutil

import pytest

from nanochat.common import UserError
from nanochat.native import load_library

load = load_library.__wrapped__  # not remembered


def test_it_can_be_switched_off_and_missed(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("NANOCHAT_KERNELS", "off")
    assert load("cpu_decode") is None
    monkeypatch.setenv("NANOCHAT_KERNELS", "auto")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert load("cpu_decode") is None
    assert not list(tmp_path.iterdir())


def test_another_value_than_auto_and_off_is_an_error(monkeypatch):
    monkeypatch.setenv("NANOCHAT_KERNELS", "foo")
    with pytest.raises(UserError, match="NANOCHAT_KERNELS='foo' is unknown; use auto or off"):
        load("cpu_decode")


def test_a_compiler_that_fails_is_done_without(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    assert load("cpu_decode") is None
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")
def test_compiled_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert load("cpu_decode") is not None
    (made,) = (tmp_path / "nanochat" / "kernels").iterdir()
    stamp = made.stat().st_mtime_ns
    assert load("cpu_decode") is not None and made.stat().st_mtime_ns == stamp
