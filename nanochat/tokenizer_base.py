"""What every tokenizer of the project shares: special tokens, split pattern, the methods built on encoding.

Users import these names from `nanochat.tokenizer`.
"""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import overload

from nanochat import conversation as conversations
from nanochat.conversation import Conversation

# The ids follow the learned tokens in this order; files of other nanochat implementations rely on it.
SPECIAL_TOKENS = (
    "<|bos|>",  # starts every document and every conversation
    "<|user_start|>", "<|user_end|>",
    "<|assistant_start|>", "<|assistant_end|>",
    "<|python_start|>", "<|python_end|>",  # a tool call
    "<|output_start|>", "<|output_end|>",  # what the tool answered
)  # fmt: skip

# The crate's NANOCHAT_PATTERN, here too so that importing this module loads nothing (a test compares them):
# GPT-4's pattern with digit groups of at most two: at a vocabulary of 32K and depth 12 the validation bpb is
# 0.969 for groups of one, 0.965 for two, 0.972 for three.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)


class Tokenizer(ABC):
    """What both tokenizers can do: encode with prepended and appended tokens, render conversations."""

    @abstractmethod
    def get_vocab_size(self) -> int: ...

    @abstractmethod
    def encode_special(self, text: str) -> int | None: ...

    @abstractmethod
    def get_special_tokens(self) -> Collection[str]: ...

    @abstractmethod
    def get_bos_token_id(self) -> int: ...

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str: ...

    @abstractmethod
    def decode_single_token_bytes(self, token: int) -> bytes: ...

    @abstractmethod
    def _encode_one(self, text: str) -> list[int]: ...

    @abstractmethod
    def _encode_many(
        self, texts: list[str], prepend: int | None, append: int | None, num_threads: int | None
    ) -> list[list[int]]: ...

    @overload
    def encode(
        self,
        text: str,
        prepend: int | str | None = None,
        append: int | str | None = None,
        num_threads: int | None = 8,
    ) -> list[int]: ...

    @overload
    def encode(
        self,
        text: list[str],
        prepend: int | str | None = None,
        append: int | str | None = None,
        num_threads: int | None = 8,
    ) -> list[list[int]]: ...

    def encode(
        self,
        text: str | list[str],
        prepend: int | str | None = None,
        append: int | str | None = None,
        num_threads: int | None = 8,
    ) -> list[int] | list[list[int]]:
        """Ids of a text, or a list of ids for each text of a list. Special tokens in it are plain characters.

        prepend and append are an id or the string of a special token, added to every row.
        Raises ValueError if text is neither a string nor a list of strings, or an id is no token's.
        """
        first, last = self._token_id(prepend), self._token_id(append)
        if isinstance(text, str):
            ids = self._encode_one(text)
            return [*([] if first is None else [first]), *ids, *([] if last is None else [last])]
        if isinstance(text, list) and all(isinstance(item, str) for item in text):
            return self._encode_many(text, first, last, num_threads)
        raise ValueError(f"encode takes a string or a list of strings, not {type(text).__name__}")

    __call__ = encode

    def _token_id(self, token: int | str | None) -> int | None:
        if isinstance(token, str):
            return self._special_id(token)
        if token is not None:
            self.decode_single_token_bytes(token)  # fails for an id that is no token's
        return token

    def _special_id(self, text: str) -> int:
        token = self.encode_special(text)
        if token is None:
            raise KeyError(text)
        return token

    def render_conversation(
        self, conversation: Conversation, max_tokens: int | None = 2048
    ) -> tuple[list[int], list[int]]:
        """Ids and loss mask (1 = training target) of a conversation, both cut to max_tokens.

        max_tokens=None cuts nothing. Raises ValueError for a malformed conversation.
        """
        return conversations.render(conversation, self._encode_one, self._special_id, max_tokens)

    def render_for_completion(self, conversation: Conversation, max_tokens: int = 2048) -> list[int]:
        """The prompt for the last message of a conversation, which must be the assistant's and is left out.

        A prompt longer than max_tokens is cut on the left, after BOS.
        """
        return conversations.render_prompt(conversation, self._encode_one, self._special_id, max_tokens)

    def completion_prompts(
        self, conversations: Sequence[Conversation], max_tokens: int
    ) -> tuple[list[list[int]], int]:
        """The prompts for the last messages, none longer than max_tokens, and how many were cut to that."""
        prompts = [self.render_for_completion(conversation, max_tokens + 1) for conversation in conversations]
        num_cut = sum(len(prompt) > max_tokens for prompt in prompts)
        return [
            prompt if len(prompt) <= max_tokens else [prompt[0], *prompt[2:]] for prompt in prompts
        ], num_cut

    def visualize_tokenization(
        self, ids: Sequence[int], mask: Sequence[int], with_token_id: bool = False
    ) -> str:
        """The tokens joined by `|` in ANSI colours: green = training target, red = not."""
        return conversations.visualize(ids, mask, self.decode, with_token_id)


class StreamingDecoder:
    """Text of a stream of tokens, holding back an unfinished character until its last byte has come."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that this token completes, possibly none."""
        return self._decoder.decode(self._tokenizer.decode_single_token_bytes(token))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an unfinished character. The decoder can be used again."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest
