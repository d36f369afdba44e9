"""Bring a tokenizer in from another program's file, or write ours for another program.

python -m scripts.tok_convert --from-pickle=tokenizer.pkl     (upstream's file becomes our tokenizer)
python -m scripts.tok_convert --to-json=tokenizer.json        (ours, for the library `tokenizers`)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nanochat.common import UserError, get_base_dir
from nanochat.configurator import option, run


@dataclass(frozen=True)
class Config:
    from_pickle: str = option("", "upstream's tokenizer.pkl; none of its code is run")
    from_json: str = option("", "a tokenizer.json of a byte-level BPE")
    to_json: str = option("", "write this tokenizer.json")
    tokenizer_dir: str = option("", "our tokenizer's folder, default tokenizer in the base folder")
    overwrite: bool = option(False, "replace the tokenizer that is in the folder")


def main(cfg: Config) -> None:
    """Convert between our tokenizer and tokenizer.pkl (in) or tokenizer.json (in and out)."""
    if sum(map(bool, (cfg.from_pickle, cfg.from_json, cfg.to_json))) != 1:
        raise UserError("give exactly one of --from-pickle, --from-json and --to-json")
    if cfg.to_json:
        export(cfg)
    else:
        bring_in(cfg)


def export(cfg: Config) -> None:
    """Write our tokenizer as tokenizer.json."""
    from nanochat.tokenizer import get_tokenizer
    from nanochat.tokenizer_files import write_tokenizer_json

    tokenizer = get_tokenizer(cfg.tokenizer_dir or None)
    write_tokenizer_json(tokenizer.vocabulary, cfg.to_json)
    print(f"wrote {tokenizer.get_vocab_size():,} tokens to {cfg.to_json}")


def bring_in(cfg: Config) -> None:
    """Save the vocabulary of a foreign file as our tokenizer."""
    from nanochat.tokenizer import CONFIG_FILE, RustBPETokenizer
    from nanochat.tokenizer_files import read_tokenizer_json, read_tokenizer_pickle

    directory = Path(cfg.tokenizer_dir or get_base_dir() / "tokenizer")
    if (directory / CONFIG_FILE).exists() and not cfg.overwrite:
        raise UserError(f"{directory} has a tokenizer, and models need theirs; --overwrite replaces it")
    vocabulary = (
        read_tokenizer_pickle(cfg.from_pickle) if cfg.from_pickle else read_tokenizer_json(cfg.from_json)
    )
    if "<|bos|>" not in vocabulary.special_tokens:
        raise UserError(f"{cfg.from_pickle or cfg.from_json} has no special token <|bos|>")
    tokenizer = RustBPETokenizer(vocabulary)
    tokenizer.save(directory)
    print(f"{tokenizer.get_vocab_size():,} tokens, {len(vocabulary.special_tokens)} of them special")


if __name__ == "__main__":
    run(Config, main)
