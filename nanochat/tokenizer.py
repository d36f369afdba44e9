"""The project's tokenizer: byte-level BPE by the crate `rustbpe`, stored as text and JSON, never pickled.

The second class, `HuggingFaceTokenizer`, wraps a library. Neither of them ever reads a special token out of
ordinary text. rustbpe, tiktoken, tokenizers, torch and numpy are imported where they are used, so that
importing this module is instant.
"""

from __future__ import annotations

import binascii
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat.common import UserError, get_base_dir, read_json, whole_file, write_json
from nanochat.tokenizer_base import SPECIAL_TOKENS, SPLIT_PATTERN, StreamingDecoder, Tokenizer
from nanochat.tokenizer_hf import HuggingFaceTokenizer

if TYPE_CHECKING:
    import numpy as np
    import tiktoken
    import torch

__all__ = [
    "SPECIAL_TOKENS",
    "SPLIT_PATTERN",
    "HuggingFaceTokenizer",
    "RustBPETokenizer",
    "StreamingDecoder",
    "Tokenizer",
    "Vocabulary",
    "get_token_bytes",
    "get_tokenizer",
]

RANKS_FILE = "ranks.tiktoken"
CONFIG_FILE = "tokenizer_config.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Vocabulary:
    """Everything that defines a byte-level BPE: plain data, in memory and on disk."""

    ranks: dict[bytes, int]
    pattern: str
    special_tokens: dict[str, int]
    name: str = "rustbpe"

    @classmethod
    def from_tiktoken(cls, enc: tiktoken.Encoding) -> Vocabulary:
        """The vocabulary of a tiktoken encoding, with tiktoken's ids."""
        return cls(dict(enc._mergeable_ranks), enc._pat_str, dict(enc._special_tokens), enc.name)

    @classmethod
    def load(cls, directory: str | Path) -> Vocabulary:
        """Read what `save` wrote. Missing or damaged files are a UserError."""
        directory = Path(directory)
        for name in (CONFIG_FILE, RANKS_FILE):
            if not (directory / name).is_file():
                raise UserError(
                    f"no tokenizer in {directory} ({name} is missing); run python -m scripts.tok_train"
                )
        config = read_json(directory / CONFIG_FILE)
        version = config.get("format_version")
        if version != FORMAT_VERSION:
            raise UserError(
                f"{directory / CONFIG_FILE} has format {version}; this code reads {FORMAT_VERSION}"
            )
        blob = (directory / RANKS_FILE).read_bytes()
        # The hash also catches a pair of files from two different trainings.
        if hashlib.sha256(blob).hexdigest() != config.get("ranks_sha256"):
            raise UserError(
                f"{directory / RANKS_FILE} is damaged, or saving was interrupted (its hash is not that in"
                f" {CONFIG_FILE}); run python -m scripts.tok_train"
            )
        pattern, special, name = (config.get(key) for key in ("pattern", "special_tokens", "name"))
        if not (isinstance(pattern, str) and isinstance(special, dict) and isinstance(name, str)):
            raise UserError(f"{directory / CONFIG_FILE} is damaged: it lacks pattern, special_tokens or name")
        try:
            return cls(_parse_ranks(blob), pattern, special, name)
        except ValueError as error:
            raise UserError(f"{directory / RANKS_FILE} is damaged: {error}") from None

    def save(self, directory: str | Path) -> None:
        """Write the ranks in tiktoken's text format, then the configuration with their hash."""
        directory, blob = Path(directory), self._ranks_text()
        with whole_file(directory / RANKS_FILE) as file:
            file.write(blob)
        config = {
            "format_version": FORMAT_VERSION, "name": self.name, "pattern": self.pattern,
            "special_tokens": self.special_tokens, "ranks_sha256": hashlib.sha256(blob).hexdigest(),
        }  # fmt: skip
        write_json(directory / CONFIG_FILE, config)

    @cached_property
    def sha256(self) -> str:
        """Hash in hexadecimal of what decides how text becomes ids: ranks, pattern and special tokens."""
        special = sorted(self.special_tokens.items(), key=lambda item: item[1])
        rest = json.dumps([self.pattern, special]).encode()
        return hashlib.sha256(self._ranks_text() + rest).hexdigest()

    def _ranks_text(self) -> bytes:
        ordered = sorted(self.ranks.items(), key=lambda item: item[1])
        lines = (binascii.b2a_base64(token, newline=False) + b" %d\n" % rank for token, rank in ordered)
        return b"".join(lines)


def _parse_ranks(blob: bytes) -> dict[bytes, int]:
    fields = blob.split()
    return dict(zip(map(binascii.a2b_base64, fields[0::2]), map(int, fields[1::2]), strict=True))


class RustBPETokenizer(Tokenizer):
    """The project's tokenizer: the crate's encoder over a vocabulary, and its special tokens."""

    def __init__(self, vocabulary: Vocabulary | tiktoken.Encoding, bos_token: str = "<|bos|>") -> None:
        import rustbpe

        if not isinstance(vocabulary, Vocabulary):
            vocabulary = Vocabulary.from_tiktoken(vocabulary)
        self.vocabulary = vocabulary
        self._core = rustbpe.Tokenizer.from_ranks(
            vocabulary.ranks.items(), vocabulary.pattern, vocabulary.special_tokens
        )
        self._bos_token_id = self.encode_special(bos_token)
        self._vocab_size = 1 + max(*vocabulary.ranks.values(), *vocabulary.special_tokens.values())
        self._tiktoken: tiktoken.Encoding | None = None

    def __reduce__(self) -> tuple:
        """Pickled as its vocabulary: the crate's encoder is built again."""
        bos_token = next(
            name for name, number in self.vocabulary.special_tokens.items() if number == self._bos_token_id
        )
        return RustBPETokenizer, (self.vocabulary, bos_token)

    @classmethod
    def train_from_iterator(cls, text_iterator: Iterable[str], vocab_size: int) -> RustBPETokenizer:
        """Learn a vocabulary of vocab_size tokens, the special ones included, from texts.

        It comes out smaller, with a warning of the crate, if the texts run out of pairs. Raises ValueError if
        vocab_size has no room for the 256 bytes and the special tokens.
        """
        import rustbpe

        smallest = 256 + len(SPECIAL_TOKENS)
        if vocab_size < smallest:
            raise ValueError(f"vocab_size={vocab_size} is too small; the smallest is {smallest}")
        core = rustbpe.Tokenizer()
        core.train_from_iterator(text_iterator, vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
        pairs = core.get_mergeable_ranks()
        ranks = {bytes(token): rank for token, rank in pairs}
        assert len(ranks) == len(pairs), "two merges made the same token"
        special_tokens = {token: len(ranks) + index for index, token in enumerate(SPECIAL_TOKENS)}
        return cls(Vocabulary(ranks, SPLIT_PATTERN, special_tokens))

    @classmethod
    def from_directory(cls, directory: str | Path) -> RustBPETokenizer:
        """Load what `save` wrote; UserError if that cannot be."""
        vocabulary = Vocabulary.load(directory)
        if "<|bos|>" not in vocabulary.special_tokens:
            raise UserError(f"the tokenizer in {directory} has no special token <|bos|>")
        try:
            return cls(vocabulary)
        except (TypeError, ValueError) as error:
            raise UserError(f"the tokenizer in {directory} is damaged: {error}") from None

    @classmethod
    def from_pretrained(cls, name: str) -> RustBPETokenizer:
        """A tiktoken encoding by name, such as gpt2 or cl100k_base; <|endoftext|> serves as BOS."""
        import tiktoken

        return cls(tiktoken.get_encoding(name), "<|endoftext|>")

    def save(self, directory: str | Path) -> None:
        """Write the tokenizer into a directory, which is created if missing."""
        self.vocabulary.save(directory)
        print(f"Saved tokenizer to {directory}")

    def to_tiktoken(self) -> tiktoken.Encoding:
        """The same tokenizer as a tiktoken encoding, for interchange."""
        import tiktoken

        v = self.vocabulary
        return tiktoken.Encoding(
            v.name, pat_str=v.pattern, mergeable_ranks=v.ranks, special_tokens=v.special_tokens
        )

    @property
    def enc(self) -> tiktoken.Encoding:
        """The tiktoken encoding, built on first use."""
        if self._tiktoken is None:
            self._tiktoken = self.to_tiktoken()
        return self._tiktoken

    def get_vocab_size(self) -> int:
        """Largest id + 1, special tokens included."""
        return self._vocab_size

    def get_special_tokens(self) -> set[str]:
        """The strings of the special tokens."""
        return set(self.vocabulary.special_tokens)

    def encode_special(self, text: str) -> int:
        """Id of a special token by its exact string; KeyError if there is none."""
        return self.vocabulary.special_tokens[text]

    def get_bos_token_id(self) -> int:
        """Id of the token that starts every document."""
        return self._bos_token_id

    def encode_arrays(
        self,
        texts: list[str],
        prepend: int | str | None = None,
        append: int | str | None = None,
        num_threads: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """All ids of many texts in one array of the smallest unsigned dtype, and int64 offsets (len + 1)."""
        first, last = self._token_id(prepend), self._token_id(append)
        return self._core.encode_batch_arrays(texts, first, last, num_threads)

    def _encode_one(self, text: str) -> list[int]:
        return self._core.encode_ordinary(text)

    def _encode_many(
        self, texts: list[str], prepend: int | None, append: int | None, num_threads: int | None
    ) -> list[list[int]]:
        ids, offsets = self.encode_arrays(texts, prepend, append, num_threads)
        flat = ids.tolist()
        return [flat[start:stop] for start, stop in pairwise(offsets.tolist())]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; invalid UTF-8 becomes U+FFFD, special tokens become their strings."""
        return self._core.decode(ids, errors="replace")

    def decode_single_token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for; for a special token those of its string."""
        return self._core.token_bytes(token)

    def id_to_token(self, token: int) -> str:
        """Text of one id; lossy if it is only a part of a character."""
        return self.decode([token])

    def token_bytes_lengths(self) -> np.ndarray:
        """int32 (vocabulary size,): bytes of text that each token stands for; 0 for special tokens."""
        import numpy as np

        lengths = np.zeros(self.get_vocab_size(), dtype=np.int32)
        ranks = self.vocabulary.ranks
        lengths[np.fromiter(ranks.values(), np.int64, len(ranks))] = [len(token) for token in ranks]
        return lengths


def get_tokenizer(directory: str | Path | None = None) -> RustBPETokenizer:
    """The trained tokenizer of this base folder, or of the given directory."""
    return RustBPETokenizer.from_directory(directory or get_base_dir() / "tokenizer")


def get_token_bytes(
    device: str | torch.device = "cpu", tokenizer: RustBPETokenizer | None = None
) -> torch.Tensor:
    """int32 (vocabulary size,): bytes per token of a tokenizer, default the trained one, for bits per byte."""
    import torch

    return torch.from_numpy((tokenizer or get_tokenizer()).token_bytes_lengths()).to(device)
