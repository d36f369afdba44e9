"""Everything from an empty folder to a model that you can talk to, in one command.

    bash runs/speedrun.sh                       choose the plan by hardware
    bash runs/speedrun.sh --dry-run             show the plan and do nothing
    NANOCHAT_DATA=tinyworld bash runs/speedrun.sh    embedded data: no GPU, no network

Run it again to go on after an interruption; finished stages are skipped.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from nanochat.common import UserError, data_source, get_base_dir, read_json, remember_data_source
from nanochat.configurator import option, run


@dataclass(frozen=True)
class Config:
    plan: str = option(
        "auto", "which run; auto: by GPUs and NANOCHAT_DATA",
        choices=("auto", "speedrun", "run1000", "cpu", "tinyworld"),
    )  # fmt: skip
    dry_run: bool = option(False, "print stages, commands, sizes and expected times, and stop")
    from_stage: str = option(
        "", "start at this stage and repeat it; earlier ones are left alone", short="-from"
    )
    only: str = option("", "repeat this stage alone")
    force: bool = option(False, "repeat finished stages, and replace another plan's run in this base folder")
    rl: bool = option(False, "add reinforcement learning to plans on hub data")
    seed: int = option(0, "seed of data and training in the tinyworld plan")


def main(cfg: Config) -> None:
    """Train a chat model from nothing: data, tokenizer, all training stages, evaluation, report."""
    from nanochat.pipeline import Markers, describe, run_plan, selected, to_run

    base = get_base_dir()
    plan = make_plan(cfg)
    stages = selected(plan, cfg.from_stage, cfg.only)
    pending = to_run(stages, Markers(base / "run"), cfg.from_stage, cfg.only, cfg.force)
    free = shutil.disk_usage(base).free
    print(describe(plan, stages, pending, folder=base, free_bytes=free), flush=True)
    source = plan.environment["NANOCHAT_DATA"]
    problem = (
        check_data_set(source)
        or check_hub(source, [stage.name for stage in pending])
        or check_disk(plan.disk_bytes, free, base)
    )
    if cfg.dry_run:
        print(f"\nproblem: {problem}" if problem else "\ndry run: nothing was started", flush=True)
        return
    if problem:
        raise UserError(problem)
    remember_data_source(source)
    run_plan(plan, base / "run", base / "logs", start=cfg.from_stage, only=cfg.only, force=cfg.force)
    if not cfg.only:
        print(closing(base), flush=True)


def make_plan(cfg: Config):
    """The plan for this machine, and why it was chosen."""
    from nanochat import plans
    from nanochat.environment import gpus
    from nanochat.machine import usable_cores
    from nanochat.tinyworld_plan import tinyworld_plan

    wants_tinyworld = cfg.plan == "tinyworld" or (
        cfg.plan == "auto" and os.environ.get("NANOCHAT_DATA") == "tinyworld"
    )
    if wants_tinyworld:
        why = "asked for by --plan" if cfg.plan == "tinyworld" else "asked for by NANOCHAT_DATA=tinyworld"
        return tinyworld_plan(why, usable_cores(), cfg.seed)
    if cfg.plan == "cpu":
        return plans.cpu_plan()
    found = visible(gpus())
    if cfg.plan == "run1000":
        return plans.run1000_plan(found, cfg.rl)
    if found:
        return plans.gpu_plan(found, cfg.rl)
    if cfg.plan == "speedrun":
        raise UserError(
            "plan speedrun needs a CUDA GPU, and torch sees none; use --plan=tinyworld or --plan=cpu"
        )
    if os.environ.get("NANOCHAT_DATA"):
        data_source()  # rejects names that are no data source
        return plans.cpu_plan()
    why = f"no CUDA GPU here: embedded data, sized for {usable_cores()} cores"
    return tinyworld_plan(why, usable_cores(), cfg.seed)


def visible(found: tuple) -> tuple:
    """The GPUs to use: all, or the first NPROC_PER_NODE."""
    wanted = os.environ.get("NPROC_PER_NODE")
    if not wanted:
        return found
    if not wanted.isdigit() or not 1 <= int(wanted) <= max(1, len(found)):
        raise UserError(f"NPROC_PER_NODE={wanted} must be between 1 and the {len(found)} visible GPUs")
    return found[: int(wanted)]


# --- checks before anything starts -------------------------------------------------------------------


def check_data_set(source: str) -> str:
    """What is wrong where the user names a text that the plan would not train on; empty if nothing is."""
    named = os.environ.get("NANOCHAT_DATASET")
    if source != "tinyworld" or named in (None, "", "tinyworld"):
        return ""
    return (
        f"this plan trains on the embedded TinyWorld, not on NANOCHAT_DATASET={named}; unset that, or pretrain on your"
        " text by itself, without NANOCHAT_DATA=tinyworld: python -m scripts.base_train"
    )


def check_hub(source: str, pending: list[str]) -> str:
    """What is wrong with the network, if a pending stage needs it for that data source; empty if nothing is."""
    if source != "hub" or not any(name.startswith("data") for name in pending):
        return ""
    from nanochat.download import hub_endpoint

    endpoint = hub_endpoint()
    failure = hub_failure(endpoint)
    return failure and (
        f"the hub cannot be reached ({endpoint}: {failure}); set HF_ENDPOINT to a mirror, or use the embedded"
        " data source, which needs no network: NANOCHAT_DATA=tinyworld bash runs/speedrun.sh"
    )


def hub_failure(endpoint: str) -> str:
    """Why a HEAD request to the hub fails; empty if it answers."""
    from urllib.error import HTTPError, URLError
    from urllib.request import Request, urlopen

    try:
        urlopen(Request(endpoint, method="HEAD"), timeout=5.0).close()
    except HTTPError:
        return ""  # it answered
    except (URLError, OSError, ValueError) as error:
        return str(getattr(error, "reason", error))
    return ""


def check_disk(needed: int, free: int, base: Path) -> str:
    """What is wrong with the disk; empty if the plan fits in what is free and what the base folder holds."""
    from nanochat.report_render import format_bytes

    if needed <= free:
        return ""
    held = sum(path.stat().st_size for path in base.rglob("*") if path.is_file())
    if needed <= free + held:
        return ""
    return (
        f"{base} has {format_bytes(free)} free and the plan needs {format_bytes(needed)};"
        " set NANOCHAT_BASE_DIR to a larger disk"
    )


def closing(base: Path) -> str:
    """What the run achieved, and how to talk to the model."""
    from nanochat.report_render import format_seconds, summary_table
    from nanochat.report_scores import shown_stages

    path = base / "report" / "report.json"
    lines = [""]
    if path.exists():
        report = read_json(path)
        metrics = report["summary"]["metrics"]
        lines += [summary_table(metrics, shown_stages(metrics))]
        lines += [f"time in stages: {format_seconds(sum(report['stage_seconds'].values()))}"]
        lines += [f"report: {Path('report.md').resolve()}"]
    lines += [
        "", "Talk to it:",
        '  python -m scripts.chat_cli -p "Who are you?"',
        "  python -m scripts.chat_web",
        f"({activation()} first; the model is in {base})",
    ]  # fmt: skip
    return "\n".join(lines)


def activation() -> str:
    """How to get this environment, and this base folder if it is not the default, in a shell."""
    environment = os.environ.get("VIRTUAL_ENV") or ".venv"
    base = os.environ.get("NANOCHAT_BASE_DIR")
    return f"source {environment}/bin/activate" + (f"; export NANOCHAT_BASE_DIR={base}" if base else "")


if __name__ == "__main__":
    run(Config, main)
