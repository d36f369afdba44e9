"""A checkpoint as a Hugging Face folder, which appears only after it was loaded and compared with the original."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nanochat.common import UserError, print0, usual_mode, whole_file, write_json
from nanochat.gpt import GPT, GPTConfig
from nanochat.interop import hf_config
from nanochat.interop.hf_tokenizer import BOS, END_OF_ANSWER, write_tokenizer
from nanochat.interop.hub_access import hub_errors
from nanochat.interop.verification import transformers_package, verify
from nanochat.tokenizer import RustBPETokenizer

SHARD_BYTES = 5_000_000_000
CHAT_SAMPLING = {"do_sample": True, "temperature": 0.6, "top_k": 50}  # as in scripts.chat_cli


def export_folder(
    model: GPT,
    tokenizer: RustBPETokenizer,
    directory: Path,
    card: str,
    *,
    is_chat: bool,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write model (fp32, on the CPU), tokenizer and card into a new folder, and verify what was written.

    Raises UserError, leaving nothing behind, if the folder exists, something has no counterpart in
    transformers, or the folder computes something else than the model.
    """
    transformers_package()  # before gigabytes are written that could not be verified
    directory = directory.resolve()
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise UserError(f"{directory} is not an empty folder; an export makes a new one")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as scratch:
            part = Path(scratch) / directory.name  # unlike its parent readable by others
            part.mkdir()
            _write(model, tokenizer, part, card, is_chat, shard_bytes)
            verify(part, model, tokenizer)
            if directory.exists():
                directory.rmdir()
            os.replace(part, directory)
    except OSError as error:  # of the system: what transformers raises, verify reports
        raise UserError(f"cannot write {directory}: {error.strerror or error}") from error


def exportable_config(config: GPTConfig, unround_rope: bool) -> GPTConfig:
    """The configuration to export. Raises UserError if a classic one asks for what transformers lacks."""
    unrounded = hf_config.without_rounded_rope(config)
    if hf_config.is_classic(config) or not hf_config.is_classic(unrounded):
        return config
    if not unround_rope:
        raise UserError(
            "this checkpoint rounds its rotary tables to bfloat16, transformers' NanoChat does not, and logits in"
            " fp32 would differ in the third decimal; --unround-rope exports it with tables in the model's dtype"
        )
    return unrounded


def with_config(model: GPT, config: GPTConfig) -> GPT:
    """The model under a configuration that differs in its rotary tables only; weights are shared."""
    assert replace(model.config, rope_dtype=config.rope_dtype) == config
    model.config = config
    model.init_rotary()
    return model


def _write(
    model: GPT, tokenizer: RustBPETokenizer, part: Path, card: str, is_chat: bool, shard_bytes: int
) -> None:
    config = model.config
    state = hf_config.to_hf_state(model.state_dict(), config)
    write_shards(state, part, shard_bytes)
    bos, end = tokenizer.encode_special(BOS), tokenizer.encode_special(END_OF_ANSWER)
    content = hf_config.to_hf_config(config)
    # no padding id: as an embedding's padding_idx it would keep that token from being finetuned
    tokens = {"bos_token_id": bos, "eos_token_id": [end, bos], "pad_token_id": None}
    write_json(part / "config.json", content | tokens)
    generation = tokens | {"pad_token_id": bos} | (CHAT_SAMPLING if is_chat else {})
    write_json(part / "generation_config.json", generation)
    write_tokenizer(tokenizer, part, config.sequence_len)
    if not hf_config.is_classic(config):
        source = Path(__file__).with_name(f"{hf_config.REMOTE_MODULE}.py")
        shutil.copyfile(source, part / source.name)
    with whole_file(part / "README.md", "w") as file:
        file.write(card)


def write_shards(state: dict[str, torch.Tensor], directory: Path, shard_bytes: int) -> None:
    """Write tensors as safetensors: one file, or several of at most shard_bytes and an index of them."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError:
        raise UserError("the export needs the package safetensors; run: uv sync --extra hf") from None

    def save(shard: dict[str, torch.Tensor], name: str) -> None:
        try:
            save_file(shard, directory / name, {"format": "pt"})  # transformers refuses files without it
        except SafetensorError as error:
            raise UserError(f"cannot write {name}: {error}") from None
        os.chmod(directory / name, usual_mode())  # safetensors 0.8 leaves it to its owner alone

    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in state.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        save(shards[0], "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save(shard, file_name)
        weight_map |= dict.fromkeys(shard, file_name)
    total = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(directory / "model.safetensors.index.json", index)


# --- to the hub --------------------------------------------------------------------------------------

_UPLOADED = [
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja", "README.md", "model*.safetensors", "model.safetensors.index.json",
    f"{hf_config.REMOTE_MODULE}.py",
]  # fmt: skip
# Whatever a loader could read instead of the new files, such as shards of an earlier model or pickled weights.
_REPLACED = ["*.safetensors", "*.bin", "*.json", "*.jinja", "*.py", "*.model", "merges.txt", "vocab.txt"]


def check_token(repo: str) -> None:
    """Raise a UserError, before a long export, if the hub cannot be reached or does not know the user."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    with hub_errors(f"cannot push to {repo}"):
        validate_repo_id(repo)
        HfApi().whoami()


def push(directory: Path, repo: str, private: bool) -> str:
    """Upload an exported folder to the hub with the user's token; returns its address.

    Files of an earlier model are deleted there. Raises UserError if refused.
    """
    from huggingface_hub import HfApi

    api: Any = HfApi()
    with hub_errors(f"cannot push to {repo}"):
        created = api.create_repo(repo, private=private, exist_ok=True)
        print0(f"uploading {directory} to {created}")
        api.upload_folder(
            repo_id=created.repo_id, folder_path=directory, commit_message="Upload from nanochat",
            allow_patterns=_UPLOADED, delete_patterns=_REPLACED,
        )  # fmt: skip
    return str(created)
