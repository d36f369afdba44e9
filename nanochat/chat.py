"""A conversation with a model: what has been said, the settings, and how the next answer comes about."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from nanochat.common import UserError
from nanochat.engine import Engine
from nanochat.serve.errors import ApiError
from nanochat.serve.parts import PartsDecoder
from nanochat.serve.prompt import Prompt, build_prompt
from nanochat.tokenizer import RustBPETokenizer


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


@dataclass
class Chat:
    """A conversation with a model, and the settings that can be changed during it."""

    engine: Engine
    tokenizer: RustBPETokenizer
    temperature: float = 0.6
    top_k: int = 50
    top_p: float = 1.0
    max_tokens: int = 512
    seed: int | None = None
    system: str = ""
    raw: bool = False
    messages: list[dict[str, Any]] = field(default_factory=list)
    num_replies: int = 0
    last_seed: int = 0

    @property
    def context(self) -> int:
        return self.engine.model.config.sequence_len

    def prompt(self) -> Prompt:
        """The tokens that ask for the next answer, old exchanges left out where they do not fit."""
        try:
            return build_prompt(
                self.tokenizer, self.messages, system=self.system,
                max_tokens=self.max_tokens or self.context, context_length=self.context,
            )  # fmt: skip
        except ApiError as error:
            raise UserError(error.message) from None

    def answer(self, question: str, show: Callable[[str, str], None], notice: Callable[[str], None]) -> Reply:
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

    def _generate(self, show: Callable[[str, str], None], notice: Callable[[str], None]) -> Reply:
        prompt = self.prompt()
        if prompt.truncated_messages:
            notice(
                f"the conversation is too long: its first {prompt.truncated_messages} messages are left out"
            )
        kept = PartsDecoder(self.tokenizer)
        shown = PartsDecoder(self.tokenizer, raw=True) if self.raw else kept
        decoders = [kept, shown] if self.raw else [kept]
        begun, first_s, count, reason = time.perf_counter(), 0.0, 0, "length"
        try:
            for token, is_terminal in self._tokens(prompt.tokens, prompt.max_tokens):
                first_s = first_s or time.perf_counter() - begun
                reason = "stop" if is_terminal else reason
                count += not is_terminal
                deltas = [decoder.push(token) for decoder in decoders][-1]
                for delta in deltas:
                    show(delta.kind, delta.text)
        except KeyboardInterrupt:
            reason = "cancelled"
        for delta in [decoder.flush() for decoder in decoders][-1]:
            show(delta.kind, delta.text)
        total_s = time.perf_counter() - begun
        return Reply(kept.parts, kept.response, reason, len(prompt.tokens), count, first_s, total_s)

    def _tokens(self, prompt: list[int], max_tokens: int) -> Iterator[tuple[int, bool]]:
        """Generated ids, and whether each is the one that ends the answer."""
        # A fixed seed gives a repeatable conversation, yet another answer on /retry.
        self.last_seed = secrets.randbits(31) if self.seed is None else self.seed + self.num_replies
        self.num_replies += 1
        terminals = self.engine.toolbox.terminals
        options = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        for column, _ in self.engine.generate(prompt, 1, max_tokens, seed=self.last_seed, **options):
            yield column[0], column[0] in terminals

    def undo(self) -> str | None:
        """Take back the last question and its answer; the question, or None if there is none."""
        while self.messages:
            message = self.messages.pop()
            if message["role"] == "user":
                return message["content"]
        return None
