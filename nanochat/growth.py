"""More layers on top of a trained model, and layers that rest. [LLaMA Pro, Wu et al. 2024, arXiv 2401.02415]

The projections of the new blocks start at zero, so the deeper network begins where the source model ended. While the
layers of the source rest, what they know cannot be overwritten; a later stage trains everything.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from nanochat.common import UserError
from nanochat.gpt import GPT, GPTConfig


def deeper(config: GPTConfig, add_layers: int) -> GPTConfig:
    """The configuration with more layers. Raises UserError where the old layers would not stay what they are."""
    if add_layers < 1:
        raise UserError(f"--add-layers={add_layers} must be positive")
    if config.use_value_embeds and add_layers % 2:
        raise UserError(
            f"--add-layers={add_layers} must be even: every second layer has a value embedding, counted from the last"
        )
    return replace(config, n_layer=config.n_layer + add_layers)


@torch.no_grad()
def grow(model: GPT, add_layers: int) -> GPT:
    """A deeper network with the weights of `model` and, above them, new blocks that do not change anything yet.

    With residual scalars two things differ: the new blocks get a little of the token embedding, as last layers
    do, and the backout, whose middle layer is another one now, starts at zero.
    """
    config = deeper(model.config, add_layers)
    grown = GPT.build(config, model.get_device(), model.compute_dtype)
    grown.init_weights()
    grown.load_state_dict({**grown.state_dict(), **_lengthened(model, grown)})
    return grown


def _lengthened(model: GPT, grown: GPT) -> dict[str, torch.Tensor]:
    """The weights of a model, with the scalars that grown layers need."""
    state, old = model.state_dict(), model.config.n_layer
    if model.config.use_lambdas:
        for name, value in (("resid_lambdas", 1.0), ("x0_lambdas", 0.05)):
            longer = torch.full_like(grown.get_parameter(name), value)
            longer[:old] = state[name]
            state[name] = longer
    if model.config.use_backout:
        state["backout_lambda"] = torch.zeros_like(state["backout_lambda"])
    return state


def freeze(model: GPT, layers: int) -> None:
    """Let only the blocks above the lowest `layers` learn, with their value embeddings and all residual scalars.

    Raises UserError if that leaves no block.
    """
    if not 0 < layers < model.config.n_layer:
        raise UserError(
            f"--freeze-layers={layers} must leave some of the {model.config.n_layer} layers to train"
        )
    model.requires_grad_(False)
    for layer in range(layers, model.config.n_layer):
        model.blocks[layer].requires_grad_(True)
        if model.config.has_value_embed(layer):
            model.value_embeds[str(layer)].requires_grad_(True)
    if model.config.use_lambdas:
        model.resid_lambdas.requires_grad_(True)
        model.x0_lambdas.requires_grad_(True)
    if model.config.use_backout:
        model.backout_lambda.requires_grad_(True)
