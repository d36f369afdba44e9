"""Generate TinyWorld: python -m nanochat.tinyworld --seed=0 --chars=24e6 --out=DIR"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from nanochat.common import get_base_dir, print0
from nanochat.configurator import option, run
from nanochat.tinyworld.sizes import DEFAULT_CHARS


@dataclass(frozen=True)
class Config:
    """Which world, how much of it, and where."""

    seed: int = option(0, "which world; another seed gives other people and towns")
    chars: int = option(DEFAULT_CHARS, "characters of training text")
    out: str = option("", "folder to write to; empty: tinyworld in the base folder")


def main(cfg: Config) -> None:
    """Write the embedded data source: pretraining shards, task rows, words, CORE bundle."""
    from nanochat.tinyworld.writer import generate

    root = Path(cfg.out) if cfg.out else get_base_dir() / "tinyworld"
    start = time.perf_counter()
    record = generate(root, cfg.seed, cfg.chars)
    seconds = time.perf_counter() - start
    print0(f"TinyWorld seed {cfg.seed} below {root} in {seconds:.1f} s")
    for kind in ("text", "rows", "core"):
        totals = record[kind]
        assert isinstance(totals, dict)
        print0(f"{kind}: " + ", ".join(f"{name} {count:,}" for name, count in totals.items()))


if __name__ == "__main__":
    run(Config, main)
