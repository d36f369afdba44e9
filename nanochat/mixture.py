"""Several streams of packed rows as one, in fixed shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np

from nanochat.prefetch import Packer


class HasRows(Protocol):
    @property
    def num_rows(self) -> int:
        """Rows packed so far."""
        ...


SnapshotT = TypeVar("SnapshotT", bound=HasRows)


class MixturePacker(Generic[SnapshotT]):
    """Every row comes from the stream that is furthest behind its share of the rows so far; the first on ties.

    So the order is fixed, no share is ever off by a whole row, and the rows counted by the streams are all the state.
    Rows are equally long, so shares of rows are shares of tokens.
    """

    exhausted = False

    def __init__(self, packers: Sequence[Packer[SnapshotT]], weights: Sequence[float]) -> None:
        """weights: positive, of any sum."""
        self._packers = packers
        self._shares = [weight / sum(weights) for weight in weights]
        self._rows = [packer.snapshot().num_rows for packer in packers]

    def pack(self, inputs: np.ndarray | None, targets: np.ndarray | None) -> None:
        """Write the next row, or only step over it."""
        total = sum(self._rows) + 1
        behind = [share * total - rows for share, rows in zip(self._shares, self._rows, strict=True)]
        chosen = behind.index(max(behind))
        self._packers[chosen].pack(inputs, targets)
        self._rows[chosen] += 1

    def snapshot(self) -> tuple[SnapshotT, ...]:
        """The states of the streams after the rows so far."""
        return tuple(packer.snapshot() for packer in self._packers)
