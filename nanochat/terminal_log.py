"""Run a command with its output both on the terminal and in a log file.

On a terminal the child gets a pseudo-terminal, so that its progress line stays one line; the log keeps the
last state of each overwritten line and no colour codes. Elsewhere the child gets a pipe.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

# A training stage needs this long at most to write its checkpoint after it was asked to stop.
_GRACE_SECONDS = 120.0
_ESCAPE = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")


class LogCleaner:
    """Turns terminal output into log lines: of an overwritten line the last state, without colours."""

    def __init__(self) -> None:
        self._open = b""

    def feed(self, data: bytes) -> bytes:
        """Complete lines that data finishes."""
        *lines, self._open = (self._open + data).split(b"\n")
        # Only what follows the last return can still be seen; dropping the rest keeps a long bar short.
        self._open = self._open[max(0, self._open.rfind(b"\r", 0, -1)) :]
        return b"".join(_visible(line) + b"\n" for line in lines)

    def flush(self) -> bytes:
        """The unfinished last line."""
        line, self._open = _visible(self._open), b""
        return line + b"\n" if line else b""


def _visible(line: bytes) -> bytes:
    shown = [part for part in _ESCAPE.sub(b"", line).split(b"\r") if part.strip()]
    return shown[-1].rstrip() if shown else b""


def copy_output(command: Sequence[str], environment: Mapping[str, str], log: Path) -> int:
    """Run a command, copy what it prints to stdout and to the log, return its exit status.

    An exception while it runs (Ctrl-C) ends it with SIGTERM, waits for it to save, and is raised again.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file, _output_channel() as (writer, reader):
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=writer, stderr=writer, env=dict(environment),
            start_new_session=True,
        )  # fmt: skip
        os.close(writer)
        try:
            _copy(reader, file)
            return process.wait()
        except BaseException:
            _end(process, reader, file)
            raise


@contextmanager
def _output_channel() -> Iterator[tuple[int, int]]:
    """(write end for the child, read end): a pseudo-terminal when stdout is a terminal, else a pipe."""
    if sys.stdout.isatty() and sys.platform != "win32":
        import fcntl
        import pty
        import termios

        reader, writer = pty.openpty()
        size = shutil.get_terminal_size()
        fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", size.lines, size.columns, 0, 0))
    else:
        reader, writer = os.pipe()
    try:
        yield writer, reader
    finally:
        os.close(reader)


def _copy(reader: int, file) -> None:
    cleaner, terminal = LogCleaner(), getattr(sys.stdout, "buffer", None)
    while True:
        try:
            data = os.read(reader, 65536)
        except OSError:  # a pseudo-terminal ends with EIO when its last writer is gone
            data = b""
        file.write(cleaner.feed(data) if data else cleaner.flush())
        file.flush()
        if not data:
            return
        if terminal is None:
            sys.stdout.write(data.decode("utf-8", "replace"))
        else:
            terminal.write(data)
        sys.stdout.flush()


def _end(process: subprocess.Popen, reader: int, file) -> None:
    """Ask the command and its children to stop, show what they still say, and insist after a while."""

    def signal_group(number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)

    with suppress(ProcessLookupError):
        process.terminate()  # only the leader: torchrun passes it on to its workers
    insist = threading.Timer(_GRACE_SECONDS, signal_group, [signal.SIGKILL])
    insist.start()
    try:
        _copy(reader, file)
        process.wait()
    finally:
        insist.cancel()
        if process.poll() is None:  # a second Ctrl-C: no more patience
            signal_group(signal.SIGKILL)
            process.wait()
