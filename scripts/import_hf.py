"""Make a NanoChat folder of the hub or the disk one of our checkpoints, to chat with, evaluate and train on.

python -m scripts.import_hf --path=owner/name --stage=sft
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nanochat.configurator import option, run
from nanochat.options import STAGES


@dataclass(frozen=True)
class Config:
    path: str = option(..., "folder, or name on the hub (owner/name)")
    stage: str = option(..., "what the model is", short="i", choices=STAGES)
    model_tag: str | None = option(
        None, "checkpoint folder to make; default the name of the source", short="g"
    )
    step: int = option(0, "step to store it under", short="s")
    revision: str | None = option(None, "branch, tag or commit on the hub; default its main branch")


def main(cfg: Config) -> None:
    """Import a NanoChat model, classic or exported by us, from safetensors and JSON."""
    from nanochat.interop.hf_import import fetch, read_folder
    from nanochat.interop.imported import save_as_checkpoint

    folder, commit = fetch(cfg.path, cfg.revision)
    tag = cfg.model_tag or Path(cfg.path).resolve().name
    origin = {"format": "hugging face", "path": cfg.path, "revision": cfg.revision, "commit": commit}
    save_as_checkpoint(read_folder(folder), cfg.stage, tag, cfg.step, origin)


if __name__ == "__main__":
    run(Config, main)
