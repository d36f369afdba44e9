"""Runs side by side: the right numbers in the right columns, bold only where a run is surely better."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat.common import UserError, read_json, write_json
from nanochat.plots_compared import compared_figure, compared_figures
from nanochat.report import Report
from nanochat.report_compare import best_run, compare, differing_settings, load_runs

ROOT = Path(__file__).resolve().parent.parent


def make_run(base: Path, mmlu: float, bpb: float, depth: int) -> Path:
    report = Report(base / "report")
    report.reset()
    folder = base / "base_checkpoints" / "d4"
    folder.mkdir(parents=True)
    events = [{"step": s, "train/loss": 8.0 - s / depth, "val/bpb": bpb + 1 / (1 + s)} for s in range(20)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    report.log("Base model training", [{"depth": depth, "seed": 0, "note": "a|b"}])
    report.log("Base model evaluation", [{"val bpb": bpb}])
    report.log("Chat evaluation sft", [{"MMLU": mmlu, "MMLU problems": 400, "GSM8K": 0.5}])
    report.generate(base)
    return base


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [make_run(folder / "a", 0.40, 0.8, 4), make_run(folder / "b", 0.42, 0.7, 6)]


def test_tables_show_every_run(runs, tmp_path):
    text = compare(runs, tmp_path)
    assert text == (tmp_path / "compare.md").read_text(encoding="utf-8")
    assert re.search(r"\| +\| a +\| b +\|", text)
    assert re.search(
        r"\| MMLU +\| SFT +\| 0.4000 \[0.353, 0.449\] \| 0.4200 \[0.373, 0.469\] \| 0.2500", text
    )
    assert re.search(r"\| val bpb +\| BASE +\| 0.8000 +\| \*\*0.7000\*\*", text)
    assert re.search(r"\| Base model training \| depth +\| 4 +\| 6 +\|", text)
    assert "seed" not in text
    page = (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert page.count('<img alt="') == 2 and "<b>0.7000</b>" in page


def test_runs_may_be_named_by_any_of_their_files(runs):
    named = [runs[0] / "report" / "report.json", runs[1] / "report"]
    assert [run.base for run in load_runs(named)] == [run.resolve() for run in runs]
    assert [run.name for run in load_runs(named)] == ["a", "b"]


def test_names_grow_until_they_differ(runs, tmp_path):
    other = tmp_path / "elsewhere" / "a"
    make_run(other, 0.5, 0.9, 4)
    assert [run.name for run in load_runs([runs[0], other])] == [f"{runs[0].parent.name}/a", "elsewhere/a"]


@pytest.mark.parametrize(("better", "wins"), [(0.43, False), (0.60, True)])
def test_best_only_beyond_both_intervals(runs, tmp_path, better, wins):
    third = make_run(tmp_path / "c", better, 0.9, 4)
    loaded = load_runs([*runs, third])
    best = best_run(loaded, "MMLU", "sft")
    assert (best is loaded[2]) if wins else best is None
    assert best_run(loaded, "GSM8K", "sft") is None, "nobody knows how many problems there were"
    assert best_run(loaded, "val bpb", "base") is loaded[1], "lower is better"


def test_reports_of_older_versions_have_no_intervals(runs, tmp_path):
    old = make_run(tmp_path / "old", 0.3, 0.9, 4)
    record = read_json(old / "report" / "report.json")
    del record["summary"]["intervals"]
    write_json(old / "report" / "report.json", record)
    assert "| 0.3000 " in compare([runs[0], old], tmp_path)


def test_equal_settings_are_left_out(runs):
    assert differing_settings(load_runs(runs)) == [("Base model training", "depth", ["4", "6"])]


def test_curves_of_all_runs_share_a_panel():
    events = {"base": [{"step": s, "val/bpb": 2.0 - s} for s in range(3)]}
    drawing = compared_figure({"x": events, "y": events, "z": {}}, "val/bpb", "t", "s")
    assert drawing is not None
    (axis,) = drawing.axes
    assert [line.get_label() for line in axis.lines] == ["x  0.000", "y  0.000"]
    assert compared_figures({"z": {}}) == []


def test_errors_are_one_line(runs, tmp_path):
    with pytest.raises(UserError, match="two runs or more"):
        compare(runs[:1], tmp_path)
    with pytest.raises(UserError, match=r"no report\.json in .*nothing"):
        compare([runs[0], tmp_path / "nothing"], tmp_path)
    write_json(tmp_path / "report.json", read_json(runs[0] / "report" / "report.json") | {"stage_seconds": 4})
    with pytest.raises(UserError, match="it lacks stage_seconds;"):
        compare([runs[0], tmp_path], tmp_path)
    write_json(tmp_path / "report.json", {})
    with pytest.raises(UserError, match=r"report\.json is no whole report, it lacks header, "):
        compare([runs[0], tmp_path], tmp_path)
    with pytest.raises(UserError, match="named twice"):
        compare([runs[0], runs[0] / "report"], tmp_path)


def test_a_base_folder_may_hold_several_reports(runs, tmp_path, capsys):
    base = make_run(tmp_path / "c", 0.5, 0.9, 4)
    shutil.copytree(base / "report", base / "before")
    shutil.copy(base / "report" / "report.json", base / "report" / "other.json")
    write_json(base / "before" / "report.json", read_json(base / "report" / "report.json") | {"header": {}})
    named = [base / "before", base / "report", runs[0]]
    assert [run.name for run in load_runs(named)] == ["c/before", "c/report", "a/report"]
    copies = [base / "report" / "other.json", base]
    assert [run.name for run in load_runs(copies)] == ["other.json", "report.json"]
    compare(named[:2], tmp_path)
    assert capsys.readouterr().err == f"written: {tmp_path / 'compare.md'} and compare.html\n"
    page = (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert "<p>All runs have the same settings.</p>" in page and "Settings that differ" not in page


def test_the_command(runs, tmp_path):
    command = [sys.executable, "-m", "nanochat.report", "compare", *map(str, runs)]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PATH": "", "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == (tmp_path / "compare.md").read_text(encoding="utf-8")
