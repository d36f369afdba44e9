"""Writes a whole TinyWorld below a folder, with everything that the pipeline otherwise downloads."""

from __future__ import annotations

import shutil
from pathlib import Path

from nanochat.common import UserError, read_json, write_json
from nanochat.tinyworld import sizes
from nanochat.tinyworld.core_bundle import write_bundle
from nanochat.tinyworld.documents import build_authors, documents
from nanochat.tinyworld.rows import write_rows
from nanochat.tinyworld.shards import write_shards

# Written last; a folder without it is incomplete.
MARK = "tinyworld.json"


def generate(root: Path, seed: int = 0, chars: int = sizes.DEFAULT_CHARS) -> dict[str, object]:
    """Write the world of `seed` below `root` with `chars` characters of training text; returns its record.

    Replaces another world there. The same seed and size give the same texts and rows on every platform
    and Python version, and the same bytes for the same pyarrow version. Raises UserError for sizes that
    are too small and negative seeds.
    """
    if seed < 0:
        raise UserError(f"--seed={seed} is negative; use 0 or more")
    if chars < sizes.SMALLEST_CHARS:
        raise UserError(f"--chars={chars} is too small for a world; use {sizes.SMALLEST_CHARS} or more")
    _clear(root)
    authors = build_authors(seed)
    record: dict[str, object] = {
        "format": sizes.FORMAT_VERSION,
        "seed": seed,
        "chars": chars,
        "text": write_shards(root / "base_data", documents(authors), chars),
        "rows": write_rows(root, authors),
        "core": write_bundle(root / "eval_bundle", authors),
    }
    write_json(root / MARK, record)
    return record


def _clear(root: Path) -> None:
    """An empty place for the new world; the mark of the old one goes first."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        (root / MARK).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write TinyWorld below {root}: {error.strerror}; choose another --out"
        ) from None
    for folder in ("base_data", "task_data", "eval_bundle"):
        shutil.rmtree(root / folder, ignore_errors=True)


def is_generated(root: Path, seed: int, chars: int) -> bool:
    """Whether exactly this world lies complete below `root`."""
    if not (root / MARK).exists():
        return False
    record = read_json(root / MARK)
    num_shards = len(list((root / "base_data").glob("*.parquet")))
    if num_shards < record["text"]["shards"]:  # a damaged one was deleted
        return False
    return [record.get(key) for key in ("format", "seed", "chars")] == [sizes.FORMAT_VERSION, seed, chars]
