"""The commands of `python -m nanochat.dataset`: fetch (the default), list, verify, import."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from nanochat.common import UserError, hash_file
from nanochat.configurator import option, run
from nanochat.dataset import data_sets_in_use, list_parquet_files, open_shard, read_row_group
from nanochat.download import Facts, check_space, fetch, hub_endpoint, locked, part_size
from nanochat.manifests import (
    NAMED_SETS,
    TINYWORLD,
    PretrainingSet,
    imported_sets,
    list_hub_files,
    read_manifest,
    record_files,
)  # fmt: skip

REFRESH_S = 0.5  # of the progress line on a terminal


@dataclass(frozen=True)
class FetchConfig:
    num_files: int = option(
        -1, "training shards to have, from the first on; -1 = all", short="n", least=0, off=-1
    )
    num_workers: int = option(4, "parallel downloads", short="w", least=1)
    seed: int = option(0, "seed of the embedded data (NANOCHAT_DATA=tinyworld)")
    chars: int = option(-1, "characters of embedded pretraining text; -1 = the default amount")


@dataclass(frozen=True)
class ListConfig:
    pass


@dataclass(frozen=True)
class VerifyConfig:
    num_workers: int = option(4, "files at a time", short="w", least=1)


def main(argv: Sequence[str]) -> None:
    """Run the command named first, by default fetch."""
    from nanochat import text_import

    name, *rest = argv or [""]
    if name == "list":
        run(ListConfig, list_sets, rest, "nanochat.dataset list")
    elif name == "verify":
        run(VerifyConfig, verify_files, rest, "nanochat.dataset verify")
    elif name == "import":
        run(text_import.Config, text_import.import_text, rest, "nanochat.dataset import")
    elif name and not name.startswith("-") and name != "fetch":
        print(f"error: unknown command {name}; use fetch, list, verify or import", file=sys.stderr)
        sys.exit(2)
    else:
        run(FetchConfig, fetch_files, rest if name == "fetch" else argv, "nanochat.dataset")


# --- fetch -------------------------------------------------------------------------------------------


def fetch_files(cfg: FetchConfig) -> None:
    """Fetch the pretraining shards of the sets in use (NANOCHAT_DATASET), or generate the embedded one.

    Other commands: list, verify, import. HF_ENDPOINT: a mirror of the hub. HF_HUB_OFFLINE=1: no network.
    """
    for named in data_sets_in_use():
        if named.repo:
            _fetch_hub(named, cfg)
        elif named is TINYWORLD:
            _generate(named, cfg)
        else:
            print(f"data source: your own text, {len(list_parquet_files(named.path))} shards in {named.path}")


def _fetch_hub(named: PretrainingSet, cfg: FetchConfig) -> None:
    indices, folder = named.shards(cfg.num_files), named.path
    print(
        f"data source: hub, {named.name}: {len(indices) - 1} training shards and the validation shard into {folder}\n"
        f"{named.summary}; licence: {named.licence}", flush=True,
    )  # fmt: skip
    missing = [index for index in indices if not (folder / named.file_name(index)).exists()]
    num_failed = len(missing)
    if missing:
        num_failed -= download_shards(named, missing, folder, cfg.num_workers)
    print(f"{len(indices) - num_failed} of {len(indices)} shards are in {folder}")
    if num_failed:
        raise UserError(
            f"{num_failed} shards could not be fetched from {hub_endpoint()}; run again to go on where it "
            "stopped, or use the embedded data: NANOCHAT_DATA=tinyworld"
        )


def download_shards(named: PretrainingSet, indices: Sequence[int], folder: Path, num_workers: int = 4) -> int:
    """Fetch shards in parallel, each checked against its size and hash; returns how many of them came.

    Says what happens on the way. UserError before anything is fetched if the disk is too small.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [named.file_name(index) for index in indices]
    known = _known_files(named, folder, names)
    sizes = {name: known.get(name, Facts()).num_bytes or named.shard_bytes for name in names}
    parts = {name: part_size(folder / name) for name in names}
    check_space(folder, sum(sizes.values()) - sum(parts.values()))
    progress, came = _Progress(sizes, parts), {}

    def get(index: int) -> Facts:
        name = named.file_name(index)
        with locked(folder / name):
            if (folder / name).exists():  # another process was first
                return Facts((folder / name).stat().st_size, hash_file(folder / name))
            return fetch(
                named.url(index), folder / name, known.get(name), lambda num: progress.tell(name, num)
            )

    pool = ThreadPoolExecutor(max(1, num_workers))
    try:
        jobs = {pool.submit(get, index): named.file_name(index) for index in indices}
        pending = set(jobs)
        while pending:
            finished, pending = wait(pending, REFRESH_S, FIRST_COMPLETED)
            for job in finished:
                try:
                    came[jobs[job]] = job.result()
                    progress.finish(jobs[job])
                except UserError as error:
                    progress.fail(error)
            progress.show()
    finally:
        progress.stopped.set()  # after Ctrl-C the threads end at their next chunk; the parts stay
        pool.shutdown(cancel_futures=True)
        record_files(named, folder, {name: facts for name, facts in came.items() if name not in known})
    return len(came)


def _known_files(named: PretrainingSet, folder: Path, names: Sequence[str]) -> Mapping[str, Facts]:
    """Size and hash of files as recorded, and for new ones as the hub lists them (a mirror may have no list)."""
    known = read_manifest(folder)
    if not all(name in known for name in names) and (listed := list_hub_files(named)):
        record_files(named, folder, listed)
        known = read_manifest(folder)
    return known


class _Progress:
    """What has arrived, told by the threads, shown by the main one: a line that changes on a terminal."""

    def __init__(self, sizes: Mapping[str, int], parts: Mapping[str, int]) -> None:
        self.stopped = threading.Event()
        self._sizes, self._here, self._before = dict(sizes), dict(parts), sum(parts.values())
        self._num_files, self._started = 0, time.monotonic()
        self._shown = sys.stdout.isatty()

    def tell(self, name: str, num_bytes: int) -> None:
        if self.stopped.is_set():
            raise UserError("interrupted")
        self._here[name] = num_bytes

    def finish(self, name: str) -> None:
        self._num_files += 1
        self._print(f"{name}: {self._here[name] / 1e6:.1f} MB ({self._summary()})")

    def fail(self, error: UserError) -> None:
        self._print(str(error), sys.stderr)

    def show(self) -> None:
        if self._shown:
            print(f"\r\x1b[K{self._summary()}", end="", flush=True)

    def _print(self, line: str, file=None) -> None:
        print(f"\r\x1b[K{line}" if self._shown else line, file=file or sys.stdout, flush=True)

    def _summary(self) -> str:
        here, total = sum(self._here.values()), sum(self._sizes.values())
        speed = (here - self._before) / max(time.monotonic() - self._started, 1e-3)
        left = f", {(total - here) / speed / 60:.0f} min left" if speed > 0 and total > here else ""
        files = f"{self._num_files} of {len(self._sizes)} files"
        return f"{files}, {here / 1e9:.2f} of {total / 1e9:.2f} GB, {speed / 1e6:.1f} MB/s{left}"


def _generate(named: PretrainingSet, cfg: FetchConfig) -> None:
    from nanochat.tinyworld import DEFAULT_CHARS, generate, is_generated

    root, chars = named.path.parent, cfg.chars if cfg.chars > 0 else DEFAULT_CHARS
    print(f"data source: tinyworld, seed {cfg.seed}, {chars:,} characters, in {root}", flush=True)
    if is_generated(root, cfg.seed, chars):
        print("already there")
        return
    generate(root, cfg.seed, chars)
    files = list_parquet_files(named.path)
    record_files(named, named.path, {p.name: Facts(p.stat().st_size, hash_file(p)) for p in files})
    print(f"{len(files)} shards, tasks and evaluation bundle written")


# --- list and verify ---------------------------------------------------------------------------------


def list_sets(cfg: ListConfig) -> None:
    """List the pretraining sets: files here and in all, size here, licence, folder. * marks those in use."""
    used = data_sets_in_use()
    for named in (*NAMED_SETS.values(), *imported_sets()):
        files = list_parquet_files(named.path)
        size = sum(path.stat().st_size for path in files)
        total = f" of {named.last_shard + 1:,}" if named.repo else ""
        print(f"{'*' if named in used else ' '} {named.name:<14} {named.summary}")
        print(f"    {len(files):,}{total} files here, {size / 1e9:.2f} GB, in {named.path}")
        print(
            f"    licence: {named.licence}"
            + (f"; from {hub_endpoint()}/datasets/{named.repo}" if named.repo else "")
        )


def verify_files(cfg: VerifyConfig) -> None:
    """Compare every shard of the sets in use with the recorded size and SHA-256."""
    for named in data_sets_in_use():
        _verify(named.path, cfg.num_workers)


def _verify(folder: Path, num_workers: int) -> None:
    files, known = list_parquet_files(folder), read_manifest(folder)
    if not files:
        raise UserError(f"no shard in {folder}; run: python -m nanochat.dataset -n 8")

    def problem(path: Path) -> str:
        if path.name in known:
            return known[path.name].problem(path)
        try:
            with open_shard(path) as file:
                for index in range(file.num_row_groups):
                    read_row_group(path, file, index)
        except UserError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        problems = list(pool.map(problem, files))
    for path, found in zip(files, problems, strict=True):
        print(f"{path.name}: {found or ('right' if path.name in known else 'readable, no hash recorded')}")
    if damaged := [path.name for path, found in zip(files, problems, strict=True) if found]:
        raise UserError(
            f"{len(damaged)} of {len(files)} shards in {folder} are damaged: {', '.join(damaged)}; "
            "delete them and fetch them again"
        )
    print(f"{len(files)} shards in {folder} are right")
