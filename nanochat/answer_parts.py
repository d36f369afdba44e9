"""From generated ids to what a reader sees: text, tool calls and their results, cut at stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from nanochat.tokenizer_base import StreamingDecoder, Tokenizer

TEXT, CALL, OUTPUT = "text", "python", "python_output"


@dataclass(frozen=True, slots=True)
class Delta:
    """New content of one kind: a piece of text, or a whole tool call or result."""

    kind: str
    text: str


@dataclass(slots=True)
class PartsDecoder:
    """Incremental decoder of one answer.

    Text comes out as soon as its bytes are complete and cannot be the start of a stop string; calls and
    results come out whole. `parts` is the structured answer so far: `{"type", "text"}` dicts that
    `nanochat.serve.prompt` renders back to the ids they came from. With raw, special tokens are shown as text.
    Stop strings are looked for in text alone, not in calls, results or the names of special tokens, and not
    across a special token; what is found does not depend on raw.
    """

    tokenizer: Tokenizer
    stop: Sequence[str] = ()
    raw: bool = False
    stopped: bool = False
    parts: list[dict[str, str]] = field(default_factory=list)
    _special: dict[int | None, str] = field(init=False)
    _bytes: StreamingDecoder = field(init=False)
    _kind: str = TEXT
    _block: str = ""
    _held: str = ""

    def __post_init__(self) -> None:
        names = self.tokenizer.get_special_tokens()
        self._special = {self.tokenizer.encode_special(name): name for name in names}
        self._bytes = StreamingDecoder(self.tokenizer)

    @property
    def response(self) -> str:
        """The text of the answer, without calls and results."""
        return "".join(part["text"] for part in self.parts if part["type"] == TEXT)

    def push(self, token: int) -> list[Delta]:
        """Take one generated id; return what became visible."""
        if self.stopped:
            return []
        name = self._special.get(token)
        if name is None:
            return self._text(self._bytes.push(token))
        deltas = self._text(self._bytes.flush())
        return deltas if self.stopped else deltas + self._switch(name)

    def flush(self) -> list[Delta]:
        """End of the answer: release what was held back and close an open block."""
        return [] if self.stopped else self._text(self._bytes.flush()) + self._close()

    def _switch(self, name: str) -> list[Delta]:
        opened = {"<|python_start|>": CALL, "<|output_start|>": OUTPUT}.get(name)
        closes = {"<|python_end|>": CALL, "<|output_end|>": OUTPUT}.get(name) == self._kind
        says_nothing = opened is None and not closes
        deltas = [] if says_nothing and self._kind != TEXT else self._close()
        self._kind = self._kind if says_nothing else opened or TEXT
        return deltas + self._emit(TEXT, name) if self.raw else deltas

    def _close(self) -> list[Delta]:
        if self._kind == TEXT:
            held, self._held = self._held, ""
            return self._emit(TEXT, held)
        block, self._block = self._block, ""
        kind, self._kind = self._kind, TEXT
        return [] if self.raw else self._emit(kind, block)

    def _text(self, text: str) -> list[Delta]:
        if self._kind != TEXT:
            self._block += text
            return self._emit(TEXT, text) if self.raw else []
        self._held += text
        cut = min((at for at in map(self._held.find, self.stop) if at >= 0), default=-1)
        if cut >= 0:
            visible, self._held, self.stopped = self._held[:cut], "", True
        else:
            keep = _overlap(self._held, self.stop)
            split = len(self._held) - keep
            visible, self._held = self._held[:split], self._held[split:]
        return self._emit(TEXT, visible)

    def _emit(self, kind: str, text: str) -> list[Delta]:
        if kind == TEXT and not text:
            return []
        if kind == TEXT and self.parts and self.parts[-1]["type"] == TEXT:
            self.parts[-1]["text"] += text
        else:
            self.parts.append({"type": kind, "text": text})
        return [Delta(kind, text)]


def _overlap(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of text that a stop string starts with."""
    longest = min(len(text), max((len(word) - 1 for word in stop), default=0))
    ends = range(longest, 0, -1)
    return next((n for n in ends if any(word.startswith(text[-n:]) for word in stop)), 0)
