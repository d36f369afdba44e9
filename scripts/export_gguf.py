"""Write a classic checkpoint as a GGUF file (uv sync --extra gguf).

python -m scripts.export_gguf -i sft --output=model-q8_0.gguf --type=q8_0
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nanochat.configurator import option, run
from nanochat.options import STAGES


@dataclass(frozen=True)
class Config:
    source: str = option(..., "stage of the checkpoint", short="i", choices=STAGES)
    output: str = option(..., "file to make", short="o")
    type: str = option("q8_0", "how weights are stored", short="t", choices=("f32", "f16", "q8_0", "q4_0"))
    model_tag: str | None = option(None, "checkpoint folder; default the largest model", short="g")
    step: int | None = option(None, "step of the checkpoint; default the last", short="s")
    unround_rope: bool = option(
        False, "export a classic upstream import although llama.cpp does not round rotary tables to bfloat16"
    )


def main(cfg: Config) -> None:
    """Export a classic checkpoint to GGUF, for a llama.cpp build that has the architecture nanochat."""
    import torch

    from nanochat.checkpoint_manager import Checkpoint, locate
    from nanochat.common import print0
    from nanochat.interop.gguf_export import export_gguf
    from nanochat.interop.hf_export import exportable_config, with_config

    directory, step = locate(cfg.source, cfg.model_tag, cfg.step)
    checkpoint = Checkpoint.open(directory, step)
    config = exportable_config(checkpoint.config(), cfg.unround_rope)
    model = with_config(checkpoint.model(torch.device("cpu"), torch.float32), config).eval()
    export_gguf(model, checkpoint.tokenizer(), Path(cfg.output), cfg.type)
    print0(f"wrote {cfg.output} from {directory} step {step}")


if __name__ == "__main__":
    run(Config, main)
