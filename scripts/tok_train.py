"""Train the tokenizer on the pretraining text.

python -m scripts.tok_train --max-chars=2000000000 --vocab-size=32768
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat.common import UserError, data_source, get_base_dir
from nanochat.configurator import as_dict, option, run

if TYPE_CHECKING:
    from nanochat.metrics import StatusLine
    from nanochat.tokenizer import RustBPETokenizer, Vocabulary

MOST_RANKS = 1 << 24  # of the crate
# Lines, numbers of several lengths, contractions, marks, other scripts, an emoji of several code points.
_PROBE = """One line, and a second:
\t7 49 365 1,024 3.14159 20261121
I'll say it's fine; they've said we'd -- "wait!" (really?) {a: [b]} <|bos|>
今天天气很好，我们去公园吧。 Привет! नमस्ते 👩🏽\u200d🚀   end"""


@dataclass(frozen=True)
class Config:
    max_chars: int = option(2_000_000_000, "stop after about this many characters of text")
    doc_cap: int = option(10_000, "use at most this many characters of a document")
    vocab_size: int = option(32_768, "number of tokens, special ones included")


def main(cfg: Config) -> None:
    """Train the tokenizer on the pretraining text and save it in the base folder."""
    from nanochat.dataset import data_sets_in_use, parquets_iter_batched
    from nanochat.tokenizer import SPECIAL_TOKENS, RustBPETokenizer

    check(cfg, smallest_vocab=256 + len(SPECIAL_TOKENS), largest_vocab=MOST_RANKS + len(SPECIAL_TOKENS))
    directory = get_base_dir() / "tokenizer"
    text = "+".join(named.name for named in data_sets_in_use())
    print(
        f"data: {data_source()}, text: {text}   {'   '.join(f'{k}: {v:,}' for k, v in as_dict(cfg).items())}",
        flush=True,
    )

    texts = capped_texts(parquets_iter_batched("train"), cfg.doc_cap, cfg.max_chars)
    started = time.perf_counter()
    with progress() as status:
        tokenizer = RustBPETokenizer.train_from_iterator(texts, cfg.vocab_size)
        train_s = time.perf_counter() - started
        status.note(f"trained {tokenizer.get_vocab_size():,} tokens in {train_s:.2f} s")

    check_round_trip(tokenizer)
    announce_replacement(directory, tokenizer.vocabulary)
    tokenizer.save(directory)
    log_report(cfg, tokenizer, train_s)


def check(cfg: Config, smallest_vocab: int, largest_vocab: int) -> None:
    """Raise a UserError for settings that cannot work, before any text is read."""
    if cfg.vocab_size < smallest_vocab:
        raise UserError(f"--vocab-size={cfg.vocab_size} is too small; the smallest is {smallest_vocab}")
    if cfg.vocab_size > largest_vocab:
        raise UserError(f"--vocab-size={cfg.vocab_size} is too large; the largest is {largest_vocab:,}")
    for name in ("max_chars", "doc_cap"):
        if getattr(cfg, name) < 1:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag}={getattr(cfg, name)} leaves no text to train on; give at least 1")


def capped_texts(batches: Iterable[list[str]], doc_cap: int, max_chars: int) -> Iterator[str]:
    """Documents cut to doc_cap characters, up to the one with which their total first exceeds max_chars."""
    num_chars = 0
    for batch in batches:
        for document in batch:
            text = document[:doc_cap]
            num_chars += len(text)
            yield text
            if num_chars > max_chars:
                return


class _ProgressHandler(logging.Handler):
    def __init__(self, status: StatusLine) -> None:
        super().__init__()
        self._status = status

    def emit(self, record: logging.LogRecord) -> None:
        show = self._status.note if record.levelno >= logging.WARNING else self._status.show
        show(record.getMessage())


@contextmanager
def progress() -> Iterator[StatusLine]:
    """Show what the crate logs while it reads and learns: a status line, and warnings that stay."""
    from nanochat.metrics import StatusLine

    status, logger = StatusLine(), logging.getLogger("rustbpe")
    handler, level = _ProgressHandler(status), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield status
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def check_round_trip(tokenizer: RustBPETokenizer) -> None:
    """Encode and decode a difficult text; a tokenizer that changes it is not worth saving."""
    decoded = tokenizer.decode(tokenizer.encode(_PROBE))
    assert decoded == _PROBE, f"the text came back as {decoded!r}"


def announce_replacement(directory: Path, vocabulary: Vocabulary) -> None:
    """Say which models were trained with another tokenizer, which is about to be replaced."""
    from nanochat.checkpoint_manager import models_with
    from nanochat.tokenizer import CONFIG_FILE, Vocabulary

    if not (directory / CONFIG_FILE).exists():
        return
    with suppress(UserError):  # a damaged one is no loss
        before = Vocabulary.load(directory)
        if before.sha256 != vocabulary.sha256 and (models := models_with(before)):
            print(
                f"this replaces the tokenizer of {', '.join(models)}: these models keep their copies of it, new ones"
                " are trained with the new one (a run in the same folder with --resume=never)"
            )


def log_report(cfg: Config, tokenizer: RustBPETokenizer, train_s: float) -> None:
    """Write the report section: settings, time, and how long the tokens are."""
    from nanochat.report import get_report

    lengths = tokenizer.token_bytes_lengths()
    lengths = lengths[lengths > 0]
    statistics = {
        "train_time": train_s,
        "num_special_tokens": len(tokenizer.get_special_tokens()),
        "token_bytes_min": int(lengths.min()),
        "token_bytes_max": int(lengths.max()),
        "token_bytes_mean": float(lengths.mean()),
        "token_bytes_std": float(lengths.std(ddof=1)),
    }
    get_report().log(section="Tokenizer training", data=[as_dict(cfg), statistics])


if __name__ == "__main__":
    run(Config, main)
