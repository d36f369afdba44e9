"""Batches made ahead of time by a background thread and moved to the device without stopping it.

Shared by the loaders of pretraining and of conversations. A loader packs one endless stream of rows that
does not depend on the number of ranks. With batch size B, micro-batch m is rows [m*B, (m+1)*B); rank r of w
gets micro-batches r, r+w, r+2w, ... So one rank that takes w micro-batches sees what w ranks see with one
each, and a saved state continues with any number of ranks and any batch size. Every rank packs the whole
stream and keeps its own rows; encoding is cheap beside a training step.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch

from nanochat.common import World

PREFETCH_BATCHES = 3
ValueT = TypeVar("ValueT")
SnapshotT = TypeVar("SnapshotT")
SnapshotT_co = TypeVar("SnapshotT_co", covariant=True)


class Batch(NamedTuple):
    """inputs and targets, int64 (B, T), on the device of the rank; target -1 = not a target."""

    inputs: torch.Tensor
    targets: torch.Tensor


class Packer(Protocol[SnapshotT_co]):
    """Packs rows one after the other; `exhausted` once only padding is left."""

    def pack(self, inputs: np.ndarray | None, targets: np.ndarray | None) -> None:
        """Write the next row into two int64 (T,) arrays, or only step over it if they are None."""
        ...

    def snapshot(self) -> SnapshotT_co:
        """State after the rows packed so far; cheap, taken once per batch."""
        ...

    @property
    def exhausted(self) -> bool: ...


class Background(Generic[ValueT]):
    """Runs an iterator in a thread, a bounded number of values ahead. Its exceptions are raised by next().

    close() stops the thread; so do garbage collection and the end of the program.
    """

    def __init__(self, start: Callable[[], Iterator[ValueT]], depth: int = PREFETCH_BATCHES) -> None:
        self._queue: queue.Queue = queue.Queue(maxsize=depth)
        stop = threading.Event()
        # The thread must not refer to self, or an abandoned loader would never be collected.
        arguments = (start, self._queue, stop)
        thread = threading.Thread(target=_produce, args=arguments, name="prefetch", daemon=True)
        self._close = weakref.finalize(self, _shut_down, thread, self._queue, stop)
        self._failure: BaseException | None = None
        thread.start()

    def __iter__(self) -> Background[ValueT]:
        return self

    def __next__(self) -> ValueT:
        if self._failure is not None:
            raise self._failure
        if not self._close.alive:
            raise RuntimeError("the loader is closed")
        value, failure = self._queue.get()
        if failure is not None:
            self._failure = failure
            raise failure
        return value

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._close()


def _produce(start: Callable[[], Iterator], values: queue.Queue, stop: threading.Event) -> None:
    failure: BaseException = StopIteration()
    try:
        for value in start():
            values.put((value, None))
            if stop.is_set():
                return
    except BaseException as error:  # handed over to the consumer, which raises it
        failure = error
    values.put((None, failure))


def _shut_down(thread: threading.Thread, values: queue.Queue, stop: threading.Event) -> None:
    stop.set()
    while thread.is_alive():
        # The thread may be waiting for room; whatever it still delivers is thrown away.
        with suppress(queue.Empty):
            values.get(timeout=0.05)
        if threading.current_thread() is thread:  # the collector may run anywhere, even in the thread itself
            return


class BatchStream(Generic[SnapshotT]):
    """This rank's batches of a packer's rows, on the device, each with the state right after its round.

    A round is one micro-batch per rank. States are taken at the end of a round, so they are the same on all
    ranks. Ends after the round in which the packer ran dry (some of its rows may be nothing but padding).
    """

    def __init__(self, packer: Packer[SnapshotT], batch_size: int, seq_len: int, world: World) -> None:
        self._device = world.device
        self._rounds = Background(partial(_rounds, packer, (2, batch_size, seq_len), world))

    def next(self) -> tuple[Batch, SnapshotT, bool]:
        """The next batch, the state after it, and whether it is the last. StopIteration after the last."""
        block, snapshot, is_last = next(self._rounds)
        # Pinned blocks come from torch's caching host allocator, which records an event for every
        # asynchronous copy and hands a block out again only when that copy has happened. So the copy may
        # wait behind queued kernels while the thread fills other blocks. Each batch gets its own memory.
        block = block.to(self._device, non_blocking=self._device.type == "cuda")
        return Batch(block[0], block[1]), snapshot, is_last

    def close(self) -> None:
        """Stop packing."""
        self._rounds.close()


def _rounds(
    packer: Packer[SnapshotT], shape: tuple[int, int, int], world: World
) -> Iterator[tuple[torch.Tensor, SnapshotT, bool]]:
    pinned = world.device.type == "cuda"
    if pinned:
        torch.cuda.set_device(world.device)  # per thread; else pinning would open a context on GPU 0
    while not packer.exhausted:
        block = torch.empty(shape, dtype=torch.int64, pin_memory=pinned)
        _pack_round(packer, block.numpy(), world)
        yield block, packer.snapshot(), packer.exhausted


def _pack_round(packer: Packer, block: np.ndarray, world: World) -> None:
    for rank in range(world.size):
        for row in range(block.shape[1]):
            if rank == world.rank:
                packer.pack(block[0, row], block[1, row])
            else:
                packer.pack(None, None)
