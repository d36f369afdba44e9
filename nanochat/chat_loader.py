"""Batches of conversations for mid-training and SFT: rows packed full, exact state.

Every row starts with BOS. Whole conversations are placed, the longest first and then those that fill the row
up; what is left is padded with BOS. A conversation longer than a row is cut to it, so that every row takes at
least one and the packer can never stall. Targets are the next tokens, -1 in padding and, with mask=True, wherever the
conversation's loss mask is 0 (what users and tools say). See nanochat/prefetch.py for ranks and batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import numpy as np

from nanochat.common import UserError, World
from nanochat.packing import BestFitBuffer
from nanochat.prefetch import Batch, BatchStream

STATE_FORMAT = 1
BUFFER_SIZE = 100  # conversations to choose from
# A row counts as full if less than one part in this many is padding. Insisting on full rows uses up the short
# conversations, and later rows end up emptier: 3.4 % of padding instead of 2.4 on lengths that are hard to pack.
_PADDING_ACCEPTED = 64


class ConversationTokenizer(Protocol):
    """What the loader needs of a tokenizer."""

    def get_bos_token_id(self) -> int: ...

    def render_conversation(
        self, conversation: dict[str, Any], max_tokens: int | None = ...
    ) -> tuple[list[int], list[int]]:
        """Token ids and loss mask (1 = learn to write this token)."""
        ...


class Conversations(Protocol):
    """A task: a list of conversations."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


class ConversationKey(NamedTuple):
    """A conversation in a pass over the task; also a position of the reader (the next one to read)."""

    epoch: int  # from 1
    index: int


class Rendered(NamedTuple):
    """Tokens int64 and whether each is a target, both of the same length."""

    tokens: np.ndarray
    is_target: np.ndarray


@dataclass(frozen=True, slots=True)
class ChatStats:
    """Counts since the start of the run, over all ranks."""

    rows: int = 0  # packed rows of T tokens
    conversations_used: int = 0
    conversations_truncated: int = 0  # of those used, the ones cut to a row
    conversations_dropped: int = 0  # nothing to learn in the part that fits
    tokens_used: int = 0
    tokens_supervised: int = 0
    tokens_supervised_lost: int = 0  # cut off
    tokens_truncated: int = 0
    tokens_padding: int = 0


@dataclass(frozen=True, slots=True)
class ChatSnapshot:
    """State of the stream after a number of rows."""

    reader: ConversationKey
    buffered: tuple[ConversationKey, ...]  # in order of arrival
    stats: ChatStats


class ChatPacker:
    """Rows of conversations; exhausted after the given number of epochs (None = never)."""

    def __init__(
        self,
        tokenizer: ConversationTokenizer,
        task: Conversations,
        seq_len: int,
        mask: bool,
        epochs: int | None,
        start: ChatSnapshot,
    ) -> None:
        self._tokenizer, self._task, self._mask, self._epochs = tokenizer, task, mask, epochs
        self._capacity = seq_len + 1
        self._position, self._counts = start.reader, asdict(start.stats)
        self._num_useless = 0  # conversations without a target, since the last one with
        self._buffer: BestFitBuffer[ConversationKey, Rendered] = BestFitBuffer()
        for key in start.buffered:
            rendered = self._render(key)[0]
            self._buffer.add(key, len(rendered.tokens), rendered)
        self._row = Rendered(np.empty(self._capacity, np.int64), np.empty(self._capacity, np.bool_))

    @property
    def exhausted(self) -> bool:
        """Whether all conversations have been placed; further rows would be nothing but padding."""
        self._refill()
        return not len(self._buffer)

    def pack(self, inputs: np.ndarray | None, targets: np.ndarray | None) -> None:
        """Write the next row, or only step over it."""
        filled = num_supervised = 0
        for rendered in self._choose():
            end = filled + len(rendered.tokens)
            self._row.tokens[filled:end], self._row.is_target[filled:end] = rendered
            num_supervised += int(np.count_nonzero(rendered.is_target[0 if filled else 1 :]))
            filled = end
            self._counts["conversations_used"] += 1
        self._row.tokens[filled:], self._row.is_target[filled:] = self._tokenizer.get_bos_token_id(), False
        self._count_row(filled, num_supervised)
        if inputs is not None and targets is not None:
            inputs[:] = self._row.tokens[:-1]
            targets[:] = np.where(self._row.is_target[1:], self._row.tokens[1:], -1)

    def _choose(self) -> list[Rendered]:
        """The conversations of the next row; none when all have been placed."""
        self._refill()
        longest = self._buffer.take_longest(self._capacity)
        if longest is None:
            return []
        self._refill()
        left = self._capacity - len(longest.tokens)
        return [longest, *self._buffer.take_filling(left, self._capacity // _PADDING_ACCEPTED)]

    def snapshot(self) -> ChatSnapshot:
        """State after the rows so far."""
        return ChatSnapshot(self._position, self._buffer.keys(), ChatStats(**self._counts))

    def _count_row(self, filled: int, num_supervised: int) -> None:
        self._counts["rows"] += 1
        self._counts["tokens_used"] += filled
        self._counts["tokens_supervised"] += num_supervised
        self._counts["tokens_padding"] += self._capacity - filled

    def _refill(self) -> None:
        while len(self._buffer) < BUFFER_SIZE and not self._is_read():
            key = self._position
            rendered, num_cut, num_lost = self._render(key)
            self._position = self._after(key)
            self._counts["tokens_truncated"] += num_cut
            self._counts["tokens_supervised_lost"] += num_lost
            if rendered.is_target[1:].any():
                self._num_useless = 0
                self._counts["conversations_truncated"] += num_cut > 0
                self._buffer.add(key, len(rendered.tokens), rendered)
            else:
                self._drop()

    def _is_read(self) -> bool:
        return self._epochs is not None and self._position.epoch > self._epochs

    def _after(self, key: ConversationKey) -> ConversationKey:
        is_last = key.index + 1 >= len(self._task)
        return ConversationKey(key.epoch + 1, 0) if is_last else key._replace(index=key.index + 1)

    def _drop(self) -> None:
        self._counts["conversations_dropped"] += 1
        self._num_useless += 1
        if self._num_useless >= len(self._task):
            raise UserError(
                f"none of the {len(self._task)} conversations has a token to learn within a row of "
                f"{self._capacity} tokens; raise --max-seq-len"
            )

    def _render(self, key: ConversationKey) -> tuple[Rendered, int, int]:
        """The conversation cut to a row, and the numbers of tokens and of targets cut off."""
        try:
            ids, mask = self._tokenizer.render_conversation(self._task[key.index], max_tokens=None)
        except ValueError as error:
            raise UserError(f"conversation {key.index} of the training data: {error}") from None
        tokens = np.array(ids[: self._capacity], dtype=np.int64)
        if not self._mask:
            mask = [1] * len(ids)
        is_target = np.array(mask[: self._capacity], dtype=np.bool_)
        return Rendered(tokens, is_target), len(ids) - len(tokens), sum(mask[self._capacity :])


class ChatLoader:
    """Iterator over the batches of one rank; state_dict() is the state after the last one returned.

    With `epochs` it ends after that many passes: the last batches of all ranks may hold rows of nothing but
    padding. With `state` it continues exactly, whatever the batch size and the number of ranks. mask=False
    makes every token of a conversation a target (mid-training). close() stops the background thread.
    """

    def __init__(
        self,
        tokenizer: ConversationTokenizer,
        task: Conversations,
        batch_size: int,
        seq_len: int,
        world: World,
        *,
        mask: bool = True,
        epochs: int | None = None,
        state: dict[str, Any] | None = None,
    ) -> None:
        self._size, self._epochs = len(task), epochs
        if not self._size:
            raise UserError("the training data holds no conversation")
        self._identity = {
            "format": STATE_FORMAT, "seq_len": seq_len, "mask": mask, "num_conversations": self._size,
        }  # fmt: skip
        self._snapshot = _start(state, self._identity)
        packer = ChatPacker(tokenizer, task, seq_len, mask, epochs, self._snapshot)
        self._stream = BatchStream(packer, batch_size, seq_len, world)
        self.exhausted = False  # whether the last batch has been returned

    def __iter__(self) -> ChatLoader:
        return self

    def __next__(self) -> Batch:
        batch, self._snapshot, self.exhausted = self._stream.next()
        return batch

    @property
    def progress(self) -> float:
        """Share of the conversations of all epochs (of one, if endless) that has been consumed, in [0, 1]."""
        stats = self._snapshot.stats
        consumed = stats.conversations_used + stats.conversations_dropped
        return min(1.0, consumed / (self._size * (self._epochs or 1)))

    @property
    def epoch(self) -> int:
        """Pass over the conversations, from 1, of those consumed so far."""
        stats = self._snapshot.stats
        done = (stats.conversations_used + stats.conversations_dropped) // self._size
        return min(done + 1, self._epochs or done + 1)

    def stats(self) -> dict[str, int | float]:
        """Conversations, tokens and rows so far, over all ranks, and the share of padding."""
        stats = self._snapshot.stats
        total = stats.tokens_used + stats.tokens_padding
        return {**asdict(stats), "fraction_padding": stats.tokens_padding / total if total else 0.0}

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue after the last batch returned, as JSON values; alike on all ranks."""
        groups = groupby(self._snapshot.buffered, lambda key: key.epoch)
        return {
            **self._identity,
            "reader": list(self._snapshot.reader),
            "buffered": [[epoch, [key.index for key in keys]] for epoch, keys in groups],
            "stats": asdict(self._snapshot.stats),
        }

    def close(self) -> None:
        """Stop the background thread."""
        self._stream.close()


def count_rows(
    tokenizer: ConversationTokenizer,
    task: Conversations,
    seq_len: int,
    *,
    mask: bool = True,
    epochs: int = 1,
    report: Callable[[float], None] = lambda share: None,
) -> int:
    """Rows that a ChatLoader makes of a task, so that the number of steps is known before the first one.

    Renders every conversation once per epoch. report: called after every row with the share that has been rendered.
    """
    packer = ChatPacker(tokenizer, task, seq_len, mask, epochs, _start(None, {}))
    while not packer.exhausted:
        packer.pack(None, None)
        epoch, index = packer.snapshot().reader
        report((epoch - 1 + index / len(task)) / epochs)
    return packer.snapshot().stats.rows


def _start(state: dict[str, Any] | None, identity: dict[str, Any]) -> ChatSnapshot:
    if state is None:
        return ChatSnapshot(ConversationKey(1, 0), (), ChatStats())
    for name, value in identity.items():
        if state.get(name) != value:
            raise UserError(f"cannot resume the data: {name} was {state.get(name)!r} and is now {value!r}")
    buffered = tuple(ConversationKey(epoch, index) for epoch, rows in state["buffered"] for index in rows)
    return ChatSnapshot(ConversationKey(*state["reader"]), buffered, ChatStats(**state["stats"]))
