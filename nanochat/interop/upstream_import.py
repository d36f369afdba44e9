"""Files of an upstream checkpoint folder: model_000123.pt, meta_000123.json, and a pickled tokenizer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from nanochat.common import UserError, print0, read_json
from nanochat.interop.hf_config import describe
from nanochat.interop.hf_import import Imported
from nanochat.interop.upstream import migrate
from nanochat.tokenizer import RustBPETokenizer
from nanochat.tokenizer_files import read_tokenizer_pickle


def read_upstream(
    directory: Path, step: int | None, tokenizer_path: Path | None, softcap: float | None
) -> tuple[Imported, int, dict[str, Any]]:
    """An upstream checkpoint in our terms, its step, and its metadata. Prints what was assumed.

    The tokenizer is looked for in the folder, in `tokenizer/` inside it, and in `tokenizer/` of the base folder
    that a checkpoint folder stands in. Raises UserError, one line, for whatever is missing, damaged or foreign.
    """
    step = _last_step(directory) if step is None else step
    meta = read_json(directory / f"meta_{step:06d}.json")
    if not isinstance(meta, dict) or not isinstance(meta.get("model_config"), dict):
        raise UserError(f"{directory / f'meta_{step:06d}.json'} holds no model_config")
    if "files" in meta:
        raise UserError(f"{directory} is a checkpoint of ours; it needs no import")
    vocabulary = read_tokenizer_pickle(tokenizer_path or _find_tokenizer(directory))
    migration = migrate(_read_weights(directory / f"model_{step:06d}.pt"), meta["model_config"], softcap)
    print0(f"{directory} step {step}: {describe(migration.config)}")
    for note in migration.assumptions:
        print0(f"  assumed: {note}")
    try:
        tokenizer = RustBPETokenizer(vocabulary)
    except (KeyError, ValueError) as error:
        raise UserError(f"the tokenizer cannot be used: {error!r}") from None
    if tokenizer.get_vocab_size() != migration.config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.get_vocab_size():,} tokens, the model was trained with"
            f" {migration.config.vocab_size:,}; name the right one with --tokenizer"
        )
    return Imported(migration.config, migration.state, tokenizer), step, meta


def _last_step(directory: Path) -> int:
    names = (re.fullmatch(r"model_(\d+)\.pt", path.name) for path in directory.glob("model_*.pt"))
    steps = [int(match[1]) for match in names if match]
    if not steps:
        raise UserError(f"{directory} holds no model_<step>.pt")
    return max(steps)


def _find_tokenizer(directory: Path) -> Path:
    base = directory.resolve().parent.parent
    places = (directory, directory / "tokenizer", base / "tokenizer")
    found = next((place / "tokenizer.pkl" for place in places if (place / "tokenizer.pkl").is_file()), None)
    if found is None:
        raise UserError(f"no tokenizer.pkl in {', '.join(map(str, places))}; name it with --tokenizer")
    return found


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Tensors by name. torch's restricted reader builds tensors and plain containers and calls nothing else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a broken file
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"cannot read {path}: {reason[0]}") from None
    is_state = isinstance(state, dict) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state.items()
    )
    if not is_state:
        raise UserError(f"{path} is not a state dict: tensors by name")
    return state
