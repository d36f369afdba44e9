"""Pretraining shards on this machine: where they are, which are for validation, how to read them.

A shard is a parquet file with a string column `text`. In the folder of a data set the last file by name is
the validation split, all others are training. Documents are shuffled when the shards are made, never here.

    python -m nanochat.dataset -n 8      # 8 training shards and the validation shard
    python -m nanochat.dataset list      # what there is, and what is here
    python -m nanochat.dataset verify    # every file against its size and SHA-256
    python -m nanochat.dataset import --name=mine --files=FOLDER

NANOCHAT_DATA=tinyworld generates the embedded data instead; NANOCHAT_DATASET names another set, one that was
imported, or a mixture: climbmix:0.7,mine:0.3 takes 70 % of the tokens from the first. It decides about pretraining
text alone: the other stages and evaluations stay with the data source. The commands are in nanochat/dataset_commands.py.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat.common import UserError, data_source
from nanochat.manifests import CLIMBMIX, FINEWEB_EDU, NAMED_SETS, TINYWORLD, PretrainingSet, imported_set

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq


def data_sets_in_use() -> dict[PretrainingSet, float]:
    """The sets that NANOCHAT_DATASET names, with their shares of the tokens, which add up to 1.

    By default climbmix alone, or the embedded set where that is the data source. A source that the base folder only
    remembers gives way to NANOCHAT_DATASET; NANOCHAT_DATA=tinyworld does not. UserError for a name that is neither
    known nor imported, and for weights that make no sense.
    """
    text = os.environ.get("NANOCHAT_DATASET") or ""
    if data_source() == "tinyworld" and (not text or os.environ.get("NANOCHAT_DATA")):
        return {TINYWORLD: 1.0}
    text = text or CLIMBMIX.name
    weights: dict[PretrainingSet, float] = {}
    for part in text.split(","):
        name, _, weight = part.strip().partition(":")
        named = _named_set(name, text)
        if named in weights:
            raise UserError(f"NANOCHAT_DATASET={text!r} names {name} twice")
        weights[named] = _weight(weight, text) if weight or "," in text else 1.0
    return {named: weight / sum(weights.values()) for named, weight in weights.items()}


def _named_set(name: str, text: str) -> PretrainingSet:
    if not name:
        raise UserError(
            f"NANOCHAT_DATASET={text!r} has a place without a name; write for example climbmix:0.7,mine:0.3"
        )
    found = NAMED_SETS.get(name) or imported_set(name)
    if name not in NAMED_SETS and not found.path.is_dir():
        raise UserError(
            f"NANOCHAT_DATASET={text!r}: {name!r} is unknown; use {', '.join(NAMED_SETS)}, "
            f"or import text under this name: python -m nanochat.dataset import --name={name} --files=FOLDER"
        )
    return found


def _weight(text: str, whole: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not 0 < weight < float("inf"):
        raise UserError(
            f"NANOCHAT_DATASET={whole!r}: the weight {text!r} is no positive number; as in a:0.7,b:0.3"
        )
    return weight


# --- listing and splitting ---------------------------------------------------------------------------


def list_parquet_files(data_dir: Path | None = None, warn_on_legacy: bool = False) -> list[Path]:
    """All complete parquet files of a folder, sorted by name; by default those of all sets in use.

    Without ClimbMix shards on disk, the FineWeb-Edu shards of an older set-up are used; `warn_on_legacy`
    prints how to move on.
    """
    folders = data_folders(warn_on_legacy) if data_dir is None else [data_dir]
    return [path for folder in folders for path in _parquet_files(folder)]


def data_folders(warn_on_legacy: bool = False) -> list[Path]:
    """The folders of the sets in use, existing or not; an older set-up's as above."""
    folders = [named.path for named in data_sets_in_use()]
    legacy = FINEWEB_EDU.path
    if folders == [CLIMBMIX.path] and not CLIMBMIX.path.is_dir() and legacy.is_dir():
        if warn_on_legacy:
            print(_LEGACY_NOTICE.format(new=CLIMBMIX.path, old=legacy), file=sys.stderr)
        return [legacy]
    return folders


def _parquet_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix == ".parquet" and path.is_file())


_LEGACY_NOTICE = """\
+------------------------------------------------------------------------------
| The default data set is now ClimbMix, but {new} does not exist.
| Using the FineWeb-Edu shards in {old}.
| To change over:    python -m nanochat.dataset -n 170
| and then:          python -m scripts.tok_train
| To stay, silently: export NANOCHAT_DATASET=fineweb-edu
+------------------------------------------------------------------------------"""


def split_files(split: str, data_dir: Path | None = None, warn_on_legacy: bool = False) -> list[Path]:
    """The files of a split, "train" or "val": of a folder, the last by name is validation, the others training.

    By default of all sets in use. Raises UserError if a folder has fewer than two files, or if a set in use
    lacks the validation shard that its manifest pins: taking another file instead would move it into training as soon as more come.
    """
    assert split in ("train", "val"), f"split is {split!r}"
    folders = data_folders(warn_on_legacy) if data_dir is None else [data_dir]
    return [path for folder in folders for path in _split_of(folder, split)]


def _split_of(folder: Path, split: str) -> list[Path]:
    files = _parquet_files(folder)
    hint = f"run: python -m nanochat.dataset{'' if folder == TINYWORLD.path else ' -n 8'}"
    if len(files) < 2:
        found = f"only {files[0].name}" if files else "no parquet file"
        raise UserError(
            f"{found} in {folder}, but training needs one and validation another (the last by name); {hint}"
        )
    last = files[-1]
    for named in data_sets_in_use():
        pinned = named.file_name(named.last_shard)
        if named.repo and folder == named.path and _is_hub_shard(last) and last.name != pinned:
            raise UserError(f"the validation shard {pinned} is missing in {folder}; {hint}")
    return files[-1:] if split == "val" else files[:-1]


def _is_hub_shard(path: Path) -> bool:
    return re.fullmatch(r"shard_\d{5}\.parquet", path.name) is not None


# --- reading -----------------------------------------------------------------------------------------


def open_shard(path: Path, column: str = "text") -> pq.ParquetFile:
    """Open a shard; a damaged file or one without a column of text is a UserError that names it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot read {path}: {reason} Delete it and fetch it again") from None
    if column not in file.schema_arrow.names:
        raise UserError(f"{path} has no column `{column}`, only {', '.join(file.schema_arrow.names)}")
    kind = file.schema_arrow.field(column).type
    if not _is_text(kind):
        raise UserError(f"{path}: column `{column}` holds {kind}, not text; write it anew with text there")
    return file


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


@contextmanager
def naming_damage(path: Path, row_group: int) -> Iterator[None]:
    """Whatever pyarrow says of damaged bytes becomes a UserError that names file and row group."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(
            f"{path} is damaged: row group {row_group} cannot be read ({reason}). "
            "Delete the file and fetch, generate or import it again"
        ) from None


def read_row_group(path: Path, file: pq.ParquetFile, index: int) -> list[str]:
    """The documents of one row group of the open shard at path; a missing text is an empty document."""
    with naming_damage(path, index):
        column = file.read_row_group(index, columns=["text"]).column("text")
        return [text or "" for text in column.to_pylist()]


def parquets_iter_batched(
    split: str, start: int = 0, step: int = 1, data_dir: Path | None = None
) -> Iterator[list[str]]:
    """Documents of a split, one list per row group: of each file the groups start, start+step, ...

    Of a mixture, always of the set that is furthest behind its share of the characters so far; a set that
    has ended leaves its place to the others.
    """
    if data_dir is not None or len(data_sets_in_use()) == 1:
        yield from _row_groups(split_files(split, data_dir), start, step)
        return
    sources = [
        (_row_groups(split_files(split, named.path), start, step), share)
        for named, share in data_sets_in_use().items()
    ]
    chars = [0] * len(sources)
    while sources:
        at = min(range(len(sources)), key=lambda i: chars[i] / sources[i][1])
        texts = next(sources[at][0], None)
        if texts is None:
            del sources[at], chars[at]
        else:
            chars[at] += sum(map(len, texts))
            yield texts


def _row_groups(files: Sequence[Path], start: int, step: int) -> Iterator[list[str]]:
    for path in files:
        with open_shard(path) as file:
            for index in range(start, file.num_row_groups, step):
                yield read_row_group(path, file, index)


if __name__ == "__main__":
    from nanochat.dataset_commands import main

    main(sys.argv[1:])
