"""The process of a model: loads it, and steps its engine over the requests that the server sends."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, BinaryIO

from nanochat.common import UserError
from nanochat.configurator import look_for_garbage_rarely
from nanochat.serve.protocol import (
    Cancel,
    Command,
    Generated,
    Loaded,
    LoadFailed,
    Memory,
    Refused,
    Stepped,
    Submit,
    send_message,
)

if TYPE_CHECKING:  # the server imports this module too, and shall not load torch
    from nanochat.engine import Request
    from nanochat.serve.settings import Replica

MEASURE_S = 1.0  # between looks at the memory of the device while it works


def serve_replica(channel: socket.socket, load: Callable[[int], Replica], index: int) -> None:
    """Load a model and generate until the server closes its end of the channel, which ends the process at once.

    Whatever goes wrong ends it too: the server starts another one.
    """
    look_for_garbage_rarely()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the server decides
    commands: SimpleQueue[Command] = SimpleQueue()
    # A thread reads, so that commands never fill the channel while the engine works.
    threading.Thread(target=_read, args=(channel.makefile("rb"), commands), daemon=True).start()
    try:
        replica = load(index)
    except UserError as error:
        send_message(channel, LoadFailed(str(error)))
        return
    with suppress(OSError):  # the server is gone
        _Generator(channel, replica, commands).run()


def _read(file: BinaryIO, commands: SimpleQueue[Command]) -> None:
    try:
        while True:
            commands.put(pickle.load(file))
    except (EOFError, OSError, pickle.UnpicklingError):
        os._exit(0)  # the server is gone, and nobody would read what is generated


class _Generator:
    """The loop between the channel and the engine."""

    def __init__(self, channel: socket.socket, replica: Replica, commands: SimpleQueue[Command]) -> None:
        self._channel, self._replica, self._commands = channel, replica, commands
        self._requests: dict[int, Request] = {}
        self._numbers: dict[Request, int] = {}
        self._measured = 0.0

    def run(self) -> None:
        engine = self._replica.engine
        send_message(self._channel, Loaded(self._replica.info, self._replica.tokenizer, engine.max_batch))
        while True:
            self._follow()
            begun = time.perf_counter()
            events = engine.step() if self._requests else []
            generated = [
                Generated(
                    self._numbers[e.request],
                    e.token,
                    e.finish_reason,
                    e.is_terminal,
                    e.logprob,
                    e.top_logprobs,
                )
                for e in events
                if e.request in self._numbers
            ]
            for one in generated:
                if one.finish_reason is not None:
                    self._forget(one.number)
            send_message(self._channel, Stepped(generated, time.perf_counter() - begun, self._memory()))

    def _follow(self) -> None:
        """Do what the server wants by now, after waiting for it when there is nothing to do."""
        wait = not self._requests
        while True:
            try:
                command = self._commands.get(block=wait)
            except Empty:
                return
            wait = False
            if isinstance(command, Cancel):
                for number in command.numbers:
                    if number in self._requests:
                        self._replica.engine.cancel(self._forget(number))
            else:
                self._submit(command)

    def _submit(self, command: Submit) -> None:
        taken: list[int] = []
        try:
            for number, prompt, params in command.wanted:
                request = self._replica.engine.submit(prompt, params)
                self._requests[number], self._numbers[request] = request, number
                taken.append(number)
        except ValueError as error:  # the engine refuses the request itself; the model is fine
            for number in taken:
                self._replica.engine.cancel(self._forget(number))
            send_message(self._channel, Refused([one.number for one in command.wanted], str(error)))

    def _forget(self, number: int) -> Request:
        request = self._requests.pop(number)
        del self._numbers[request]
        return request

    def _memory(self) -> Memory | None:
        now = time.monotonic()
        if self._requests and now - self._measured < MEASURE_S:
            return None
        self._measured = now
        return {"kv_cache": self._replica.engine.kv_bytes, **device_memory(self._replica.info.device)}


def device_memory(device: str) -> Memory:
    """What the tensors use, what this process holds, and what the device has; None where nobody counts."""
    if not device.startswith("cuda"):
        return dict.fromkeys(("allocated", "reserved", "total"))
    import torch

    return {
        "allocated": torch.cuda.memory_allocated(device),
        "reserved": torch.cuda.memory_reserved(device),
        "total": torch.cuda.get_device_properties(device).total_memory,
    }
