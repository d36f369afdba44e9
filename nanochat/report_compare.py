"""Several runs side by side: scores with their intervals, what differs in their settings, and curves.

    python -m nanochat.report compare ~/runs/a ~/runs/b     # writes compare.md and compare.html here

A run is named by its base folder, its report folder or its report.json.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory

from nanochat.common import UserError, print0, read_json, whole_file
from nanochat.options import STAGES
from nanochat.report_html import figure, html_table, page, score_cell
from nanochat.report_render import CHANCE, TASKS, format_seconds, format_value, score_text, table

MISSING = "-"
_GENERATE = "write it with that base folder as NANOCHAT_BASE_DIR: python -m nanochat.report generate"


@dataclass(frozen=True)
class Run:
    """A finished report; base is the folder of its checkpoints."""

    name: str
    base: Path
    report: Mapping

    @property
    def busy_seconds(self) -> float | None:
        return sum(self.report["stage_seconds"].values()) or self.report["wall_clock_seconds"]

    def score(self, metric: str, stage: str) -> float | None:
        return self.report["summary"]["metrics"].get(metric, {}).get(stage)

    def interval(self, metric: str, stage: str) -> Sequence[float] | None:
        # reports of older versions have none
        return self.report["summary"].get("intervals", {}).get(metric, {}).get(stage)


def compare(paths: Sequence[Path], folder: Path) -> str:
    """Write compare.md and compare.html into folder; returns the Markdown. UserError for fewer than two runs."""
    if len(paths) < 2:
        raise UserError("compare needs two runs or more: python -m nanochat.report compare RUN RUN")
    runs = load_runs(paths)
    text = "\n".join(
        [
            "# nanochat runs compared\n",
            _overview(runs),
            "## Scores\n",
            _scores(runs),
            _LEGEND,
            *_settings(runs),
        ]
    )
    with whole_file(folder / "compare.md", "w") as file:
        file.write(text)
    with whole_file(folder / "compare.html", "w") as file:
        file.write(_html(runs))
    print0(f"written: {folder / 'compare.md'} and compare.html", file=sys.stderr)
    return text


_LEGEND = "In brackets: 95 % intervals. **Bold**: better than all others beyond both intervals.\n"


_SAME_SETTINGS = "All runs have the same settings."


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """The reports at these places, named by the shortest ends of their paths that differ."""
    files = [_report_file(path) for path in paths]
    files = [file.resolve() for file in files]
    if repeated := next((file for place, file in enumerate(files) if file in files[:place]), None):
        raise UserError(f"compare: {repeated} is named twice")
    bases, folders = [file.parent.parent for file in files], [file.parent for file in files]
    # A base folder may hold more than one report, and a folder copies of report.json under other names.
    places = next(each for each in (bases, folders, files) if len(set(each)) == len(each))
    depth = 1
    while len({place.parts[-depth:] for place in places}) < len(places):
        depth += 1
    names = ["/".join(place.parts[-depth:]) for place in places]
    return [Run(name, base, _read(file)) for name, base, file in zip(names, bases, files, strict=True)]


def _report_file(path: Path) -> Path:
    for candidate in (path, path / "report.json", path / "report" / "report.json"):
        if candidate.is_file():
            return candidate
    raise UserError(f"no report.json in {path}; {_GENERATE}")


def _read(file: Path) -> Mapping:
    report = read_json(file)
    needed = {
        "header": dict, "sections": list, "summary": dict, "stage_seconds": dict, "wall_clock_seconds": object,
        "cost_usd": object,
    }  # fmt: skip
    wrong = [
        name for name, kind in needed.items() if name not in report or not isinstance(report[name], kind)
    ]
    if wrong:
        raise UserError(f"{file} is no whole report, it lacks {', '.join(wrong)}; {_GENERATE}")
    return report


# --- what is compared --------------------------------------------------------------------------------


def _rows(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """(metric, stage) of every score that any run has, in the order of the report."""
    order = ("CORE", *TASKS, "val bpb", "ChatCORE")
    return [(m, s) for m in order for s in STAGES if any(run.score(m, s) is not None for run in runs)]


def best_run(runs: Sequence[Run], metric: str, stage: str) -> Run | None:
    """The run that is surely best: no other's interval reaches its own. Of a score without one nobody is sure."""
    scored = [(score, run) for run in runs if (score := run.score(metric, stage)) is not None]
    if len(scored) < 2:
        return None
    if metric == "val bpb":  # over so many bytes that its interval would be narrower than its digits
        (lowest, best), (second, _), *_ = sorted(scored, key=lambda pair: pair[0])
        return best if lowest < second else None
    intervals = [(run.interval(metric, stage), run) for _, run in scored]
    known = [(interval, run) for interval, run in intervals if interval is not None]
    if len(known) < len(scored):
        return None
    (highest, best), *others = sorted(known, key=lambda pair: pair[0][0], reverse=True)
    return best if highest[0] > max(interval[1] for interval, _ in others) else None


def _facts(run: Run) -> dict[str, str]:
    header = run.report["header"]
    hardware, cost = header.get("hardware", {}), run.report["cost_usd"]
    gpus = hardware.get("gpus") or []
    return {
        "commit": str(header.get("git", {}).get("commit", "unknown")),
        "started": str(header.get("started", "unknown"))[:16].replace("T", " "),
        "hardware": f"{len(gpus)} x {gpus[0]['name']}"
        if gpus
        else f"{hardware.get('usable_cores', '?')} cores",
        "time": format_seconds(run.busy_seconds),
        "cost": MISSING if cost is None else f"${cost:.2f}",
    }


def differing_settings(runs: Sequence[Run]) -> list[tuple[str, str, list[str]]]:
    """(section, setting, value per run) of what is not the same in all runs."""
    values: dict[tuple[str, str], dict[str, str]] = {}
    for run in runs:
        for section in run.report["sections"]:
            settings = next((item for item in section["items"] if isinstance(item, Mapping)), {})
            if section["section"].startswith(
                ("Base model training", "Mid", "Chat SFT", "Chat DPO", "Chat RL", "Tokenizer t")
            ):
                for key, value in settings.items():
                    values.setdefault((section["section"], key), {})[run.name] = format_value(value)
    found = []
    for (section, key), by_run in values.items():
        shown = [by_run.get(run.name, MISSING) for run in runs]
        if len(set(shown)) > 1:
            found.append((section, key, shown))
    return found


# --- Markdown ----------------------------------------------------------------------------------------


def _overview(runs: Sequence[Run]) -> str:
    facts = [_facts(run) for run in runs]
    return table(["", *(r.name for r in runs)], [[key, *(fact[key] for fact in facts)] for key in facts[0]])


def _scores(runs: Sequence[Run]) -> str:
    rows = []
    for metric, stage in _rows(runs):
        best, cells = best_run(runs, metric, stage), []
        for run in runs:
            score = run.score(metric, stage)
            text = MISSING if score is None else score_text(score, run.interval(metric, stage))
            cells.append(f"**{text}**" if run is best else text)
        chance = f"{CHANCE[metric]:.4f}" if metric in CHANCE else MISSING
        rows.append([metric, stage.upper(), *cells, chance])
    return table(["Metric", "Stage", *(run.name for run in runs), "Chance"], rows)


def _settings(runs: Sequence[Run]) -> list[str]:
    rows = [[section, key, *shown] for section, key, shown in differing_settings(runs)]
    if not rows:
        return ["## Settings\n", f"{_SAME_SETTINGS}\n"]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return ["## Settings that differ\n", table(["Stage", "Setting", *(run.name for run in runs)], cells)]


# --- HTML --------------------------------------------------------------------------------------------


def _html(runs: Sequence[Run]) -> str:
    facts, names = [_facts(run) for run in runs], [run.name for run in runs]
    rows = []
    for metric, stage in _rows(runs):
        best = best_run(runs, metric, stage)
        cells = [score_cell(metric, run.score(metric, stage), run.interval(metric, stage)) for run in runs]
        marked = [f"<b>{cell}</b>" if run is best else cell for run, cell in zip(runs, cells, strict=True)]
        rows.append(
            [metric, stage.upper(), *marked, f"{CHANCE[metric]:.0%}" if metric in CHANCE else MISSING]
        )
    overview = [[escape(key), *(escape(fact[key]) for fact in facts)] for key in facts[0]]
    parts = [
        html_table(["", *names], overview),
        "<h2>Scores</h2>",
        html_table(["", "", *names, "Chance"], rows),
    ]
    parts.append(
        '<p class="muted">Below a score: its 95 % interval. Bold: better than all others beyond both intervals.</p>'
    )
    parts += ["<h2>Curves</h2>", *_curves(runs)]
    parts += _settings_html(runs)
    return page("nanochat runs compared", "\n".join(parts))


def _settings_html(runs: Sequence[Run]) -> list[str]:
    rows = [[escape(c) for c in (section, key, *shown)] for section, key, shown in differing_settings(runs)]
    if not rows:
        return ["<h2>Settings</h2>", f"<p>{_SAME_SETTINGS}</p>"]
    heads = ["Stage", "Setting", *(run.name for run in runs)]
    return ["<h2>Settings that differ</h2>", html_table(heads, rows)]


def _curves(runs: Sequence[Run]) -> list[str]:
    from nanochat.plots import find_metrics, save
    from nanochat.plots_compared import compared_figures

    # Where a base folder has several reports, its curves are of the run that began last.
    last = {run.base: run for run in sorted(runs, key=lambda run: run.report["header"].get("started", ""))}
    shown = []
    with TemporaryDirectory() as scratch:
        figures = compared_figures(
            {run.name: find_metrics(run.base) if run is last[run.base] else {} for run in runs}
        )
        for place, (caption, drawing) in enumerate(figures):
            path = Path(scratch) / f"{place}.png"
            save(drawing, path)
            shown.append(figure(path, caption))
    return shown or ['<p class="muted">No metrics lie beside these reports.</p>']
