"""What the server and the process of a model say to each other: pickled messages over a pair of sockets."""

from __future__ import annotations

import asyncio
import pickle
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from nanochat.sampling_params import SamplingParams
from nanochat.serve.settings import ModelInfo
from nanochat.tokenizer import RustBPETokenizer

# Bytes of keys and values, and on a GPU those that tensors use, that the process holds, that the device has.
Memory = dict[str, "int | None"]
_HEAD = 4  # bytes that say how long a message to the server is


# --- to the process of the model


class Wanted(NamedTuple):
    """One answer to generate. The sender chooses the number by which both sides name it."""

    number: int
    prompt: Sequence[int]
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class Submit:
    """Start these answers together; equal prompts are read once."""

    wanted: list[Wanted]


@dataclass(frozen=True, slots=True)
class Cancel:
    """Forget these answers. Those that ended meanwhile do not matter."""

    numbers: list[int]


Command = Submit | Cancel


# --- to the server


@dataclass(frozen=True, slots=True)
class Loaded:
    """The model is there. max_batch is how many answers it generates at the same time."""

    info: ModelInfo
    tokenizer: RustBPETokenizer
    max_batch: int


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """There is nothing to load, and trying again will not help."""

    message: str


@dataclass(frozen=True, slots=True)
class Refused:
    """The engine does not take these answers."""

    numbers: list[int]
    reason: str


class Generated(NamedTuple):
    """A token of an answer, or (token None) its end without one; the fields are those of the engine's Event."""

    number: int
    token: int | None
    finish_reason: str | None
    is_terminal: bool
    logprob: float | None
    top_logprobs: Sequence[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Stepped:
    """Commands were read and the engine made a step, which took step_s seconds. memory None: as before."""

    generated: list[Generated]
    step_s: float
    memory: Memory | None = None


Message = Loaded | LoadFailed | Refused | Stepped


def send_message(channel: socket.socket, message: Message) -> None:
    """To the server. Waits while it does not read; raises OSError when it is gone."""
    body = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    channel.sendall(len(body).to_bytes(_HEAD, "big") + body)


async def read_message(reader: asyncio.StreamReader) -> Message:
    """The next message of the model's process; raises IncompleteReadError or ConnectionError when it ended."""
    size = int.from_bytes(await reader.readexactly(_HEAD), "big")
    return pickle.loads(await reader.readexactly(size))
