"""Speed of the pretraining loader alone, and what packing drops: `python -m dev.bench.loader`.

Batches are taken as fast as they come: reading, encoding with the crate, packing and the hand-over between threads
all count. Beside it stands how much faster that is than the training step on the same machine (--step=false leaves that
out). Processor time is there for machines that are busy with other things.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from dev.bench.corpus import load_tokenizer, text_shards, tokenizer_for
from nanochat.common import print0
from nanochat.configurator import as_dict, option, run

# Tokens per row, vocabulary, rows: the small shape of dev.bench.train, and the flagship's.
CASES = {"small": (512, 4096, 8), "flagship": (2048, 32768, 16)}


@dataclass(frozen=True)
class Config:
    repeats: int = option(3, "measurements of each case; the median counts")
    tokens: int = option(8_000_000, "tokens of a measurement")
    cases: str = option("small,flagship", "rows of 512 tokens (small) or 2,048 (flagship), by commas")
    packing: str = option("bestfit", "how rows are packed", choices=("bestfit", "stream"))
    step: bool = option(True, "measure the training step of the small shape, too")
    data: str = option("auto", "auto, tinyworld, or a folder of shards")


def main(cfg: Config) -> None:
    """Measure the loader of pretraining alone."""
    import torch

    data_dir, source = text_shards(cfg.data)
    threads = torch.get_num_threads()
    print0(f"{platform.processor() or platform.machine()}, {threads} threads, {source}")
    names = cfg.cases.split(",")
    tokenizers = {name: tokenizer_for(data_dir, source, CASES[name][1]) for name in names}
    runs: dict[str, list[dict]] = {name: [] for name in names}
    for _ in range(cfg.repeats):
        for name in names:
            runs[name].append(measure(name, tokenizers[name], data_dir, cfg))
    table = {
        name: {key: statistics.median(r[key] for r in results) for key in results[0]}
        for name, results in runs.items()
    }
    for name, row in table.items():
        print(
            f"{name:9} {row['tokens_per_second']:12,.0f} tok/s, {row['tokens_per_cpu_second']:12,.0f} per CPU second; "
            f"packing drops {100 * row['dropped']:.1f} %"
        )
    ratios = step_ratios(table, data_dir, tokenizers, cfg) if cfg.step and "small" in table else {}
    print(json.dumps(as_dict(cfg) | {"source": source, "threads": threads, "cases": table} | ratios))


def measure(name: str, tokenizer: Path, data_dir: Path, cfg: Config) -> dict[str, float]:
    """Tokens per second after the buffer is full, and the share of tokens that packing dropped."""
    import torch

    from nanochat.common import World
    from nanochat.dataloader import PretrainLoader

    length, _, rows = CASES[name]
    loader = PretrainLoader(
        load_tokenizer(tokenizer), rows, length, "train", World(0, 0, 1, torch.device("cpu")),
        packing=cfg.packing, data_dir=data_dir,
    )  # fmt: skip
    next(loader)
    batches = max(cfg.tokens // (rows * length), 1)
    started, cpu_started = time.perf_counter(), time.process_time()
    for _ in range(batches):
        next(loader)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    dropped = loader.stats()["fraction_dropped"]
    loader.close()
    tokens = batches * rows * length
    return {
        "tokens_per_second": tokens / seconds,
        "tokens_per_cpu_second": tokens / cpu_seconds,
        "dropped": dropped,
    }


def step_ratios(table: dict[str, dict], data_dir: Path, tokenizers: dict[str, Path], cfg: Config) -> dict:
    """How many times faster the loader is than our training step, in time and in processor time."""
    from dev.bench import train

    settings = train.Config(device_type="cpu", steps=5, phase_steps=1)
    job = train.job_of(settings, "small", "cpu", data_dir, tokenizers["small"])
    result = train.child(job | {"contender": "modern"}, 1, settings)
    if result is None:
        return {}
    length, _, rows = CASES["small"]
    per_second, per_cpu_second = (
        rows * length / statistics.median(result[kind]) for kind in ("seconds", "cpu_seconds")
    )
    ratio = table["small"]["tokens_per_second"] / per_second
    cpu_ratio = table["small"]["tokens_per_cpu_second"] / per_cpu_second
    print(f"{ratio:.0f} times the step's {per_second:,.0f} tok/s, {cpu_ratio:.0f} times in CPU time")
    return {"step_tokens_per_second": per_second, "ratio_to_step": ratio, "ratio_to_step_cpu_time": cpu_ratio}


if __name__ == "__main__":
    run(Config, main)
