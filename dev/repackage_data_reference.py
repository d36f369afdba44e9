"""How the named pretraining sets are made of their sources: shuffle once, cut into shards of one size. Not used at run time.

    python -m dev.repackage_data_reference --source=fineweb-edu --out=shards
    python -m dev.repackage_data_reference --files=a.parquet,b.jsonl --out=shards --limit=100000
    HF_TOKEN=... python -m dev.repackage_data_reference --source=climbmix --out=shards --upload=owner/name

A shard ends with the document at which its characters reach --chars-per-shard and its documents are a multiple of
1,024, so that all row groups are full; the last one holds what is left. It is a parquet file with the column
`text`, row groups of 1,024, zstd level 3, no dictionary, no statistics. The source must fit the disk; for a set of
your own `python -m nanochat.dataset import` streams instead and adds a validation shard.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.common import UserError, write_json
from nanochat.configurator import option, run
from nanochat.manifests import MANIFEST
from nanochat.metrics import duration
from nanochat.text_import import ROWS_PER_GROUP, write_shard

SEED = 42


@dataclass(frozen=True)
class Source:
    """A set on the hub. Without a text column it holds GPT-2 tokens, which are decoded."""

    repo: str
    subset: str | None = None
    text_field: str = "text"
    tokens_field: str = ""


SOURCES = {
    "fineweb-edu": Source("HuggingFaceFW/fineweb-edu", "sample-100BT"),
    "climbmix": Source("nvidia/Nemotron-ClimbMix", tokens_field="tokens"),
}


@dataclass(frozen=True)
class Config:
    out: str = option(..., "folder of the shards; must be new or empty")
    source: str = option("", "set on the hub", choices=("", *SOURCES))
    files: str = option("", "instead, local parquet or JSON lines files of one kind, separated by commas")
    text_field: str = option("text", "column of --files that holds the text")
    tokens_field: str = option("", "column of --files that holds GPT-2 tokens instead")
    chars_per_shard: int = option(250_000_000, "characters of a shard at least")
    limit: int = option(0, "documents to take; 0: all")
    upload: str = option("", "repository of the hub to upload the folder to, with the token in HF_TOKEN")


def main(cfg: Config) -> None:
    """Cut a shuffled set into shards of one size."""
    if bool(cfg.source) == bool(cfg.files):
        raise UserError("give either --source or --files")
    if cfg.chars_per_shard < 1 or cfg.limit < 0:
        raise UserError("--chars-per-shard must be positive, --limit not negative")
    folder = Path(cfg.out)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; choose another --out")
    rows, source = load(cfg)
    rows = rows.shuffle(seed=SEED)
    rows = rows.select(range(min(cfg.limit, len(rows)))) if cfg.limit else rows
    print(f"{len(rows):,} documents into {folder}", flush=True)
    facts = list(write_shards(texts(rows, source), folder, cfg.chars_per_shard, len(rows)))
    name = cfg.source or folder.name
    write_json(folder / MANIFEST, {"name": name, "seed": SEED, "sources": [source.repo], "files": facts})
    if cfg.upload:
        upload(folder, cfg.upload)


def load(cfg: Config) -> tuple[Any, Source]:
    """The documents, not shuffled yet, and what is known of them."""
    import datasets

    if cfg.source:
        source = SOURCES[cfg.source]
        return datasets.load_dataset(source.repo, source.subset, split="train"), source
    paths = [part.strip() for part in cfg.files.split(",") if part.strip()]
    if missing := [path for path in paths if not Path(path).is_file()]:
        raise UserError(f"--files: {missing[0]} does not exist")
    kind = "parquet" if paths[0].endswith(".parquet") else "json"
    try:
        rows = datasets.load_dataset(kind, data_files=paths, split="train")
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise UserError(f"--files: {error.__cause__ or error}") from None
    wanted = cfg.tokens_field or cfg.text_field
    if wanted not in rows.column_names:
        raise UserError(f"--files: no column {wanted!r}, but {', '.join(rows.column_names)}")
    return rows, Source(cfg.files, None, cfg.text_field, cfg.tokens_field)


def texts(rows: Iterable[dict[str, Any]], source: Source) -> Iterator[str]:
    """The text of each row."""
    if not source.tokens_field:
        yield from (row[source.text_field] or "" for row in rows)
        return
    import tiktoken

    decode = tiktoken.get_encoding("gpt2").decode
    yield from (decode(row[source.tokens_field]) for row in rows)


def write_shards(documents: Iterator[str], folder: Path, chars_per_shard: int, total: int) -> Iterator[dict]:
    """Write the shards one after the other; the facts of each for the manifest."""
    begun, done, index = time.monotonic(), 0, 0
    held: list[str] = []
    chars = 0
    for text in documents:
        held.append(text)
        chars += len(text)
        is_last = done + len(held) == total
        if is_last or (chars >= chars_per_shard and len(held) % ROWS_PER_GROUP == 0):
            facts = write_shard(
                folder / f"shard_{index:05d}.parquet", held, compression_level=3, write_statistics=False
            )
            done += len(held)
            left = duration((time.monotonic() - begun) / done * (total - done))
            size = f"{facts['bytes'] / 1e6:.1f} MB"
            print(
                f"{facts['name']}: {len(held):,} documents, {chars:,} characters, {size}; {left} left",
                flush=True,
            )
            yield facts
            held, chars, index = [], 0, index + 1


def upload(folder: Path, repo: str) -> None:
    """Send the folder to the hub, what is there already left out."""
    import os

    from huggingface_hub import HfApi

    if not os.environ.get("HF_TOKEN"):
        raise UserError(f"--upload={repo} needs a token in HF_TOKEN; the shards are in {folder}")
    api = HfApi(token=os.environ["HF_TOKEN"])
    api.create_repo(repo, repo_type="dataset", exist_ok=True)
    api.upload_large_folder(repo_id=repo, repo_type="dataset", folder_path=str(folder))


if __name__ == "__main__":
    run(Config, main)
