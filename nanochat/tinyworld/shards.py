"""Pretraining shards: Parquet files with one column `text`, the last one for validation."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import whole_file
from nanochat.tinyworld import sizes
from nanochat.tinyworld.rng import held_out

TEXT_SCHEMA = pa.schema([("text", pa.string())])


class ShardWriter:
    """One shard, written row group by row group; the file appears when the writer is closed."""

    def __init__(self, path: Path) -> None:
        self._stack = ExitStack()
        file = self._stack.enter_context(whole_file(path))
        self._writer = pq.ParquetWriter(
            file, TEXT_SCHEMA, compression="zstd", compression_level=sizes.ZSTD_LEVEL, use_dictionary=False
        )
        self._stack.callback(self._writer.close)
        self._rows: list[str] = []
        self.chars = 0
        self.num_documents = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self._flush()
        self._stack.__exit__(*error)  # type: ignore[arg-type]

    def add(self, text: str) -> None:
        """Append one document."""
        self._rows.append(text)
        self.chars += len(text)
        self.num_documents += 1
        if len(self._rows) == sizes.ROW_GROUP_DOCUMENTS:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.table({"text": self._rows}, schema=TEXT_SCHEMA))
            self._rows = []


def write_shards(folder: Path, texts: Iterable[str], chars: int) -> dict[str, int]:
    """Write at least `chars` characters of training text and the validation shard; returns totals.

    A document's own hash decides on which side it falls, so equal documents never fall on both.
    """
    num_shards = max(1, round(chars / sizes.SHARD_CHARS))
    stream = iter(texts)
    written = documents = 0
    with ShardWriter(folder / f"shard_{num_shards:05d}.parquet") as validation:
        for shard in range(num_shards):
            with ShardWriter(folder / f"shard_{shard:05d}.parquet") as training:
                while written + training.chars < chars * (shard + 1) / num_shards:
                    _route(next(stream), training, validation)
            written += training.chars
            documents += training.num_documents
        while validation.num_documents < sizes.SMALLEST_VALIDATION_DOCUMENTS:
            _route(next(stream), None, validation)
    return {
        "train_chars": written, "train_documents": documents, "validation_chars": validation.chars,
        "validation_documents": validation.num_documents, "shards": num_shards + 1,
    }  # fmt: skip


def _route(text: str, training: ShardWriter | None, validation: ShardWriter) -> None:
    if held_out(text, sizes.VALIDATION_EVERY):
        validation.add(text)
    elif training is not None:
        training.add(text)
