"""Make a checkpoint of upstream nanochat, of any revision, one of ours: to chat with, evaluate and train on.

python -m scripts.import_upstream --path=DIR --stage=sft
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nanochat.configurator import option, run
from nanochat.options import STAGES


@dataclass(frozen=True)
class Config:
    path: str = option(..., "folder on this disk with model_<step>.pt and meta_<step>.json")
    stage: str = option(..., "what the model is", short="i", choices=STAGES)
    model_tag: str | None = option(None, "checkpoint folder to make; default <source>-imported", short="g")
    step: int | None = option(None, "step to import; default the last", short="s")
    tokenizer: str | None = option(None, "the tokenizer.pkl it was trained with; default the one beside it")
    softcap: float | None = option(None, "softcap of the logits; 20 if it was trained Mar 2 to 9 2026")


def main(cfg: Config) -> None:
    """Import an upstream checkpoint; pickles are read by readers that cannot call anything."""
    from nanochat.interop.imported import save_as_checkpoint
    from nanochat.interop.upstream_import import read_upstream

    directory = Path(cfg.path)
    tokenizer = Path(cfg.tokenizer) if cfg.tokenizer else None
    imported, step, meta = read_upstream(directory, cfg.step, tokenizer, cfg.softcap)
    tag = cfg.model_tag or f"{directory.resolve().name}-imported"
    save_as_checkpoint(imported, cfg.stage, tag, step, {"format": "upstream", "path": cfg.path, "meta": meta})


if __name__ == "__main__":
    run(Config, main)
