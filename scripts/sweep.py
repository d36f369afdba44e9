"""Train a family of models and collect one CSV row per run: the miniseries, and the scaling laws.

    bash runs/miniseries.sh                 one compute-optimal model per depth
    bash runs/scaling_laws.sh               every depth at every FLOPs budget

Each run is a stage with its own log and marker, so a sweep that was stopped goes on where it was. Rows come
from the run_summary.json that base_train writes beside its checkpoint, never from logs.
"""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat.common import UserError, get_base_dir, read_json, whole_file
from nanochat.configurator import option, run

if TYPE_CHECKING:
    from nanochat.environment import Gpu
    from nanochat.pipeline import Stage

MINISERIES_COLUMNS = (
    "depth", "model_dim", "num_params", "num_scaling_params", "num_iterations", "tokens_trained",
    "param_data_ratio", "val_bpb", "core_score", "train_time_sec",
)  # fmt: skip
_GROUPS = ("wte", "value_embeds", "lm_head", "transformer", "scalars", "total")
SCALING_COLUMNS = (
    "flops_budget", "depth", "model_dim", *(f"params_{group}" for group in _GROUPS), "num_iterations",
    "tokens_trained", "val_bpb", "core_score", "train_time_sec",
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    kind: str = option("miniseries", "which sweep", choices=("miniseries", "scaling"))
    series: str = option("", "name of the sweep; default: SERIES_NAME, else today's date like jan11")
    depths: str = option("", "depths, separated by commas (default: 12,14,...,26; scaling: 10,12,...,20)")
    flops: str = option("1e18,2.15e18,4.64e18,1e19", "FLOPs budgets of the scaling laws")
    train_args: str = option("", "more flags for every base_train, in quotes")
    num_shards: int = option(1000, "pretraining shards to download first (hub data)", least=1)
    skip_setup: bool = option(False, "data and tokenizer are there already (also SKIP_SETUP=1)")
    dry_run: bool = option(False, "print the runs with sizes and expected times, and stop")
    force: bool = option(False, "repeat finished runs")


@dataclass(frozen=True, slots=True)
class Run:
    """One training run of a sweep."""

    tag: str  # model tag, the name of its checkpoint folder
    depth: int
    flops_budget: str = ""  # as it was written; empty for the miniseries


def main(cfg: Config) -> None:
    """Train every model of a sweep and write results.csv."""
    import shutil

    from nanochat.dataset import data_sets_in_use
    from nanochat.environment import gpus
    from nanochat.pipeline import Markers, describe, run_plan, to_run
    from scripts.speedrun import check_disk, check_hub

    base = get_base_dir()
    series = cfg.series or os.environ.get("SERIES_NAME") or time.strftime("%b%d").lower()
    runs = sweep_runs(cfg.kind, series, cfg.depths, cfg.flops)
    found = gpus()
    ranks = num_processes(len(found))
    speed = expected_speed(found, ranks)
    plan = sweep_plan(cfg, series, runs, ranks, (base / "tokenizer").exists(), speed)
    folder = base / f"{series}_{cfg.kind}_results"
    pending = to_run(plan.stages, Markers(folder / "run"), force=cfg.force)
    free = shutil.disk_usage(base).free
    source = "hub" if any(named.repo for named in data_sets_in_use()) else "own"
    hub = check_hub(source, [stage.name for stage in pending])
    problems = [text for text in (hub, check_disk(plan.disk_bytes, free, base)) if text]
    if cfg.dry_run:
        print(describe(plan, plan.stages, pending, folder=folder, free_bytes=free))
        print("", *(f"problem: {text}" for text in problems), "dry run: nothing was started", sep="\n")
        return
    if problems:
        raise UserError("; ".join(problems))
    run_plan(
        plan, folder / "run", folder, force=cfg.force,
        after_stage=lambda stage: write_rows(folder / "results.csv", cfg.kind, runs, base),
    )  # fmt: skip
    print(f"\n{len(runs)} runs: {folder / 'results.csv'}")


def num_processes(num_gpus: int) -> int:
    """Ranks per run: NPROC_PER_NODE, else one per GPU, else one."""
    wanted = os.environ.get("NPROC_PER_NODE") or str(max(1, num_gpus))
    if not wanted.isdigit() or int(wanted) < 1:
        raise UserError(f"NPROC_PER_NODE={wanted} is not a number of processes")
    return int(wanted)


# --- the runs ----------------------------------------------------------------------------------------


def sweep_runs(kind: str, series: str, depths: str, flops: str) -> list[Run]:
    """The runs of a sweep in the order in which they are trained."""
    default = range(12, 27, 2) if kind == "miniseries" else range(10, 21, 2)
    chosen = list(dict.fromkeys(_numbers(depths, int, "--depths") if depths else default))
    if not re.fullmatch(r"\w[\w.-]*", series):  # it becomes the name of folders
        raise UserError(f"--series={series} must be letters, digits, dots, dashes and underscores")
    if kind == "miniseries":
        return [Run(f"{series}_miniseries_d{depth}", depth) for depth in chosen]
    _numbers(flops, float, "--flops")
    budgets = [budget.strip() for budget in flops.split(",")]
    return [
        Run(f"{series}_scaling_{budget}_d{depth}", depth, budget) for budget in budgets for depth in chosen
    ]


def _numbers(text: str, kind: type, flag: str) -> list:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{flag}={text} must be numbers separated by commas") from None


def sweep_plan(
    cfg: Config, series: str, runs: Sequence[Run], ranks: int, has_tokenizer: bool, speed: Speed
):  # fmt: skip
    """Data and tokenizer unless they exist, then one stage per run."""
    from nanochat.checkpoint_manager import model_dir
    from nanochat.pipeline import Plan, Stage
    from nanochat.plans import DOWNLOAD_BYTES_PER_S, Launcher

    stages, disk_bytes = [], 0
    if not cfg.skip_setup and os.environ.get("SKIP_SETUP") != "1":
        data, disk_bytes = data_stage(cfg.num_shards)
        stages += [data] if data else []
        if not has_tokenizer:  # an existing one belongs to models in this folder
            train = ("python", "-m", "scripts.tok_train")
            stages.append(Stage("tok_train", "learn the vocabulary", train, 120))
    vocab_size = vocabulary()
    for one in runs:
        flags = _words(train_flags(cfg, one), cfg)
        try:
            flops, checkpoint = cost(one, flags, vocab_size, ranks)
        except UserError as error:
            raise UserError(f"{one.tag}: {error}") from None
        command = Launcher(ranks, one.tag).command("scripts.base_train", flags)
        about = f"depth {one.depth}" + (f" at {one.flops_budget} FLOPs" if one.flops_budget else "")
        output = str(model_dir("base", one.tag))
        stages.append(Stage(one.tag, about, command, flops / speed.flops, resumable=True, output=output))
        disk_bytes += checkpoint
    given = {name: os.environ[name] for name in ("NANOCHAT_DATA", "NANOCHAT_DATASET") if os.environ.get(name)}
    return Plan(
        f"{series}_{cfg.kind}", f"{len(runs)} runs on {ranks} ranks", tuple(stages), given,
        {"times": f"training at {speed}, downloads at {DOWNLOAD_BYTES_PER_S / 1e6:.0f} MB/s; evaluations left out"},
        disk_bytes,
    )  # fmt: skip


def data_stage(num_shards: int) -> tuple[Stage | None, int]:
    """What fetches or generates the training text, None where all is there; and the bytes of the whole text."""
    from nanochat.dataset import data_sets_in_use, list_parquet_files
    from nanochat.manifests import TINYWORLD
    from nanochat.pipeline import Stage
    from nanochat.plans import DOWNLOAD_BYTES_PER_S
    from nanochat.tinyworld import DEFAULT_CHARS

    python = ("python", "-m", "nanochat.dataset")
    sets = list(data_sets_in_use())
    if sets == [TINYWORLD]:  # which may be of another seed, and then stays as it is
        there = list_parquet_files(TINYWORLD.path)
        return None if there else Stage("data", "generate the embedded text", python, 5), DEFAULT_CHARS
    hub = [named for named in sets if named.repo]  # one's own text is there
    wanted = [(named, index) for named in hub for index in named.shards(num_shards)]
    missing = sum(
        named.shard_bytes for named, index in wanted if not (named.path / named.file_name(index)).exists()
    )
    about = f"{num_shards:,} shards of {' and of '.join(named.name for named in hub)}"
    stage = Stage("data", about, (*python, "-n", str(num_shards)), missing / DOWNLOAD_BYTES_PER_S)
    return stage if missing else None, sum(named.shard_bytes for named, _ in wanted)


# --- what the runs take ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Speed:
    """FLOP/s that training is expected to reach on all ranks together, and where that is known from."""

    flops: float
    source: str

    def __str__(self) -> str:
        return f"about {self.flops / 1e12:.3g} TFLOP/s ({self.source})"


def expected_speed(found: Sequence[Gpu], ranks: int) -> Speed:
    """By the names of the GPUs; without one measured here, where all ranks share the processor."""
    from nanochat.common import autodetect_device_type, check_device, compute_dtype, peak_flops
    from nanochat.dry_run import training_speed
    from nanochat.plans import training_flops

    if found:
        name = found[0].name
        known = "by its data sheet" if peak_flops(name) else "a guess, its data sheet is unknown"
        return Speed(ranks * training_flops(found[:1]), f"{ranks} x {name}, {known}")
    device = check_device(autodetect_device_type())
    return Speed(training_speed(device, compute_dtype(device)[0]), f"{device.type}, measured now")


def cost(one: Run, flags: Sequence[str], vocab_size: int, ranks: int) -> tuple[float, int]:
    """(FLOPs of training, bytes of the checkpoint) of a run with these flags; a UserError if base_train would refuse them."""
    from nanochat.configurator import parse
    from nanochat.scaling import accumulation_steps
    from nanochat.sizing import checkpoint_bytes, flops_per_token
    from scripts import base_train

    settings = parse(base_train.Config, flags)
    if (settings.depth, settings.model_tag, settings.dry_run) != (one.depth, one.tag, False):
        raise UserError("--depth, --model-tag and --dry-run are not for --train-args")
    config = base_train.network(settings, vocab_size)
    horizon = base_train.plan_run(settings, config, ranks)
    if settings.device_batch_size is not None:
        accumulation_steps(horizon.total_batch_size, settings.device_batch_size, settings.max_seq_len, ranks)
    return flops_per_token(config) * horizon.num_tokens, checkpoint_bytes(config)


def vocabulary() -> int:
    """Size of the vocabulary that is here, or of the one that tok_train would learn."""
    from nanochat.tokenizer import get_tokenizer
    from scripts import tok_train

    try:
        return get_tokenizer().get_vocab_size()
    except UserError:
        return tok_train.Config().vocab_size


def _words(flags: str, cfg: Config) -> list[str]:
    try:
        return shlex.split(flags)
    except ValueError as error:
        raise UserError(f"--train-args={cfg.train_args!r}: {error}") from None


def train_flags(cfg: Config, one: Run) -> str:
    """Flags of one run: no intermediate evaluation, CORE in full at the end."""
    rows = 8 if one.depth >= 28 else 16 if one.depth >= 20 else 32
    flags = f"--depth={one.depth} --model-tag={one.tag} --device-batch-size={rows} --core-metric-every=999999"
    flags += " --core-metric-max-per-task=-1 --sample-every=-1 --save-every=-1"
    if one.flops_budget:
        flags += (
            f" --target-flops={one.flops_budget} --target-param-data-ratio=-1 --eval-tokens={100 * 524288}"
        )
    wandb_run = os.environ.get("WANDB_RUN") or "dummy"
    if wandb_run != "dummy":
        flags += f" --run={wandb_run}_d{one.depth}"
    return f"{flags} {cfg.train_args}".rstrip()  # of a repeated flag the last one counts


# --- results -----------------------------------------------------------------------------------------


def write_rows(path: Path, kind: str, runs: Sequence[Run], base: Path) -> None:
    """Write the CSV anew from the summaries of the runs that are finished."""
    columns = MINISERIES_COLUMNS if kind == "miniseries" else SCALING_COLUMNS
    rows = []
    for one in runs:
        summary = base / "base_checkpoints" / one.tag / "run_summary.json"
        if summary.exists():
            rows.append(row(kind, one, read_json(summary)))
    with whole_file(path, "w") as file:
        file.write(",".join(columns) + "\n")
        file.writelines(",".join(_cell(values[column]) for column in columns) + "\n" for values in rows)


def row(kind: str, one: Run, summary: dict) -> dict[str, object]:
    """CSV values of one run, by column."""
    groups = summary["num_params"]
    values: dict[str, object] = {
        "flops_budget": one.flops_budget, "num_params": groups["total"], "params_total": groups["total"],
        "params_transformer": groups["transformer_matrices"],
        "param_data_ratio": summary["tokens_trained"] / summary["num_scaling_params"],
        "core_score": summary.get("core_score"),
    }  # fmt: skip
    values |= {
        f"params_{group}": groups.get(group, 0) for group in _GROUPS if f"params_{group}" not in values
    }
    copied = ("depth", "model_dim", "num_scaling_params", "num_iterations", "tokens_trained", "val_bpb")
    return values | {name: summary[name] for name in (*copied, "train_time_sec")}


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    run(Config, main)
