"""Starting the processes of the models, before the server itself is ready and again when one ends."""

from __future__ import annotations

import multiprocessing
import multiprocessing.util
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING

from nanochat.serve.replica import serve_replica

if TYPE_CHECKING:
    from nanochat.serve.settings import Replica


@dataclass(frozen=True, slots=True)
class ModelProcess:
    """A running process and the server's end of the channel to it."""

    process: BaseProcess
    channel: socket.socket

    def end(self, wait_s: float) -> str:
        """Wait for its end, force it after wait_s seconds, and say how it ended. Blocks."""
        self.process.join(wait_s)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        code = self.process.exitcode or 0
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"


class Launcher:
    """`count` processes that load their models by `load(index)`; the first ones start at once.

    load must be picklable. method is that of multiprocessing: a fresh interpreter ("spawn") inherits no
    connection of a client.
    """

    def __init__(self, load: Callable[[int], Replica], count: int, method: str = "spawn") -> None:
        self.count, self._load = count, load
        self._context = multiprocessing.get_context(method)
        self._started = {index: self._launch(index) for index in range(count)}

    def take(self, index: int) -> ModelProcess:
        """The process that was started for a worker, or a new one."""
        return self._started.pop(index, None) or self._launch(index)

    def _launch(self, index: int) -> ModelProcess:
        ours, theirs = socket.socketpair()
        # A forked process has a copy, and while it is open would not notice that the server is gone.
        multiprocessing.util.register_after_fork(ours, socket.socket.close)
        process = self._context.Process(  # pyright: ignore[reportAttributeAccessIssue]
            target=serve_replica, args=(theirs, self._load, index), name=f"model-{index}", daemon=True
        )
        process.start()
        theirs.close()  # so that the end of the process is the end of the channel
        ours.setblocking(False)
        return ModelProcess(process, ours)
