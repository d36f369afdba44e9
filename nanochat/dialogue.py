"""A conversation as a person in a terminal has it: what was said, the settings, and taking turns.

Who answers is left open: `nanochat.chat` asks a model in this process, `nanochat.remote_chat` a server.
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Show = Callable[[str, str], None]  # kind of part (text, python, python_output), text
Notice = Callable[[str], None]
_HARMLESS = "\n\t\u200c\u200d"  # joiners are part of emoji and of some scripts


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer and how it came about; times in seconds."""

    parts: list[dict[str, str]]
    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    first_token_s: float
    total_s: float

    @property
    def tokens_per_second(self) -> float:
        """After the first token."""
        return max(self.completion_tokens - 1, 0) / max(self.total_s - self.first_token_s, 1e-9)

    def summary(self, context: int) -> str:
        """One line about speed and context use."""
        used = self.prompt_tokens + self.completion_tokens
        return (
            f"{self.completion_tokens} tokens, first after {1000 * self.first_token_s:.0f} ms,"
            f" then {self.tokens_per_second:.1f} tokens/s; context {used}/{context}; {self.finish_reason}"
        )


class Display(ABC):
    """Where the parts of an answer are written as they come; a call waits for its result: both are one bracket."""

    _call: str | None = None

    @abstractmethod
    def begin(self) -> None:
        """Before the first part."""

    @abstractmethod
    def end(self) -> None:
        """After the last part."""

    def show(self, kind: str, text: str) -> None:
        """Write a part of an answer."""
        if kind == "python":
            self.flush()
            self._call = text
        elif kind == "python_output":
            call, self._call = self._call, None
            self.write_tool(f"[{call} = {text}]" if call is not None else f"[{text}]")
        else:
            self.flush()
            self.write_text(text)

    def flush(self) -> None:
        """Write a call that has got no result."""
        if self._call is not None:
            self.write_tool(f"[{self._call}]")
            self._call = None

    @abstractmethod
    def write_text(self, text: str) -> None:
        """What the model says."""

    @abstractmethod
    def write_tool(self, text: str) -> None:
        """What a tool did, in brackets."""


@dataclass(kw_only=True)
class Dialogue(ABC):
    """A conversation, and the settings that can be changed during it. max_tokens 0: to the context's end."""

    temperature: float = 0.6
    top_k: int = 50
    top_p: float = 1.0
    max_tokens: int = 512
    seed: int | None = None
    stop: str = ""
    system: str = ""
    raw: bool = False
    messages: list[dict[str, Any]] = field(default_factory=list)
    num_replies: int = 0
    last_seed: int = 0

    @property
    @abstractmethod
    def context(self) -> int:
        """The longest conversation that the model can read, in tokens."""

    @abstractmethod
    def used_tokens(self) -> int:
        """How much of the context the conversation takes."""

    @abstractmethod
    def _generate(self, show: Show, notice: Notice) -> Reply:
        """Answer the last message; Ctrl-C ends the answer, not the program. Raises UserError."""

    def answer(self, question: str, show: Show, notice: Notice) -> Reply:
        """Generate the answer to a question and keep both; Ctrl-C keeps what there is. Raises UserError."""
        self.messages.append({"role": "user", "content": question})
        try:
            reply = self._generate(show, notice)
        except BaseException:
            self.messages.pop()
            raise
        has_tools = any(part["type"] != "text" for part in reply.parts)
        self.messages.append({"role": "assistant", "content": reply.parts if has_tools else reply.text})
        return reply

    def undo(self) -> str | None:
        """Take back the last question and its answer; the question, or None if there is none."""
        while self.messages:
            message = self.messages.pop()
            if message["role"] == "user":
                return message["content"]
        return None

    def _next_seed(self) -> int:
        """A fixed seed gives a repeatable conversation, yet another answer on /retry."""
        self.last_seed = secrets.randbits(31) if self.seed is None else self.seed + self.num_replies
        self.num_replies += 1
        return self.last_seed


def printable(text: str) -> str:
    """Text for a terminal: nothing in it can move the cursor, change colours or turn the writing direction."""
    return "".join(char if char.isprintable() or char in _HARMLESS else _stand_in(char) for char in text)


def _stand_in(char: str) -> str:
    return " " if char.isspace() else "\ufffd"
