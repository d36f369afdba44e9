"""Where every import ends: a network in our terms becomes a checkpoint of ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nanochat.checkpoint_manager import list_steps, model_dir, save_checkpoint
from nanochat.common import UserError, print0
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import RustBPETokenizer, Vocabulary


@dataclass(frozen=True)
class Imported:
    """A network in our terms: weights in fp32 under our names, and what is known of its training.

    training: entries of a checkpoint's metadata that later stages take their batch and rates from.
    """

    config: GPTConfig
    state: dict[str, torch.Tensor]
    tokenizer: RustBPETokenizer
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        found, wanted = self.tokenizer.get_vocab_size(), self.config.vocab_size
        if found != wanted:
            raise UserError(
                f"the tokenizer has {found:,} tokens, the model was trained with {wanted:,}: it is another model's"
            )


def usable_tokenizer(vocabulary: Vocabulary) -> RustBPETokenizer:
    """The tokenizer of a foreign vocabulary. Raises UserError if there is none."""
    try:
        return RustBPETokenizer(vocabulary)
    except KeyError as error:
        raise UserError(f"the tokenizer has no token {error}") from None
    except ValueError as error:
        raise UserError(f"the tokenizer cannot be used: {error}") from None


def save_as_checkpoint(imported: Imported, stage: str, tag: str, step: int, origin: dict) -> Path:
    """Write a checkpoint of ours, without optimizer state; origin is recorded in its metadata.

    Raises UserError if the folder already holds checkpoints.
    """
    directory = model_dir(stage, tag)
    if step < 0:
        raise UserError(f"--step={step} must be at least 0")
    if list_steps(directory):
        raise UserError(f"{directory} already holds checkpoints; choose another --model-tag")
    model = GPT.build(imported.config, "cpu", torch.float32)
    model.load_state_dict(imported.state)
    meta = {
        "stage": stage, "user_config": {}, "max_seq_len": imported.config.sequence_len, **imported.training,
        "imported_from": origin,
    }  # fmt: skip
    save_checkpoint(directory, step, model, meta, tokenizer=imported.tokenizer)
    print0(
        f"wrote {directory} step {step}; optimizer state is not imported, training starts with a fresh one"
    )
    return directory
