"""The plans of a whole run: which stages with which flags, chosen by hardware and data source.

hub data: speedrun (GPUs, sized by number and memory), run1000 (depth 32), cpu (a small model on a laptop).
Embedded data: nanochat/tinyworld_plan.py, which needs neither GPU nor network.
"""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from nanochat.common import UserError, peak_flops
from nanochat.environment import Gpu
from nanochat.memory import training_bytes
from nanochat.network_config import GPTConfig
from nanochat.options import STAGE_FOLDERS
from nanochat.pipeline import Plan, Stage
from nanochat.report_render import format_bytes
from nanochat.scaling import Horizon, model_dimensions
from nanochat.sizing import (
    SHARD_BYTES,
    checkpoint_bytes,
    flops_per_token,
    parameters,
    ratio_horizon,
    scaling_parameters,
    shards_needed,
)

_MEMORY_SHARE = 0.92  # of a GPU's memory; the rest is the CUDA context and fragmentation
_UTILIZATION = 0.45  # of the peak FLOPs that pretraining reaches; upstream reports 0.4 to 0.6
_UNKNOWN_PEAK_FLOPS = 50e12
_LONGEST_PRETRAINING_S = 8 * 3600
DOWNLOAD_BYTES_PER_S = 50e6


# --- building stages ---------------------------------------------------------------------------------

# Training stages, with the ending of their wandb run's name; they can resume.
_TRAINING = {
    "scripts.base_train": "base", "scripts.mid_train": "mid", "scripts.chat_sft": "sft",
    "scripts.chat_dpo": "dpo", "scripts.chat_rl": "rl",
}  # fmt: skip
_EVALUATIONS = ("scripts.base_eval", "scripts.chat_eval")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a plan, before it is known how its command is started."""

    name: str
    about: str
    seconds: float
    needs: tuple[str, ...]
    command: str  # module and flags
    background: bool = False


@dataclass(frozen=True, slots=True)
class Launcher:
    """How the commands of one plan are started, and which model they work on."""

    num_processes: int
    model_tag: str

    def stages(self, rows: Sequence[Row]) -> tuple[Stage, ...]:
        """Rows as stages, between the beginning of the report and its end."""
        begin = Row("report_reset", "begin a new report", 5, (), "nanochat.report reset")
        end = Stage(
            "report", "tables and plots", ("python", "-m", "nanochat.report", "generate"), 10, always=True,
            output="report.md, report_files/",
        )  # fmt: skip
        return (*(self._stage(row) for row in (begin, *rows)), end)

    def _stage(self, row: Row) -> Stage:
        module, *flags = shlex.split(row.command)
        ending = _TRAINING.get(module, "")
        tags = [flag.split("=", 1)[1] for flag in flags if flag.startswith(("--model-tag=", "--output-tag="))]
        output = f"{STAGE_FOLDERS[ending]}/{(tags or [self.model_tag])[-1]}" if ending else ""
        command = self.command(module, flags)
        return Stage(
            row.name, row.about, command, row.seconds, row.needs, bool(ending), row.background, output=output
        )

    def command(self, module: str, flags: Sequence[str]) -> tuple[str, ...]:
        """Training and evaluation run on all ranks and name their model; everything else is one process."""
        ending, wandb_run = _TRAINING.get(module, ""), os.environ.get("WANDB_RUN") or "dummy"
        if ending and wandb_run != "dummy" and not any(flag.startswith("--run=") for flag in flags):
            flags = [*flags, f"--run={wandb_run}-{ending}"]
        if not ending and module not in _EVALUATIONS:
            return ("python", "-m", module, *flags)
        if not any(flag.startswith("--model-tag=") for flag in flags):
            flags = [*flags, f"--model-tag={self.model_tag}"]
        if self.num_processes == 1:
            return ("python", "-m", module, *flags)
        launcher = ("torchrun", "--standalone", f"--nproc_per_node={self.num_processes}", "-m")
        return (*launcher, module, "--", *flags)


def model_facts(config: GPTConfig, horizon: Horizon) -> dict[str, str]:
    """Size of the model and of its training, for the description of a plan."""
    groups = parameters(config)
    return {
        "model": f"depth {config.n_layer}, width {config.n_embd}, {config.n_head} heads,"
        f" {groups['total']:,} parameters, context {config.sequence_len}",
        "training": f"{horizon.num_tokens:,} tokens = {horizon.num_steps:,} steps x"
        f" {horizon.total_batch_size:,} tokens ({horizon.num_tokens / scaling_parameters(config):.1f} per"
        f" scaling parameter, {flops_per_token(config) * horizon.num_tokens:.2e} FLOPs)",
    }


# --- GPUs, hub data ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GpuChoice:
    """What a set of GPUs trains."""

    num_gpus: int
    depth: int
    device_batch_size: int
    seconds: float  # expected duration of pretraining
    memory_bytes: int  # expected peak per GPU


def training_flops(gpus: Sequence[Gpu]) -> float:
    """FLOP/s that training is expected to reach on all of the GPUs; a guess for those whose name is unknown."""
    return len(gpus) * (peak_flops(gpus[0].name) or _UNKNOWN_PEAK_FLOPS) * _UTILIZATION


def pretraining_seconds(config: GPTConfig, ratio: float, gpus: Sequence[Gpu]) -> float:
    """Expected duration of pretraining on all of the GPUs."""
    tokens = ratio_horizon(config, ratio).num_tokens
    return flops_per_token(config) * tokens / training_flops(gpus)


def largest_batch(config: GPTConfig, ratio: float, gpus: Sequence[Gpu], limit: int = 32) -> int:
    """The largest power of two of sequences per GPU that fits its memory and divides the batch; 0 if none."""
    memory = min(gpu.memory_bytes for gpu in gpus)
    total = ratio_horizon(config, ratio).total_batch_size
    rows = limit
    while rows:
        divides = total % (rows * config.sequence_len * len(gpus)) == 0
        if divides and training_bytes(config, rows, len(gpus)) <= _MEMORY_SHARE * memory:
            return rows
        rows //= 2
    return 0


def choose(
    gpus: Sequence[Gpu], ratio: float = 8.0, depths: Sequence[int] = (24, 20, 16, 12, 8, 6, 4)
) -> GpuChoice:
    """The deepest model that fits the GPUs' memory and pretrains within eight hours, else the smallest."""
    used = gpus[: 2 ** int(math.log2(len(gpus)))]  # the batch is a power of two, so must the ranks be
    fitting = []
    for depth in depths:
        config = GPTConfig.modern(**model_dimensions(depth))
        # 8 x 80 GB could take more rows at smaller depths, but no run needs more than the flagship's 16.
        rows = largest_batch(config, ratio, used, limit=16)
        if rows:
            seconds = pretraining_seconds(config, ratio, used)
            memory = training_bytes(config, rows, len(used))
            fitting.append(GpuChoice(len(used), depth, rows, seconds, memory))
    if not fitting:
        raise UserError(
            f"{gpus[0].name} has {format_bytes(gpus[0].memory_bytes)}, too little even for depth {depths[-1]};"
            " run with NANOCHAT_DATA=tinyworld"
        )
    return next((choice for choice in fitting if choice.seconds <= _LONGEST_PRETRAINING_S), fitting[-1])


def gpu_plan(gpus: Sequence[Gpu], rl: bool = False) -> Plan:
    """The speedrun: depth 24 on eight 80 GB GPUs, less on fewer or smaller ones."""
    choice = choose(gpus)
    why = f"{len(gpus)} x {gpus[0].name} with {format_bytes(min(g.memory_bytes for g in gpus))}"
    if choice.num_gpus < len(gpus):
        why += f", of which {choice.num_gpus} are used (a power of two)"
    config = GPTConfig.modern(**model_dimensions(choice.depth))
    flags = f"--depth={choice.depth} --target-param-data-ratio=8"
    return _hub_plan("speedrun", why, config, 8.0, choice, flags, "", rl)


def run1000_plan(gpus: Sequence[Gpu], rl: bool = False) -> Plan:
    """The large run: depth 32, twenty tokens per scaling parameter, a vocabulary of 65,536."""
    if not gpus:
        raise UserError("plan run1000 needs GPUs; without one use: bash runs/speedrun.sh")
    config = GPTConfig.modern(vocab_size=65536, **model_dimensions(32))
    used = gpus[: 2 ** int(math.log2(len(gpus)))]
    rows = largest_batch(config, 20.0, used, limit=8)
    if not rows:
        raise UserError(f"depth 32 does not fit {gpus[0].name}; use: bash runs/speedrun.sh")
    choice = GpuChoice(
        len(used), 32, rows, pretraining_seconds(config, 20.0, used), training_bytes(config, rows, len(used))
    )
    why = f"asked for; {len(used)} x {gpus[0].name}"
    tokenizer = "--max-chars=4000000000 --vocab-size=65536"
    return _hub_plan(
        "run1000", why, config, 20.0, choice, "--depth=32 --target-param-data-ratio=20", tokenizer, rl
    )


def _hub_plan(
    name: str, why: str, config: GPTConfig, ratio: float, choice: GpuChoice, base: str, tokenizer: str, rl: bool,
) -> Plan:  # fmt: skip
    rows, horizon = f"--device-batch-size={choice.device_batch_size}", ratio_horizon(config, ratio)
    shards = shards_needed(horizon.num_tokens)
    download_s = shards * SHARD_BYTES / DOWNLOAD_BYTES_PER_S
    # Mid-training and finetuning see about a tenth of the tokens of a small pretraining run.
    base_s, tune_s = choice.seconds, max(120.0, choice.seconds / 10)
    table = [
        Row("data", "the first 8 shards of pretraining text", 20, (), "nanochat.dataset -n 8"),
        Row("data_all", f"all {shards} shards", download_s, ("data",), f"nanochat.dataset -n {shards}", True),
        Row("tok_train", "learn the vocabulary", 120, ("data",), f"scripts.tok_train {tokenizer}"),
        Row("tok_eval", "compare with GPT-2 and GPT-4", 30, ("tok_train",), "scripts.tok_eval"),
        Row("base_train", "pretrain", base_s, ("tok_train", "data_all"), f"scripts.base_train {base} {rows}"),
        Row(
            "base_eval", "CORE, bits per byte, samples", max(120.0, base_s / 15), ("base_train",),
            f"scripts.base_eval {rows}",
        ),
        *_tuning_rows(tune_s, rows, rows, ""),
        *(_reinforcement_rows(3 * tune_s, "-a GSM8K") if rl else []),
    ]  # fmt: skip
    facts = model_facts(config, horizon) | {
        "memory": f"about {format_bytes(choice.memory_bytes)} per GPU at {choice.device_batch_size} rows",
        "data": f"hub, {shards} shards",
    }
    stages = Launcher(choice.num_gpus, f"d{config.n_layer}").stages(table)
    disk = shards * SHARD_BYTES + 3 * checkpoint_bytes(config)
    return Plan(name, why, stages, {"NANOCHAT_DATA": "hub"}, facts, disk)


def _tuning_rows(seconds: float, mid: str, sft: str, evaluation: str) -> list[Row]:
    """Mid-training and finetuning with their evaluations; seconds of one of the two trainings."""
    return [
        Row(
            "mid_train", "learn conversations and tools", seconds, ("base_train",), f"scripts.mid_train {mid}"
        ),
        evaluation_row("mid", "mid_train", seconds / 2, evaluation),
        Row("chat_sft", "finetune on answers", seconds, ("mid_train",), f"scripts.chat_sft {sft}"),
        evaluation_row("sft", "chat_sft", seconds / 2, evaluation),
    ]


def _reinforcement_rows(seconds: float, evaluation: str) -> list[Row]:
    return [
        Row("chat_rl", "reinforce correct answers", seconds, ("chat_sft",), "scripts.chat_rl"),
        evaluation_row("rl", "chat_rl", seconds / 6, evaluation),
    ]


def evaluation_row(source: str, trained_by: str, seconds: float, flags: str) -> Row:
    """The row that scores the model of a stage."""
    about = f"score the {source} model on its tasks"
    return Row(f"chat_eval_{source}", about, seconds, (trained_by,), f"scripts.chat_eval -i {source} {flags}")


# --- CPU, hub data -----------------------------------------------------------------------------------


def cpu_plan() -> Plan:
    """A small model on web text without a GPU: about an hour on a fast laptop, to see every stage at work."""
    config = GPTConfig.modern(sequence_len=512, window_pattern="L", **model_dimensions(6, head_dim=64))
    horizon = Horizon(5000, 16384, 1.0, 1.0, "--num-iterations")
    sizes = "--max-seq-len=512 --device-batch-size=32 --total-batch-size=16384"
    base = (
        f"scripts.base_train --depth=6 --head-dim=64 --window-pattern=L {sizes} --eval-every=100"
        " --eval-tokens=524288 --core-metric-every=-1 --sample-every=100 --num-iterations=5000"
    )
    base_eval = "scripts.base_eval --device-batch-size=1 --split-tokens=16384 --max-per-task=16"
    tuning = f"{sizes} --eval-every=200 --eval-tokens=524288 --num-iterations=750"
    table = [
        Row("data", "8 shards of pretraining text", 40, (), "nanochat.dataset -n 8"),
        Row("tok_train", "learn the vocabulary", 120, ("data",), "scripts.tok_train"),
        Row("tok_eval", "compare with GPT-2 and GPT-4", 30, ("tok_train",), "scripts.tok_eval"),
        Row("base_train", "pretrain", 1800, ("tok_train",), base),
        Row("base_eval", "CORE, bits per byte, samples", 300, ("base_train",), base_eval),
        *_tuning_rows(300, tuning, f"{tuning} --chatcore-every=-1", "--max-new-tokens=128 --max-problems=20"),
    ]
    facts = model_facts(config, horizon) | {
        "memory": f"about {format_bytes(training_bytes(config, 32, 1, on_gpu=False))}",
        "data": "hub, 8 shards",
    }
    disk = 9 * SHARD_BYTES + 3 * checkpoint_bytes(config)
    why = "web text without a GPU, as asked for"
    return Plan("cpu", why, Launcher(1, "d6").stages(table), {"NANOCHAT_DATA": "hub"}, facts, disk)
