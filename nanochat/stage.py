"""What the training scripts share around the loop: what they say at the start, and what they leave behind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from nanochat.checkpoint_manager import Checkpoint, list_steps, locate, model_dir
from nanochat.common import (
    UserError,
    World,
    data_source,
    device_name,
    peak_memory_bytes,
    print0,
    write_json,
)
from nanochat.compilation import should_compile
from nanochat.flash_attention import describe_backend
from nanochat.gpt import GPT
from nanochat.metrics import Value, duration
from nanochat.options import StageConfig
from nanochat.precision import Precision, choose_precision
from nanochat.report import get_report
from nanochat.trainer import TrainingPlan
from nanochat.training_run import LoopState, find_resume_point


def announce(world: World, compile_flag: str, precision_flag: str = "auto") -> tuple[Precision, bool]:
    """Print on what the run runs and why; returns (what it computes in, compile or not)."""
    device = world.device
    precision = choose_precision(precision_flag, device)
    compiled, why_compiled = should_compile(compile_flag, device)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    print0(f"device: {device_name(device)}{threads} x {world.size} ranks")
    print0(f"attention: {describe_backend(device, precision.dtype)}")
    print0(f"torch.compile: {'on' if compiled else 'off'} ({why_compiled})")
    print0(f"data source: {data_source()}")
    return precision, compiled


def announce_model(model: GPT, precision: Precision) -> None:
    """Print the configuration, what the parameters add up from, and what is multiplied in which numbers."""
    print0(f"model: {model.config}")
    for name, count in model.num_scaling_params().items():
        print0(f"  {name:<22} {count:>16,}")
    print0(f"FLOPs per token: {model.estimate_flops():.3e}")
    print0(f"precision: {precision.apply(model)}")


def announce_batch(total: int, rows: int, seq_len: int, world: World, accumulation: int) -> None:
    """Print the factors of the batch, so that a reader can redo the arithmetic."""
    factors = f"{rows} rows x {seq_len} tokens x {world.size} ranks x {accumulation} accumulation"
    print0(f"batch: {total:,} tokens = {factors}")


def checkpoint_folder(stage: str, model_tag: str) -> Path:
    """Where this run's checkpoints and metrics go."""
    directory = model_dir(stage, model_tag)
    print0(f"checkpoints and metrics.jsonl: {directory}")
    return directory


def output_folder(stage: str, source: Path, output_tag: str | None) -> Path:
    """Where a run goes that starts from the model in `source`. Raises UserError for that folder itself."""
    directory = checkpoint_folder(stage, output_tag or source.name)
    if directory == source:
        raise UserError(f"{source} is both what is read and what is written; name another with --output-tag")
    return directory


@dataclass(frozen=True)
class Beginning:
    """Where a stage that starts from an earlier one reads and writes."""

    source: Checkpoint
    directory: Path
    resume_from: Checkpoint | None

    def weights(self, with_adapters: bool) -> Checkpoint:
        """The checkpoint whose model training goes on with. Adapters come with the optimizer's state."""
        return self.source if with_adapters else self.resume_from or self.source


def begin(stage: str, cfg: StageConfig, world: World) -> Beginning:
    """Find the source model, the folder to write and what lies there to continue; say so."""
    found = Checkpoint.open(*locate(cfg.source, cfg.model_tag, cfg.model_step))
    print0(f"source model: {found.directory} step {found.step}")
    directory = output_folder(stage, found.directory, cfg.output_tag)
    if cfg.save:
        return Beginning(found, directory, find_resume_point(directory, world, cfg.resume))
    if list_steps(directory):
        raise UserError(f"--no-save would replace the metrics of the run in {directory}; use --output-tag")
    return Beginning(found, directory, None)


def data_facts(counts: Mapping[str, int | float]) -> dict[str, Value]:
    """Print what a run has trained on; returns it for the report."""
    for name, value in counts.items():
        print0(f"  Data: {name}: {value:,}" if isinstance(value, int) else f"  Data: {name}: {value:.4f}")
    return {f"Data: {name}": value for name, value in counts.items()}


def finish(
    title: str, plan: TrainingPlan, world: World, model: GPT, state: LoopState, facts: dict[str, Value]
) -> None:
    """Print the outcome, write run_summary.json beside the checkpoint and the section of the report."""
    tokens = plan.schedule.num_steps * plan.total_batch_size
    timed_tokens = state.timed_steps * plan.total_batch_size
    results = {name: value for name, value in state.results.items() if isinstance(value, float)}
    memory = peak_memory_bytes(world.device)
    print0(
        f"{title}: {plan.schedule.num_steps} steps, {tokens:,} tokens in {duration(state.total_training_time)}"
    )
    for name, value in results.items():
        print0(f"  {name}: {value:.4f}")
    if not world.is_main or not plan.save:
        return
    params = model.num_scaling_params()
    summary = {
        "stage": plan.stage,
        "depth": model.config.n_layer,
        "model_dim": model.config.n_embd,
        "num_params": params,
        "num_scaling_params": params["transformer_matrices"] + params["lm_head"],
        "num_iterations": plan.schedule.num_steps,
        "tokens_trained": tokens,
        "total_batch_size": plan.total_batch_size,
        "flops": model.estimate_flops() * tokens,
        "val_bpb": state.results.get("val/bpb"),
        "core_score": state.results.get("core_metric"),
        "train_time_sec": state.total_training_time,
    }
    write_json(plan.directory / "run_summary.json", summary)
    outcome = {
        "Number of parameters": params["total"],
        "FLOPs per token": f"{model.estimate_flops():.3e}",
        "Number of iterations": plan.schedule.num_steps,
        "Number of training tokens": tokens,
        "World size": world.size,
        **facts,
        "Minimum validation bpb": state.min_val_bpb,
        **{f"Final {name}": value for name, value in results.items()},
        "Skipped steps": state.skipped_steps,
        "Total training time": duration(state.total_training_time),
        "Tokens per second": round(timed_tokens / state.total_training_time) if timed_tokens else None,
        "Peak memory": f"{memory / 2**20:,.0f} MiB",
    }
    checkpoint = Checkpoint.open(plan.directory, plan.schedule.num_steps)
    get_report().log(section=title, data=[plan.settings, outcome], model=checkpoint)
