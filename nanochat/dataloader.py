"""Pretraining batches: documents of the shards, encoded and packed into rows, with an exact state.

packing="bestfit": every row starts with BOS and is filled without padding: the longest buffered document that
fits, again and again; when none fits, the shortest one is cut to fill the row and its rest is dropped.
packing="stream": all documents end to end; nothing is dropped, but rows start anywhere.

See nanochat/prefetch.py for how rows are dealt to ranks and batches. A state names the files, the position of
the reader and the buffered documents by their place in the files; these are read and encoded again on resume.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.common import UserError, World
from nanochat.dataset import data_sets_in_use, split_files
from nanochat.document_reader import DocumentKey, DocumentReader, DocumentTokenizer, fitting_sizes
from nanochat.mixture import MixturePacker
from nanochat.packing import BestFitBuffer
from nanochat.prefetch import Batch, BatchStream, Packer

STATE_FORMAT = 1


@dataclass(frozen=True, slots=True)
class PackingStats:
    """Counts since the start of the run, over all ranks."""

    rows: int = 0
    tokens_used: int = 0
    tokens_dropped: int = 0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """State of the stream after a number of rows."""

    reader: DocumentKey  # the next document to read
    last_read: DocumentKey
    buffered: tuple[DocumentKey, ...]  # in order of arrival
    offset: int  # tokens already used of the first buffered document (stream packing only)
    stats: PackingStats

    @property
    def num_rows(self) -> int:
        return self.stats.rows


# --- packing -----------------------------------------------------------------------------------------


class BestFitPacker:
    """Rows of T + 1 tokens, BOS first, no padding; see the head of this file."""

    exhausted = False

    def __init__(self, reader: DocumentReader, seq_len: int, buffer_size: int, start: Snapshot) -> None:
        self._reader, self._capacity, self._buffer_size = reader, seq_len + 1, buffer_size
        self._buffer: BestFitBuffer[DocumentKey, np.ndarray] = BestFitBuffer()
        self._add(reader.fetch(start.buffered))
        self._rows, self._used = start.stats.rows, start.stats.tokens_used
        self._dropped = start.stats.tokens_dropped
        self._row = np.empty(self._capacity, dtype=np.int64)

    def pack(self, inputs: np.ndarray | None, targets: np.ndarray | None) -> None:
        """Write the next row, or only step over it."""
        filled = 0
        while filled < self._capacity:
            while len(self._buffer) < self._buffer_size:
                self._add(self._reader.next_slice())
            remaining = self._capacity - filled
            document = self._buffer.take_longest(remaining)
            if document is None:
                document = self._buffer.take_shortest()
                self._dropped += len(document) - remaining
                document = document[:remaining]
            if inputs is not None:
                self._row[filled : filled + len(document)] = document
            filled += len(document)
        self._rows += 1
        self._used += self._capacity
        if inputs is not None and targets is not None:
            inputs[:], targets[:] = self._row[:-1], self._row[1:]

    def snapshot(self) -> Snapshot:
        """State after the rows so far."""
        stats = PackingStats(self._rows, self._used, self._dropped)
        return Snapshot(self._reader.position, self._reader.last_read, self._buffer.keys(), 0, stats)

    def _add(self, documents: Iterator[tuple[DocumentKey, np.ndarray]] | list) -> None:
        for key, tokens in documents:
            self._buffer.add(key, len(tokens), tokens)


class StreamPacker:
    """Rows of T tokens cut from the endless sequence of all documents; every token is an input once."""

    exhausted = False

    def __init__(self, reader: DocumentReader, seq_len: int, start: Snapshot) -> None:
        self._reader, self._seq_len = reader, seq_len
        self._documents: deque[tuple[DocumentKey, np.ndarray]] = deque(reader.fetch(start.buffered))
        self._offset = start.offset
        self._available = sum(len(tokens) for _, tokens in self._documents) - start.offset
        self._rows = start.stats.rows

    def pack(self, inputs: np.ndarray | None, targets: np.ndarray | None) -> None:
        """Write the next row, or only step over it. Its last target is the first input of the next row."""
        while self._available < self._seq_len + 1:
            documents = self._reader.next_slice()
            self._documents.extend(documents)
            self._available += sum(len(tokens) for _, tokens in documents)
        if inputs is not None and targets is not None:
            row = self._peek(self._seq_len + 1)
            inputs[:], targets[:] = row[:-1], row[1:]
        self._advance()

    def snapshot(self) -> Snapshot:
        """State after the rows so far."""
        keys = tuple(key for key, _ in self._documents)
        stats = PackingStats(self._rows, self._rows * self._seq_len, 0)
        return Snapshot(self._reader.position, self._reader.last_read, keys, self._offset, stats)

    def _peek(self, count: int) -> np.ndarray:
        parts, offset = [], self._offset
        for _, tokens in self._documents:
            parts.append(tokens[offset : offset + count])
            count -= len(parts[-1])
            offset = 0
            if count == 0:
                break
        return np.concatenate(parts)

    def _advance(self) -> None:
        self._rows += 1
        self._available -= self._seq_len
        self._offset += self._seq_len
        while self._documents and self._offset >= len(self._documents[0][1]):
            self._offset -= len(self._documents.popleft()[1])


# --- the loader --------------------------------------------------------------------------------------


class PretrainLoader:
    """Endless iterator over the batches of one rank; state_dict() is the state after the last one returned.

    Rows of a mixture of sets (NANOCHAT_DATASET) come from the sets in their shares; see nanochat/mixture.py.
    Packing runs in a background thread; close() stops it (as does dropping the loader). With `state` the
    loader continues exactly, whatever the batch size and the number of ranks; UserError if the files are gone
    or changed, or packing, seq_len or mixture differ. Upstream's three-key states are accepted, approximately.
    """

    def __init__(
        self,
        tokenizer: DocumentTokenizer,
        batch_size: int,
        seq_len: int,
        split: str,
        world: World,
        *,
        packing: str = "bestfit",
        tokenizer_batch_size: int = 128,
        buffer_size: int = 1000,
        state: dict[str, Any] | None = None,
        data_dir: Path | None = None,
    ) -> None:
        assert packing in ("bestfit", "stream"), f"packing is {packing!r}"
        self._identity = {"format": STATE_FORMAT, "packing": packing, "seq_len": seq_len}
        sets = data_sets_in_use() if data_dir is None else {}
        if len(sets) > 1:
            self._identity["mixture"] = [[named.name, share] for named, share in sets.items()]
            folders: list[Path | None] = [named.path for named in sets]
        else:
            folders = [data_dir]
        states = _states(state, self._identity, len(folders))
        self._files: list[list[list]] = []
        self._snapshots: tuple[Snapshot, ...] = tuple(_start(old, world.size) for old in states)
        packers: list[Packer[Snapshot]] = []
        for folder, old, snapshot in zip(folders, states, self._snapshots, strict=True):
            files = split_files(split, folder, warn_on_legacy=split == "train" and world.is_main)
            if old is not None and "files" in old:
                files = _saved_files(old["files"], files[0].parent)
            self._files.append([[path.name, path.stat().st_size] for path in files])
            start = snapshot.reader, snapshot.last_read
            if packing == "bestfit":
                places, slice_size = fitting_sizes(files, buffer_size, tokenizer_batch_size)
                reader = DocumentReader(files, tokenizer, slice_size, *start)
                packers.append(BestFitPacker(reader, seq_len, places, snapshot))
            else:
                reader = DocumentReader(files, tokenizer, tokenizer_batch_size, *start)
                packers.append(StreamPacker(reader, seq_len, snapshot))
        packer = MixturePacker[Snapshot](packers, list(sets.values()) if len(sets) > 1 else [1.0])
        self._stream = BatchStream(packer, batch_size, seq_len, world)

    def __iter__(self) -> PretrainLoader:
        return self

    def __next__(self) -> Batch:
        batch, self._snapshots, _ = self._stream.next()
        return batch

    @property
    def epoch(self) -> int:
        """Pass over the data, from 1, that the last batch had read up to; of a mixture, of the set read most."""
        return max(snapshot.last_read.epoch for snapshot in self._snapshots)

    def stats(self) -> dict[str, int | float]:
        """Rows and tokens used and dropped so far, over all ranks, and the share dropped."""
        parts = [asdict(snapshot.stats) for snapshot in self._snapshots]
        stats = {name: sum(part[name] for part in parts) for name in parts[0]}
        total = stats["tokens_used"] + stats["tokens_dropped"]
        return {**stats, "fraction_dropped": stats["tokens_dropped"] / total if total else 0.0}

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue after the last batch returned, as JSON values; alike on all ranks."""
        states = [_state(s, files) for s, files in zip(self._snapshots, self._files, strict=True)]
        return {**self._identity, **(states[0] if len(states) == 1 else {"sets": states})}

    def close(self) -> None:
        """Stop the background thread."""
        self._stream.close()


def _state(snapshot: Snapshot, files: list[list]) -> dict[str, Any]:
    return {
        "files": files,
        "pq_idx": snapshot.last_read.file,
        "rg_idx": snapshot.last_read.row_group,
        "epoch": snapshot.last_read.epoch,
        "last_row": snapshot.last_read.row,
        "reader": list(snapshot.reader),
        "buffered": _grouped(snapshot.buffered),
        "offset": snapshot.offset,
        "stats": asdict(snapshot.stats),
    }


def _grouped(keys: Sequence[DocumentKey]) -> list[list]:
    """Keys as [epoch, file, row group, [rows]], one entry per run of neighbours, order kept."""
    groups = groupby(keys, lambda key: key[:3])
    return [[*place, [key.row for key in group]] for place, group in groups]


def _start(state: dict[str, Any] | None, world_size: int) -> Snapshot:
    if state is None:
        first = DocumentKey(1, 0, 0, 0)
        return Snapshot(first, first, (), 0, PackingStats())
    epoch = state.get("epoch", 1)
    last_read = DocumentKey(epoch, state["pq_idx"], state["rg_idx"], state.get("last_row", 0))
    if "reader" not in state:
        # Upstream: each rank goes on one stride of row groups after rank 0's. Together: all from there on.
        row_group = (state["rg_idx"] // world_size + 1) * world_size
        return Snapshot(last_read._replace(row_group=row_group), last_read, (), 0, PackingStats())
    buffered = tuple(
        DocumentKey(epoch, file, group, row) for epoch, file, group, rows in state["buffered"] for row in rows
    )
    stats = PackingStats(**state["stats"])
    return Snapshot(DocumentKey(*state["reader"]), last_read, buffered, state["offset"], stats)


def _states(
    state: dict[str, Any] | None, identity: dict[str, Any], num_sets: int
) -> Sequence[dict[str, Any] | None]:
    """The saved states of the sets of a mixture, or of the only one."""
    if state is None:
        return [None] * num_sets
    if "format" in state or num_sets > 1:
        _check_identity(state, identity)
    return [state] if num_sets == 1 else state["sets"]


def _check_identity(state: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name in ("format", "packing", "seq_len", "mixture"):
        if state.get(name) != wanted.get(name):
            raise UserError(
                f"cannot resume the data: {name} was {state.get(name)!r} and is now {wanted.get(name)!r}"
            )


def _saved_files(saved: list[list], folder: Path) -> list[Path]:
    """The files of a saved state; files that came later are left out, so that the order stays."""
    for name, size in saved:
        path = folder / name
        if not path.is_file():
            raise UserError(f"cannot resume the data: {path} is missing")
        if path.stat().st_size != size:
            raise UserError(f"cannot resume the data: {path} has {path.stat().st_size} bytes, not {size}")
    return [folder / name for name, _ in saved]
