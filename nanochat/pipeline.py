"""Run the stages of a plan one after the other: markers, logs, resuming, stopping at the first error.

A stage is finished when `<folder>/<stage>.done` exists, its command is the same, and the stages it needs have
not run again since. Running a plan twice therefore does nothing, an interrupted plan goes on where it was,
and a changed flag repeats exactly what depends on it. A training stage that was
interrupted goes on from its newest checkpoint.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from nanochat.common import UserError, exclusive, read_json, write_json
from nanochat.metrics import duration
from nanochat.report_render import format_bytes
from nanochat.terminal_log import copy_output


@dataclass(frozen=True, slots=True)
class Stage:
    """One command of a plan."""

    name: str
    about: str
    command: tuple[str, ...]
    seconds: float  # expected duration
    needs: tuple[str, ...] = ()  # stages whose result it reads; when one of them runs again, so does this one
    resumable: bool = False  # takes --resume=never (start over) and --resume=auto (go on where it was)
    background: bool = False  # runs beside the following stages, up to the first that needs it
    always: bool = False  # runs every time, for what only collects the others' results
    output: str = ""  # where the result is, for people

    @property
    def identity(self) -> str:
        """Hash of what is computed: module and flags, but not how many processes compute it."""
        words = self.command[self.command.index("-m") + 1 :] if "-m" in self.command else self.command
        return hashlib.sha256("\0".join(word for word in words if word != "--").encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Plan:
    """Stages in order, and what to tell about them before they run."""

    name: str
    why: str
    stages: tuple[Stage, ...]
    environment: dict[str, str] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    disk_bytes: int = 0

    def stage(self, name: str) -> Stage:
        """The stage of a name; a UserError that lists the names otherwise."""
        found = next((stage for stage in self.stages if stage.name == name), None)
        if found is None:
            raise UserError(f"{name!r} is not a stage of plan {self.name}; it has: {', '.join(self.names)}")
        return found

    @property
    def names(self) -> list[str]:
        return [stage.name for stage in self.stages]


class StageFailed(UserError):
    """A stage ended with an error; the message names it, its exit status and its log."""


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop (Ctrl-C or SIGTERM)."""


# --- markers -----------------------------------------------------------------------------------------


class Markers:
    """What is finished and what was begun, as small JSON files in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _read(self, name: str, kind: str) -> dict:
        path = self.folder / f"{name}.{kind}"
        return read_json(path) if path.exists() else {}

    def result(self, name: str) -> str:
        """Id of the last complete run of a stage; empty if there is none."""
        return self._read(name, "done").get("id", "")

    def seconds(self, name: str) -> float | None:
        """Duration of the last complete run of a stage, interrupted attempts included."""
        return self._read(name, "done").get("seconds")

    def _inputs(self, stage: Stage) -> dict:
        return {"identity": stage.identity, "needs": {name: self.result(name) for name in stage.needs}}

    def is_done(self, stage: Stage) -> bool:
        marker = self._read(stage.name, "done")
        return not stage.always and bool(marker) and marker["inputs"] == self._inputs(stage)

    def begin(self, stage: Stage) -> float | None:
        """Note that a stage starts. Returns the seconds spent before, or None if this is not a continuation."""
        before = self._read(stage.name, "started")
        same = bool(before) and before["inputs"] == self._inputs(stage)
        spent = before["seconds"] if same else 0.0
        older = before.get("older_checkpoint", 0) if same else self._newest_checkpoint(stage)
        (self.folder / f"{stage.name}.done").unlink(missing_ok=True)
        started = {"inputs": self._inputs(stage), "seconds": spent, "older_checkpoint": older}
        write_json(self.folder / f"{stage.name}.started", started)
        return spent if same else None

    def has_saved(self, stage: Stage) -> bool:
        """Whether a training stage that was begun has written a checkpoint since. Until then an earlier run's are there."""
        older = self._read(stage.name, "started").get("older_checkpoint", 0)
        return not stage.output or self._newest_checkpoint(stage) > older

    def _newest_checkpoint(self, stage: Stage) -> int:
        """When the newest checkpoint of its output folder was written, in ns; 0 if there is none."""
        found = (self.folder.parent / stage.output).glob("meta_*.json") if stage.output else ()
        return max((path.stat().st_mtime_ns for path in found), default=0)

    def pause(self, stage: Stage, seconds: float) -> None:
        """Remember the time that an unfinished attempt took."""
        started = self._read(stage.name, "started")
        write_json(self.folder / f"{stage.name}.started", started | {"seconds": started["seconds"] + seconds})

    def finish(self, stage: Stage, seconds: float) -> None:
        started = self._read(stage.name, "started")
        marker = {
            "id": uuid.uuid4().hex[:12], "inputs": started["inputs"], "seconds": started["seconds"] + seconds,
            "command": shlex.join(stage.command), "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        }  # fmt: skip
        write_json(self.folder / f"{stage.name}.done", marker)
        (self.folder / f"{stage.name}.started").unlink()

    def forget(self, name: str) -> None:
        for kind in ("done", "started"):
            (self.folder / f"{name}.{kind}").unlink(missing_ok=True)


# --- running -----------------------------------------------------------------------------------------


def run_plan(
    plan: Plan,
    folder: Path,
    logs: Path,
    *,
    start: str = "",
    only: str = "",
    force: bool = False,
    after_stage: Callable[[Stage], None] | None = None,
) -> None:
    """Run what is not finished. Raises StageFailed at the first error, Interrupted on Ctrl-C or SIGTERM.

    folder: markers and the ledger stages.json. logs: one file per stage and attempt.
    start: begin at this stage and repeat it; only: repeat this stage alone; force: repeat everything.
    """
    markers, stages = Markers(folder), selected(plan, start, only)
    with _exclusive(folder, plan.name, force), _stop_signals():
        runner = _Runner(plan, markers, logs)
        try:
            for stage in stages:
                if force or stage.name in (start, only):
                    markers.forget(stage.name)
                runner.run(stage)
                runner.write_ledger()
                if after_stage is not None:
                    after_stage(stage)
            runner.wait_for(plan.names)
        finally:
            runner.stop_background()
            runner.write_ledger()


def selected(plan: Plan, start: str = "", only: str = "") -> list[Stage]:
    """The stages that --from and --only leave; a UserError if both are given."""
    if start and only:
        raise UserError("--from starts in the middle and --only runs one stage; give one of them")
    if only:
        return [plan.stage(only)]
    return list(plan.stages[plan.stages.index(plan.stage(start)) :]) if start else list(plan.stages)


def to_run(
    stages: Sequence[Stage], markers: Markers, start: str = "", only: str = "", force: bool = False
) -> list[Stage]:
    """Those of the stages that run_plan would run with these options: also what needs another one of them."""
    found: dict[str, Stage] = {}
    for stage in stages:
        repeated = force or stage.name in (start, only) or not markers.is_done(stage)
        if repeated or any(name in found for name in stage.needs):
            found[stage.name] = stage
    return list(found.values())


@contextmanager
def _exclusive(folder: Path, name: str, force: bool):
    """One run at a time per folder, and no plan over the results of another unless forced."""
    with exclusive(folder):
        owner = folder / "plan.json"
        other = read_json(owner)["plan"] if owner.exists() else name
        if other != name and not force:
            raise UserError(
                f"{folder.parent} holds a run of plan {other}, and plan {name} would overwrite it;"
                " set NANOCHAT_BASE_DIR to another folder, or give --force to start over here"
            )
        write_json(owner, {"plan": name})
        yield


@contextmanager
def _stop_signals():
    """SIGTERM stops a run as Ctrl-C does: the stage may save, and the next run resumes it."""

    def stop(number: int, frame: object) -> None:
        raise Interrupted

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Runner:
    """Starts the commands of one plan and keeps its background processes."""

    def __init__(self, plan: Plan, markers: Markers, logs: Path) -> None:
        self.plan, self.markers, self.logs = plan, markers, logs
        self._background: dict[str, tuple[Stage, subprocess.Popen, Path, float]] = {}
        self._environment = os.environ | plan.environment | {"PYTHONUNBUFFERED": "1"}

    def run(self, stage: Stage) -> None:
        self.wait_for(stage.needs)
        title = f"[{self.plan.names.index(stage.name) + 1}/{len(self.plan.stages)}] {stage.name}"
        if self.markers.is_done(stage):
            say(f"{title}: finished before in {duration(self.markers.seconds(stage.name) or 0)}, skipped")
            return
        spent = self.markers.begin(stage)
        if stage.resumable:
            goes_on = spent is not None and self.markers.has_saved(stage)
            flag = "--resume=auto" if goes_on else "--resume=never"
            stage = replace(stage, command=(*stage.command, flag))
        log = self.logs / f"{time.strftime('%Y%m%d-%H%M%S')}_{stage.name}.log"
        say(_banner(title, stage, log, resumed=spent is not None))
        if stage.background:
            self._start(stage, log)
        else:
            self._foreground(stage, log)

    def _foreground(self, stage: Stage, log: Path) -> None:
        started = time.monotonic()
        try:
            status = copy_output(executable(stage.command), self._environment, log)
        except BaseException as error:
            self.markers.pause(stage, time.monotonic() - started)
            if isinstance(error, FileNotFoundError):
                raise StageFailed(f"stage {stage.name}: {stage.command[0]} is not installed") from None
            if isinstance(error, KeyboardInterrupt):
                say(f"\nstopped in stage {stage.name}; run the same command again to go on. Log: {log}")
            raise
        self._settle(stage, status, time.monotonic() - started, log)

    def _settle(self, stage: Stage, status: int, seconds: float, log: Path) -> None:
        if status:
            self.markers.pause(stage, seconds)
            last = _last_line(log)
            raise StageFailed(
                f"stage {stage.name} failed with exit status {status} after {duration(seconds)}; log: {log}"
                + (f"; it ends with: {last}" if last else "")
            )
        self.markers.finish(stage, seconds)
        say(f"{stage.name} finished in {duration(seconds)}")

    def _start(self, stage: Stage, log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as file:
            process = subprocess.Popen(
                executable(stage.command), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                env=self._environment, start_new_session=True,
            )  # fmt: skip
        self._background[stage.name] = (stage, process, log, time.monotonic())

    def wait_for(self, names: Sequence[str]) -> None:
        """Let the background stages among names finish."""
        for name in [name for name in names if name in self._background]:
            stage, process, log, started = self._background[name]
            if process.poll() is None:
                say(f"waiting for {name} (follow it with: tail -f {log})")
            status = process.wait()
            del self._background[name]
            self._settle(stage, status, time.monotonic() - started, log)

    def stop_background(self) -> None:
        for stage, process, _, started in self._background.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            self.markers.pause(stage, time.monotonic() - started)
        self._background.clear()

    def write_ledger(self) -> None:
        """The stages with commands and seconds, for the report."""
        rows = [
            {
                "name": stage.name, "about": stage.about, "command": shlex.join(stage.command),
                "seconds": self.markers.seconds(stage.name),
            }
            for stage in self.plan.stages
        ]  # fmt: skip
        write_json(self.markers.folder / "stages.json", {"plan": self.plan.name, "stages": rows})


def executable(command: tuple[str, ...]) -> tuple[str, ...]:
    """The command with this interpreter in the place of `python` and `torchrun`, whatever PATH says."""
    heads = {"python": (sys.executable,), "torchrun": (sys.executable, "-m", "torch.distributed.run")}
    return (*heads.get(command[0], command[:1]), *command[1:])


def say(text: str) -> None:
    print(text, flush=True)


def _banner(title: str, stage: Stage, log: Path, resumed: bool) -> str:
    bold, plain = (
        ("\x1b[1m", "\x1b[0m") if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else ("", "")
    )
    lines = [
        "", f"{bold}{title}{plain}: {stage.about} (about {duration(stage.seconds)})"
        + (", resumed" if resumed else "") + (", in the background" if stage.background else ""),
        f"  command  {shlex.join(stage.command)}",
        f"  log      {log}", *([f"  output   {stage.output}"] if stage.output else []),
    ]  # fmt: skip
    return "\n".join(lines)


def _last_line(log: Path) -> str:
    """The last line of a log that says something: usually the error."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode("utf-8", "replace").splitlines()
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")


# --- dry run -----------------------------------------------------------------------------------------


def describe(
    plan: Plan, stages: Sequence[Stage], pending: Sequence[Stage], *, folder: Path, free_bytes: int
) -> str:
    """The plan as text: why, facts, stages with commands and expected times. Starts nothing.

    pending: those of the stages that are not done, see to_run. folder: where everything goes, which has free_bytes
    of room.
    """
    total = sum(stage.seconds for stage in pending if not stage.background)
    rows = {"plan": plan.name, "why": plan.why} | plan.facts
    rows["disk"] = f"about {format_bytes(plan.disk_bytes)}, {format_bytes(free_bytes)} free in {folder}"
    rows["time"] = f"about {duration(total)} for {len(pending)} of {len(plan.stages)} stages"
    width = max(map(len, rows))
    lines = [*(f"{key:<{width}}  {value}" for key, value in rows.items()), ""]
    exports = "".join(f"{key}={shlex.quote(value)} " for key, value in plan.environment.items())
    for stage in stages:
        state = f"about {duration(stage.seconds)}" if stage in pending else "done"
        lines.append(f"{plan.names.index(stage.name) + 1:>2}. {stage.name} ({state}): {stage.about}")
        lines.append(f"    {exports}{shlex.join(stage.command)}")
    return "\n".join(lines)
