"""Write a checkpoint as a Hugging Face folder, verify it, and optionally push it to the hub.

python -m scripts.export_hf -i sft --output=my-model
python -m scripts.export_hf -i sft --output=my-model --push=me/my-model   # also uploads a folder exported before
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nanochat.configurator import option, run
from nanochat.options import STAGES


@dataclass(frozen=True)
class Config:
    source: str = option(..., "stage of the checkpoint", short="i", choices=STAGES)
    output: str = option(
        ..., "folder to make; with --push it may be this checkpoint's earlier export", short="o"
    )
    model_tag: str | None = option(None, "checkpoint folder; default the largest model", short="g")
    step: int | None = option(None, "step of the checkpoint; default the last", short="s")
    unround_rope: bool = option(
        False,
        "export a classic upstream import although transformers does not round rotary tables to bfloat16",
    )
    push: str | None = option(None, "name on the hub (owner/name) to upload the folder to, with your token")
    private: bool = option(True, "make the uploaded model private if it is new")


def main(cfg: Config) -> None:
    """Export a checkpoint to transformers: weights, configuration, tokenizer, chat template, model card."""
    import torch

    from nanochat.checkpoint_manager import Checkpoint, locate
    from nanochat.common import get_base_dir, print0
    from nanochat.interop import hf_export
    from nanochat.interop.hf_config import describe
    from nanochat.interop.model_card import model_card, report_scores
    from nanochat.interop.verification import verify

    if cfg.push is not None:
        hf_export.check_token(cfg.push)
    directory, step = locate(cfg.source, cfg.model_tag, cfg.step)
    checkpoint = Checkpoint.open(directory, step)
    config = hf_export.exportable_config(checkpoint.config(), cfg.unround_rope)
    print0(f"model: {directory} step {step}; {describe(config)}")
    model = hf_export.with_config(checkpoint.model(torch.device("cpu"), torch.float32), config).eval()
    output, tag = Path(cfg.output), directory.name
    if cfg.push is not None and (output / "config.json").exists():  # an upload that failed is repeated
        verify(output, model, checkpoint.tokenizer())
    else:
        scores = report_scores(get_base_dir(), cfg.source, tag, step)
        num_parameters = model.num_scaling_params()["total"]
        card = model_card(f"nanochat {tag}", config, num_parameters, cfg.source, step, scores)
        hf_export.export_folder(model, checkpoint.tokenizer(), output, card, is_chat=cfg.source != "base")
        print0(f"wrote {output}")
    if cfg.push is not None:
        print0(f"pushed: {hf_export.push(output, cfg.push, cfg.private)}")


if __name__ == "__main__":
    run(Config, main)
