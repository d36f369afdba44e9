"""CORE of models that everybody has: a check that the evaluation here is the published one, and a yardstick.

    python -m scripts.base_eval --hf-path=openai-community/gpt2 --eval=core

prints the scores found beside these. They are upstream's, on all examples of the evaluation bundle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath

CORE_TOLERANCE = 0.005  # rounding of another machine or dtype moves few examples
TASK_TOLERANCE = 0.01


@dataclass(frozen=True, slots=True)
class Reference:
    """Published scores of a model: CORE, and accuracies of some tasks (0 to 1)."""

    title: str
    core: float
    accuracies: Mapping[str, float]


_TASKS = ("hellaswag_zeroshot", "lambada_openai", "hellaswag", "piqa", "arc_easy", "arc_challenge")
_PERCENT = {
    "gpt2": ("GPT-2 124M", 0.1139, (30.9, 32.3, 30.8, 62.3, 41.2, 22.2)),
    "gpt2-medium": ("GPT-2 355M", 0.1849, (39.0, 42.6, 39.5, 67.0, 48.0, 26.2)),
    "gpt2-large": ("GPT-2 774M", 0.2146, (44.0, 48.8, 44.4, 69.8, 53.5, 26.4)),
    "gpt2-xl": ("GPT-2 1.6B", 0.256525, (50.2, 52.3, 51.2, 72.5, 59.5, 29.9)),
}
REFERENCES = {
    name: Reference(title, core, {task: value / 100 for task, value in zip(_TASKS, values, strict=True)})
    for name, (title, core, values) in _PERCENT.items()
}


def reference_of(path: str) -> Reference | None:
    """The published scores of a Hugging Face model by the last part of its name or folder; None if unknown."""
    return REFERENCES.get(PurePath(path).name)


def compare(reference: Reference, core: float, accuracies: Mapping[str, float], is_whole: bool) -> list[str]:
    """Lines of scores found and published, and a verdict. is_whole: whether all examples were evaluated."""
    rows = [
        (task, accuracies[task], value) for task, value in reference.accuracies.items() if task in accuracies
    ]
    rows.append(("CORE", core, reference.core))
    lines = [f"{reference.title:<24} found  published  difference"]
    lines += [
        f"{name:<22} {found:7.4f}    {value:7.4f}     {found - value:+7.4f}" for name, found, value in rows
    ]
    if not is_whole:
        return [*lines, "self-check: only a part of the examples was evaluated, so the scores may differ"]
    off = [
        name
        for name, found, value in rows
        if abs(found - value) > (CORE_TOLERANCE if name == "CORE" else TASK_TOLERANCE)
    ]
    verdict = f"differs: {', '.join(off)}" if off else "passed, the scores are the published ones"
    return [*lines, f"self-check: {verdict}"]


def neighbours(core: float) -> str:
    """Between which of the known models a CORE lies, as a phrase."""
    ranked = sorted(REFERENCES.values(), key=lambda reference: reference.core)
    below = [r for r in ranked if r.core <= core]
    above = [r for r in ranked if r.core > core]
    parts = [f"above {below[-1].title} ({below[-1].core:.4f})"] if below else []
    parts += [f"below {above[0].title} ({above[0].core:.4f})"] if above else []
    return ", ".join(parts)
