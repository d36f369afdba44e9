"""Pretraining shards: where they are, which are for validation, how to read and how to get them.

A shard is a parquet file with a string column `text`. In the folder of a data set the last file by name is
the validation split, all others are training. Documents are shuffled when the shards are made, never here.

    python -m nanochat.dataset -n 8     # 8 training shards and the validation shard

NANOCHAT_DATA=tinyworld generates the embedded data instead; NANOCHAT_DATASET names another hub data set, or one
that nanochat.text_import made of your own text.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat.common import UserError, data_root, data_source, get_base_dir
from nanochat.configurator import option, run
from nanochat.hub import download_file_with_lock

if TYPE_CHECKING:
    import pyarrow.parquet as pq


@dataclass(frozen=True, slots=True)
class HubShards:
    """A data set of numbered shards on the Hugging Face hub; the last one is always its validation split."""

    name: str
    url: str
    last_shard: int
    folder: str

    def file_name(self, index: int) -> str:
        return f"shard_{index:05d}.parquet"


CLIMBMIX = HubShards(
    "climbmix", "https://huggingface.co/datasets/karpathy/climbmix-400b-shuffle/resolve/main",
    6542, "base_data_climbmix",
)  # fmt: skip
FINEWEB_EDU = HubShards(
    "fineweb-edu", "https://huggingface.co/datasets/karpathy/fineweb-edu-100b-shuffle/resolve/main",
    1822, "base_data",
)  # fmt: skip
HUB_SHARDS = {shards.name: shards for shards in (CLIMBMIX, FINEWEB_EDU)}


def hub_shards() -> HubShards:
    """The hub data set in use: NANOCHAT_DATASET, by default climbmix."""
    name = os.environ.get("NANOCHAT_DATASET") or CLIMBMIX.name
    if name not in HUB_SHARDS:
        raise UserError(
            f"NANOCHAT_DATASET={name!r} is unknown; use {' or '.join(HUB_SHARDS)}, "
            f"or import text under this name: python -m nanochat.text_import --name={name} --files=FOLDER"
        )
    return HUB_SHARDS[name]


def imported_dir(name: str) -> Path:
    """Folder of a data set made of one's own text, whether it exists or not."""
    return get_base_dir() / "imported_data" / name


def default_data_dir() -> Path:
    """Folder of the shards of the data source and data set in use. Not created."""
    if data_source() == "tinyworld":
        return data_root() / "base_data"
    if uses_imported_data():
        return imported_dir(os.environ["NANOCHAT_DATASET"])
    return get_base_dir() / hub_shards().folder


def uses_imported_data() -> bool:
    """Whether NANOCHAT_DATASET names a data set made of one's own text."""
    name = os.environ.get("NANOCHAT_DATASET", "")
    return name not in ("", *HUB_SHARDS) and imported_dir(name).is_dir()


# --- listing and splitting ---------------------------------------------------------------------------


def list_parquet_files(data_dir: Path | None = None, warn_on_legacy: bool = False) -> list[Path]:
    """All complete parquet files of a folder, sorted by name; by default those of the data source in use.

    Without ClimbMix shards on disk, the FineWeb-Edu shards of an older set-up are used; `warn_on_legacy`
    prints how to move on.
    """
    folder = data_dir or default_data_dir()
    legacy = get_base_dir() / FINEWEB_EDU.folder
    is_default = data_dir is None and folder == get_base_dir() / CLIMBMIX.folder
    if is_default and not folder.is_dir() and legacy.is_dir():
        if warn_on_legacy:
            print(_LEGACY_NOTICE.format(new=folder, old=legacy), file=sys.stderr)
        folder = legacy
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
    """The files of a split, "train" or "val": the last file by name is validation, the others training.

    Raises UserError if there are fewer than two files, or if ClimbMix lacks its pinned validation shard:
    taking another file instead would move it into training as soon as more shards arrive.
    """
    assert split in ("train", "val"), f"split is {split!r}"
    files = list_parquet_files(data_dir, warn_on_legacy)
    folder = data_dir or default_data_dir()
    hint = f"run: python -m nanochat.dataset{' -n 8' if data_source() == 'hub' else ''}"
    if len(files) < 2:
        found = f"only {files[0].name}" if files else "no parquet file"
        raise UserError(
            f"{found} in {folder}, but training needs one and validation another (the last by name); {hint}"
        )
    pinned = CLIMBMIX.file_name(CLIMBMIX.last_shard)
    last = files[-1]
    if last.parent.name == CLIMBMIX.folder and _is_hub_shard(last) and last.name != pinned:
        raise UserError(f"the validation shard {pinned} is missing in {folder}; {hint}")
    return files[-1:] if split == "val" else files[:-1]


def _is_hub_shard(path: Path) -> bool:
    return re.fullmatch(r"shard_\d{5}\.parquet", path.name) is not None


# --- reading -----------------------------------------------------------------------------------------


def open_shard(path: Path, column: str = "text") -> pq.ParquetFile:
    """Open a shard; a damaged file or one without the column of text is a UserError that names it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot read {path}: {reason} Delete it and fetch it again") from None
    if column not in file.schema_arrow.names:
        raise UserError(f"{path} has no column `{column}`, only {', '.join(file.schema_arrow.names)}")
    return file


def read_row_group(file: pq.ParquetFile, index: int) -> list[str]:
    """The documents of one row group; a missing text is an empty document."""
    return [text or "" for text in file.read_row_group(index, columns=["text"]).column("text").to_pylist()]


def parquets_iter_batched(
    split: str, start: int = 0, step: int = 1, data_dir: Path | None = None
) -> Iterator[list[str]]:
    """Documents of a split, one list per row group: of each file the groups start, start+step, ..."""
    for path in split_files(split, data_dir):
        with open_shard(path) as file:
            for index in range(start, file.num_row_groups, step):
                yield read_row_group(file, index)


# --- getting -----------------------------------------------------------------------------------------


def download_single_file(index: int, shards: HubShards, folder: Path) -> str:
    """Fetch one shard unless it is there; says what happened. Raises UserError after the last attempt."""
    target = folder / shards.file_name(index)
    if target.exists():
        return f"{target.name}: already there"
    download_file_with_lock(f"{shards.url}/{target.name}", target)
    return f"{target.name}: {target.stat().st_size / 1e6:.1f} MB"


def download_shards(shards: HubShards, indices: Sequence[int], folder: Path, num_workers: int = 4) -> int:
    """Fetch shards in parallel, reporting each; returns how many are there in the end."""
    num_done = 0
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        jobs = [pool.submit(download_single_file, index, shards, folder) for index in indices]
        for job in as_completed(jobs):
            try:
                print(job.result(), flush=True)
                num_done += 1
            except UserError as error:
                print(error, file=sys.stderr, flush=True)
    return num_done


@dataclass(frozen=True)
class Config:
    num_files: int = option(-1, "training shards to have, from the first on; -1 = all", short="n")
    num_workers: int = option(4, "parallel downloads", short="w")
    seed: int = option(0, "seed of the embedded data (NANOCHAT_DATA=tinyworld)")
    chars: int = option(-1, "characters of embedded pretraining text; -1 = the default amount")


def main(cfg: Config) -> None:
    """Fetch the pretraining shards of the data source in use, or generate the embedded one."""
    if data_source() == "tinyworld":
        _generate(cfg)
        return
    if uses_imported_data():
        print(f"data source: your own text, {len(list_parquet_files())} shards in {default_data_dir()}")
        return
    shards = hub_shards()
    wanted = shards.last_shard if cfg.num_files < 0 else min(cfg.num_files, shards.last_shard)
    indices = [*range(wanted), shards.last_shard]
    folder = default_data_dir()
    print(f"data source: hub, {shards.name}: {wanted} training shards and the validation shard into {folder}")
    num_done = download_shards(shards, indices, folder, cfg.num_workers)
    print(f"{num_done} of {len(indices)} shards are in {folder}")
    if num_done < len(indices):
        raise UserError(
            f"{len(indices) - num_done} shards could not be fetched from {shards.url}; run again to retry, "
            "or use the embedded data: NANOCHAT_DATA=tinyworld"
        )


def _generate(cfg: Config) -> None:
    from nanochat.tinyworld import DEFAULT_CHARS, generate, is_generated

    root, chars = data_root(), cfg.chars if cfg.chars > 0 else DEFAULT_CHARS
    print(f"data source: tinyworld, seed {cfg.seed}, {chars:,} characters, in {root}", flush=True)
    if is_generated(root, cfg.seed, chars):
        print("already there")
    else:
        generate(root, cfg.seed, chars)
        print(f"{len(list_parquet_files())} shards, tasks and evaluation bundle written")


if __name__ == "__main__":
    run(Config, main)
