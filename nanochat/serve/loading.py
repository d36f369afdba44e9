"""From a checkpoint on disk to a replica that serves. Runs in the process of the model."""

from __future__ import annotations

from nanochat.common import UserError, print0
from nanochat.serve.settings import ModelInfo, Replica

# Below this many parameters a second thread gains nothing, and while it waits for work it takes the core of the server:
# a sixth fewer tokens for one client, a third for 64 (1.6 million parameters, two cores, LOG 2026-11-26).
_ONE_THREAD_BELOW = 4_000_000


def load_replica(
    index: int,
    *,
    count: int,
    source: str | None,
    device_type: str,
    model_tag: str | None,
    step: int | None,
    python_tool: str,
    max_batch: int,
    quantized: str = "none",
) -> Replica:
    """Load the model of a stage for worker `index` of `count`, on the GPU of that number if there are GPUs.

    Its matrices are quantised or not. Raises UserError if there is no such model or device, or the checkpoint is damaged.
    """
    # here, because the server imports this module too
    import torch

    from nanochat.checkpoint_manager import find_model_tag, latest_stage, load_model, stage_dir
    from nanochat.common import autodetect_device_type, check_device
    from nanochat.engine import Engine
    from nanochat.python_tool import tools_of
    from nanochat.quantize import quantize

    device_type = device_type or autodetect_device_type()
    num_gpus = torch.cuda.device_count() if device_type == "cuda" else 0
    if count > max(1, num_gpus):  # every worker finds it, and any may be the first to say it
        raise UserError(f"--num-gpus={count}, but {num_gpus} GPUs can be used here; lower it")
    device = check_device(device_type, index)
    source = source or latest_stage()
    tag = model_tag or find_model_tag(stage_dir(source))
    model, tokenizer, meta = load_model(source, device, "eval", tag, step)
    if device.type == "cpu" and sum(p.numel() for p in model.parameters()) < _ONE_THREAD_BELOW:
        torch.set_num_threads(1)
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
    return Replica(
        Engine(model, tokenizer, tools=tools_of(python_tool), max_batch=max_batch), tokenizer, info
    )
