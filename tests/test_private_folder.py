"""The folder of an untrusted program: measuring and removing survive whatever is in it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from nanochat.private_folder import ENTRY_BYTES, MAX_DEPTH, folder_bytes, private_folder, remove


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder beside a file that must never change."""
    (tmp_path / "outside").write_text("x")
    (tmp_path / "inside").mkdir()
    yield tmp_path / "inside"
    assert (tmp_path / "outside").read_text() == "x"


def dig(folder: Path, depth: int) -> None:
    """Nest folders and a file at the bottom, by relative paths as a program would."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        for _ in range(depth):
            os.mkdir("d")
            os.chdir("d")
        Path("bottom").touch()
    finally:
        os.chdir(before)


def test_it_is_private_and_goes_away():
    with pytest.raises(RuntimeError), private_folder() as path:
        assert os.path.realpath(path) == path and stat.S_IMODE(os.stat(path).st_mode) == 0o700
        Path(path, "a").write_text("x")
        raise RuntimeError
    assert not os.path.exists(path)


def test_trees_deeper_than_paths_and_recursion():
    with private_folder() as path:
        dig(Path(path), 2100)
        assert folder_bytes(path) == float("inf")
    assert not os.path.exists(path)


def test_links_are_not_followed(folder):
    (folder / "file").symlink_to(folder.parent / "outside")
    (folder / "folder").symlink_to(folder.parent)
    (folder / "loop").symlink_to("loop")
    os.link(folder.parent / "outside", folder / "second name")
    os.mkfifo(folder / "pipe")
    assert folder_bytes(str(folder)) < 10 * ENTRY_BYTES
    remove(str(folder))
    assert not folder.exists()


def test_names_and_permissions_do_not_help(folder):
    for name in ("a\nb", " ", "-rf", "\udcff", "é" * 100):
        (folder / name).mkdir()
        (folder / name / "x").touch()
        (folder / name).chmod(0)
    remove(str(folder))
    assert not folder.exists()


def test_empty_files_count(folder):
    for i in range(50):
        (folder / str(i)).touch()
    (folder / "large").write_bytes(bytes(1 << 20))
    assert folder_bytes(str(folder)) >= 50 * ENTRY_BYTES + (1 << 20)
    assert folder_bytes(str(folder), enough=10 * ENTRY_BYTES) <= 12 * ENTRY_BYTES + (1 << 20)
    dig(folder, MAX_DEPTH - 1)
    assert folder_bytes(str(folder)) < float("inf")


def test_what_is_gone_is_no_error(tmp_path):
    assert folder_bytes(str(tmp_path / "nothing")) == 0
    remove(str(tmp_path / "nothing"))
