"""How fast a model generates, and how far that is from what the hardware can do. The last line is JSON."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

from nanochat.common import UserError, print0
from nanochat.configurator import option, run
from nanochat.options import STAGES, WhichWeights

if TYPE_CHECKING:
    import torch

    from nanochat.engine import Engine
    from nanochat.gpt import GPT
    from nanochat.interop.peer import TransformersPeer
    from nanochat.network_config import GPTConfig
    from nanochat.roofline import ModelCost
    from nanochat.sampling import SamplingParams
    from nanochat.sweep_bench import Peaks


@dataclass(frozen=True)
class Config(WhichWeights):
    source: str = option(
        "base", "checkpoint family, or random weights", short="i", choices=(*STAGES, "random")
    )
    # --- the network of random weights
    arch: str = option("classic", "random: architecture", choices=("classic", "modern"))
    depth: int = option(12, "random: layers", least=1)
    n_embd: int = option(0, "random: width; 0 follows from the depth", least=0)
    vocab_size: int = option(32768, "random: vocabulary", least=1)
    sequence_len: int = option(2048, "random: context", least=4)  # two tokens to read and two to write
    # --- what is generated
    prompt_tokens: int = option(2048, "prompt length; what does not fit the context is cut", least=1)
    decode_tokens: int = option(256, "new tokens per row; half the context where that is smaller", least=2)
    batch_sizes: str = option("1,8,32,128", "rows that decode together, separated by commas")
    prefill_lengths: str = option("", "further prompt lengths to measure reading with, separated by commas")
    temperature: float = option(0.0, "sampling temperature; 0 is greedy", short="t", least=0)
    top_k: int = option(50, "candidates while the temperature is above 0; 0: all", short="k", least=0)
    distinct: bool = option(False, "a prompt of its own for each row, instead of samples of one prompt")
    # --- how it is measured
    repeats: int = option(3, "timed runs; medians are reported", least=1)
    warmup: int = option(8, "tokens of the untimed run before", least=0)
    dtype: str | None = option(None, "compute dtype; None chooses", short="d", choices=("bfloat16", "float16", "float32"))  # fmt: skip
    speculate: int = option(0, "tokens to guess ahead while one row runs", least=0)
    attn: str | None = option(None, "how a processor reads prompts, as NANOCHAT_ATTN: cpp or sdpa; default: the best there is")  # fmt: skip
    peer: str = option(
        "none", "measured in turns with us on the same weights", choices=("none", "transformers")
    )
    # --- requests that arrive at random
    clients: int = option(0, "requests of the load test; 0: none", least=0)
    arrivals: str = option(
        "exponential:0.005", "seconds between arrivals: 0.1, uniform:0:0.1 or exponential:0.1"
    )
    load_prompts: str = option("uniform:16:160", "prompt lengths of the load test")
    load_tokens: str = option("uniform:16:64", "new tokens of the load test")
    json: str = option("", "file for the JSON, too")


def main(cfg: Config) -> None:
    """Measure prefill, decode over batch sizes, and optionally a random load, against the hardware's limits."""
    check(cfg)
    if cfg.attn:
        os.environ["NANOCHAT_ATTN"] = cfg.attn
    if cfg.dtype:
        os.environ["NANOCHAT_DTYPE"] = cfg.dtype
    from nanochat.common import (  # fmt: skip
        autodetect_device_type,
        check_device,
        device_name,
        keep_freed_memory,
        peak_flops,
        whole_file,
    )
    from nanochat.quantize import quantize
    from nanochat.roofline import measured_bandwidth, peak_bandwidth
    from nanochat.sweep_bench import Peaks

    device = check_device(cfg.device_type or autodetect_device_type())
    if cfg.attn and device.type != "cpu":
        raise UserError(
            f"--attn={cfg.attn} is for processors; on {device.type} generation has its own attention"
        )
    keep_freed_memory()
    name = device_name(device)
    peaks = Peaks(peak_bandwidth(name), peak_flops(name), measured_bandwidth(device))
    model, tokenizer, step = network(cfg, device)
    with peer_of(cfg, model) as peer:  # which has the weights as they are
        note = quantize(model, cfg.quantize, None if cfg.source == "random" else tokenizer)
        if cfg.quantize != "none":
            print0(note)
        result = {"source": cfg.source, "step": step, "gpu": name, "quantize": cfg.quantize, "note": note}
        result |= measure(cfg, model, tokenizer, peaks, peer)
    text = json.dumps(result, separators=(",", ":"))
    print0(text)  # first: it is there whatever happens to the file
    if cfg.json:
        with whole_file(cfg.json, "w") as file:
            file.write(text + "\n")


def check(cfg: Config) -> None:
    """UserError for flags that would end the measurement after minutes."""
    from nanochat.common import check_writable
    from nanochat.load_bench import distribution

    integers("--batch-sizes", cfg.batch_sizes)
    integers("--prefill-lengths", cfg.prefill_lengths)
    for name in ("arrivals", "load_prompts", "load_tokens"):
        try:
            distribution(getattr(cfg, name))
        except UserError as error:
            raise UserError(f"--{name.replace('_', '-')}: {error}") from None
    if cfg.json:
        check_writable(cfg.json)


def measure(
    cfg: Config, model: GPT, tokenizer: Any, peaks: Peaks, peer: TransformersPeer | None
) -> dict[str, Any]:
    """Everything that the JSON holds about a model."""
    from nanochat.roofline import ModelCost
    from nanochat.sweep_bench import bench_engine

    batches = integers("--batch-sizes", cfg.batch_sizes)
    lengths = integers("--prefill-lengths", cfg.prefill_lengths)
    device, cost, context = model.get_device(), ModelCost.of(model), model.config.sequence_len
    if cfg.decode_tokens >= context:
        print0(f"{context // 2} new tokens instead of {cfg.decode_tokens}, to fit the context of {context}")
        cfg = replace(cfg, decode_tokens=context // 2)
    prompt_tokens = min(cfg.prompt_tokens, context - cfg.decode_tokens)
    if prompt_tokens < cfg.prompt_tokens:
        print0(f"the prompt is cut to {prompt_tokens} tokens, to fit the context of {context}")
    middle = prompt_tokens + cfg.decode_tokens // 2
    per_step = cost.weight_bytes + cost.kv_read_bytes(middle)
    vram = total_memory(device)
    engine = bench_engine(model, tokenizer, max(*batches, cfg.clients, 1), speculate=cfg.speculate)
    result: dict[str, Any] = {
        "model_config": vars(model.config),
        "dtype": str(model.compute_dtype)[6:], "attention": engine.attention,
        "peak_bandwidth_bytes_per_sec": peaks.bandwidth, "peak_flops_per_sec": peaks.flops,
        "measured_bandwidth_bytes_per_sec": round(peaks.measured_bandwidth), "total_vram_bytes": vram,
        "num_params": cost.num_params, "param_dtypes": cost.param_dtypes, "weight_bytes": cost.weight_bytes,
        "weight_bytes_read": cost.weight_bytes_read, "kv_bytes_per_token": cost.kv_bytes_per_token,
        "kv_read_bytes_per_step": cost.kv_read_bytes(middle), "context_mid": middle,
        "decode_flops_per_token": cost.decode_flops(middle),
        "ceiling_bs1_tok_per_sec": None if peaks.bandwidth is None else round(peaks.bandwidth / per_step, 1),
        "max_full_context_rows": (vram - cost.weight_bytes) // (cost.kv_bytes_per_token * context),
        "prompt_tokens": prompt_tokens, "decode_tokens": cfg.decode_tokens, "temperature": cfg.temperature,
    }  # fmt: skip
    print_card(cfg, device, result)
    bench = Bench(cfg, engine, device, cost, peaks, prompt_tokens)
    result["prefill"], *others = [bench.prefill(length) for length in (prompt_tokens, *lengths)]
    if others:
        result["prefills"] = others
    result["sweep"] = [bench.sweep(batch, peer) for batch in batches]
    if cfg.clients:
        result["load"] = bench.load()
    return result


class Bench:
    """The measurements of one model."""

    def __init__(
        self, cfg: Config, engine: Engine, device: torch.device, cost: ModelCost, peaks: Peaks, length: int
    ) -> None:
        self.cfg, self.engine, self.device, self.length = cfg, engine, device, length
        self.cost, self.peaks = cost, peaks

    def params(self, max_tokens: int) -> SamplingParams:
        from nanochat.sampling import SamplingParams

        return SamplingParams(self.cfg.temperature, self.cfg.top_k, max_tokens)

    def prompts(self, rows: int, length: int) -> list[list[int]]:
        """Text, or random ids for random weights; one prompt for all rows or, with --distinct, different ones."""
        import random

        from nanochat.sweep_bench import NoTokenizer, english_prompt

        tokenizer, config = self.engine.tokenizer, self.engine.model.config
        rng = random.Random(0)
        if isinstance(tokenizer, NoTokenizer) or self.cfg.distinct:
            made = [rng.choices(range(config.vocab_size), k=length) for _ in range(rows)]
        else:
            made = [english_prompt(tokenizer, length)]
        return made if self.cfg.distinct else made[:1] * rows

    def prefill(self, length: int) -> dict[str, Any]:
        from nanochat.sweep_bench import prefill_entry, timed_run

        length = min(length, self.engine.model.config.sequence_len - 2)
        runs = [
            timed_run(self.engine, self.prompts(1, length), self.params(2), self.device)
            for _ in range(1 + self.cfg.repeats)
        ]
        entry = prefill_entry(runs[1:], length, self.cost, self.peaks)
        print0(
            f"prefill {length} tokens: {1e3 * entry['time_sec']:.1f} ms, {entry['tok_per_sec']:,.0f} tokens/s"
        )
        return entry

    def sweep(self, batch: int, peer: TransformersPeer | None) -> dict[str, Any]:
        from nanochat.sweep_bench import memory_since, run_or_oom, sweep_entry, timed_run

        cfg, prompts = self.cfg, self.prompts(batch, self.length)
        context = self.length + cfg.decode_tokens // 2

        def measure() -> dict[str, Any]:
            peak = memory_since(self.device)
            timed_run(self.engine, prompts, self.params(max(2, cfg.warmup)), self.device)
            if peer:
                peer.generate(prompts, max(2, cfg.warmup), cfg.temperature, cfg.top_k)
            ours, theirs = [], []
            for _ in range(cfg.repeats):
                ours.append(timed_run(self.engine, prompts, self.params(cfg.decode_tokens), self.device))
                if peer:
                    theirs.append(peer.generate(prompts, cfg.decode_tokens, cfg.temperature, cfg.top_k)[0])
            entry = sweep_entry(batch, ours, context, self.cost, self.peaks, peak())
            if peer:
                tokens = batch * cfg.decode_tokens
                ratio = median(b / a.total for a, b in zip(ours, theirs, strict=True))
                whole = {"tok_per_sec": round(tokens / median(theirs), 1), "ours_over_peer": round(ratio, 2)}
                whole["ours_tok_per_sec"] = round(tokens / entry["total_sec"], 1)
                entry["transformers"] = {"total_sec": round(median(theirs), 6), **whole}
            return entry

        entry = run_or_oom(measure, batch)
        print_row(entry)
        return entry

    def load(self) -> dict[str, Any]:
        """The same requests together and one after the other."""
        from nanochat.load_bench import make_clients, serve

        cfg, config = self.cfg, self.engine.model.config
        clients = make_clients(
            cfg.clients, cfg.arrivals, cfg.load_prompts, cfg.load_tokens, self.params(1), config.sequence_len,
            config.vocab_size,
        )  # fmt: skip
        together, single = [], []
        for _ in range(cfg.repeats):
            together.append(serve(self.engine, clients, cfg.clients))
            single.append(serve(self.engine, clients, 1))

        def middle(runs: list[dict[str, Any]]) -> dict[str, Any]:
            return sorted(runs, key=lambda r: r["seconds"])[len(runs) // 2]

        ratio = round(median(b["seconds"] / a["seconds"] for a, b in zip(together, single, strict=True)), 2)
        print0(
            f"load: {cfg.clients} requests in {middle(together)['seconds']:.2f} s together, "
            f"{middle(single)['seconds']:.2f} s one after the other ({ratio:.1f} times)"
        )
        return {"together": middle(together), "one_by_one": middle(single), "speedup": ratio}


def integers(flag: str, text: str) -> list[int]:
    """Positive integers separated by commas."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdigit() and int(part) > 0 for part in parts) or (not parts and flag == "--batch-sizes"):
        raise UserError(f"{flag}={text!r} must be positive integers separated by commas")
    return [int(part) for part in parts]


def network(cfg: Config, device: torch.device) -> tuple[GPT, Any, int | None]:
    """(model, tokenizer, step) of a checkpoint or of random weights."""
    from nanochat.checkpoint_manager import load_model

    if cfg.source != "random":
        model, tokenizer, meta = load_model(
            cfg.source, device, "eval", model_tag=cfg.model_tag, step=cfg.step
        )
        return model, tokenizer, meta.get("step")
    import torch

    from nanochat.common import compute_dtype
    from nanochat.gpt import GPT, GPTConfig
    from nanochat.scaling import model_dimensions
    from nanochat.sweep_bench import NoTokenizer

    width = cfg.n_embd or model_dimensions(cfg.depth)["n_embd"]
    heads = max(1, width // (128 if width >= 512 else 64))
    make = GPTConfig.classic if cfg.arch == "classic" else GPTConfig.modern
    config = make(
        sequence_len=cfg.sequence_len, vocab_size=cfg.vocab_size, n_layer=cfg.depth, n_head=heads,
        n_kv_head=heads, n_embd=width,
    )  # fmt: skip
    refuse_too_large(config, device)
    torch.manual_seed(0)
    model = GPT.build(config, device, compute_dtype(device)[0])
    model.init_weights()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.to(model.compute_dtype)
    return model.eval().requires_grad_(False), NoTokenizer(), None


def refuse_too_large(config: GPTConfig, device: torch.device) -> None:
    """UserError for random weights, drawn in fp32, that do not fit what is free of the memory."""
    from nanochat.batch_fit import memory_for_this_process
    from nanochat.sizing import parameters

    needed, free = 4 * parameters(config)["total"], memory_for_this_process(device)
    if needed > free:
        raise UserError(
            f"random weights of {config.n_layer} layers, {config.n_embd:,} wide, take {needed / 2**30:,.1f} GiB,"
            f" and {free / 2**30:,.1f} GiB of {total_memory(device) / 2**30:,.1f} are free;"
            " lower --depth, --n-embd or --vocab-size"
        )


def peer_of(cfg: Config, model: GPT) -> Any:
    """A context manager of the peer, or of None."""
    if cfg.peer == "none":
        return nullcontext()
    from nanochat.interop.peer import TransformersPeer

    return TransformersPeer(model)


def total_memory(device: torch.device) -> int:
    """Bytes of the GPU's memory, or of the machine's."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    import psutil

    return psutil.virtual_memory().total


def print_card(cfg: Config, device: torch.device, result: dict[str, Any]) -> None:
    """What is measured, and what bounds it."""
    config = result["model_config"]
    print0(f"model    {cfg.source}, {config['n_layer']} layers of {config['n_embd']}, {result['dtype']}")
    print0(f"device   {device}, attention of {result['attention']}")
    print0(f"weights  {result['num_params']:,} parameters {result['param_dtypes']}")
    print0(
        f"bytes    {result['weight_bytes_read'] / 1e6:.1f} MB of matrices per step, "
        f"{result['kv_read_bytes_per_step'] / 1e6:.2f} MB of keys and values per row at {result['context_mid']}"
    )
    limit = result["weight_bytes_read"] + result["kv_read_bytes_per_step"]
    measured = result["measured_bandwidth_bytes_per_sec"]
    print0(
        f"memory   {measured / 1e9:.1f} GB/s measured: at most {measured / limit:,.0f} tokens/s at batch 1"
    )


def print_row(entry: dict[str, Any]) -> None:
    """One line of the sweep."""
    if "error" in entry:
        print0(f"batch {entry['batch_size']:4d}: {entry['error']}")
        return
    text = (
        f"batch {entry['batch_size']:4d}: TTFT {1e3 * entry['ttft_sec']:8.2f} ms, TPOT {1e3 * entry['tpot_sec']:7.3f} ms, "
        f"{entry['tok_per_sec']:9,.1f} tok/s, bandwidth {entry['mbu_measured_percent']:5.1f} % of measured"
    )
    if entry["mbu_percent"] is not None:
        text += f", MBU {entry['mbu_percent']:.1f} %"
    if entry["mfu_percent"] is not None:
        text += f", MFU {entry['mfu_percent']:.2f} %"
    text += f", {entry['peak_vram_bytes'] / 2**30:.2f} GiB, {entry['decode_steps']} steps"
    if peer := entry.get("transformers"):
        text += (
            f"; with prefill {peer['ours_tok_per_sec']:,.0f} tok/s, transformers {peer['tok_per_sec']:,.0f} "
            f"({peer['ours_over_peer']:.2f} times)"
        )
    print0(text)


if __name__ == "__main__":
    run(Config, main)
