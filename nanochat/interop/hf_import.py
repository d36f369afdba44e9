"""A NanoChat folder, from the hub or the disk, as one of our checkpoints. Only safetensors and JSON are read."""

from __future__ import annotations

from pathlib import Path

import torch

from nanochat.common import UserError, print0, read_json
from nanochat.interop.hf_config import describe, from_hf_config, from_hf_state
from nanochat.interop.hf_tokenizer import read_tokenizer
from nanochat.interop.hub_access import hub_errors
from nanochat.interop.imported import Imported

_WEIGHTS, _INDEX, _SHARD = (
    "model.safetensors",
    "model.safetensors.index.json",
    "model-?????-of-?????.safetensors",
)
_WANTED_FILES = ["config.json", "tokenizer.json", _WEIGHTS, _INDEX, _SHARD]


def fetch(source: str, revision: str | None = None) -> tuple[Path, str | None]:
    """The folder of a model, and its commit if it is of the hub; a path is taken as it is.

    Raises UserError if there is none or it cannot be downloaded.
    """
    if Path(source).is_dir():
        if revision is not None:
            raise UserError(
                f"--revision={revision}: {source} is a folder, only models of the hub have revisions"
            )
        return Path(source), None
    if source.count("/") != 1 or source.startswith((".", "/")):
        raise UserError(f"{source} is neither a folder nor a model of the hub, such as owner/name")
    from huggingface_hub import snapshot_download

    print0(f"downloading {source}")
    with hub_errors(f"cannot download {source}"):
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=_WANTED_FILES))
    return folder, folder.name  # snapshots/<commit>


def read_folder(directory: Path) -> Imported:
    """Read and check a folder. Raises UserError for anything missing, damaged, left over or of another kind."""
    config = from_hf_config(read_json(directory / "config.json"))
    print0(f"{directory}: {describe(config)}")
    tokenizer = read_tokenizer(directory)
    return Imported(config, from_hf_state(_read_weights(directory), config), tokenizer)


def _read_weights(directory: Path) -> dict[str, torch.Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise UserError("the import needs the package safetensors; run: uv sync --extra hf") from None
    state: dict[str, torch.Tensor] = {}
    for name in _weight_files(directory):
        path = directory / name
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError, ValueError) as error:
            raise UserError(f"cannot read {path}: {error}") from None
        if twice := state.keys() & tensors.keys():
            raise UserError(f"{path} repeats {sorted(twice)[0]}")
        state |= tensors
    return state


def _weight_files(directory: Path) -> list[str]:
    index, has_one = directory / _INDEX, (directory / _WEIGHTS).exists()
    if index.exists() and has_one:
        raise UserError(
            f"{directory} holds both {_WEIGHTS} and an index of shards; delete what is not the model"
        )
    if not index.exists():
        if has_one:
            return [_WEIGHTS]
        raise UserError(f"{directory} has no model.safetensors; pickled weights are not read")
    weight_map = read_json(index).get("weight_map")
    names = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
    # an index of a stranger must not make us read outside of its folder
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise UserError(f"{index} does not list files of its own folder")
    return names
