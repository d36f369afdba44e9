"""The README.md of an exported folder: what the model is, how to run it, and what it scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nanochat.interop.hf_config import describe, is_classic
from nanochat.network_config import GPTConfig
from nanochat.report_render import TASKS, kind_of, table

TRANSFORMERS = "5.20"  # the oldest version that the tests run with; pyproject.toml says the same
_BASE_SCORES = ("CORE metric", "train bpb", "val bpb")
_CHAT_SCORES = (*TASKS, "ChatCORE metric")


def model_card(
    name: str, config: GPTConfig, num_parameters: int, stage: str, step: int, scores: dict[str, float]
) -> str:
    """The card, in the hub's format. scores may be empty."""
    trust = "" if is_classic(config) else ", trust_remote_code=True"
    needs = "" if is_classic(config) else "; modeling_nanochat_modern.py in this folder is its code"
    header = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        "- nanochat",
        "---",
    ]
    lines = [
        *header, "", f"# {name}", "",
        f"A [nanochat](https://github.com/karpathy/nanochat) model, stage {stage}, step {step:,}: {describe(config)},"
        f" {num_parameters:,} parameters. The weights are fp32, exactly as trained{needs}.", "",
        f"Needs transformers {TRANSFORMERS} or newer. Logits equal nanochat's up to its context of {config.sequence_len:,}"
        " tokens; no text was longer in training. Beyond that, transformers' full attention still sees everything while"
        " nanochat's looks no further back than the context, and answers of both get worse.", "",
        "```python", *(_chat_example(trust) if stage != "base" else _base_example(trust)), "```", "",
    ]  # fmt: skip
    if stage != "base":
        lines += [
            "A tool call stands between `<|python_start|>` and `<|python_end|>`. nanochat's own engine evaluates it"
            " and inserts the result between `<|output_start|>` and `<|output_end|>`; transformers does not.", "",
        ]  # fmt: skip
    lines += ["## Scores", "", _score_table(scores)]
    return "\n".join(lines).rstrip() + "\n"


def _chat_example(trust: str) -> list[str]:
    return [
        "from transformers import pipeline",
        f'chat = pipeline("text-generation", "PATH OR NAME OF THIS MODEL"{trust})',
        'answer = chat([{"role": "user", "content": "Why is the sky blue?"}], max_new_tokens=200)',
        'print(answer[0]["generated_text"][-1]["content"])',
    ]


def _base_example(trust: str) -> list[str]:
    return [
        "from transformers import pipeline",
        f'complete = pipeline("text-generation", "PATH OR NAME OF THIS MODEL"{trust})',
        "# every text that the model was trained on begins with <|bos|>",
        'print(complete("<|bos|>The capital of France is", max_new_tokens=20)[0]["generated_text"])',
    ]


def _score_table(scores: dict[str, float]) -> str:
    if not scores:
        return "Not evaluated."
    return table(
        ["Evaluation", "Score"], [[name, f"{value:.4f}"] for name, value in scores.items()], align="<>"
    )


def report_scores(base: Path, stage: str, tag: str, step: int) -> dict[str, float]:
    """What the report of a base folder says about exactly this checkpoint; empty if it was not evaluated."""
    from nanochat.report import Report

    if not (base / "report").is_dir():
        return {}
    slug = "base-model-evaluation" if stage == "base" else f"chat-evaluation-{stage}"
    wanted = _BASE_SCORES if stage == "base" else _CHAT_SCORES
    for section in Report(base / "report").sections():
        items = [item for item in section["items"] if isinstance(item, dict)]
        if kind_of(section) == slug and items and _is_about(items[0], stage, tag, step):
            found = {key: value for item in items for key, value in item.items() if key in wanted}
            return {name: float(found[name]) for name in wanted if isinstance(found.get(name), int | float)}
    return {}


def _is_about(first: dict[str, Any], stage: str, tag: str, step: int) -> bool:
    """Whether a section's first item names this checkpoint."""
    if stage == "base":
        return first.get("model") == f"base model {tag} (step {step})"
    return first.get("step") == step and first.get("model_tag") == tag
