"""Bits per byte and samples of a base model: `scripts.base_eval` without CORE.

python -m scripts.base_loss --device-batch-size=16
"""

from __future__ import annotations

from dataclasses import dataclass

from nanochat.configurator import option, run
from nanochat.options import CPU_TOKENS
from scripts import base_eval

TOKENS = 20 * 524288  # of a split


@dataclass(frozen=True)
class Config:
    device_batch_size: int = option(32, "rows per forward pass and rank", least=1)
    split_tokens: int | None = option(
        None, f"tokens per split; auto: {TOKENS:,}, on a CPU {CPU_TOKENS:,}", none="auto", least=1
    )
    model_tag: str | None = option(None, "checkpoint folder; default the largest model")
    model_step: int | None = option(None, "step of the checkpoint; default the last")
    device_type: str = option("", "cuda, mps or cpu; default the best there is")


def main(cfg: Config) -> None:
    """Measure the bits per byte of a base model on the training and validation text, and print samples."""
    settings = base_eval.Config(
        eval="bpb,sample",
        model_tag=cfg.model_tag,
        step=cfg.model_step,
        device_batch_size=cfg.device_batch_size,
        split_tokens=cfg.split_tokens,
        device_type=cfg.device_type,
    )
    base_eval.evaluate(settings, "Base model loss", usual_tokens=TOKENS)


if __name__ == "__main__":
    run(Config, main)
