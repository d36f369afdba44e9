"""Tensors that others wrote, under our names: all there, none left over, of the right shapes, exact in fp32."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch

from nanochat.common import UserError
from nanochat.gpt import GPT, GPTConfig

SIZES = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
SIZE_LIMIT = 1 << 20  # beyond any model; a hostile file must not make us allocate or count to a billion
EXACT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # fp32 holds every value of these

_VOCABULARY_TABLES = re.compile(r"transformer\.wte\.weight|lm_head\.weight|value_embeds\.\d+\.weight")


def is_vocabulary_table(name: str) -> bool:
    """Whether a tensor of our state dict has a row for each token."""
    return _VOCABULARY_TABLES.fullmatch(name) is not None


def fp32(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in fp32. Raises UserError where that would change values, or where the tensor is only a view."""
    if tensor.dtype not in EXACT_DTYPES:
        raise UserError(f"{name} is {tensor.dtype}; weights are fp32, bf16 or fp16, which fp32 holds exactly")
    if tensor.layout != torch.strided or not tensor.is_contiguous():
        raise UserError(f"{name} is not stored value by value")
    return tensor.float()


def fitted(
    tensors: Mapping[str, torch.Tensor], config: GPTConfig, their_name: Callable[[str], str] = str
) -> dict[str, torch.Tensor]:
    """Our state dict in fp32; rows that pad the vocabulary, where missing, are zero: no token reaches them.

    their_name: what a tensor of ours is called in `tensors`. Raises UserError, naming them, if tensors are
    missing, left over or of another shape.
    """
    # a file that says a million layers must not make us build them
    if len(tensors) < 6 * config.n_layer + 2:
        raise UserError(f"{len(tensors)} tensors are too few for {config.n_layer} layers")
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in GPT(config).state_dict().items()}
    theirs = {their_name(name): name for name in shapes}
    if missing := sorted(theirs.keys() - tensors.keys()):
        raise UserError(f"the weights lack {_some(missing)}")
    if unknown := sorted(tensors.keys() - theirs.keys()):
        raise UserError(f"the weights hold {_some(unknown)}, which the network does not have")
    result = {}
    for source, name in theirs.items():
        tensor, shape = fp32(source, tensors[source]), shapes[name]
        if is_vocabulary_table(name) and tensor.shape == (config.vocab_size, *shape[1:]):
            tensor = torch.cat([tensor, tensor.new_zeros(shape[0] - tensor.size(0), shape[1])])
        if tensor.shape != shape:
            raise UserError(f"{source} is {tuple(tensor.shape)}, its configuration says {tuple(shape)}")
        result[name] = tensor
    return result


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
