"""The library `tokenizers` behind our methods, for foreign models and as an independent trainer.

Users import the class from `nanochat.tokenizer`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat.common import UserError, whole_file
from nanochat.tokenizer_base import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer

if TYPE_CHECKING:
    import tokenizers


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizers.Tokenizer` behind the same methods. Its trainer numbers the special tokens 0 to 8."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        tokenizer.encode_special_tokens = True  # special tokens inside a text are plain characters
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(cls, hf_path: str) -> HuggingFaceTokenizer:
        """A tokenizer of the Hugging Face hub, such as gpt2."""
        import tokenizers

        return cls(tokenizers.Tokenizer.from_pretrained(hf_path))

    @classmethod
    def from_directory(cls, directory: str | Path) -> HuggingFaceTokenizer:
        """Load tokenizer.json of a directory."""
        import tokenizers

        path = Path(directory) / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"no tokenizer in {directory} (tokenizer.json is missing)")
        return cls(tokenizers.Tokenizer.from_file(str(path)))

    @classmethod
    def train_from_iterator(cls, text_iterator: Iterable[str], vocab_size: int) -> HuggingFaceTokenizer:
        """Learn a byte-level BPE of vocab_size tokens, the special ones included."""
        from tokenizers import Regex, decoders, pre_tokenizers, trainers
        from tokenizers import Tokenizer as Backend
        from tokenizers.models import BPE

        backend = Backend(BPE(byte_fallback=True, unk_token=None, fuse_unk=False))
        split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated", invert=False)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])  # pyright: ignore
        backend.decoder = decoders.ByteLevel()  # pyright: ignore
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=0,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=list(SPECIAL_TOKENS),
            show_progress=True,
        )
        backend.train_from_iterator(text_iterator, trainer)
        return cls(backend)

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json into a directory, which is created if missing."""
        with whole_file(Path(directory) / "tokenizer.json", "w") as file:
            file.write(self.tokenizer.to_str(pretty=True))
        print(f"Saved tokenizer to {directory}")

    def get_vocab_size(self) -> int:
        """Number of tokens, special ones included."""
        return self.tokenizer.get_vocab_size()

    def get_special_tokens(self) -> list[str]:
        """The strings of the special tokens."""
        return [token.content for token in self.tokenizer.get_added_tokens_decoder().values()]

    def id_to_token(self, token: int) -> str | None:
        """The library's name of a token, in its byte-level alphabet."""
        return self.tokenizer.id_to_token(token)

    def encode_special(self, text: str) -> int | None:
        """Id of a token by its exact string, or None."""
        return self.tokenizer.token_to_id(text)

    def get_bos_token_id(self) -> int:
        """Id of <|bos|>, else of <|endoftext|>."""
        candidates = (self.encode_special(text) for text in ("<|bos|>", "<|endoftext|>"))
        bos = next((token for token in candidates if token is not None), None)
        assert bos is not None, "this tokenizer has neither <|bos|> nor <|endoftext|>"
        return bos

    def _encode_one(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _encode_many(
        self, texts: list[str], prepend: int | None, append: int | None, num_threads: int | None
    ) -> list[list[int]]:
        return [self.encode(text, prepend, append) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens included."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def decode_single_token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for; for a special token those of its string."""
        name = self.tokenizer.id_to_token(token) if 0 <= token < 1 << 32 else None
        if name is None:
            raise ValueError(f"no token has id {token}")
        if token in self.tokenizer.get_added_tokens_decoder():
            return name.encode()
        return bytes(map(byte_level_alphabet().index, name))


@cache
def byte_level_alphabet() -> str:
    """The 256 characters with which byte-level token names spell the bytes 0 to 255.

    A printable byte stands for itself, the others in their order for U+0100 and up.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (chr(0x100 + index) for index in range(256))
    return "".join(chr(byte) if byte in printable else next(others) for byte in range(256))
