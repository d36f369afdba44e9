"""One contender of dev.bench.train in a process of its own: trains a few steps, prints what they took as JSON.

Both contenders take the same rows from the same loader, as many micro-batches to a step, and wait for the loss after
every step, as the training loop does. Phases are timed in further steps, because that needs a synchronisation after each.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nanochat.common import distributed, peak_memory_bytes, synchronize

if TYPE_CHECKING:
    import torch

    from nanochat.common import World
    from nanochat.dataloader import PretrainLoader

PHASES = ("data", "forward", "backward", "optimizer", "communication")


class Shape(NamedTuple):
    """Layers, width, heads, tokens per row, vocabulary, rows per micro-batch."""

    layers: int
    width: int
    heads: int
    length: int
    vocab_size: int
    rows: int


@dataclass
class Clock:
    """Seconds of each phase; does nothing, synchronisation included, unless it is on."""

    device: torch.device
    on: bool = False
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if not self.on:
            yield
            return
        started, before = time.perf_counter(), self.seconds["communication"]
        yield
        synchronize(self.device)
        # Communication inside another phase is not that phase's time.
        inside = self.seconds["communication"] - before if name != "communication" else 0.0
        self.seconds[name] += time.perf_counter() - started - inside


def main() -> None:
    import torch

    job = json.loads(sys.argv[1])
    shape = Shape(**job["shape"])
    if job["contender"] == "hf":  # as a user would: nothing of ours around it
        world = single(torch.device(job["device"]))
        torch.manual_seed(42)
        print(json.dumps(measure(hugging_face(shape, world, job), shape, world, job)))
        return
    with distributed(job["device"]) as world:
        result = measure(ours(job["contender"], shape, world, job), shape, world, job)
    if world.is_main:
        print(json.dumps(result))


def single(device: torch.device) -> World:
    from nanochat.common import World

    return World(0, 0, 1, device)


# --- the contenders ----------------------------------------------------------------------------------

Step = Callable[["PretrainLoader", Clock], float]


def ours(contender: str, shape: Shape, world: World, job: dict[str, Any]) -> tuple[Step, float, str]:
    """The step of nanochat.trainer with the settings of base_train, FLOPs per token, and what it runs on."""
    import torch

    from nanochat import sharding
    from nanochat.compilation import should_compile
    from nanochat.flash_attention import describe_backend
    from nanochat.gpt import GPT, GPTConfig
    from nanochat.precision import choose_precision

    arch, _, precision_name = contender.partition("-")
    precision = choose_precision(precision_name or "auto", world.device)
    compiled, _ = should_compile(job["compile"], world.device)
    make = GPTConfig.classic if arch == "classic" else GPTConfig.modern
    config = make(
        sequence_len=shape.length, vocab_size=shape.vocab_size, n_layer=shape.layers, n_head=shape.heads,
        n_kv_head=shape.heads, n_embd=shape.width,
    )  # fmt: skip
    model = GPT.build(config, world.device, precision.dtype)
    model.init_weights()
    said = precision.apply(model)
    optimizer = model.setup_optimizer(world)
    forward = torch.compile(model, dynamic=False) if compiled else model

    def step(loader: PretrainLoader, clock: Clock) -> float:
        with clock.phase("data"):
            batches = [next(loader) for _ in range(job["micro_batches"])]
        with clock.phase("communication"):
            count = world.sum(torch.stack([(targets >= 0).sum() for _, targets in batches]).sum())
        total = torch.zeros((), device=world.device)
        for inputs, targets in batches:
            with clock.phase("forward"):
                loss = forward(inputs, targets, loss_reduction="sum") / count
            with clock.phase("backward"):
                loss.backward()
            total += loss.detach()
        with clock.phase("communication"):
            total = world.sum(total)
        with clock.phase("optimizer"), communication(sharding, clock):
            optimizer.step(skip=~total.isfinite())
            model.zero_grad(set_to_none=True)
        return total.item()

    how = f"{said}, {'compiled' if compiled else 'eager'}, {describe_backend(world.device, precision.dtype)}"
    return step, model.estimate_flops(), how


@contextmanager
def communication(sharding: Any, clock: Clock) -> Iterator[None]:
    """Counts the waiting for gradients and weights of other ranks as communication."""
    wait = sharding.Flight.wait

    def timed(flight: Any) -> Any:
        if flight.work is None:
            return wait(flight)
        with clock.phase("communication"):
            return wait(flight)

    sharding.Flight.wait = timed
    try:
        yield
    finally:
        sharding.Flight.wait = wait


def hugging_face(shape: Shape, world: World, job: dict[str, Any]) -> tuple[Step, float, str]:
    """transformers' NanoChat with AdamW. On a processor as a user trains by default: fp32, eager, torch's defaults;
    on a GPU compiled, with bf16 products of fp32 weights and the fused optimizer."""
    import torch
    from transformers import NanoChatConfig, NanoChatForCausalLM

    from nanochat.gpt import GPT, GPTConfig

    config = NanoChatConfig(
        vocab_size=shape.vocab_size, hidden_size=shape.width, intermediate_size=4 * shape.width,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.heads,
        max_position_embeddings=shape.length, use_cache=False,
    )  # fmt: skip
    on_gpu = world.device.type == "cuda"
    model = NanoChatForCausalLM(config).to(world.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True if on_gpu else None)
    forward = torch.compile(model) if on_gpu else model
    flops = GPT(
        GPTConfig.classic(
            sequence_len=shape.length, vocab_size=shape.vocab_size, n_layer=shape.layers, n_head=shape.heads,
            n_kv_head=shape.heads, n_embd=shape.width,
        )
    ).estimate_flops()  # fmt: skip

    def step(loader: PretrainLoader, clock: Clock) -> float:
        with clock.phase("data"):
            batches = [next(loader)[0] for _ in range(job["micro_batches"])]
        total = torch.zeros((), device=world.device)
        for inputs in batches:
            with clock.phase("forward"), torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
                loss = forward(input_ids=inputs, labels=inputs).loss / len(batches)
            with clock.phase("backward"):
                loss.backward()
            total += loss.detach()
        with clock.phase("optimizer"):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return total.item()

    return step, flops, "bfloat16 autocast, compiled, AdamW fused" if on_gpu else "float32, eager, AdamW"


# --- measuring ---------------------------------------------------------------------------------------


def measure(contender: tuple[Step, float, str], shape: Shape, world: World, job: dict[str, Any]) -> dict:
    """Seconds of every step after the warm-up, share of each phase, peak memory, last loss."""
    from dev.bench.corpus import load_tokenizer
    from nanochat.dataloader import PretrainLoader

    step, flops, how = contender
    tokenizer = load_tokenizer(Path(job["tokenizer"]))
    loader = PretrainLoader(
        tokenizer, shape.rows, shape.length, "train", world, data_dir=Path(job["data_dir"])
    )
    clock, seconds, cpu_seconds, loss = Clock(world.device), [], [], 0.0
    for i in range(job["warmup"] + job["steps"]):
        synchronize(world.device)
        started, cpu_started = time.perf_counter(), time.process_time()
        loss = step(loader, clock)
        if i >= job["warmup"]:
            seconds.append(time.perf_counter() - started)
            cpu_seconds.append(time.process_time() - cpu_started)
    clock.on = True
    for _ in range(job["phase_steps"]):
        step(loader, clock)
    loader.close()
    return {
        "tokens": job["micro_batches"] * shape.rows * shape.length,  # of a step and rank
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "phases": {name: value / job["phase_steps"] for name, value in clock.seconds.items()},
        "peak_bytes": peak_memory_bytes(world.device),
        "flops_per_token": flops,
        "product_flops": product_flops(shape, world.device),
        "loss": loss,
        "how": how,
    }


def product_flops(shape: Shape, device: torch.device, repeats: int = 30) -> float:
    """FLOP/s of the largest product of a block, alone: what its multiplications could run at. bf16 on a GPU, else fp32."""
    import torch

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x, w = (
        torch.randn(n, shape.width, dtype=dtype, device=device)
        for n in (shape.rows * shape.length, 4 * shape.width)
    )
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        torch.mm(x, w.T)
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * len(x) * w.numel() / statistics.median(seconds)


if __name__ == "__main__":
    main()
