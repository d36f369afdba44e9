"""A conversation with a model in this process: how the next answer comes about."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from nanochat.answer_parts import PartsDecoder
from nanochat.common import UserError
from nanochat.dialogue import Dialogue, Notice, Reply, Show
from nanochat.engine import Engine
from nanochat.serve.prompt import Prompt, build_prompt
from nanochat.tokenizer import RustBPETokenizer


@dataclass
class Chat(Dialogue):
    """A conversation with a model in this process."""

    engine: Engine
    tokenizer: RustBPETokenizer

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
        except Exception as error:
            from nanochat.serve.errors import ApiError  # only here: it brings FastAPI

            if not isinstance(error, ApiError):
                raise
            raise UserError(error.message) from None

    def used_tokens(self) -> int:
        return len(self.prompt().tokens) if self.messages else 0

    def _generate(self, show: Show, notice: Notice) -> Reply:
        prompt = self.prompt()
        if prompt.truncated_messages:
            notice(
                f"the conversation is too long: its first {prompt.truncated_messages} messages are left out"
            )
        kept = PartsDecoder(self.tokenizer, self._stop)
        shown = PartsDecoder(self.tokenizer, self._stop, raw=True) if self.raw else kept
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
        reason = "stop" if kept.stopped else reason
        for delta in [decoder.flush() for decoder in decoders][-1]:
            show(delta.kind, delta.text)
        total_s = time.perf_counter() - begun
        return Reply(kept.parts, kept.response, reason, len(prompt.tokens), count, first_s, total_s)

    @property
    def _stop(self) -> tuple[str, ...]:
        return (self.stop,) if self.stop else ()

    def _tokens(self, prompt: list[int], max_tokens: int) -> Iterator[tuple[int, bool]]:
        """Generated ids, and whether each is the one that ends the answer."""
        terminals = self.engine.toolbox.terminals
        options = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        options |= {"seed": self._next_seed(), "stop": self._stop}
        for column, _ in self.engine.generate(prompt, 1, max_tokens, **options):
            yield column[0], column[0] in terminals
