"""Score a chat model on its tasks: ARC, MMLU, GSM8K, HumanEval, SpellingBee, and their mean ChatCORE.

python -m scripts.chat_eval -i sft
torchrun --nproc_per_node=8 -m scripts.chat_eval -i sft -a "GSM8K|MMLU"
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat.common import UserError, read_json, write_json
from nanochat.configurator import as_dict, option, run
from nanochat.options import STAGES, WhichModel

if TYPE_CHECKING:
    from tasks.chat_eval import TaskScore


@dataclass(frozen=True)
class Config(WhichModel):
    source: str = option(..., "stage of the checkpoint", short="i", choices=STAGES)
    task_name: str = option("", "names of tasks, separated by |; default all", short="a")
    dtype: str | None = option(
        None,
        "dtype of matrix products; default by hardware",
        short="d",
        choices=("bfloat16", "float16", "float32"),
    )
    temperature: float = option(0.0, "sampling temperature; 0 is greedy", short="t", least=0)
    max_new_tokens: int = option(512, "longest generated answer, in tokens", short="m", least=1)
    num_samples: int = option(1, "answers per problem; one right one is enough", short="n", least=1)
    top_k: int = option(50, "sample from the k likeliest tokens", short="k", least=0)
    batch_size: int = option(
        8, "rows of the full context in a forward pass, multiple choice", short="b", least=1
    )
    max_problems: int = option(
        -1, "evaluate only the first problems of each task; -1 = all", short="x", least=1, off=-1
    )


def main(cfg: Config) -> None:
    """Score a chat model on its tasks, print accuracies and ChatCORE, and save them beside the checkpoint."""
    from nanochat.checkpoint_manager import Checkpoint, load_model, locate
    from nanochat.common import data_source, distributed, print0
    from nanochat.engine import Engine
    from nanochat.report import get_report
    from tasks.chat_eval import EvalOptions, run_chat_eval

    names = task_names(cfg)
    if cfg.dtype:
        os.environ["NANOCHAT_DTYPE"] = cfg.dtype
    with distributed(cfg.device_type) as world:
        directory, step = locate(cfg.source, cfg.model_tag, cfg.step, contents=False)
        print0(f"model: {directory} step {step} | data source: {data_source()}")
        model, tokenizer, _ = load_model(cfg.source, world.device, "eval", directory.name, step)
        options = EvalOptions(
            cfg.batch_size, cfg.num_samples, cfg.max_new_tokens, cfg.temperature, cfg.top_k, cfg.max_problems
        )
        checkpoint = Checkpoint.open(directory, step)
        scores = run_chat_eval(names, Engine(model, tokenizer), world, options)
        metrics = summary(scores)
        for name, value in metrics.items():
            print0(f"{name}: {value:.4f}")
        if interval := interval_of(scores):
            low, high = interval.values()
            print0(f"95 % of resampled problems give a ChatCORE of {low:.4f} to {high:.4f}")
            metrics |= interval
        if world.is_main:
            path = directory / f"chat_eval_{step:06d}.json"
            print0(save(path, scores, checkpoint.weights_sha256, asdict(options)))
        accuracies: dict[str, float] = {name: score.accuracy for name, score in scores.items()}
        accuracies |= {f"{name} problems": score.total for name, score in scores.items()}
        get_report().log(
            section=f"Chat evaluation {cfg.source}",
            data=[as_dict(cfg) | {"model_tag": directory.name, "step": step}, accuracies, metrics],
            model=checkpoint,
            covers={name: score.total for name, score in scores.items()},
        )


def task_names(cfg: Config) -> list[str]:
    """The tasks asked for. Raises UserError for an unknown one or for numbers without a meaning."""
    from tasks.chat_eval import ALL_TASKS

    names: list[str] = cfg.task_name.split("|") if cfg.task_name else [*ALL_TASKS]
    if unknown := [name for name in names if name not in ALL_TASKS]:
        raise UserError(f"--task-name: unknown {', '.join(unknown)}; there are {', '.join(ALL_TASKS)}")
    for flag in ("batch_size", "num_samples", "max_new_tokens"):
        if getattr(cfg, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')}={getattr(cfg, flag)} must be at least 1")
    if cfg.max_problems == 0:
        raise UserError("--max-problems=0 leaves nothing to evaluate; use -1 for all problems")
    return names


def summary(scores: dict[str, TaskScore]) -> dict[str, float]:
    """ChatCORE over the six tasks and over the five of the published scores, where all were evaluated."""
    from tasks.chat_eval import ALL_TASKS, CATEGORICAL_TASKS, FIVE_TASKS, chat_core

    accuracies = {name: score.accuracy for name, score in scores.items()}
    means = {
        "ChatCORE metric": chat_core(accuracies, ALL_TASKS),
        "ChatCORE without SpellingBee": chat_core(accuracies, FIVE_TASKS),
        "ChatCORE categorical": chat_core(accuracies, CATEGORICAL_TASKS),
    }
    return {name: value for name, value in means.items() if value is not None}


def interval_of(scores: dict[str, TaskScore]) -> dict[str, float]:
    """Both ends of the 95 % interval of ChatCORE, where all tasks were evaluated."""
    from tasks.chat_eval import chat_core_interval

    interval = chat_core_interval(scores)
    return {} if interval is None else {"ChatCORE 95% low": interval.low, "ChatCORE 95% high": interval.high}


def save(path: Path, scores: dict[str, TaskScore], weights: str, options: dict) -> str:
    """Write the results beside the checkpoint, and say where they are.

    Tasks that were not evaluated now keep their entries, and so do those that were on more problems of the same
    weights. The metrics are those of all entries.
    """
    from nanochat.report import covered_less
    from tasks.chat_eval import TaskScore

    record = read_json(path) if path.exists() else {}
    tasks = record.get("tasks", {}) if record.get("weights") == weights else {}
    before = {name: tasks[name]["total"] for name in scores if name in tasks}
    less = covered_less({name: score.total for name, score in scores.items()}, before)
    for name, score in scores.items():
        if name in less:
            continue
        tasks[name] = asdict(score) | {
            "accuracy": score.accuracy, "interval": score.interval, "chance": score.chance, "options": options,
        }  # fmt: skip
    stored = {
        name: TaskScore(*(task[field.name] for field in fields(TaskScore))) for name, task in tasks.items()
    }
    metrics = summary(stored) | interval_of(stored)
    write_json(path, {"weights": weights, "tasks": tasks, "metrics": metrics})
    kept = f" keeps what was made on more problems: {', '.join(less.values())}" if less else ""
    return f"results: {path}{kept}"


if __name__ == "__main__":
    run(Config, main)
