"""Text and tokenizer of the training benchmarks: real pretraining shards where they are, else TinyWorld's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nanochat.common import get_base_dir

if TYPE_CHECKING:
    from nanochat.tokenizer import RustBPETokenizer

SHARED_TEXT = Path(__file__).parents[3] / "shared" / "data" / "text"
_TINYWORLD_CHARS = 20_000_000
_TOKENIZER_CHARS = 20_000_000


def bench_dir() -> Path:
    """Where benchmarks keep what they make once."""
    folder = get_base_dir() / "bench_train"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def text_shards(choice: str) -> tuple[Path, str]:
    """Folder of shards and what they hold. choice: "auto", "tinyworld", or a folder of parquet files."""
    if choice not in ("auto", "tinyworld"):
        return Path(choice), choice
    if choice == "auto" and any(SHARED_TEXT.glob("*.parquet")):
        return SHARED_TEXT, "shared pretraining text"
    from nanochat.tinyworld import generate, is_generated

    root = bench_dir() / "tinyworld"
    if not is_generated(root, 0, _TINYWORLD_CHARS):
        generate(root, 0, _TINYWORLD_CHARS)
    return root / "base_data", "TinyWorld"


def tokenizer_for(data_dir: Path, name: str, vocab_size: int) -> Path:
    """Folder of a tokenizer of at most vocab_size tokens, trained on the shards at first use."""
    from nanochat.dataset import parquets_iter_batched
    from nanochat.tokenizer import RustBPETokenizer

    folder = bench_dir() / f"tokenizer-{name.replace('/', '_').replace(' ', '_')}-{vocab_size}"
    if not folder.is_dir():
        texts = (text for batch in parquets_iter_batched("train", data_dir=data_dir) for text in batch)
        RustBPETokenizer.train_from_iterator(_limited(texts, _TOKENIZER_CHARS), vocab_size).save(folder)
    return folder


def load_tokenizer(folder: Path) -> RustBPETokenizer:
    """A tokenizer that tokenizer_for has made."""
    from nanochat.tokenizer import get_tokenizer

    return get_tokenizer(folder)


def _limited(texts, num_chars: int):
    """The first texts, of num_chars characters together."""
    for text in texts:
        if num_chars < 0:
            return
        num_chars -= len(text)
        yield text
