"""Text of the training report: numbers, Markdown tables, sections, header. Pure functions, no files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from nanochat.confidence import wilson
from nanochat.environment import Bloat, Git, Hardware, Software
from nanochat.metrics import duration

# Score of a model that guesses; ChatCORE and CORE are centred so that guessing gives 0.
CHANCE = {
    "CORE": 0.0, "ARC-Challenge": 0.25, "ARC-Easy": 0.25, "GSM8K": 0.0, "HumanEval": 0.0, "MMLU": 0.25,
    "SpellingBee": 0.0, "ChatCORE": 0.0,
}  # fmt: skip
TASKS = tuple(name for name in CHANCE if name not in ("CORE", "ChatCORE"))

# Settings are the command line of a script: many entries with names of Python attributes. Fewer are results.
_MOST_RESULTS = 8
# These sections list many benchmarks whose names look like attributes.
_ALL_RESULTS = ("base-model-evaluation", "base-model-loss")

Item = str | Mapping[str, object] | None


# --- values ------------------------------------------------------------------------------------------


def format_value(value: object) -> str:
    """A value as the report shows it: 4 decimals, 3 significant digits below 1e-3, thousands separators."""
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10000 else str(value)
    if isinstance(value, float):
        return f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.4f}"
    return str(value)


def format_seconds(seconds: float | None) -> str:
    """A duration for people; `unknown` for None and for negative ones, which clocks that were set give."""
    return "unknown" if seconds is None or seconds < 0 else duration(seconds)


def format_bytes(count: float) -> str:
    """A size in the largest unit that keeps it above 1, with binary steps."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit in ("B", "KB") else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TB"


def fenced(text: str, indent: str = "") -> str:
    """Text that must not become markup (samples, model output), in a fence longer than any inside it."""
    # An untrained model prints control characters, with which tools take the report for a binary file.
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", lambda match: f"\\x{ord(match[0]):02x}", text)
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return "\n".join(indent + line for line in [f"{fence}text", *text.split("\n"), fence])


# --- tables ------------------------------------------------------------------------------------------


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    widths: Sequence[int] | None = None,
    align: str = "",
) -> str:
    """A Markdown table padded so that it also reads well as plain text; align has `<` or `>` per column."""
    widths = widths or [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    align = align or "<" * len(columns)
    rules = [
        "-" * (width + 1) + (":" if side == ">" else "-") for width, side in zip(widths, align, strict=True)
    ]
    lines = [_row(columns, widths, align), "|" + "|".join(rules) + "|"]
    return "\n".join(lines + [_row(row, widths, align) for row in rows]) + "\n"


def _row(cells: Sequence[str], widths: Sequence[int], align: str) -> str:
    padded = [f"{cell:{side}{width}}" for cell, width, side in zip(cells, widths, align, strict=True)]
    return "| " + " | ".join(padded) + " |"


def _cell(value: object) -> str:
    text = value if isinstance(value, str) else format_value(value)
    return text.replace("|", "\\|").replace("<", "&lt;")


def summary_table(
    metrics: Mapping[str, Mapping[str, float]],
    stages: Sequence[str],
    intervals: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
) -> str:
    """Metrics by stage, 95 % intervals and the score of guessing: CORE, the tasks, the others, ChatCORE."""
    order = ["CORE", *sorted(t for t in TASKS if t != "SpellingBee"), "SpellingBee", "val bpb", "ChatCORE"]
    columns = ["Metric", *(stage.upper() for stage in stages), "Chance"]
    rows = []
    for metric in (m for m in order if m in metrics):
        known = (intervals or {}).get(metric, {})
        scores = [
            score_text(metrics[metric][s], known.get(s)) if s in metrics[metric] else "-" for s in stages
        ]
        rows.append([metric, *scores, f"{CHANCE[metric]:.4f}" if metric in CHANCE else "-"])
    cells = [max([8, *(len(row[i]) for row in rows)]) for i in range(1, len(columns))]
    return table(columns, rows, widths=[15, *cells])


def score_text(value: float, interval: Sequence[float] | None) -> str:
    """A score with its interval, if that is known."""
    return f"{value:.4f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


# --- sections ----------------------------------------------------------------------------------------


def section_markdown(title: str, timestamp: str, items: Sequence[Item]) -> str:
    """The plain form of one section, as `log` stores it: strings verbatim, dicts as `- key: value` lines."""
    parts = [f"## {title}\n", f"timestamp: {timestamp}\n", "\n"]
    for item in items:
        if not item:
            continue
        if isinstance(item, str):
            parts.append(item)
            continue
        for key, value in item.items():
            text = format_value(value)
            multiline = "\n" in text or text.startswith("#")
            parts.append(f"- {key}:\n\n{fenced(text, '  ')}\n\n" if multiline else f"- {key}: {text}\n")
    return "".join(parts) + "\n"


def kind_of(section: Mapping) -> str:
    """The slug of a section's plain title, without the model that it is about."""
    return section.get("kind", section["slug"])


def rich_section(section: Mapping, note: str = "") -> str:
    """The report's form of one section: scores beside chance, results as a table, settings folded away."""
    parts = [f"## {section['section']}\n", f"{note}\n" if note else ""]
    settings: dict[str, object] = {}
    for item in section["items"]:
        if isinstance(item, str):
            parts.append(item.rstrip("\n") + "\n")
        elif item:
            parts += _rich_item(item, None if kind_of(section) in _ALL_RESULTS else settings)
    if settings:
        parts.append(_folded("Settings", key_value_table(settings)))
    if section.get("command"):
        parts.append(_folded("Command", f"```bash\n{section['command']}\n```\n"))
    return "\n".join(part for part in parts if part) + "\n"


def _rich_item(item: Mapping[str, object], settings: dict[str, object] | None) -> list[str]:
    """Render scores, results and samples; move the many settings of a script into `settings`, if given."""
    scores = {k: v for k, v in item.items() if k in TASKS and isinstance(v, float | int)}
    samples = {k: v for k, v in item.items() if k.startswith(("sample ", "unconditioned "))}
    problems = {k: v for k, v in item.items() if k.removesuffix(" problems") in TASKS and k not in scores}
    rest = {k: v for k, v in item.items() if k not in scores | samples | problems}
    named_like_code = [key for key in rest if re.fullmatch(r"[a-z][a-z0-9_]*", key)]
    if settings is not None and len(named_like_code) > _MOST_RESULTS:
        settings.update({key: rest.pop(key) for key in named_like_code})
    parts = [key_value_table(rest)] if rest else []
    if scores:
        parts.append(score_table(scores, problems))
    if samples:
        shown = "\n\n".join(f"*{key}*\n\n{fenced(str(value))}" for key, value in samples.items())
        parts.append(_folded(f"{len(samples)} samples", shown + "\n"))
    return parts


def key_value_table(item: Mapping[str, object]) -> str:
    """One row per entry; multi-line values are shown on one line."""
    return table(["", "Value"], [[_cell(k), _cell(v).replace("\n", " ")] for k, v in item.items()])


def score_table(scores: Mapping[str, object], problems: Mapping[str, object] | None = None) -> str:
    """One row per task: score, its 95 % interval, what guessing gives, a bar from guessing to perfect.

    problems: `<task> problems` with their numbers, from which the intervals are computed.
    """
    rows = []
    for name, value in scores.items():
        score, chance, total = float(str(value)), CHANCE[name], (problems or {}).get(f"{name} problems")
        bar = "\u2588" * round(10 * max(0.0, min(1.0, (score - chance) / (1 - chance))))
        low, high = wilson(round(score * int(str(total))), int(str(total))) if total else (0.0, 1.0)
        rows.append(
            [name, f"{score:.1%}", f"{low:.1%} to {high:.1%}" if total else "-", f"{chance:.0%}",
             f"`{bar:\u2591<10}`"]  # light shade
        )  # fmt: skip
    return table(["Task", "Score", "95 %", "Chance", "From chance to perfect"], rows, align="<>>><")


def _folded(summary: str, body: str) -> str:
    return f"<details><summary>{summary}</summary>\n\n{body}\n</details>\n"


# --- header ------------------------------------------------------------------------------------------


def header_markdown(
    generated: str, git: Git, hardware: Hardware, software: Software, bloat: Bloat, usd: float | None
) -> str:
    """Title and environment of a run; the caller appends when it started."""
    state = "dirty" if git.dirty else "clean"
    lines = [
        "# nanochat training report", "", f"Generated: {generated}", "", "## Environment", "",
        "### Git Information", f"- Branch: {git.branch}",
        f"- Commit: {git.commit}" + ("" if git.commit == "unknown" else f" ({state})"),
        f"- Message: {git.message}", "", "### Hardware", *_hardware_lines(hardware, usd), "",
        "### Software", f"- Python: {software.python}", f"- PyTorch: {software.torch}",
        f"- nanochat: {software.nanochat}", f"- Compute dtype: {software.compute_dtype}",
        f"- World size: {software.world_size}",
        *([f"- wandb run: {software.wandb_run}"] if software.wandb_run else []), "", "",
        "### Bloat", *bloat_lines(bloat), "",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _hardware_lines(hardware: Hardware, usd: float | None) -> list[str]:
    memory = "unknown" if hardware.memory_bytes is None else f"{hardware.memory_bytes / 2**30:.1f} GB"
    physical = hardware.physical_cores or "unknown"
    lines = [
        f"- Platform: {hardware.platform}",
        f"- CPUs: {physical} cores ({hardware.usable_cores} logical)",
        f"- Memory: {memory}",
    ]
    if not hardware.gpus:
        return [*lines, "- GPUs: None available"]
    names = ", ".join(dict.fromkeys(gpu.name for gpu in hardware.gpus))
    total = sum(gpu.memory_bytes for gpu in hardware.gpus) / 2**30
    lines += [
        f"- GPUs: {len(hardware.gpus)}x {names}",
        f"- GPU Memory: {total:.1f} GB total",
        f"- CUDA Version: {hardware.cuda_version}",
    ]
    return [*lines, f"- Hourly Rate: ${usd:.2f}/hour"] if usd is not None else lines


def bloat_lines(bloat: Bloat) -> list[str]:
    """How much code there is to read."""
    return [
        f"- Characters: {bloat.characters:,}",
        f"- Lines: {bloat.lines:,}",
        f"- Files: {bloat.files:,}",
        f"- Tokens (approx): {bloat.tokens:,}",
        f"- Dependencies (uv.lock lines): {bloat.uv_lock_lines:,}",
    ]
