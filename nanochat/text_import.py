"""Your own text as shards to pretrain on: parquet, JSON lines, text files or a Hugging Face data set, shuffled.

    python -m nanochat.dataset import --name=mine --files=notes/,articles.jsonl.gz
    python -m nanochat.dataset import --name=wiki --hub=owner/name --subset=en --split=train
    NANOCHAT_DATASET=mine python -m scripts.base_train

Documents are dealt to buckets on disk at random and every bucket is shuffled in memory, so the text may be far
larger than memory: a bucket holds one shard, or a 512th of very large sets. The last shard is for validation.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nanochat.common import UserError, hash_file, whole_file, write_json
from nanochat.configurator import option
from nanochat.dataset import naming_damage, open_shard
from nanochat.download import check_space
from nanochat.manifests import MANIFEST, NAMED_SETS, imported_set

JSON_LINES, PLAIN_TEXT, PACKED = (".jsonl", ".ndjson", ".json"), (".txt", ".md"), (".gz", ".zst")
MAX_BUCKETS = 512  # open files at a time; systems allow 1,024
ROWS_PER_GROUP = 1024
TEXT_CHARS = 100_000  # of one document of a text file; longer files are cut at line ends
PACKED_FACTOR = 4  # how much larger text is than gzip or zstd make it, roughly


@dataclass(frozen=True)
class Config:
    name: str = option(..., "name of the new data set, for NANOCHAT_DATASET")
    files: str = option(
        "", "files and folders, separated by commas: .parquet, .jsonl, .txt, .md, also .gz and .zst"
    )
    hub: str = option("", "instead of files, a data set of the Hugging Face hub, or a folder that holds one")
    subset: str = option("", "configuration of the data set of --hub; default its only one")
    split: str = option("train", "split of the data set of --hub")
    text_field: str = option("text", "column or key that holds the text")
    chars_per_shard: int = option(250_000_000, "characters of a shard")
    val_share: float = option(0.01, "part of the documents for validation, at most one shard")
    seed: int = option(0, "of the shuffling")


def import_text(cfg: Config) -> None:
    """Import text as a data set to pretrain on."""
    if not cfg.name.replace("-", "").replace("_", "").isalnum() or cfg.name in NAMED_SETS:
        raise UserError(f"--name={cfg.name!r} must be new, of letters, digits, - and _")
    if cfg.chars_per_shard < 1 or not 0 < cfg.val_share < 1:
        raise UserError("--chars-per-shard must be positive and --val-share between 0 and 1")
    if bool(cfg.files) == bool(cfg.hub):
        raise UserError("give either --files or --hub")
    folder = imported_set(cfg.name).path
    if folder.exists():
        raise UserError(f"{folder} exists already; delete it or choose another --name")
    if cfg.hub:
        source = f"{cfg.hub} {cfg.subset}".strip() + f", split {cfg.split}"
        documents, num_bytes, sources = *stream_hub(cfg.hub, cfg.subset, cfg.split, cfg.text_field), [source]
    else:
        paths = find_files([part.strip() for part in cfg.files.split(",") if part.strip()])
        documents = (text for path in paths for text in read_documents(path, cfg.text_field))
        num_bytes, sources = sum(map(_unpacked_bytes, paths)), [str(path) for path in paths]
        source = f"{len(paths):,} files"
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Buckets hold the text once; shards, which are packed, replace them one by one.
    check_space(folder.parent, round(1.3 * (num_bytes or 0)))
    size = f"about {num_bytes / 1e6:,.1f} MB" if num_bytes else "an unknown amount"
    print(f"{source}, {size} of text, into {folder}", flush=True)
    facts = write_data_set(cfg, documents, num_bytes, sources)
    total = sum(fact["documents"] for fact in facts)
    unset = "" if os.environ.get("NANOCHAT_DATA") != "tinyworld" else ", without NANOCHAT_DATA=tinyworld"
    print(
        f"{total:,} documents in {len(facts)} shards, the last for validation; to use: NANOCHAT_DATASET={cfg.name}"
        f" python -m scripts.base_train{unset}"
    )


def write_data_set(
    cfg: Config, documents: Iterator[str], num_bytes: int | None, sources: Sequence[str]
) -> list[dict]:
    """The documents as the data set cfg.name, which appears whole or not at all; returns facts of its shards."""
    folder = imported_set(cfg.name).path
    try:
        with TemporaryDirectory(dir=folder.parent, prefix=f".{cfg.name}.") as scratch:
            made = Path(scratch) / "shards"
            made.mkdir()
            facts = write_shards(documents, made, num_bytes, cfg.chars_per_shard, cfg.val_share, cfg.seed)
            about = {"name": cfg.name, "seed": cfg.seed, "sources": list(sources)}
            write_json(made / MANIFEST, {**about, "files": facts})
            os.replace(made, folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
    return facts


# --- reading -----------------------------------------------------------------------------------------


def find_files(names: Sequence[str]) -> list[Path]:
    """The files themselves, and all readable ones below the folders, by name. UserError if there are none."""
    found: list[Path] = []
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            found += sorted(file for file in path.rglob("*") if file.is_file() and _kind(file))
        elif not path.is_file():
            raise UserError(f"--files: {path} does not exist")
        elif not _kind(path):
            known = ", ".join((".parquet", *JSON_LINES, *PLAIN_TEXT))
            raise UserError(f"--files: {path} is none of {known}, nor these with {' or '.join(PACKED)}")
        else:
            found.append(path)
    if not found:
        raise UserError(f"--files: nothing to read in {', '.join(names) or 'no file'}")
    return found


def read_documents(path: Path, text_field: str) -> Iterator[str]:
    """The documents of a file, one at a time, without empty ones. UserError with file and line for broken ones."""
    kind = _kind(path)
    if kind == ".parquet":
        documents = _read_parquet(path, text_field)
    elif kind in JSON_LINES:
        documents = _read_json_lines(path, text_field)
    else:
        documents = _read_text(path)
    return (text for text in documents if text.strip())


def stream_hub(name: str, subset: str, split: str, text_field: str) -> tuple[Iterator[str], int | None]:
    """The documents of a split, read as they are needed, and about how many bytes they have, if that is known."""
    import datasets

    try:
        rows = datasets.load_dataset(name, subset or None, split=split, streaming=True)
        facts = (rows.info.splits or {}).get(split)
    except (OSError, ValueError) as error:
        raise UserError(f"--hub={name}: {_first_line(error)}") from None
    return _texts_of(name, rows, text_field), facts.num_bytes if facts else None


def _texts_of(name: str, rows: Iterable[Any], text_field: str) -> Iterator[str]:
    source = iter(rows)
    for number in count():
        try:
            row = next(source)
        except StopIteration:
            return
        except (OSError, ValueError) as error:  # the network, or a damaged file
            raise UserError(f"--hub={name}: after {number:,} rows: {_first_line(error)}") from None
        if not isinstance(row.get(text_field), str | None) or text_field not in row:
            raise UserError(
                f"--hub={name}: row {number:,} has no text under {text_field!r}, but {', '.join(row)}; "
                "see --text-field"
            )
        if (row[text_field] or "").strip():
            yield row[text_field]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _kind(path: Path) -> str:
    """The ending without the packing; empty if it is not one that can be read."""
    name = path.with_suffix("") if path.suffix in PACKED else path
    is_packed_parquet = name is not path and name.suffix == ".parquet"
    return (
        name.suffix if name.suffix in (".parquet", *JSON_LINES, *PLAIN_TEXT) and not is_packed_parquet else ""
    )


def _read_parquet(path: Path, text_field: str) -> Iterator[str]:
    with open_shard(path, text_field) as file:
        for group in range(file.num_row_groups):
            with naming_damage(path, group):
                for batch in file.iter_batches(ROWS_PER_GROUP, row_groups=[group], columns=[text_field]):
                    yield from (text or "" for text in batch.column(0).to_pylist())


def _read_json_lines(path: Path, text_field: str) -> Iterator[str]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not valid JSON: {error}") from None
        if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
            what = f"keys {', '.join(record)}" if isinstance(record, dict) else f"a {type(record).__name__}"
            if isinstance(record, dict) and text_field in record:
                what = json.dumps(record[text_field])[:40]
            raise UserError(f"{path}:{number}: no text under {text_field!r}, but {what}; see --text-field")
        yield record[text_field]


def _read_text(path: Path) -> Iterator[str]:
    """The whole file, or pieces of it that end with a line."""
    lines = _lines(path)
    while True:
        piece, size = [], 0
        for line in lines:
            piece.append(line)
            size += len(line)
            if size >= TEXT_CHARS:
                break
        if not piece:
            return
        yield "".join(piece)


def _lines(path: Path) -> Iterator[str]:
    """Lines of a file that may be packed, a chunk at a time. Text that is not UTF-8 is a UserError."""
    import pyarrow as pa

    number = 0
    try:
        packing = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
        with pa.input_stream(str(path), compression=packing, buffer_size=1 << 20) as stream:
            for line in io.TextIOWrapper(stream, encoding="utf-8", newline=""):
                number += 1
                yield line
    except UnicodeDecodeError as error:
        # Of what is decoded at once, the lines before the bad byte have not come out yet.
        number += 1 + len(re.findall(rb"\r\n|\r|\n", error.object[: error.start]))
        raise UserError(f"{path}:{number}: not UTF-8: {error.reason}") from None
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: damaged after line {number}: {error}") from None


# --- writing -----------------------------------------------------------------------------------------


def write_shards(
    documents: Iterator[str],
    folder: Path,
    num_bytes: int | None,
    chars_per_shard: int,
    val_share: float = 0.01,
    seed: int = 0,
) -> list[dict]:
    """Write shuffled shards into an empty folder; returns name, documents, characters, bytes, sha256 of each.

    num_bytes: about how much text there is, None if unknown; it decides on the number of buckets. UserError for
    fewer than two documents.
    """
    guess = MAX_BUCKETS if num_bytes is None else -(-num_bytes // chars_per_shard)
    rng, num_buckets = random.Random(seed), min(max(1, guess), MAX_BUCKETS)
    held_out: list[str] = []  # for validation
    with TemporaryDirectory(dir=folder.parent, prefix=".buckets.") as scratch, ExitStack() as stack:
        paths = [Path(scratch) / str(bucket) for bucket in range(num_buckets)]
        buckets = [stack.enter_context(open(path, "wb")) for path in paths]
        num_documents = num_held_out_chars = num_chars = 0
        for num_documents, text in enumerate(documents, start=1):  # noqa: B007
            # the first document is held out, so that there is always one
            data = text.encode("utf-8", errors="replace")  # JSON may hold halves of surrogate pairs
            if (rng.random() < val_share or not held_out) and num_held_out_chars < chars_per_shard:
                held_out.append(data.decode())
                num_held_out_chars += len(text)
            else:
                rng.choice(buckets).write(len(data).to_bytes(8, "little") + data)
                num_chars += len(text)
        if num_documents < 2:
            raise UserError(f"{num_documents} documents: training needs one and validation another")
        stack.close()
        names = _names()
        facts = []
        together = max(1, num_buckets * chars_per_shard // max(1, num_chars))  # buckets that fill a shard
        for start in range(0, num_buckets, together):
            texts = [text for path in paths[start : start + together] for text in _take(path)]
            rng.shuffle(texts)
            facts += [write_shard(folder / next(names), part) for part in _parts(texts, chars_per_shard)]
        rng.shuffle(held_out)
        return [*facts, write_shard(folder / next(names), held_out)]


def _take(path: Path) -> Iterator[str]:
    with open(path, "rb") as file:
        while size := file.read(8):
            yield file.read(int.from_bytes(size, "little")).decode()
    path.unlink()  # the space is needed for the shards


def _names() -> Iterator[str]:
    return (f"shard_{number:05d}.parquet" for number in count())


def _parts(texts: Sequence[str], chars: int) -> Iterator[list[str]]:
    """Runs of texts of nearly equal size, as many as come nearest to so many characters each; none for no text."""
    total = sum(map(len, texts))
    num_parts, part, done = max(1, round(total / chars)), [], 0
    for text in texts:
        part.append(text)
        before, done = done, done + len(text)
        if before * num_parts // total < done * num_parts // total:  # a border lies in this text
            yield part
            part = []


def write_shard(path: Path, texts: list[str], **parquet: Any) -> dict:
    """Write one shard; its facts for the manifest. parquet: further options of the file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"text": pa.array(texts, pa.large_string())})
    options = {"row_group_size": ROWS_PER_GROUP, "compression": "zstd", "use_dictionary": False, **parquet}
    with whole_file(path) as file:
        pq.write_table(table, file, **options)
    return {
        "name": path.name, "documents": len(texts), "characters": sum(map(len, texts)),
        "bytes": path.stat().st_size, "sha256": hash_file(path),
    }  # fmt: skip


def _unpacked_bytes(path: Path) -> int:
    factor = PACKED_FACTOR if path.suffix in (*PACKED, ".parquet") else 1
    return path.stat().st_size * factor
