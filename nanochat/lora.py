"""LoRA: train small matrices beside frozen weights. [Hu et al. 2021, arXiv 2106.09685]

A matrix W (O, I) becomes W + (alpha / rank) B A with A (rank, I) and B (O, rank); only A and B learn, and B starts
at zero, so that training starts from the source model. The tables have adapters like the matrices of the blocks: a
base model has never seen the special tokens of a chat. Everyone else sees an ordinary model: its state_dict() is
merged, so checkpoints hold plain weights, which every script loads. What resuming needs besides the source, A and B
themselves, is part of the optimizer's state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat.common import UserError, World, print0
from nanochat.optim import MuonAdamW

if TYPE_CHECKING:
    from nanochat.checkpoint_manager import Checkpoint
    from nanochat.gpt import GPT
    from nanochat.options import StageConfig


Layer = nn.Linear | nn.Embedding


class Adapter(nn.Module):
    """A frozen layer and what is learned beside it. base: Linear or Float8Linear, without bias, or a table."""

    def __init__(self, base: Layer, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), scale
        (outputs, inputs), device = base.weight.shape, base.weight.device
        down = torch.randn(rank, inputs, generator=generator) / inputs**0.5
        self.down = nn.Parameter(down.to(device))
        self.up = nn.Parameter(torch.zeros(outputs, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        down, up = self.down.to(y.dtype), self.up.to(y.dtype)
        if isinstance(self.base, nn.Embedding):
            return y + self.scale * (F.embedding(x, up) @ down)
        return y + self.scale * F.linear(F.linear(x, down), up)

    @property
    def weight(self) -> Tensor:
        """The weight (O, I) that computes the same without the adapter; gradients reach the adapter."""
        return (self.base.weight.float() + self.scale * (self.up @ self.down)).to(self.base.weight.dtype)

    def state_dict(
        self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> Any:
        """That of the merged layer, under its name."""
        destination = {} if destination is None else destination
        destination[f"{prefix}weight"] = self.weight.detach()
        return destination


def add_adapters(model: GPT, rank: int, alpha: float) -> dict[str, Adapter]:
    """Freeze a model and put adapters beside its tables, its head and the matrices of its blocks, in place.

    Returns them by name, once where input table and head are one. Matrices with no more elements than their adapter
    would have stay as they are. Call it after the weights are set, and before compiling. Raises UserError if that
    leaves nothing to train.
    """
    if rank < 1 or alpha <= 0:
        raise UserError(f"--lora-rank={rank} and --lora-alpha={alpha} must be positive")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)  # all ranks draw alike
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, Layer)]
    adapters = {}
    for name, layer in found:
        if rank * sum(layer.weight.shape) < layer.weight.numel():
            adapters[name] = Adapter(layer, rank, alpha / rank, generator)
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, adapters[name])
    if not adapters:
        raise UserError(f"--lora-rank={rank} is as large as the matrices; use a smaller one")
    if model.config.tie_embeddings and "lm_head" in adapters:
        head, table = adapters.pop("lm_head"), adapters["transformer.wte"]
        head.down, head.up = table.down, table.up
    return adapters


def merge_adapters(model: GPT) -> None:
    """Turn a model with adapters into a plain one that computes the same, in place; others stay as they are."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, Adapter)]
    # By weight, because layers may share one.
    merged = {adapter.base.weight: adapter.weight.detach() for _, adapter in found}
    for weight, value in merged.items():
        weight.data = value
    for name, adapter in found:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, adapter.base)


class AdapterOptimizer(MuonAdamW):
    """AdamW on adapters alone. They belong to its state, because the checkpoint's weights are merged."""

    def __init__(self, adapters: dict[str, Adapter], lr: float, world: World, source: str | None) -> None:
        self._tensors = {
            f"{name}.{part}": getattr(adapter, part)
            for name, adapter in adapters.items()
            for part in ("down", "up")
        }
        self._source = source
        settings = {"kind": "adamw", "lr": lr, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.0}
        super().__init__([{**settings, "params": list(self._tensors.values())}], world=world)

    def full_state_dict(self, place: torch.device | str = "cpu") -> dict[str, Any]:
        """With the adapters and the SHA-256 of the weights that they were trained beside."""
        tensors = {name: tensor.detach().to(place, copy=True) for name, tensor in self._tensors.items()}
        return super().full_state_dict(place) | {"adapters": {"source": self._source, "tensors": tensors}}

    def load_full_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over state and adapters. Raises UserError, before anything changes, if they do not fit."""
        saved = state_dict.get("adapters")
        if saved is None:
            raise UserError(
                "the run in the folder trained without LoRA; use --lora-rank=0, or --resume=never"
            )
        if saved["source"] != self._source:
            raise UserError(
                "the adapters in the folder belong to other weights of the source model, which has been trained again;"
                " use --resume=never to start over from it"
            )
        if saved["tensors"].keys() != self._tensors.keys():
            raise UserError(
                "the adapters in the folder are of other layers, as older versions made them; use --resume=never"
            )
        shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        if {name: tuple(tensor.shape) for name, tensor in saved["tensors"].items()} != shapes:
            raise UserError(
                "the run in the folder has adapters of another --lora-rank; use that, or --resume=never"
            )
        super().load_full_state_dict(state_dict)
        with torch.no_grad():
            for name, tensor in self._tensors.items():
                tensor.copy_(saved["tensors"][name])


def train_adapters(
    cfg: StageConfig, model: GPT, source: Checkpoint, world: World, lr_scale: float
) -> AdapterOptimizer:
    """Add adapters to the source's model as the settings say; returns the optimizer that trains them alone."""
    num_frozen = sum(parameter.numel() for parameter in model.parameters())
    adapters = add_adapters(model, cfg.lora_rank, cfg.lora_alpha)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    lr = cfg.lora_lr * lr_scale
    print0(
        f"LoRA: {len(adapters)} adapters of rank {cfg.lora_rank}, {trained:,} parameters learn"
        f" ({100 * trained / num_frozen:.2f}% of the model's), learning rate {lr:.2e}"
    )
    file = source.meta.get("files", {}).get(f"model_{source.step:06d}.pt", {})
    return AdapterOptimizer(adapters, lr, world, file.get("sha256"))
