"""The report as one HTML file that can be mailed or put on a server: style and pictures inside, no scripts."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from nanochat.report_render import CHANCE, TASKS, format_seconds, format_value
from nanochat.report_scores import shown_stages

STYLE = """
:root { --ink: #22262b; --muted: #6b737c; --rule: #e4e6e9; --accent: #2f5d8c; --soft: #f6f7f8; }
* { box-sizing: border-box; }
body { font: 15px/1.55 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: var(--ink); margin: 0;
  background: white; }
main { max-width: 1040px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 28px; margin: 0 0 4px; letter-spacing: -.01em; }
h3 { font-size: 15px; margin: 20px 0 4px; }
h2 { font-size: 19px; margin: 44px 0 12px; padding-top: 16px; border-top: 1px solid var(--rule); }
p { margin: 8px 0; } .muted { color: var(--muted); }
.cards { display: flex; flex-wrap: wrap; gap: 12px; margin: 24px 0; }
.card { flex: 1 1 150px; background: var(--soft); border-radius: 10px; padding: 14px 16px; }
.card b { display: block; font-size: 23px; letter-spacing: -.01em; font-variant-numeric: tabular-nums; }
.card span { color: var(--muted); font-size: 13px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 10px 0 16px; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 16px 6px 0; text-align: left; border-bottom: 1px solid var(--rule); vertical-align: top; }
th { color: var(--muted); font-weight: 600; font-size: 13px; white-space: nowrap; }
td small { color: var(--muted); white-space: nowrap; }
.bar { display: block; width: 96px; height: 6px; border-radius: 3px; background: var(--rule); margin-top: 4px; }
.bar i { display: block; height: 6px; border-radius: 3px; background: var(--accent); }
img { width: 100%; display: block; } figure { margin: 20px 0; }
pre { background: var(--soft); border-radius: 8px; padding: 12px 14px; overflow-x: auto; font-size: 13px;
  line-height: 1.45; white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin: 8px 0; } summary { cursor: pointer; color: var(--accent); }
"""


def html_report(report: Mapping, pictures: Sequence[tuple[Path, str]], folder: Path) -> str:
    """The whole file. report: the contents of report.json in `folder`; pictures: PNG files with captions."""
    metrics, intervals = report["summary"]["metrics"], report["summary"]["intervals"]
    parts = [
        _cards(report), "<h2>Scores</h2>", scores_table(metrics, intervals), *_figures(pictures),
        *_stages(report["stages"]), *(_section(section, folder) for section in report["sections"]),
        _environment(report["header"]),
    ]  # fmt: skip
    head = report["header"]
    started = escape(head.get("started", "unknown")[:16].replace("T", " "))
    commit = escape(str(head.get("git", {}).get("commit", "unknown")))
    return page(
        "nanochat training report",
        f'<p class="muted">Run of {started}, commit {commit}</p>' + "\n".join(parts),
    )


def page(title: str, body: str) -> str:
    """A complete document."""
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><main><h1>{escape(title)}</h1>{body}</main></body></html>\n"
    )


def html_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose cells are HTML already; the column names are text."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def figure(path: Path, caption: str) -> str:
    """A PNG file inside the document."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{data}"></figure>'


def scores_table(metrics: Mapping[str, Mapping[str, float]], intervals: Mapping) -> str:
    """Metrics by stage: value, interval, a bar of the way from guessing to perfect, and the score of guessing."""
    if not metrics:
        return '<p class="muted">No evaluation has run.</p>'
    order = [m for m in ("CORE", *TASKS, "val bpb", "ChatCORE") if m in metrics]
    stages = shown_stages(metrics)
    rows = []
    for metric in order:
        cells = [score_cell(metric, metrics[metric].get(s), intervals.get(metric, {}).get(s)) for s in stages]
        rows.append([escape(metric), *cells, f"{CHANCE[metric]:.0%}" if metric in CHANCE else "-"])
    note = "Below a score: its 95 % interval over other questions of the kind. Bar: from guessing to perfect."
    return html_table(["", *(s.upper() for s in stages), "Chance"], rows) + f'<p class="muted">{note}</p>'


def score_cell(metric: str, value: float | None, interval: Sequence[float] | None) -> str:
    """One score as HTML."""
    if value is None:
        return "-"
    text = f"{value:.1%}" if metric in TASKS else f"{value:.4f}"
    if interval:
        low, high = (f"{v:.1%}" if metric in TASKS else f"{v:.3f}" for v in interval)
        text += f"<br><small>{low} to {high}</small>"
    if metric not in CHANCE:
        return text
    share = max(0.0, min(1.0, (value - CHANCE[metric]) / (1 - CHANCE[metric])))
    return f'{text}<span class="bar"><i style="width:{share:.0%}"></i></span>'


def _cards(report: Mapping) -> str:
    metrics, header = report["summary"]["metrics"], report["header"]
    cards = [(metric, f"{list(metrics[metric].values())[-1]:.3f}") for metric in ("CORE", "ChatCORE", "val bpb")
             if metric in metrics]  # fmt: skip
    busy = sum(report["stage_seconds"].values()) or report["wall_clock_seconds"]
    cards.append(("time in stages" if report["stage_seconds"] else "wall clock", format_seconds(busy)))
    if report["cost_usd"] is not None:
        cards.append(("estimated cost", f"${report['cost_usd']:.2f}"))
    gpus = header.get("hardware", {}).get("gpus") or []
    cores = header.get("hardware", {}).get("usable_cores")
    if header:
        cards.append(("hardware", f"{len(gpus)} x {gpus[0]['name']}" if gpus else f"{cores} CPU cores"))
    shown = "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for name, value in cards
    )
    return f'<div class="cards">{shown}</div>'


def _figures(pictures: Sequence[tuple[Path, str]]) -> list[str]:
    return [figure(path, caption) for path, caption in pictures]


def _stages(stages: Sequence[Mapping]) -> list[str]:
    if not stages:
        return []
    rows = [
        [escape(s["name"]), escape(s["about"]), format_seconds(s["seconds"]) if s["seconds"] else "-"]
        for s in stages
    ]
    commands = "\n".join(stage["command"] for stage in stages)
    return [
        "<h2>Stages</h2>",
        html_table(["Stage", "What it does", "Time"], rows),
        _folded("Commands", commands),
    ]


_PICTURE = re.compile(r"!\[(.*)\]\(report_files/([\w.-]+\.png)\)")


def _text(text: str, folder: Path) -> str:
    """What a section says in Markdown: its pictures, headings and tables; everything else as it is."""
    parts = []
    for block in re.split(r"\n\s*\n", text.strip()):
        rows = [line.strip().strip("|").split("|") for line in block.splitlines() if line.startswith("|")]
        if (match := _PICTURE.fullmatch(block)) and (folder / "report_files" / match[2]).exists():
            parts.append(figure(folder / "report_files" / match[2], match[1]))
        elif block.startswith("### ") and "\n" not in block:
            parts.append(f"<h3>{escape(block[4:])}</h3>")
        elif len(rows) > 2 and len(rows) == len(block.splitlines()) and len(set(map(len, rows))) == 1:
            cells = [[escape(cell.strip()) for cell in row] for row in rows[2:]]
            parts.append(html_table([cell.strip() for cell in rows[0]], cells))
        elif "\n" in block:
            parts.append(f"<pre>{escape(block)}</pre>")
        else:
            parts.append(f"<p>{escape(block)}</p>")
    return "".join(parts)


def _section(section: Mapping, folder: Path) -> str:
    parts = [f"<h2>{escape(section['section'])}</h2>"]
    for item in section["items"]:
        if isinstance(item, str):
            parts.append(_text(item, folder))
            continue
        long = {
            k: str(v)
            for k, v in item.items()
            if "\n" in str(v) or len(str(v)) > 120 or k.startswith("sample ")
        }
        short = [[escape(k), escape(format_value(v))] for k, v in item.items() if k not in long]
        table = html_table(["", "Value"], short) if short else ""
        parts.append(_fold_html(f"{len(short)} settings and results", table) if len(short) > 12 else table)
        if long:
            texts = "".join(f"<p>{escape(k)}</p><pre>{escape(v)}</pre>" for k, v in long.items())
            parts.append(_fold_html(f"{len(long)} texts", texts))
    if section.get("command"):
        parts.append(_folded("Command", section["command"]))
    return "\n".join(parts)


def _environment(header: Mapping) -> str:
    rows = [
        [escape(f"{group} {key}"), escape(_plain(value))]
        for group in ("git", "hardware", "software")
        for key, value in header.get(group, {}).items()
    ]
    return "<h2>Environment</h2>" + (html_table(["", "Value"], rows) if rows else "<p>unknown</p>")


def _plain(value: object) -> str:
    if isinstance(value, list):
        return (
            ", ".join(str(v["name"]) if isinstance(v, dict) and "name" in v else str(v) for v in value)
            or "none"
        )
    return format_value(value)


def _folded(summary: str, text: str) -> str:
    return _fold_html(summary, f"<pre>{escape(text)}</pre>")


def _fold_html(summary: str, html: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{html}</details>"
