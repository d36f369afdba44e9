"""A NanoChat folder, from the hub or the disk, as one of our checkpoints. Only safetensors and JSON are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from nanochat.checkpoint_manager import list_steps, save_checkpoint, stage_dir
from nanochat.common import UserError, print0, read_json
from nanochat.gpt import GPT, GPTConfig
from nanochat.interop.hf_config import describe, from_hf_config, from_hf_state
from nanochat.interop.hf_tokenizer import read_tokenizer
from nanochat.tokenizer import RustBPETokenizer

_WANTED_FILES = ["config.json", "tokenizer.json", "*.safetensors", "model.safetensors.index.json"]


@dataclass(frozen=True)
class Imported:
    """A network in our terms: weights in fp32 under our names."""

    config: GPTConfig
    state: dict[str, torch.Tensor]
    tokenizer: RustBPETokenizer


def fetch(source: str, revision: str | None = None) -> Path:
    """The folder of a model: a path as it is, a name of the hub downloaded. Raises UserError if there is none."""
    if Path(source).is_dir():
        return Path(source)
    if source.count("/") != 1 or source.startswith((".", "/")):
        raise UserError(f"{source} is neither a folder nor a model of the hub, such as owner/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    print0(f"downloading {source}")
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=_WANTED_FILES))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise UserError(f"cannot download {source}: {str(error).strip().splitlines()[0]}") from None


def read_folder(directory: Path) -> Imported:
    """Read and check a folder. Raises UserError for anything missing, damaged, left over or of another kind."""
    config = from_hf_config(read_json(directory / "config.json"))
    print0(f"{directory}: {describe(config)}")
    tokenizer = read_tokenizer(directory)
    if tokenizer.get_vocab_size() != config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.get_vocab_size():,} tokens, the model {config.vocab_size:,}"
        )
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
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        if (directory / "model.safetensors").exists():
            return ["model.safetensors"]
        raise UserError(f"{directory} has no model.safetensors; pickled weights are not read")
    weight_map = read_json(index).get("weight_map")
    names = sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []
    # an index of a stranger must not make us read outside of its folder
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise UserError(f"{index} does not list files of its own folder")
    return names


def save_as_checkpoint(imported: Imported, stage: str, tag: str, step: int, origin: dict) -> Path:
    """Write a checkpoint of ours, without optimizer state; origin is recorded in its metadata.

    Raises UserError if the folder already holds checkpoints.
    """
    directory = stage_dir(stage) / tag
    if list_steps(directory):
        raise UserError(f"{directory} already holds checkpoints; choose another --model-tag")
    model = GPT.build(imported.config, "cpu", torch.float32)
    model.load_state_dict(imported.state)
    # later stages ask the run that made a model for its learning rates; here it is unknown, so they use defaults
    meta = {
        "stage": stage, "user_config": {}, "max_seq_len": imported.config.sequence_len, "imported_from": origin,
    }  # fmt: skip
    save_checkpoint(directory, step, model, meta, tokenizer=imported.tokenizer)
    print0(
        f"wrote {directory} step {step}; optimizer state is not imported, training starts with a fresh one"
    )
    return directory
