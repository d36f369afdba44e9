"""Prompt lookup: guess the next tokens of a text from what followed the last time it ended like this.

A guess costs one wider forward pass, and every right token of it saves a pass. Answers that repeat their prompt
(summaries, edits, code) gain, others lose a little. The tokens are drawn as they would be without guesses,
[Leviathan 2023, arXiv 2211.17192] for a draft that puts all its probability on one token: accepted with the
probability that the model gives it, and otherwise replaced by a draw from the rest.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

_ENDINGS = (4, 3, 2)  # tokens that must recur, the longest first


def guess(tokens: Sequence[int], count: int) -> list[int]:
    """Up to `count` tokens that followed the latest earlier occurrence of the text's end; none if there is none."""
    text = array("q", tokens).tobytes()
    for length in _ENDINGS:
        if len(tokens) <= length or count < 1:
            continue
        place = _last_place(text, text[-8 * length :])
        if place >= 0:
            return list(tokens[place + length : place + length + count])
    return []


def _last_place(text: bytes, ending: bytes) -> int:
    """Index in tokens of the last occurrence of ending before the end of text; -1 if there is none."""
    stop = len(text) - 8
    while (place := text.rfind(ending, 0, stop)) >= 0:
        if place % 8 == 0:
            return place // 8
        stop = place + len(ending) - 1
    return -1
