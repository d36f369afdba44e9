"""Options that several scripts have, in one wording. Imports nothing heavy, so that --help stays instant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nanochat.common import UserError
from nanochat.configurator import as_dict, option

# When a run saves whatever its flags say; see training_run.
SAVED = "one at the end, one when interrupted, and one before an evaluation after ten minutes without"

# Of text, for bits per byte: what a CPU measures by default, in minutes. GPUs measure what takes a CPU hours.
CPU_TOKENS = 524_288

# What is trained, in order, and the folder of its checkpoints.
STAGE_FOLDERS = {
    "base": "base_checkpoints", "mid": "mid_checkpoints", "sft": "chatsft_checkpoints",
    "dpo": "chatdpo_checkpoints", "rl": "chatrl_checkpoints",
}  # fmt: skip
STAGES = tuple(STAGE_FOLDERS)


@dataclass(frozen=True, kw_only=True)
class WhichModel:
    """Which checkpoint of a stage a script reads, and where the model runs."""

    model_tag: str | None = option(None, "checkpoint folder; default the largest model", short="g")
    step: int | None = option(None, "step of the checkpoint; default the last", short="s")
    device_type: str = option("", "cuda, mps or cpu; default the best there is")


# How matrices may be kept while a model generates; see quantize.py.
QUANTIZE_KINDS = ("none", "int8", "fp8")


@dataclass(frozen=True, kw_only=True)
class WhichWeights(WhichModel):
    """Which checkpoint generates, and with how many bits of it."""

    quantize: str = option(
        "none",
        "matrices in 8 bits: half the memory, and on a processor up to twice the speed; what that costs is printed. "
        "fp8 is as small as int8 and less exact, and needs an NVIDIA GPU of compute capability 8.9 or more",
        choices=QUANTIZE_KINDS,
    )


@dataclass(frozen=True)
class StageConfig:
    """Settings of every stage that goes on from the model of an earlier one: mid-training, SFT, DPO and RL."""

    run: str = option("dummy", "wandb run name, else WANDB_RUN; dummy: no wandb", variable="WANDB_RUN")
    device_type: str = option("", "cuda, mps or cpu; empty: the best there is")
    precision: str = option(
        "auto", "numbers that are multiplied", choices=("auto", "fp32", "bf16", "fp16", "fp8", "mxfp4")
    )
    source: str = option("base", "stage whose model to start from", choices=("base", "mid", "sft"))
    model_tag: str | None = option(None, "checkpoint folder to read; default the largest")
    model_step: int | None = option(None, "step of the source model; default the last")
    output_tag: str | None = option(None, "checkpoint folder to write; default the name of the one read")
    lora_rank: int = option(0, "train adapters of this rank instead of the weights (LoRA); 0: off", least=0)
    lora_alpha: float = option(16.0, "what the adapters add is multiplied by alpha / rank")
    lora_lr: float = option(0.01, "learning rate of the adapters (AdamW)", least=0)
    clip_norm: float = option(0.0, "clip the gradient to this norm; 0: off", least=0)
    save: bool = option(True, "write checkpoints and the report section")
    save_every: int = option(-1, f"steps between checkpoints, besides {SAVED}; -1: only those")
    keep_last: int = option(2, "checkpoints to keep; 0: all", least=0)
    resume: str = option("auto", "auto: continue the run in the folder; never: start over; or a step")

    def __post_init__(self) -> None:
        for name in ("lora_alpha", "lora_lr"):
            if self.lora_rank == 0 and getattr(self, name) != getattr(StageConfig, name):
                raise UserError(
                    f"--{name.replace('_', '-')} changes nothing without --lora-rank, which turns adapters on"
                )

    def plan_settings(self) -> dict[str, Any]:
        """Fields of a RunPlan that are settings, under the same names, and all settings for the record."""
        settings = as_dict(self)
        same = ("run", "clip_norm", "save", "save_every", "keep_last")
        return {
            "settings": settings, "start_over": self.resume == "never", **{name: settings[name] for name in same},
        }  # fmt: skip
