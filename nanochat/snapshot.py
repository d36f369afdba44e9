"""Copies of weights and state that are written while training goes on: what it stands still for is one copy.

From a GPU to the host that takes seconds for a large model (4.8 s for depth 20, LOG 2026-11-26), within the GPU
milliseconds. So where the GPU has room a copy stays there, and the thread that writes the files fetches it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_SPARE = 2**30  # bytes that stay free for what training may allocate on top
_SIZES = 3  # weights and two moments are at most so many times the weights


def place_for(model: nn.Module) -> torch.device:
    """Where a copy of a model and of its optimizer's state should go."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        # Only what nobody has reserved: training needs again what it has let go of.
        free, _ = torch.cuda.mem_get_info(device)
        if free > _SPARE + _SIZES * sum(parameter.nbytes for parameter in model.parameters()):
            return device
    return torch.device("cpu")


def weights_copy(model: nn.Module, place: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The weights as they are now, which training on does not change."""
    return {name: tensor.detach().to(place, copy=True) for name, tensor in model.state_dict().items()}


class Snapshot:
    """A tree of copies at `place`, made by what the GPU has been told so far; fetched by another thread."""

    def __init__(self, tree: Any, place: torch.device) -> None:
        self._tree, self._place = tree, place
        self._made = torch.cuda.current_stream(place).record_event() if place.type == "cuda" else None

    def on_host(self) -> Any:
        """The tree with all tensors on the host. Does not hold up the GPU, and lets go of its copy."""
        tree, self._tree = self._tree, None
        if self._made is None:
            return tree
        with torch.cuda.stream(torch.cuda.Stream(self._place)):
            torch.cuda.current_stream(self._place).wait_event(self._made)
            return _on_host(tree)


def _on_host(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _on_host(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_on_host(value) for value in tree)
    return tree.cpu() if isinstance(tree, Tensor) else tree
