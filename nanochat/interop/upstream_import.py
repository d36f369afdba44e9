"""Files of an upstream checkpoint folder: model_000123.pt, meta_000123.json, and a pickled tokenizer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from nanochat.checkpoint_manager import load_tensors
from nanochat.common import UserError, print0, read_json
from nanochat.interop.hf_config import describe
from nanochat.interop.imported import Imported, usable_tokenizer
from nanochat.interop.upstream import migrate
from nanochat.tokenizer_files import read_tokenizer_pickle

_RATES = ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr")
_BATCH = ("device_batch_size", "total_batch_size", "max_seq_len")


def read_upstream(
    directory: Path, step: int | None, tokenizer_path: Path | None, softcap: float | None
) -> tuple[Imported, int, dict[str, Any]]:
    """An upstream checkpoint in our terms, its step, and its metadata. Prints what was assumed.

    The tokenizer is looked for in the folder, in `tokenizer/` inside it, and in `tokenizer/` of the base folder
    that a checkpoint folder stands in. Raises UserError, one line, for whatever is missing, damaged or foreign.
    """
    step = _last_step(directory) if step is None else step
    meta = read_json(directory / f"meta_{step:06d}.json")
    if not isinstance(meta.get("model_config"), dict):
        raise UserError(f"{directory / f'meta_{step:06d}.json'} holds no model_config")
    if "files" in meta:
        raise UserError(f"{directory} is a checkpoint of ours; it needs no import")
    vocabulary = read_tokenizer_pickle(tokenizer_path or _find_tokenizer(directory))
    migration = migrate(_read_weights(directory / f"model_{step:06d}.pt"), meta["model_config"], softcap)
    print0(f"{directory} step {step}: {describe(migration.config)}")
    for note in migration.assumptions:
        print0(f"  assumed: {note}")
    tokenizer = usable_tokenizer(vocabulary)
    return Imported(migration.config, migration.state, tokenizer, _training(meta)), step, meta


def _training(meta: dict[str, Any]) -> dict[str, Any]:
    """The recorded batch and peak learning rates, which mean the same here; -1 stands for upstream's own rules."""
    settings = meta.get("user_config")
    settings = settings if isinstance(settings, dict) else {}
    batch = {name: meta.get(name, settings.get(name)) for name in _BATCH}
    rates = {name: settings.get(name) for name in _RATES}
    return {
        **{name: value for name, value in batch.items() if type(value) is int and value > 0},
        "user_config": {
            name: value
            for name, value in rates.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1000
        },
    }


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
    state = load_tensors(path, "cpu")
    is_state = isinstance(state, dict) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state.items()
    )
    if not is_state:
        raise UserError(f"{path} is not a state dict: tensors by name")
    return state
