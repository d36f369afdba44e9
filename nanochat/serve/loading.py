"""From a checkpoint on disk to a replica that serves."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from nanochat.checkpoint_manager import find_model_tag, load_model, stage_dir
from nanochat.engine import Engine
from nanochat.serve.settings import ModelInfo, Replica


def load_replica(
    source: str,
    device: torch.device,
    model_tag: str | None,
    step: int | None,
    tools: Mapping[str, Callable[[str], str | None]],
    max_batch: int,
) -> Replica:
    """Load the model of a stage onto a device. Raises UserError if there is none or it is damaged."""
    tag = model_tag or find_model_tag(stage_dir(source))
    model, tokenizer, meta = load_model(source, device, "eval", tag, step)
    found = int(meta["step"])
    info = ModelInfo(
        name=f"nanochat-{source}-{tag}",
        source=source,
        tag=tag,
        step=found,
        created=int((stage_dir(source) / tag / f"meta_{found:06d}.json").stat().st_mtime),
        context_length=model.config.sequence_len,
        device=str(device),
        dtype=str(model.compute_dtype).removeprefix("torch."),
    )
    return Replica(Engine(model, tokenizer, tools=dict(tools), max_batch=max_batch), tokenizer, info)
