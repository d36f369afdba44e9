"""What a GPU can do, tried once, and work that is recorded as a CUDA graph, so that Python does not start its kernels one by one."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

_PATIENCE = 100  # runs until something is recorded again for which memory was missing


class Graphs:
    """Recorded work by its key. What the work reads and writes must stay where it is, or `forget` must be called.

    after: how often work is done before it is recorded, which takes as long as doing it once more.
    """

    def __init__(self, device: torch.device, enabled: bool = True, after: int = 1) -> None:
        self._device, self._enabled, self._after = device, enabled, after
        self._recorded: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.forget()

    def forget(self) -> None:
        """Record anew: what the graphs read and write is elsewhere."""
        self._recorded.clear()
        self._runs: Counter[Hashable] = Counter()
        if self._enabled:  # a pool ends with its last graph
            self._pool = torch.cuda.graph_pool_handle()

    def run(self, key: Hashable, work: Callable[[], Tensor]) -> Tensor:
        """What `work` returns; the next run may overwrite it. Does not wait."""
        if key in self._recorded:
            graph, out = self._recorded[key]
            graph.replay()
            return out
        out = work()  # which also compiles and warms up everything
        self._runs[key] += 1
        if self._enabled and self._runs[key] >= self._after:
            try:
                self._recorded[key] = self._record(work)
            except torch.OutOfMemoryError:  # while recording, cached memory is not given back
                torch.cuda.empty_cache()
                self._runs[key] = -_PATIENCE
        return out

    def _record(self, work: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph, stream = torch.cuda.CUDAGraph(), _recording_stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                out = work()
            finally:
                graph.capture_end()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        return graph, out


@functools.cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all graphs of a device: cuBLAS keeps memory for every stream that it was ever used on."""
    return torch.cuda.Stream(device)


# --- what a GPU can do -------------------------------------------------------------------------------


def works(attempt: Callable[[], object], otherwise: str) -> bool:
    """Whether kernels compile and run on a GPU when they are tried; if not, a warning says what happens `otherwise`."""
    try:
        attempt()
    except Exception as error:  # compilers fail in ways of their own
        lines = str(error).strip().splitlines() or [type(error).__name__]
        logging.getLogger(__name__).warning("%s: %s", otherwise, lines[0][:200])
        return False
    return True


@functools.cache
def kernels_run(device: torch.device) -> bool:
    """Whether Triton can compile for the device, which also needs a C compiler; tried once."""
    return works(lambda: _try_kernels(device, overlapping(False)), otherwise="decoding without CUDA graphs")


@functools.cache
def kernels_overlap(device: torch.device) -> bool:
    """Whether a kernel can begin before the one in front has ended, in a CUDA graph, too; tried once."""
    if device.type != "cuda" or not torch.version.cuda or torch.cuda.get_device_capability(device) < (9, 0):
        return False
    return works(
        lambda: _try_kernels(device, overlapping(True)), otherwise="decoding with one kernel after the other"
    )


def overlapping(on: bool) -> dict[str, bool]:
    """Options of a kernel of cuda_kernels.py that begins before the one in front has ended, or does not."""
    return {"OVERLAP": True, "launch_pdl": True} if on else {"OVERLAP": False}


def _try_kernels(device: torch.device, options: dict[str, bool]) -> None:
    from nanochat import cuda_kernels  # which imports Triton

    kernels: Any = cuda_kernels
    with torch.cuda.device(device):
        x = torch.ones(8, device=device)
        one = torch.ones(1, device=device)

        def double() -> Tensor:
            for _ in range(2):
                kernels.mix[(1,)](x, x, one, one, x, 8, BLOCK=1024, **options)
            return x

        graphs = Graphs(device)
        for _ in range(2):  # the second time from the graph
            graphs.run("double", double)
        if not bool((x == 16).all()):
            raise RuntimeError("a kernel of Triton gave a wrong result")
