"""How to choose the tokens of one request. Apart from `nanochat.sampling`, because the server's own process has no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

# Below, any gap between two fp32 logits near the softcap (1e-6 at 15) decides, and soon the quotients overflow.
_COLDEST = 1e-6
# Penalties and biases beyond say no more than this does, and could add up to infinity.
_LARGEST = 1e9


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose the tokens of one request. Raises ValueError for values without a meaning.

    temperature 0, and below 1e-6, is greedy. top_k None or 0, top_p 1, min_p 0, penalties 0 (repetition: 1) are off.
    max_tokens None is up to the context's end. seed None is a fresh one for each request.
    stop_tokens end the answer besides <|assistant_end|> and <|bos|>; so do the strings of stop, where they are
    complete in its text (see nanochat.answer_parts). logprobs is how many alternatives to report with each token's natural-log probability under the unmodified model; None reports nothing.
    extend_context allows going beyond the trained context, up to the rotary table's end.
    """

    temperature: float = 1.0
    top_k: int | None = None
    max_tokens: int | None = None
    seed: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop_tokens: frozenset[int] = frozenset()
    stop: Sequence[str] = ()
    logprobs: int | None = None
    extend_context: bool = False

    def __post_init__(self) -> None:
        checks = {
            f"temperature={self.temperature} must be a number >= 0": 0 <= self.temperature < math.inf,
            f"max_tokens={self.max_tokens} must be >= 0": self.max_tokens is None or self.max_tokens >= 0,
            f"top_p={self.top_p} must be in (0, 1]": 0 < self.top_p <= 1,
            f"min_p={self.min_p} must be in [0, 1]": 0 <= self.min_p <= 1,
            f"repetition_penalty={self.repetition_penalty} must be between {1 / _LARGEST:g} and {_LARGEST:g}": (
                1 / _LARGEST <= self.repetition_penalty <= _LARGEST
            ),
            **{
                f"{name}={value} must be between -{_LARGEST:g} and {_LARGEST:g}": abs(value) <= _LARGEST
                for name, value in self._added()
            },
            f"stop={self.stop!r} must be a sequence of strings that are not empty": _are_words(self.stop),
            f"logprobs={self.logprobs} must be >= 0": self.logprobs is None or self.logprobs >= 0,
        }
        wrong = [text for text, holds in checks.items() if not holds]
        if wrong:
            raise ValueError("; ".join(wrong))
        if self.temperature < _COLDEST:
            object.__setattr__(self, "temperature", 0.0)
        if self.top_k is not None and self.top_k <= 0:
            object.__setattr__(self, "top_k", None)

    def _added(self) -> Iterator[tuple[str, float]]:
        """What is added to logits, with its name."""
        yield "presence_penalty", self.presence_penalty
        yield "frequency_penalty", self.frequency_penalty
        for token, bias in self.logit_bias.items():
            yield f"logit_bias of token {token}", bias

    @property
    def adjusts_logits(self) -> bool:
        """Whether the logits are changed before candidates are chosen."""
        penalties = self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty
        return bool(penalties or self.logit_bias)


def _are_words(stop: Sequence[str]) -> bool:
    return not isinstance(stop, str) and all(isinstance(word, str) and word for word in stop)
