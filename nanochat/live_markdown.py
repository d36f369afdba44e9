"""Markdown on a terminal while it is being written: finished blocks stay, the growing one is redrawn."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from typing import IO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment
from rich.style import Style

from nanochat.dialogue import Display, printable

REDRAW_S = 0.05  # more often is not seen, and costs time that the model could use
# Around what a tool did. The characters are private: what the model writes cannot contain them.
DIM_ON, DIM_OFF = "\ue000", "\ue001"
FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")


class LiveMarkdown(Display):
    """One answer on a terminal: show its parts as they come, then end."""

    def __init__(self, file: IO[str]) -> None:
        self._console = Console(file=file, highlight=False, emoji=False)
        self._live: Live | None = None
        self._source = ""
        self._drawn = 0.0

    def begin(self) -> None:
        """Before the first part."""
        self._console.print("Assistant:", style="bold")
        # no thread redraws: it would write between the characters of a Ctrl-C
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._live.start()

    def show(self, kind: str, text: str) -> None:
        """Take a piece of the answer, and redraw."""
        super().show(kind, text)
        self._draw()

    def write_text(self, text: str) -> None:
        self._source += _text(text)

    def write_tool(self, text: str) -> None:
        self._source += _dimmed(text)

    def end(self) -> None:
        """After the last part: what was redrawn so far is printed for good."""
        self.flush()
        if self._live is not None:
            self._live.update("", refresh=True)
            self._live.stop()
            self._live = None
        self._print(self._source)
        self._source = ""
        self._console.print()

    def _draw(self) -> None:
        now = time.monotonic()
        if self._live is None or now - self._drawn < REDRAW_S:
            return
        self._drawn = now
        done, self._source = split_done(self._source)
        self._print(done)
        visible = tail(self._source, self._console.height - 4, self._console.width)
        self._live.update(DimmingMarkdown(visible, hyperlinks=False), refresh=True)

    def _print(self, source: str) -> None:
        if source.strip():
            self._console.print(DimmingMarkdown(source, hyperlinks=False))


class DimmingMarkdown(Markdown):
    """Markdown in which what stands between the private marks is dim."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from dim_marked(super().__rich_console__(console, options))


def dim_marked(segments: Iterable[object]) -> Iterator[Segment]:
    """Take the marks out of rendered segments, and dim what is between them, also across lines."""
    is_dim = False
    for segment in segments:
        assert isinstance(segment, Segment)
        for piece in re.split(f"([{DIM_ON}{DIM_OFF}])", segment.text):
            if piece in (DIM_ON, DIM_OFF):
                is_dim = piece == DIM_ON
            elif piece:
                style = (segment.style or Style()) + Style(dim=True) if is_dim else segment.style
                yield Segment(piece, style, segment.control)


def split_done(source: str) -> tuple[str, str]:
    """(blocks that no further text can change, the rest): cut at the last blank line outside code.

    A list item may go on after a blank line, so a list is done when text that is not indented follows it.
    """
    cut = at = 0
    fence = ""
    may_cut = False
    for line in source.splitlines(keepends=True):
        found = FENCE.match(line)
        if may_cut and line.strip() and not line.startswith((" ", "\t")) and not _is_item(line):
            cut = at
        if fence:
            fence = "" if found and found[1].startswith(fence) and line.strip() == found[1] else fence
        elif found:
            fence = found[1]
        may_cut = not fence and not line.strip()
        at += len(line)
    return source[:cut], source[cut:]


def tail(source: str, num_lines: int, width: int) -> str:
    """The end of a block that may be taller than the screen; code stays code."""
    kept = source[-max(num_lines, 1) * width :].splitlines(keepends=True)[-max(num_lines, 1) :]
    text = "".join(kept)
    opened = FENCE.match(source)
    return text if text == source or not opened else f"{opened[0]}\n{text}"


def _is_item(line: str) -> bool:
    return re.match(r"([-*+]|\d{1,9}[.)])\s", line) is not None


def _text(text: str) -> str:
    return printable(text).replace(DIM_ON, "\ufffd").replace(DIM_OFF, "\ufffd")


def _dimmed(text: str) -> str:
    escaped = re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", _text(text).replace("\n", " "))
    return f"{DIM_ON}{escaped}{DIM_OFF}"
