"""Dealing the rows of a tensor out over ranks: reduce to the owner, gather from the owners, any number of ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass(slots=True)
class Flight:
    """A collective under way. It keeps the buffer that is sent alive until it has been waited for."""

    result: Tensor
    sent: Tensor | None = None
    work: dist.Work | None = None

    def wait(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
            self.work = self.sent = None
        return self.result


@dataclass(frozen=True, slots=True)
class Share:
    """The consecutive rows of a table that one rank updates: ceil(count / size), fewer or none at the end."""

    count: int
    rank: int
    size: int

    @property
    def per_rank(self) -> int:
        return -(-self.count // self.size)

    def own(self, table: Tensor) -> Tensor:
        """The own rows, as a view."""
        return table if self.size == 1 else table[self.rank * self.per_rank : (self.rank + 1) * self.per_rank]

    def reduce(self, table: Tensor) -> Flight:
        """Launch the sum of a table over the ranks; the result is the own rows of the sum."""
        if self.size == 1:
            return Flight(table)
        sent = _padded(table, self.per_rank * self.size)
        received = sent.new_empty(self.per_rank, *sent.shape[1:])
        work = dist.reduce_scatter_tensor(received, sent, async_op=True)
        return Flight(received[: len(self.own(table))], sent, work)

    def gather(self, own: Tensor, into: Tensor | None = None) -> Flight:
        """Launch the exchange of own rows; the result is the whole table, inside `into` where rows divide evenly."""
        if self.size == 1:
            return Flight(own)
        sent = _padded(own, self.per_rank)
        whole = into
        if whole is None or self.count % self.size or not whole.is_contiguous():
            whole = sent.new_empty(self.per_rank * self.size, *sent.shape[1:])
        work = dist.all_gather_into_tensor(whole, sent, async_op=True)
        return Flight(whole[: self.count], sent, work)


def _padded(table: Tensor, num_rows: int) -> Tensor:
    """The table, contiguous, with rows of zeros up to num_rows. Not copied if nothing is missing."""
    if len(table) == num_rows:
        return table.contiguous()
    padded = table.new_zeros(num_rows, *table.shape[1:])
    padded[: len(table)] = table
    return padded
