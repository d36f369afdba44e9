"""What a run measured: `metrics.jsonl` always, wandb when a run name is given, one line on the terminal."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from types import TracebackType

from nanochat.common import UserError, whole_file

Value = float | int | str | None | dict


class MetricsLog:
    """Appends one JSON object per event to `<directory>/metrics.jsonl` and mirrors it to wandb.

    Only rank 0 writes. Resuming at a step drops what a lost run logged after it, so the file tells one story.
    What an earlier run wrote stays until the first step is logged: a run that fails before it leaves no trace.
    """

    def __init__(
        self,
        directory: Path,
        *,
        is_main: bool = True,
        resume_step: int | None = None,
        project: str = "nanochat",
        run: str = "dummy",
        config: dict | None = None,
    ) -> None:
        self._path, self._resume_step, self._is_main = directory / "metrics.jsonl", resume_step, is_main
        self._file, self._wandb = None, None
        self._early: list[str] = []  # lines of before the first step
        if is_main and run != "dummy":
            self._wandb = _start_wandb(project, run, config or {})

    def log(self, step: int, values: dict[str, Value], kind: str = "eval") -> None:
        """Record values of one step; kind is "train" or "eval". Non-finite numbers become null, as in JSON."""
        if not self._is_main:
            return
        event = {"step": step, "kind": kind, "time": round(time.time(), 3)}
        event |= {name: _plain(value) for name, value in values.items()}
        self._early.append(json.dumps(event) + "\n")
        if self._file is not None or kind == "train":
            self._write()
        if self._wandb is not None:
            self._wandb.log(event, step=step)

    def _write(self) -> None:
        if self._file is None:
            _keep_until(self._path, self._resume_step)
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (lives as long as the log)
        self._file.writelines(self._early)
        self._file.flush()
        self._early.clear()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None and self._is_main:
            self._write()  # a run that had ended before only evaluates
        self.close()


def read_metrics(path: Path) -> list[dict]:
    """All events of a metrics.jsonl; a torn last line (a killed run) is dropped."""
    events = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            events.append(json.loads(line))
        except ValueError:
            break
    return events


def _keep_until(path: Path, step: int | None) -> None:
    """Start the file afresh, or on resuming at `step` keep what had happened when that step was saved.

    A step is trained, then saved, then evaluated; the evaluations of the step are made again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    events = read_metrics(path) if step is not None and path.exists() else []
    kept = [e for e in events if e["step"] < step or (e["step"] == step and e["kind"] == "train")]
    with whole_file(path, "w") as file:
        file.writelines(json.dumps(event) + "\n" for event in kept)


def _plain(value: Value) -> Value:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _start_wandb(project: str, run: str, config: dict):
    try:
        import wandb
    except ImportError:
        raise UserError(
            f"--run={run} asks for wandb, which is not installed; pip install wandb or give --run=dummy"
        ) from None
    try:
        return wandb.init(project=project, name=run, config=config)
    except Exception as error:  # of its own kinds: no account, no network
        raise UserError(
            f"--run={run}: wandb: {str(error).strip().splitlines()[0]}; or give --run=dummy"
        ) from None


class StatusLine:
    """The progress of a loop: one line that is overwritten on a terminal, a line now and then in a log."""

    _open = False  # of all together, as a terminal has one line: whether it may be overwritten

    def __init__(self, every_seconds: float = 5.0, is_main: bool = True) -> None:
        self._is_terminal = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        self._every = 0.1 if self._is_terminal else every_seconds
        self._is_main, self._last = is_main, 0.0

    def show(self, text: str, final: bool = False) -> None:
        """Show the newest state; `final` states are always shown and kept."""
        now = time.monotonic()
        if not self._is_main or (not final and now - self._last < self._every):
            return
        self._last = now
        if self._is_terminal:
            print(f"\r\x1b[K{text}", end="\n" if final else "", flush=True)
            StatusLine._open = not final
        else:
            print(text, flush=True)

    def note(self, text: str) -> None:
        """Print a line that stays, without mixing it into an overwritten one."""
        if not self._is_main:
            return
        if self._open:
            print(flush=True)
            StatusLine._open = False
        print(text, flush=True)


def duration(seconds: float) -> str:
    """Seconds as people say them: 42s, 3m12s, 2h05m, 12 days."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    if minutes >= 100 * 60:
        return f"{round(minutes / 60 / 24):,} days"
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"
