"""The training report: every stage logs a section, `generate` makes report.md, .html, .json and the plots.

    python -m nanochat.report [generate|reset|show|json]
    python -m nanochat.report compare RUN RUN...     # several runs side by side, in compare.md and .html here

`<base>/report` holds header.md, run.json, and per section <slug>.md (to read) and <slug>.json (to compute
with). Metrics come from the JSON only: model output that looks like a metric line changes nothing.

Each model has its own sections. Those with the plain titles, from which the summary is made, are of the model that
commands take where none is named, once it has them; the titles of others end with their tags.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat import environment
from nanochat.common import (
    UserError,
    get_base_dir,
    get_dist_info,
    make_folder,
    print0,
    read_json,
    whole_file,
    write_json,
)
from nanochat.configurator import ending_well
from nanochat.report_html import html_report
from nanochat.report_render import (
    Item,
    format_seconds,
    header_markdown,
    kind_of,
    rich_section,
    section_markdown,
    summary_table,
    table,
)
from nanochat.report_scores import intervals_of, metrics_of, shown_stages

if TYPE_CHECKING:
    from nanochat.checkpoint_manager import Checkpoint

# Order of the report. Stages that a run leaves out are simply absent.
SECTIONS = (
    "tokenizer-training", "tokenizer-evaluation", "base-model-training", "base-model-loss",
    "base-model-evaluation", "midtraining", "chat-evaluation-mid", "chat-sft", "chat-evaluation-sft",
    "chat-dpo", "chat-evaluation-dpo", "chat-rl", "chat-evaluation-rl", "inference-benchmark",
    "contamination",
)  # fmt: skip


def slug_of(section: str) -> str:
    """File name of a section title."""
    return section.lower().replace(" ", "-").replace("/", "-")


class Report:
    """The report folder of one run."""

    def __init__(self, folder: Path, checkpoints: Path | None = None) -> None:
        """folder holds the sections; checkpoints (default: its parent) holds `<stage>_checkpoints`."""
        self.folder = folder
        self.base = checkpoints or folder.parent
        make_folder(folder)

    # --- one run -------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Start a new run: forget all sections, write the header and a new run id."""
        for path in self.folder.iterdir():
            if path.suffix in (".md", ".json"):
                path.unlink()
        shutil.rmtree(self.folder / "report_files", ignore_errors=True)
        hardware = environment.hardware_facts()
        git, software = environment.git_facts(environment.project_root()), environment.software_facts()
        bloat, usd = (
            environment.bloat_facts(environment.project_root()),
            environment.hourly_usd(hardware.gpus),
        )
        started = _now()
        text = header_markdown(_plain(started), git, hardware, software, bloat, usd)
        with whole_file(self.folder / "header.md", "w") as file:
            file.write(f"{text}Run started: {_plain(started)}\n\n---\n\n")
        facts = {"git": git, "hardware": hardware, "software": software, "bloat": bloat}
        run = {"run_id": uuid.uuid4().hex[:12], "started": started, "hourly_usd": usd}
        write_json(self.folder / "run.json", run | {name: asdict(fact) for name, fact in facts.items()})

    def log(
        self,
        section: str,
        data: Sequence[Item],
        model: Checkpoint | str | None = None,
        covers: Mapping[str, int] | None = None,
    ) -> Path:
        """Write a section and return its path: strings verbatim, dicts as lists, empty items left out.

        model: what it is about, a checkpoint or the name of a foreign model. covers: how much of each test was made; less
        of one than the section there is of the same weights does not replace that. A line says what stays.
        """
        about, title, there = _about(model), section, self._section(section)
        if beside := _beside(model, there):
            title = f"{section} {beside}"
            kept = f", {section!r} stays that of {there['model']}" if there.get("model") else ""
            print0(f"report: written to section {title!r}{kept}")
            there = self._section(title)
        elif there.get("model") not in (None, about["model"]):
            self._write(there | {"section": f"{section} {there['model']}"})
        if less := _less(covers or {}, there, about):
            print0(f"report: section {title!r} stays, it was made on more: {less}")
            return self.folder / f"{slug_of(title)}.md"
        record = {
            "section": title, "kind": slug_of(section), "timestamp": _now(), "run_id": self._run().get("run_id"),
            "command": _command(), **about, "covers": dict(covers or {}),
            "items": [item if isinstance(item, str) else _plain_dict(item) for item in data if item],
        }  # fmt: skip
        return self._write(record)

    def _write(self, record: dict) -> Path:
        slug = slug_of(record["section"])
        path = self.folder / f"{slug}.md"
        with whole_file(path, "w") as file:
            file.write(section_markdown(record["section"], _plain(record["timestamp"]), record["items"]))
        write_json(self.folder / f"{slug}.json", record | {"slug": slug})
        return path

    def _run(self) -> dict:
        path = self.folder / "run.json"
        return read_json(path) if path.exists() else {}

    def _section(self, title: str) -> dict:
        """What this run has logged under a title; empty if nothing."""
        path = self.folder / f"{slug_of(title)}.json"
        record = read_json(path) if path.exists() else {}
        return record if record.get("run_id") == self._run().get("run_id") else {}

    def sections(self) -> list[dict]:
        """All logged sections in the order of the report, unknown ones last by name."""
        found = []
        for path in self.folder.glob("*.json"):
            if path.name not in ("run.json", "report.json"):
                found.append(read_json(path))
                if lacking := [key for key in ("slug", "section", "items", "run_id") if key not in found[-1]]:
                    raise UserError(
                        f"{path} is no section of a report, it lacks {', '.join(lacking)}; move it away"
                    )
        known = {slug: place for place, slug in enumerate(SECTIONS)}
        return sorted(found, key=lambda s: (known.get(kind_of(s), len(known)), s["slug"]))

    # --- the report ----------------------------------------------------------------------------------

    def generate(self, copy_to: Path | None = None) -> Path:
        """Write report.md, .html, .json and report_files/*.png, and copy them to a folder (default: here).

        Raises UserError, and leaves older files as they are, if no stage has logged a section.
        """
        started = time.monotonic()
        run, sections = self._run(), self.sections()
        if not sections:
            raise UserError(
                f"nothing to report: no stage has finished in {self.base}; train first (bash runs/speedrun.sh), or"
                " set NANOCHAT_BASE_DIR to the folder of a run"
            )
        own = [s for s in sections if s["run_id"] == run.get("run_id")]
        stages = self._pipeline_stages()
        summary = _summarize(run, own, stages)
        plots = self._plots(summary, run)
        path = self.folder / "report.md"
        with whole_file(path, "w") as file:
            file.write(self._text(run, sections, own, summary, stages, plots))
        record = {
            "header": run, "sections": sections, "stages": stages,
            "summary": {key: summary[key] for key in ("metrics", "intervals")},
            **{key: summary[key] for key in ("wall_clock_seconds", "stage_seconds", "cost_usd")},
            "bloat": run.get("bloat", {}), "plots": [name for name, _ in plots],
        }  # fmt: skip
        write_json(self.folder / "report.json", record)
        with whole_file(self.folder / "report.html", "w") as file:
            pictures = [(self.folder / "report_files" / name, caption) for name, caption in plots]
            file.write(html_report(record, pictures, self.folder))
        copy = self._copy(copy_to or Path.cwd())
        print0(f"report: {copy} ({len(own)} sections, {len(plots)} plots, {time.monotonic() - started:.1f}s)")
        return path

    def _pipeline_stages(self) -> list[dict]:
        path = self.base / "run" / "stages.json"
        return read_json(path)["stages"] if path.exists() else []

    def _plots(self, summary: dict, run: dict) -> list[tuple[str, str]]:
        """(file name, title) of the plots, drawn anew from the metrics of this run's checkpoints."""
        from nanochat.plots import draw_all

        started = datetime.fromisoformat(run["started"]).timestamp() if run else 0.0
        folder = self.folder / "report_files"
        return draw_all(self.base, summary["metrics"], folder, started, summary["intervals"])

    def _text(
        self, run: dict, sections: list, own: list, summary: dict, stages: list, plots: list[tuple[str, str]]
    ) -> str:
        header = self.folder / "header.md"
        title, _, rest = (
            header.read_text(encoding="utf-8").partition("## Environment")
            if header.exists()
            else (
                "# nanochat training report\n\n",
                "",
                "\nunknown: `reset` was not called before this run\n\n",
            )
        )
        parts = [title, "## Summary\n\n", *_summary_lines(run, summary)]
        parts += [f"![{caption}](report_files/{name})\n\n" for name, caption in plots]
        if stages:
            parts += ["## Stages\n\n", _stage_table(stages), "\n", _commands(stages), "\n"]
        for section in sections:
            foreign = "*This section is from an earlier run.*\n" if section not in own else ""
            parts.append(rich_section(section, foreign) + "\n")
        return "".join([*parts, "## Environment", rest]).rstrip("-\n ") + "\n"

    def _copy(self, target: Path) -> Path:
        copy = target / "report.md"
        if target.resolve() != self.folder.resolve():
            for name in ("report.md", "report.html"):
                with whole_file(target / name, "w") as file:
                    file.write((self.folder / name).read_text(encoding="utf-8"))
            shutil.rmtree(target / "report_files", ignore_errors=True)
            if (self.folder / "report_files").exists():
                shutil.copytree(self.folder / "report_files", target / "report_files")
        return copy


class DummyReport:
    """What ranks other than 0 log to: nowhere."""

    def log(self, section: str, data: Sequence[Item], **about: object) -> None:
        pass

    def reset(self) -> None:
        pass

    def generate(self, copy_to: Path | None = None) -> None:
        pass


def get_report() -> Report | DummyReport:
    """The report of the base folder on rank 0, one that does nothing on the others."""
    return Report(get_base_dir() / "report") if get_dist_info()[1] == 0 else DummyReport()


# --- which section a section replaces ----------------------------------------------------------------


def _about(model: Checkpoint | str | None) -> dict[str, object]:
    """What a section records of its model."""
    if model is None or isinstance(model, str):
        return {"model": model}
    return {"model": model.directory.name, "step": model.step, "weights": model.weights_sha256}


def _beside(model: Checkpoint | str | None, there: Mapping) -> str:
    """What to add to the title of a section about a model, so that the one there stays; empty if it may be replaced."""
    from nanochat.checkpoint_manager import find_model_tag, list_steps

    if model is None or isinstance(model, str):
        return model or ""
    tag = model.directory.name
    if there.get("model") != find_model_tag(model.directory.parent):
        return ""
    if there["model"] != tag:
        return tag
    return "" if model.step in (there["step"], list_steps(model.directory)[-1]) else f"step {model.step}"


def _less(covers: Mapping[str, int], there: Mapping, about: Mapping) -> str:
    """Of what a section covers less than the one there about the same weights; empty if of nothing."""
    same = there.get("weights") == about.get("weights")
    return ", ".join(covered_less(covers, there.get("covers", {}) if same else {}).values())


def covered_less(covers: Mapping[str, int], before: Mapping[str, int]) -> dict[str, str]:
    """What is covered less than before, by name, with both numbers in words. Such results do not replace the earlier."""
    return {
        name: f"{name} {count:,} instead of {covers.get(name, 0):,}"
        for name, count in before.items()
        if covers.get(name, 0) < count
    }


# --- what a section records --------------------------------------------------------------------------


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _plain(stamp: str) -> str:
    return datetime.fromisoformat(stamp).strftime("%Y-%m-%d %H:%M:%S")


def _plain_dict(item: object) -> dict[str, object]:
    """A dict of JSON values: numpy and torch scalars become numbers, everything else unknown its text."""
    assert isinstance(item, dict), f"a section holds strings and dicts, not {type(item).__name__}"
    return {str(key): _plain_value(value) for key, value in item.items()}


def _plain_value(value: object) -> object:
    if hasattr(value, "item"):
        value = value.item()  # pyright: ignore[reportAttributeAccessIssue]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _command() -> str | None:
    """The command line of this process as one would type it, if it runs as a module."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is None:
        return None
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    launcher = f"torchrun --standalone --nproc_per_node={world_size}" if world_size > 1 else "python"
    name = spec.name.removesuffix(".__main__")
    return f"{launcher} -m {name} {shlex.join(sys.argv[1:])}".rstrip()


# --- summary -----------------------------------------------------------------------------------------


def _summarize(run: dict, sections: list[dict], stages: list[dict]) -> dict:
    """Metrics by stage, durations in seconds, and cost in dollars (None where unknown)."""
    ends = [datetime.fromisoformat(section["timestamp"]) for section in sections]
    seconds = None
    if run and ends:
        seconds = (max(ends) - datetime.fromisoformat(run["started"])).total_seconds()
        seconds = seconds if seconds >= 0 else None
    stage_seconds = {stage["name"]: stage["seconds"] for stage in stages if stage["seconds"] is not None}
    busy = sum(stage_seconds.values()) if stage_seconds else seconds
    usd = run.get("hourly_usd")
    return {
        "metrics": metrics_of(sections), "intervals": intervals_of(sections), "wall_clock_seconds": seconds, "stage_seconds": stage_seconds,
        "busy_seconds": busy, "cost_usd": usd * busy / 3600 if usd is not None and busy is not None else None,
    }  # fmt: skip


def _summary_lines(run: dict, summary: dict) -> list[str]:
    metrics = summary["metrics"]
    lines = [summary_table(metrics, shown_stages(metrics), summary["intervals"]), "\n"]
    lines.append(f"Total wall clock time: {format_seconds(summary['wall_clock_seconds'])}\n")
    if summary["stage_seconds"]:
        lines.append(f"\nTime in stages: {format_seconds(summary['busy_seconds'])}\n")
    if summary["cost_usd"] is not None:
        hours = summary["busy_seconds"] / 3600
        lines.append(
            f"\nEstimated cost: ${summary['cost_usd']:.2f} (${run['hourly_usd']:.2f}/hour x {hours:.2f} h)\n"
        )
    if run:
        bloat = environment.Bloat(**run["bloat"])
        lines.append(
            f"\nThe code of this run: {bloat.lines:,} lines in {bloat.files:,} files, "
            f"about {bloat.tokens:,} tokens\n"
        )
    return [*lines, "\n"]


def _stage_table(stages: list[dict]) -> str:
    rows = [
        [stage["name"], stage["about"], format_seconds(stage["seconds"]) if stage["seconds"] else "-"]
        for stage in stages
    ]
    return table(["Stage", "What it does", "Time"], rows, align="<<>")


def _commands(stages: list[dict]) -> str:
    shown = "\n".join(stage["command"] for stage in stages)
    return f"<details><summary>Commands</summary>\n\n```bash\n{shown}\n```\n\n</details>\n"


# --- command line ------------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> None:
    """Run one of the actions; generate is the default."""
    action = argv[0] if argv else "generate"
    if {"-h", "--help"} & set(argv):
        print((__doc__ or "").strip())
        return
    if action == "compare":
        from nanochat.report_compare import compare

        if flags := [word for word in argv[1:] if word.startswith("-")]:
            raise UserError(f"{flags[0]} is not an option; compare takes folders alone, and writes here")
        print(compare([Path(run) for run in argv[1:]], Path.cwd()), end="")
        return
    if action not in ("generate", "reset", "show", "json") or len(argv) > 1:
        raise UserError(f"report {' '.join(argv)!r}: use one of generate, reset, show, json, compare")
    report = get_report()
    if isinstance(report, DummyReport):
        return
    if action == "generate":
        report.generate()
    elif action == "reset":
        report.reset()
        print(f"the report begins anew: {report.folder}")
    elif action == "json":
        print(json.dumps(read_json(_generated(report.folder / "report.json"))))
    else:
        print(_generated(report.folder / "report.md").read_text(encoding="utf-8"), end="")


def _generated(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"{path} does not exist; run: python -m nanochat.report generate")
    return path


if __name__ == "__main__":
    with ending_well():
        main(sys.argv[1:])
