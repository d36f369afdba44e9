"""The pipeline runs what is not finished, resumes what was interrupted, and stops at the first error."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest

from nanochat.common import UserError
from nanochat.pipeline import Markers, Plan, Stage, StageFailed, describe, run_plan, selected, to_run
from nanochat.terminal_log import LogCleaner

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def journal(tmp_path, monkeypatch):
    """Stages of these tests are real processes that append their name and flags to one file."""
    (tmp_path / "note.py").write_text(
        textwrap.dedent(
            """
            import os, sys, time
            with open(os.environ["JOURNAL"], "a") as file:
                file.write(" ".join(sys.argv[1:]) + "\\n")
            print("working on", sys.argv[1], flush=True)
            if "--slow" in sys.argv:
                time.sleep(0.5)
            if "--fail" in sys.argv and not os.path.exists(os.environ["JOURNAL"] + ".mended"):
                print("error: the disk is full", file=sys.stderr)
                sys.exit(3)
            """
        )
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    path = tmp_path / "journal"
    monkeypatch.setenv("JOURNAL", str(path))
    return path


def stage(name, *flags, needs=(), **options):
    command = ("python", "-m", "note", name, *flags)
    return Stage(name, f"do {name}", command, 1.0, needs, **options)


def plan(*stages, name="test"):
    return Plan(name, "because", stages, {"NANOCHAT_DATA": "tinyworld"})


def run(tmp_path, the_plan, **options):
    run_plan(the_plan, tmp_path / "run", tmp_path / "logs", **options)


def lines(journal):
    return journal.read_text().split("\n")[:-1] if journal.exists() else []


CHAIN = (
    stage("data"),
    stage("tok", needs=("data",)),
    stage("base", "--depth=4", needs=("tok",), resumable=True),
    stage("eval", needs=("base",)),
    stage("sft", needs=("base",)),
)


def test_stages_run_in_order_once(tmp_path, journal, capfd):
    run(tmp_path, plan(*CHAIN))
    assert lines(journal) == ["data", "tok", "base --depth=4 --resume=never", "eval", "sft"]
    run(tmp_path, plan(*CHAIN))
    assert len(lines(journal)) == 5
    assert "base: finished before" in capfd.readouterr().out


def test_a_changed_command_repeats_it_and_what_needs_it_only(tmp_path, journal):
    run(tmp_path, plan(*CHAIN))
    journal.unlink()
    deeper = replace(CHAIN[2], command=(*CHAIN[2].command[:-1], "--depth=6"))
    run(tmp_path, plan(CHAIN[0], CHAIN[1], deeper, CHAIN[3], CHAIN[4]))
    assert lines(journal) == ["base --depth=6 --resume=never", "eval", "sft"]
    journal.unlink()
    stricter = replace(CHAIN[3], command=(*CHAIN[3].command, "-x"))
    run(tmp_path, plan(CHAIN[0], CHAIN[1], deeper, stricter, CHAIN[4]))
    assert lines(journal) == ["eval -x"]


def test_the_number_of_processes_does_not_count_as_a_change():
    single = stage("base", "--depth=4")
    command = ("torchrun", "--standalone", "--nproc_per_node=8", "-m", "note", "--", "base", "--depth=4")
    assert replace(single, command=command).identity == single.identity
    assert stage("base", "--depth=5").identity != single.identity


def test_only_repeats_one_stage_and_later_runs_follow_it(tmp_path, journal):
    run(tmp_path, plan(*CHAIN))
    journal.unlink()
    run(tmp_path, plan(*CHAIN), only="base")
    assert lines(journal) == ["base --depth=4 --resume=never"]
    run(tmp_path, plan(*CHAIN))
    assert lines(journal) == ["base --depth=4 --resume=never", "eval", "sft"]


def test_from_repeats_a_stage_and_what_follows_from_it(tmp_path, journal):
    run(tmp_path, plan(*CHAIN))
    journal.unlink()
    run(tmp_path, plan(*CHAIN), start="base")
    assert lines(journal) == ["base --depth=4 --resume=never", "eval", "sft"]


def test_force_repeats_everything_without_resuming(tmp_path, journal):
    run(tmp_path, plan(*CHAIN))
    journal.unlink()
    run(tmp_path, plan(*CHAIN), force=True)
    assert lines(journal) == ["data", "tok", "base --depth=4 --resume=never", "eval", "sft"]


def test_an_unknown_stage_is_refused_with_the_names(tmp_path, journal):
    with pytest.raises(UserError, match="data, tok, base, eval, sft"):
        run(tmp_path, plan(*CHAIN), start="bse")
    assert not lines(journal)


def test_it_stops_at_the_first_error_and_resumes_there(tmp_path, journal):
    failing = stage("base", "--fail", needs=("tok",), resumable=True)
    broken = plan(CHAIN[0], CHAIN[1], failing, CHAIN[3])
    with pytest.raises(StageFailed) as caught:
        run(tmp_path, broken)
    message = str(caught.value)
    (log,) = (tmp_path / "logs").glob("*_base.log")
    assert "stage base failed with exit status 3" in message
    assert str(log) in message and "the disk is full" in message
    assert "the disk is full" in log.read_text()
    assert lines(journal) == ["data", "tok", "base --fail --resume=never"]
    Path(f"{journal}.mended").touch()
    run(tmp_path, broken)
    assert lines(journal)[3:] == ["base --fail --resume=auto", "eval"]


def test_a_stage_that_failed_before_it_saved_does_not_go_on_with_an_earlier_model(tmp_path, journal):
    failing = stage("base", "--fail", resumable=True, output="base_checkpoints/d4")
    earlier = tmp_path / "base_checkpoints" / "d4" / "meta_000007.json"
    earlier.parent.mkdir(parents=True)
    earlier.write_text("{}")
    for _ in range(2):
        with pytest.raises(StageFailed):
            run(tmp_path, plan(failing))
    earlier.with_name("meta_000002.json").write_text("{}")  # as it would have, had it begun
    with pytest.raises(StageFailed):
        run(tmp_path, plan(failing))
    assert [line.split("=")[1] for line in lines(journal)] == ["never", "never", "auto"]


def test_an_interrupted_stage_is_not_resumed_when_its_input_changed(tmp_path, journal):
    failing = stage("base", "--fail", needs=("tok",), resumable=True)
    with pytest.raises(StageFailed):
        run(tmp_path, plan(CHAIN[0], CHAIN[1], failing))
    Path(f"{journal}.mended").touch()
    run(tmp_path, plan(CHAIN[0], CHAIN[1], failing), only="tok")
    run(tmp_path, plan(CHAIN[0], CHAIN[1], failing))
    assert lines(journal)[-1] == "base --fail --resume=never"


def test_a_background_stage_is_awaited_by_the_first_that_needs_it(tmp_path, journal, capfd):
    download = stage("download", "--slow", background=True)
    run(tmp_path, plan(download, stage("tok"), stage("base", needs=("download",))))
    assert "waiting for download" in capfd.readouterr().out
    assert lines(journal)[-1] == "base"
    assert sorted(lines(journal)) == ["base", "download --slow", "tok"]
    assert Markers(tmp_path / "run").seconds("download") >= 0.5


def test_a_failed_background_stage_stops_the_run(tmp_path, journal):
    download = stage("download", "--fail", background=True)
    with pytest.raises(StageFailed, match=r"download failed with exit status 3.*disk is full"):
        run(tmp_path, plan(download, stage("base", needs=("download",))))
    assert "base" not in lines(journal)


def test_background_processes_end_with_the_run(tmp_path, journal):
    sleeper = Stage("sleeper", "sleep", ("python", "-c", "import time; time.sleep(60)"), 1, background=True)
    started = time.monotonic()
    with pytest.raises(StageFailed):
        run(tmp_path, plan(sleeper, stage("tok", "--fail")))
    assert time.monotonic() - started < 20


def test_a_stage_that_always_runs_does(tmp_path, journal):
    collecting = plan(stage("report", always=True))
    run(tmp_path, collecting)
    run(tmp_path, collecting)
    assert lines(journal) == ["report", "report"]


def test_another_plan_in_the_same_folder_is_refused_unless_forced(tmp_path, journal):
    run(tmp_path, plan(stage("tok"), name="flagship"))
    with pytest.raises(UserError, match=r"flagship.*NANOCHAT_BASE_DIR"):
        run(tmp_path, plan(stage("tok", "--small"), name="toy"))
    run(tmp_path, plan(stage("tok", "--small"), name="toy"), force=True)
    assert lines(journal) == ["tok", "tok --small"]


def test_two_runs_in_one_folder_are_refused(tmp_path, journal):
    from filelock import FileLock

    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / "lock"), pytest.raises(UserError, match="another run"):
        run(tmp_path, plan(stage("tok")))


def test_the_ledger_lists_commands_and_seconds(tmp_path, journal):
    failing = plan(stage("tok"), stage("base", "--fail"))
    with pytest.raises(StageFailed):
        run(tmp_path, failing)
    rows = json.loads((tmp_path / "run" / "stages.json").read_text())["stages"]
    assert [row["name"] for row in rows] == ["tok", "base"]
    assert rows[0]["seconds"] > 0 and rows[1]["seconds"] is None
    assert rows[1]["command"] == "python -m note base --fail"


def test_a_missing_program_is_one_clear_line(tmp_path):
    with pytest.raises(StageFailed, match="no-such-program is not installed"):
        run(tmp_path, plan(Stage("x", "x", ("no-such-program",), 1)))


def test_sigterm_lets_the_stage_save_and_the_next_run_resumes(tmp_path, journal):
    """A real runner process is terminated; its stage catches SIGTERM, saves, and is resumed afterwards."""
    (tmp_path / "train.py").write_text(
        textwrap.dedent(
            """
            import os, signal, sys, time
            def save(number, frame):
                print("saved", flush=True)
                sys.exit(143)
            signal.signal(signal.SIGTERM, save)
            with open(os.environ["JOURNAL"], "a") as file:
                file.write(" ".join(["train", *sys.argv[1:]]) + "\\n")
            if "--resume=auto" not in sys.argv:
                time.sleep(60)
            """
        )
    )
    (tmp_path / "drive.py").write_text(
        textwrap.dedent(
            """
            import sys
            from pathlib import Path
            from nanochat.pipeline import Plan, Stage, run_plan
            here = Path(sys.argv[1])
            stage = Stage("train", "train", ("python", "-m", "train"), 1, resumable=True)
            run_plan(Plan("p", "w", (stage,)), here / "run", here / "logs")
            """
        )
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, str(tmp_path / "drive.py"), str(tmp_path)]
    runner = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 30
    while not lines(journal) and time.monotonic() < deadline:
        time.sleep(0.05)
    runner.send_signal(signal.SIGTERM)
    output, _ = runner.communicate(timeout=30)
    assert runner.returncode != 0
    assert "saved" in output and "stopped in stage train" in output
    assert subprocess.run(command, env=environment, timeout=60).returncode == 0
    assert lines(journal) == ["train --resume=never", "train --resume=auto"]


def test_describe_starts_nothing_and_shows_what_is_done(tmp_path, journal):
    run(tmp_path, plan(*CHAIN[:2]))
    journal.unlink()
    whole = replace(plan(*CHAIN), facts={"model": "tiny"}, disk_bytes=2**30)
    pending = to_run(whole.stages, Markers(tmp_path / "run"))
    text = describe(whole, whole.stages, pending, folder=tmp_path, free_bytes=2**33)
    assert "data (done)" in text and "base (about 1s)" in text
    assert "NANOCHAT_DATA=tinyworld python -m note base --depth=4" in text
    assert "1.0 GB, 8.0 GB free" in text and "3 of 5 stages" in text
    assert not lines(journal)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, []),
        ({"only": "tok"}, ["tok"]),
        ({"start": "base"}, ["base", "eval", "sft"]),
        ({"start": "eval"}, ["eval"]),
        ({"force": True}, ["data", "tok", "base", "eval", "sft"]),
    ],
)
def test_what_is_said_to_run_is_what_runs(tmp_path, journal, options, expected):
    whole = plan(*CHAIN)
    run(tmp_path, whole)
    journal.unlink()
    narrowed = {name: value for name, value in options.items() if name != "force"}
    stages = to_run(selected(whole, **narrowed), Markers(tmp_path / "run"), **options)
    assert [stage.name for stage in stages] == expected
    run(tmp_path, whole, **options)
    assert [line.split()[0] for line in lines(journal)] == expected


def test_selected_stages():
    whole = plan(*CHAIN)
    assert [s.name for s in selected(whole, only="tok")] == ["tok"]
    assert [s.name for s in selected(whole, start="base")] == ["base", "eval", "sft"]
    with pytest.raises(UserError, match="give one of them"):
        selected(whole, start="base", only="tok")


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_the_log_keeps_the_last_state_of_overwritten_lines(size):
    printed = b"start\r\n\r\x1b[K10%\r\x1b[K55%\r\x1b[K100%\n\x1b[1mbold\x1b[0m\n\nlast"
    cleaner, log = LogCleaner(), b""
    for place in range(0, len(printed), size):
        log += cleaner.feed(printed[place : place + size])
    assert log + cleaner.flush() == b"start\n100%\nbold\n\nlast\n"


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_on_a_terminal_the_stage_sees_one_and_the_log_is_clean(tmp_path):
    """Drive the real thing inside a pseudo-terminal, as a person's terminal would."""
    import pty

    (tmp_path / "drive.py").write_text(
        textwrap.dedent(
            """
            import os, sys
            from pathlib import Path
            from nanochat.terminal_log import copy_output
            child = "import sys; print(sys.stdout.isatty(), end='\\\\r\\\\x1b[K'); print('end')"
            sys.exit(copy_output((sys.executable, "-c", child), os.environ, Path(sys.argv[1])))
            """
        )
    )
    ours, theirs = pty.openpty()
    command = [sys.executable, str(tmp_path / "drive.py"), str(tmp_path / "log")]
    process = subprocess.Popen(
        command, stdout=theirs, stderr=theirs, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            data = os.read(ours, 4096)
        except OSError:
            break
        if not data:
            break
        shown += data
    os.close(ours)
    assert process.wait(timeout=30) == 0
    assert b"True\r\x1b[Kend" in shown
    assert (tmp_path / "log").read_text() == "end\n"
