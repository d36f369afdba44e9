"""From a checkpoint on disk to a replica that serves."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from nanochat.checkpoint_manager import find_model_tag, load_model, stage_dir
from nanochat.common import print0
from nanochat.engine import Engine
from nanochat.quantize import quantize
from nanochat.serve.settings import ModelInfo, Replica


def load_replica(
    source: str,
    device: torch.device,
    model_tag: str | None,
    step: int | None,
    tools: Mapping[str, Callable[[str], str | None]],
    max_batch: int,
    quantized: str = "none",
) -> Replica:
    """Load the model of a stage onto a device, its matrices quantised or not. Raises UserError if there is none or it is damaged."""
    tag = model_tag or find_model_tag(stage_dir(source))
    model, tokenizer, meta = load_model(source, device, "eval", tag, step)
    if quantized != "none":
        print0(quantize(model, quantized, tokenizer))
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
