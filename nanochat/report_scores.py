"""Scores of a run out of the sections of its report: by metric and stage, with their 95 % intervals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from nanochat.confidence import wilson
from nanochat.options import STAGES
from nanochat.report_render import TASKS

ByStage = dict[str, dict[str, float]]
Intervals = dict[str, dict[str, tuple[float, float]]]


def metrics_of(sections: Sequence[Mapping]) -> ByStage:
    """{metric: {stage: value}} of the summary table."""
    wanted: dict[str, tuple[str, dict[str, str]]] = {
        "base-model-training": ("base", {"Final core_metric": "CORE", "Final val/bpb": "val bpb"}),
        "base-model-loss": ("base", {"val bpb": "val bpb"}),
        "base-model-evaluation": ("base", {"CORE metric": "CORE", "val bpb": "val bpb"}),
    }
    tasks = {task: task for task in TASKS} | {"ChatCORE metric": "ChatCORE"}
    wanted |= {f"chat-evaluation-{stage}": (stage, tasks) for stage in STAGES}
    metrics: ByStage = {}
    for section in sections:
        stage, names = wanted.get(section["slug"], ("", {}))
        for key, value in _numbers(section):
            if key in names:
                metrics.setdefault(names[key], {})[stage] = value
    return metrics


def intervals_of(sections: Sequence[Mapping]) -> Intervals:
    """{metric: {stage: (low, high)}}: of CORE and ChatCORE as evaluated, of tasks from their numbers of problems."""
    found: Intervals = {}
    for section in sections:
        values = dict(_numbers(section))
        if section["slug"] == "base-model-evaluation" and "CORE 95% low" in values:
            found.setdefault("CORE", {})["base"] = (values["CORE 95% low"], values["CORE 95% high"])
        if section["slug"].startswith("chat-evaluation-"):
            stage = section["slug"].removeprefix("chat-evaluation-")
            if "ChatCORE 95% low" in values:
                interval = (values["ChatCORE 95% low"], values["ChatCORE 95% high"])
                found.setdefault("ChatCORE", {})[stage] = interval
            for task, interval in task_intervals(values).items():
                found.setdefault(task, {})[stage] = interval
    return found


def task_intervals(values: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """Intervals of the tasks in one item of a section, which holds `<task>` and `<task> problems`."""
    return {
        task: wilson(round(values[task] * values[f"{task} problems"]), int(values[f"{task} problems"]))
        for task in TASKS
        if task in values and f"{task} problems" in values
    }


def shown_stages(metrics: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Columns of the summary table: the stages that were evaluated, BASE and SFT always."""
    ran = {stage for scores in metrics.values() for stage in scores}
    return [stage for stage in STAGES if stage in ran or stage in ("base", "sft")]


def _numbers(section: Mapping) -> Iterator[tuple[str, float]]:
    for item in section["items"]:
        for key, value in item.items() if isinstance(item, Mapping) else ():
            if isinstance(value, float | int) and not isinstance(value, bool):
                yield key, float(value)
