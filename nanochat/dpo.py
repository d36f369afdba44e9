"""Direct preference optimisation: learn from pairs of answers, one better than the other.

[Rafailov et al. 2023, arXiv 2305.18290] A sequence's reward is beta * (log-probability now - under the source model);
the loss of a pair is -log sigmoid(reward of the chosen - reward of the rejected answer). It is an objective of the one
training loop, which does the rest. A micro-batch of B pairs has 2 B rows: chosen, rejected, chosen, rejected, ...
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.chat_loader import ConversationTokenizer
from nanochat.common import UserError, World
from nanochat.conversation import Conversation
from nanochat.gpt import GPT

_LENGTH_MULTIPLE = 32


class Pairs(Protocol):
    """Conversations that differ in their last answer: (chosen, rejected)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Conversation, Conversation]: ...


@dataclass(frozen=True)
class Preference:
    """What DPO minimises. reference: the source model, which stays as it is. beta: how dear departing from it is."""

    reference: GPT
    beta: float

    def count(self, targets: Tensor) -> Tensor:
        """Pairs in targets (2B, T) that are not padding."""
        return (targets[::2] >= 0).any(dim=1).sum()

    def loss(self, forward: Callable[..., Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        """Sum over the pairs of (2B, T); padding adds zero."""
        rewards = self.rewards(forward, inputs, targets)
        is_pair = (targets[::2] >= 0).any(dim=1)
        return -(F.logsigmoid(rewards[::2] - rewards[1::2]) * is_pair).sum()

    def rewards(self, forward: Callable[..., Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        """(2B,), of the answers in inputs and targets (2B, T)."""
        with torch.no_grad():
            before = _log_probability(self.reference, inputs, targets)
        return self.beta * (_log_probability(forward, inputs, targets) - before)


def _log_probability(forward: Callable[..., Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
    """(B,): of all targets of a row together."""
    return -forward(inputs, targets, loss_reduction="none").view_as(targets).sum(dim=1)


# --- data --------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """The tokens of one answer with its prompt, int32, and whether each is a target."""

    tokens: np.ndarray
    is_target: np.ndarray


@dataclass(frozen=True, slots=True)
class PairStats:
    """What the stage trained on: counts since the start of the run over all ranks, and of the data."""

    pairs_used: int = 0  # those of later epochs count again
    pairs_truncated: int = 0  # of those used
    tokens_used: int = 0
    tokens_supervised: int = 0
    tokens_truncated: int = 0
    tokens_padding: int = 0


class PairData:
    """Pairs as tokens, cut to rows of at most seq_len + 1; those with nothing left to tell apart are dropped.

    What the two rows of a pair have in common at the beginning is no target: it cancels in the loss.
    """

    def __init__(self, tokenizer: ConversationTokenizer, pairs: Pairs, max_seq_len: int) -> None:
        rendered = [_render(tokenizer, pairs, index) for index in range(len(pairs))]
        longest = max((len(row.tokens) for pair in rendered for row in pair), default=0)
        wanted = -(-max(longest - 1, 1) // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
        self.seq_len = min(wanted, max_seq_len)
        self.pad = tokenizer.get_bos_token_id()
        self.lengths: list[int] = []  # tokens before the cut, of both rows
        self.pairs: list[tuple[Row, Row]] = []
        for pair in rendered:
            cut = _cut(pair, self.seq_len + 1)
            if all(row.is_target[1:].any() for row in cut):
                self.pairs.append(cut)
                self.lengths.append(sum(len(row.tokens) for row in pair))
        self.num_dropped = len(rendered) - len(self.pairs)
        if not self.pairs:
            raise UserError(
                f"none of the {len(rendered)} preference pairs has two different answers within {self.seq_len} tokens"
            )


def _render(tokenizer: ConversationTokenizer, pairs: Pairs, index: int) -> tuple[Row, Row]:
    rows = []
    for conversation in pairs[index]:
        try:
            ids, mask = tokenizer.render_conversation(conversation, max_tokens=None)
        except ValueError as error:
            raise UserError(f"preference pair {index}: {error}") from None
        rows.append(Row(np.array(ids, np.int32), np.array(mask, np.bool_)))
    shorter = min(len(row.tokens) for row in rows)
    differs = rows[0].tokens[:shorter] != rows[1].tokens[:shorter]
    common = int(differs.argmax()) if differs.any() else shorter
    for row in rows:
        row.is_target[:common] = False
    return rows[0], rows[1]


def _cut(pair: tuple[Row, Row], limit: int) -> tuple[Row, Row]:
    chosen, rejected = (Row(row.tokens[:limit], row.is_target[:limit]) for row in pair)
    return chosen, rejected


class PairLoader:
    """Batches of `batch_size` pairs for one rank, each epoch in another order, without end.

    `state` is the state_dict() after some batch of a run with any batch size and number of ranks; the loader goes on
    after it. With epochs, it ends after so many passes; the last batches are filled up with padding.
    """

    def __init__(
        self,
        data: PairData,
        batch_size: int,
        world: World,
        *,
        shuffle: bool = True,
        epochs: int | None = None,
        state: dict[str, Any] | None = None,
    ) -> None:
        self._data, self._batch_size, self._world = data, batch_size, world
        self._shuffle, self._epochs = shuffle, epochs
        self._identity = {"num_pairs": len(data.pairs), "seq_len": data.seq_len}
        self._position, self._stats = 0, PairStats()
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))
        if state is not None:
            for name, value in self._identity.items():
                if state.get(name) != value:
                    raise UserError(
                        f"cannot resume the pairs: {name} was {state.get(name)} and is now {value}"
                    )
            self._position, self._stats = state["position"], PairStats(**state["stats"])

    def __iter__(self) -> PairLoader:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        """inputs and targets (2B, T) int64; targets are -1 in prompts and padding."""
        size, total = len(self._data.pairs), self._batch_size * self._world.size
        end = None if self._epochs is None else self._epochs * size
        if end is not None and self._position >= end:
            raise StopIteration
        places = range(self._position, self._position + total)
        chosen = [self._index(place) if end is None or place < end else None for place in places]
        self._position += total
        self._count([index for index in chosen if index is not None])
        own = chosen[self._world.rank * self._batch_size :][: self._batch_size]
        return self._batch(own)

    @property
    def epoch(self) -> int:
        """Pass over the pairs, from 1, of the last one returned."""
        return max(self._position - 1, 0) // len(self._data.pairs) + 1

    def stats(self) -> dict[str, int | float]:
        """Pairs and tokens so far, over all ranks, and what was never used."""
        stats, dropped = asdict(self._stats), self._data.num_dropped
        total = self._stats.tokens_used + self._stats.tokens_padding
        return {
            **stats, "pairs_dropped": dropped, "fraction_padding": stats["tokens_padding"] / total if total else 0.0,
        }  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on after the last batch, as JSON values; alike on all ranks."""
        return {**self._identity, "position": self._position, "stats": asdict(self._stats)}

    def _index(self, place: int) -> int:
        """Which pair stands at a place of the endless stream."""
        epoch, place = divmod(place, len(self._data.pairs))
        if not self._shuffle:
            return place
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([42, epoch]).permutation(len(self._data.pairs)))
        return int(self._order[1][place])

    def _batch(self, indices: list[int | None]) -> tuple[Tensor, Tensor]:
        shape = (2 * len(indices), self._data.seq_len)
        inputs, targets = np.full(shape, self._data.pad, np.int64), np.full(shape, -1, np.int64)
        for place, index in enumerate(indices):
            for side in range(2 if index is not None else 0):
                tokens, is_target = self._data.pairs[index or 0][side]
                row, length = 2 * place + side, len(tokens) - 1
                inputs[row, :length] = tokens[:-1]
                targets[row, :length] = np.where(is_target[1:], tokens[1:], -1)
        device = self._world.device
        return torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device)

    def _count(self, indices: list[int]) -> None:
        counts, limit = asdict(self._stats), 2 * (self._data.seq_len + 1)
        for index in indices:
            pair, before = self._data.pairs[index], self._data.lengths[index]
            used = sum(len(row.tokens) for row in pair)
            counts["pairs_used"] += 1
            counts["pairs_truncated"] += used < before
            counts["tokens_used"] += used
            counts["tokens_truncated"] += before - used
            counts["tokens_padding"] += limit - used
            counts["tokens_supervised"] += sum(int(np.count_nonzero(row.is_target[1:])) for row in pair)
        self._stats = PairStats(**counts)


# --- evaluation --------------------------------------------------------------------------------------


def evaluate_pairs(
    model: GPT, preference: Preference, data: PairData, batch_size: int, world: World
) -> dict[str, float]:
    """On held-out pairs: mean margin between the rewards, share of pairs ranked rightly (ties: half), mean loss."""
    totals = torch.zeros(5, device=world.device)
    for inputs, targets in PairLoader(data, batch_size, world, shuffle=False, epochs=1):
        is_pair = (targets[::2] >= 0).any(dim=1)
        rewards = preference.rewards(model, inputs, targets)
        chosen, rejected = rewards[::2][is_pair], rewards[1::2][is_pair]
        margin = chosen - rejected
        right = (margin.sign() + 1) / 2
        loss = -F.logsigmoid(margin)
        totals += torch.stack([x.sum() for x in (is_pair.float(), chosen, rejected, right, loss)])
    world.sum(totals)
    count, chosen, rejected, right, loss = totals.tolist()
    return {
        "val/margin": (chosen - rejected) / count,
        "val/accuracy": right / count,
        "val/reward_chosen": chosen / count,
        "val/reward_rejected": rejected / count,
        "val/loss": loss / count,
    }
