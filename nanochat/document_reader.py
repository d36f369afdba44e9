"""The documents of the shards as an endless stream of tokens, read from any position on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from nanochat.common import UserError
from nanochat.dataset import open_shard, read_row_group


class DocumentTokenizer(Protocol):
    """What the loader needs of a tokenizer."""

    def get_bos_token_id(self) -> int: ...

    def encode_arrays(self, texts: list[str], prepend: int) -> tuple[np.ndarray, np.ndarray]:
        """All ids in one array, and int64 offsets of the len(texts) + 1 borders."""
        ...


class DocumentKey(NamedTuple):
    """Where a document comes from; also a position of the reader (the next document to read)."""

    epoch: int  # from 1
    file: int  # index in the files of the split
    row_group: int
    row: int


class DocumentReader:
    """Endless stream of encoded documents: all files in order, again and again, in slices of a row group."""

    def __init__(
        self,
        files: Sequence[Path],
        tokenizer: DocumentTokenizer,
        slice_size: int,
        position: DocumentKey,
        last_read: DocumentKey,
    ) -> None:
        """position is the next document to read; last_read only matters until the first one is read."""
        self.position, self.last_read = position, last_read
        self._files, self._tokenizer, self._slice_size = files, tokenizer, slice_size
        self._slices = self._read()

    def next_slice(self) -> list[tuple[DocumentKey, np.ndarray]]:
        """The next documents with their tokens, each starting with BOS."""
        return next(self._slices)

    def fetch(self, keys: Sequence[DocumentKey]) -> Iterator[tuple[DocumentKey, np.ndarray]]:
        """Documents by their keys, in this order."""
        for (epoch, index, row_group), group in groupby(keys, lambda key: key[:3]):
            rows = [key.row for key in group]
            path = self._files[index]
            with open_shard(path) as file:
                texts = read_row_group(path, file, row_group)
            first = DocumentKey(epoch, index, row_group, 0)
            tokens = self._encode([texts[row] for row in rows])
            yield from ((first._replace(row=row), ids) for row, ids in zip(rows, tokens, strict=True))

    def _read(self) -> Iterator[list[tuple[DocumentKey, np.ndarray]]]:
        epoch, first_file, first_group, first_row = self.position
        num_before = 1  # a resumed first pass may find nothing left; a second one must find something
        while True:
            num_documents = 0
            for index in range(first_file, len(self._files)):
                path = self._files[index]
                with open_shard(path) as file:
                    for group in range(first_group, file.num_row_groups):
                        texts = read_row_group(path, file, group)
                        num_documents += len(texts)
                        yield from self._slices_of(texts, DocumentKey(epoch, index, group, first_row))
                        first_row = 0
                first_group = first_row = 0
            if num_documents + num_before == 0:
                raise UserError(f"no document in {', '.join(path.name for path in self._files)}")
            num_before = num_documents
            epoch, first_file = epoch + 1, 0

    def _slices_of(
        self, texts: list[str], first: DocumentKey
    ) -> Iterator[list[tuple[DocumentKey, np.ndarray]]]:
        for start in range(first.row, len(texts), self._slice_size):
            tokens = self._encode(texts[start : start + self._slice_size])
            self.last_read = first._replace(row=start)
            self.position = first._replace(row=start + len(tokens))
            yield [(first._replace(row=start + i), ids) for i, ids in enumerate(tokens)]

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        ids, offsets = self._tokenizer.encode_arrays(texts, prepend=self._tokenizer.get_bos_token_id())
        # copies, or one buffered document would keep the ids of its whole slice alive
        return [ids[start:stop].copy() for start, stop in pairwise(offsets.tolist())]


def fitting_sizes(files: Sequence[Path], buffer_size: int, slice_size: int) -> tuple[int, int]:
    """Buffer and slice size, smaller for a split with fewer documents than the buffer has places.

    Such a split would sit in the buffer several times over, and rows would hold a document and its copies,
    which a model predicts by looking back: bits per byte on 177 documents would mean nothing.
    """
    num_documents = 0
    for path in files:
        with open_shard(path) as file:
            num_documents += file.metadata.num_rows
        if num_documents >= buffer_size:
            return buffer_size, slice_size
    slice_size = min(slice_size, max(1, num_documents // 8))
    return max(1, num_documents - slice_size), slice_size
