"""A folder for one untrusted program: made in memory where possible, measured and removed whatever is in it.

What a program leaves behind may be nested deeper than paths or Python's recursion go, be locked away by its
permissions, or consist of a million empty files. Neither measuring nor removing may stumble over that.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from collections.abc import Iterator

MAX_DEPTH = 64  # folders in folders; paths of a deeper tree could not even be named
ENTRY_BYTES = 4096  # what a file or folder takes at least, however empty: a page, or a place in a table

LONG_PATH = 500  # characters; a folder with a longer path is moved to the top before it is opened


@contextlib.contextmanager
def private_folder() -> Iterator[str]:
    """The real path of a new folder that only this user may enter; gone afterwards."""
    parent = "/dev/shm" if os.access("/dev/shm", os.W_OK | os.X_OK) else None
    folder = os.path.realpath(tempfile.mkdtemp(prefix="nanochat-", dir=parent))
    try:
        yield folder
    finally:
        remove(folder)


def folder_bytes(folder: str, enough: float = float("inf")) -> float:
    """Bytes on disk below a folder; counting ends early above `enough`. Infinite for a tree too deep to count."""
    total, todo = 0.0, [(folder, 0)]
    while todo and total <= enough:
        path, depth = todo.pop()
        if depth > MAX_DEPTH:
            return float("inf")
        with contextlib.suppress(OSError), os.scandir(path) as entries:
            for entry in entries:
                total += ENTRY_BYTES
                if entry.is_dir(follow_symlinks=False):
                    todo.append((entry.path, depth + 1))
                else:
                    with contextlib.suppress(OSError):
                        total += entry.stat(follow_symlinks=False).st_blocks * 512
                if total > enough:
                    break
    return total


def remove(folder: str) -> None:
    """Delete a folder with all that is in it. Errors are passed over: what cannot be deleted stays."""
    lifted, seen, todo = os.path.join(folder, secrets.token_hex(8)), set(), [folder]
    while todo:
        path = todo[-1]
        if path in seen:  # what was in it is gone
            todo.pop()
            with contextlib.suppress(OSError):
                os.rmdir(path)
            continue
        seen.add(path)
        for entry in _entries(path):
            with contextlib.suppress(OSError):
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry.path)
                    continue
                os.chmod(entry.path, 0o700)
                below = entry.path
                if len(below) > LONG_PATH:
                    below = f"{lifted}-{len(seen)}-{len(todo)}"
                    os.rename(entry.path, below)
                todo.append(below)


def _entries(path: str) -> list[os.DirEntry[str]]:
    with contextlib.suppress(OSError), os.scandir(path) as entries:
        return list(entries)
    return []
