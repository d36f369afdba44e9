"""Shards, conversations and tokenizers whose tokens can be read off, for the tests of loaders and evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from nanochat.common import World

BOS = 0


def make_world(rank: int = 0, size: int = 1) -> World:
    """A rank on the CPU; collectives work only with size 1."""
    return World(rank, rank, size, torch.device("cpu"))


def write_shard(path: Path, row_groups: Sequence[Sequence[str]]) -> Path:
    """A parquet file with exactly these row groups."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, pa.schema([("text", pa.string())])) as writer:
        for texts in row_groups:
            writer.write_table(pa.table({"text": pa.array(texts, pa.string())}))
    return path


def damage_row_group(path: Path, index: int) -> None:
    """Flip bytes in the pages of a row group; the footer stays as it is."""
    column = pq.ParquetFile(path).metadata.row_group(index).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    content = bytearray(path.read_bytes())
    for position in range(start + column.total_compressed_size // 3, start + column.total_compressed_size):
        content[position] ^= 0xFF
    path.write_bytes(content)


class ByteTokenizer:
    """Token 0 is BOS, token b + 1 is the byte b."""

    def get_bos_token_id(self) -> int:
        return BOS

    def encode(self, texts: str | list[str], prepend: int | None = None) -> list:
        if isinstance(texts, str):
            return ([] if prepend is None else [prepend]) + [byte + 1 for byte in texts.encode()]
        return [self.encode(text, prepend) for text in texts]

    def encode_arrays(self, texts: list[str], prepend: int) -> tuple[np.ndarray, np.ndarray]:
        rows = self.encode(texts, prepend)
        offsets = np.cumsum([0] + [len(row) for row in rows])
        return np.array([token for row in rows for token in row], dtype=np.uint16), offsets

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(token - 1 for token in ids if token != BOS).decode()

    def render_conversation(self, conversation: dict, max_tokens: int = 2048) -> tuple[list[int], list[int]]:
        """User text is masked, assistant text is not."""
        ids, mask = [BOS], [0]
        for message in conversation["messages"]:
            tokens = self.encode(message["content"])
            ids += tokens
            mask += [int(message["role"] == "assistant")] * len(tokens)
        return ids[:max_tokens], mask[:max_tokens]


def documents_of_lengths(lengths: Sequence[int]) -> list[str]:
    """Texts whose tokens, BOS included, have these lengths; each text is made of one letter."""
    return [chr(ord("a") + i % 26) * (length - 1) for i, length in enumerate(lengths)]


def conversation(question: str, answer: str) -> dict:
    """One question and its answer."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
