"""Training speed against Hugging Face's NanoChat model with AdamW: `python -m dev.bench.train`.

On a processor the small shape is trained as a user would by default (Hugging Face: fp32, eager); on a GPU d12 and
d20 with 2,048 tokens (Hugging Face: bf16, compiled, fused AdamW), ours also in fp8 where the GPU has it. Every
measurement runs in a process of its own; the contenders take turns, medians count, and processor time is there for busy machines. Data is real where it is at hand.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from dev.bench.corpus import text_shards, tokenizer_for
from dev.bench.train_child import PHASES, Shape
from nanochat.common import UserError, autodetect_device_type, device_name, peak_flops, print0
from nanochat.configurator import as_dict, option, run

ROOT = Path(__file__).parents[2]
SHAPES = {
    "small": Shape(4, 256, 4, 512, 4096, 8),
    "d12": Shape(12, 768, 6, 2048, 32768, 32),
    "d20": Shape(20, 1280, 10, 2048, 32768, 16),
}


@dataclass(frozen=True)
class Config:
    device_type: str = option("", "cuda or cpu; empty: the best there is")
    shapes: str = option(
        "", "small, d12, d20 or LAYERSxWIDTHxHEADSxTOKENSxVOCABxROWS, by commas; default by device"
    )
    contenders: str = option(
        "", "of modern, classic (each also with -fp8, -bf16 ...) and hf; default by device"
    )
    repeats: int = option(3, "processes of each contender and shape; the median counts")
    steps: int = option(10, "timed steps of a process")
    warmup: int = option(3, "steps before, which compile")
    phase_steps: int = option(4, "further steps in which the phases are timed")
    micro_batches: int = option(
        0, "micro-batches of a step; 0: 8 on a GPU, as in a run of 524,288 tokens a step, else 1"
    )
    ranks: int = option(1, "ranks of ours; hf has one")
    compile: str = option("auto", "compile our step", choices=("auto", "on", "off"))
    data: str = option("auto", "auto, tinyworld, or a folder of shards")
    timeout: int = option(900, "seconds that a process may take")


@dataclass(frozen=True)
class Row:
    """Medians of one contender on one shape."""

    contender: str
    shape: str
    tokens_per_second: float
    milliseconds: float
    cpu_milliseconds: float  # processor time, which a busy machine changes less
    tflops: float
    product_tflops: float  # of a plain product as large as the network's largest, in the same processes
    mfu: float | None  # of the device's peak in bf16; None where that is unknown
    peak_mb: float
    phases: dict[str, float]  # shares of the sum of the phases
    loss: float
    how: str


def main(cfg: Config) -> None:
    """Compare the speed of training steps with Hugging Face's NanoChat."""
    import torch

    device = cfg.device_type or autodetect_device_type()
    names = (cfg.shapes or ("d12,d20" if device == "cuda" else "small")).split(",")
    shapes = {name: parse_shape(name) for name in names}
    contenders = (cfg.contenders or default_contenders(device)).split(",")
    data_dir, source = text_shards(cfg.data)
    hardware = device_name(torch.device(device)) if device == "cuda" else platform.processor()
    threads = torch.get_num_threads()
    print0(f"{hardware or platform.machine()}, {threads} threads, torch {torch.__version__}, {source}")
    table = []
    for name, shape in shapes.items():
        tokenizer = tokenizer_for(data_dir, source, shape.vocab_size)
        job = job_of(cfg, name, device, data_dir, tokenizer)
        results: dict[str, list[dict]] = {contender: [] for contender in contenders}
        for _ in range(cfg.repeats):
            for contender in contenders:
                result = child(job | {"contender": contender}, 1 if contender == "hf" else cfg.ranks, cfg)
                if result:
                    results[contender].append(result)
        rows = [summary(c, name, shape, runs, cfg, hardware) for c, runs in results.items() if runs]
        table += rows
        report(rows)
    ratios = {
        f"{row.contender} {row.shape}": {
            "time": peer.milliseconds / row.milliseconds,
            "cpu_time": peer.cpu_milliseconds / row.cpu_milliseconds,
        }
        for row in table
        for peer in table
        if peer.contender == "hf" and peer.shape == row.shape and row is not peer
    }
    print(
        json.dumps(
            as_dict(cfg)
            | {"hardware": hardware, "threads": threads, "torch": torch.__version__, "source": source}
            | {"rows": [asdict(row) for row in table], "ratio_to_hf": ratios}
        )
    )


def job_of(cfg: Config, name: str, device: str, data_dir: Path, tokenizer: Path) -> dict:
    """What a process of the benchmark is told, but for the contender."""
    micro_batches = cfg.micro_batches or (8 if device == "cuda" else 1)
    return {
        "shape": parse_shape(name)._asdict(), "device": device, "micro_batches": micro_batches, "compile": cfg.compile, "warmup": cfg.warmup,
        "steps": cfg.steps, "phase_steps": cfg.phase_steps, "data_dir": str(data_dir), "tokenizer": str(tokenizer),
    }  # fmt: skip


def parse_shape(name: str) -> Shape:
    if name in SHAPES:
        return SHAPES[name]
    try:
        return Shape(*map(int, name.split("x")))
    except (ValueError, TypeError):
        raise UserError(
            f"--shapes={name} is neither {', '.join(SHAPES)} nor six numbers with x between"
        ) from None


def default_contenders(device: str) -> str:
    from nanochat.common import check_device
    from nanochat.fp8 import supports_fp8

    has_fp8, _ = supports_fp8(check_device(device))
    return "modern,modern-fp8,hf" if has_fp8 else "modern,classic,hf"


def child(job: dict, ranks: int, cfg: Config) -> dict | None:
    """What the process printed last; None if it failed, which is said (a shape may not fit one contender)."""
    launch = (
        [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    )
    command = [sys.executable, *launch, "-m", "dev.bench.train_child", json.dumps(job)]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=cfg.timeout, env=os.environ
        )
    except subprocess.TimeoutExpired:
        print0(f"  {job['contender']:12} took longer than {cfg.timeout} s")
        return None
    if done.returncode:
        print0(f"  {job['contender']:12} failed: {done.stderr.strip().splitlines()[-1:]}")
        return None
    result = json.loads(done.stdout.splitlines()[-1])
    print0(f"  {job['contender']:12} {1e3 * statistics.median(result['seconds']):8.1f} ms a step")
    return result


def summary(contender: str, name: str, shape: Shape, runs: list[dict], cfg: Config, hardware: str) -> Row:
    ranks = 1 if contender == "hf" else cfg.ranks
    seconds, cpu_seconds = (
        statistics.median(statistics.median(result[kind]) for result in runs)
        for kind in ("seconds", "cpu_seconds")
    )
    speed = ranks * runs[0]["tokens"] / seconds
    flops, peak = runs[0]["flops_per_token"] * speed, peak_flops(hardware)
    phases = {phase: statistics.median(result["phases"][phase] for result in runs) for phase in PHASES}
    total = sum(phases.values())
    return Row(
        contender, name, speed, 1e3 * seconds, 1e3 * cpu_seconds, flops / 1e12,
        statistics.median(result["product_flops"] for result in runs) / 1e12, flops / (peak * ranks) if peak else None,
        statistics.median(result["peak_bytes"] for result in runs) / 1e6,
        {phase: value / total for phase, value in phases.items()}, runs[-1]["loss"], runs[0]["how"],
    )  # fmt: skip


def report(rows: list[Row]) -> None:
    peer = next((row for row in rows if row.contender == "hf"), None)
    for row in rows:
        ratio = ""
        if peer:
            by_cpu = peer.cpu_milliseconds / row.cpu_milliseconds
            ratio = f"{row.tokens_per_second / peer.tokens_per_second:5.2f}x hf ({by_cpu:.2f}x in CPU time)"
        mfu = f"MFU {100 * row.mfu:4.1f} %" if row.mfu is not None else f"{1e3 * row.tflops:,.0f} GFLOP/s"
        mfu += f" ({100 * row.tflops / row.product_tflops:.0f} % of a plain product)"
        shares = ", ".join(f"{phase} {100 * share:.1f} %" for phase, share in row.phases.items())
        print(
            f"{row.shape} {row.contender:12} {row.tokens_per_second:11,.0f} tok/s  {ratio}  {mfu}  {row.peak_mb:,.0f} MB"
        )
        print(f"    {shares}\n    {row.how}")


if __name__ == "__main__":
    run(Config, main)
