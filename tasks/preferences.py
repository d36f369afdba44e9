"""Pairs of answers for DPO, the first better than the second.

A line of a file of your own is a JSON object: `prompt`, a question, or `messages`, a dialogue that ends with the user;
`chosen` and `rejected`, what the assistant should and should not answer, as text or as parts with tool calls.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

from nanochat.calculator import use_calculator
from nanochat.common import UserError
from nanochat.conversation import Conversation, checked_messages
from tasks.common import RowError, Task
from tasks.gsm8k import extract_answer

Pair = tuple[Conversation, Conversation]


class PreferenceJSON:
    """The pairs of a UTF-8 JSONL file in their order. A malformed line is a RowError with its number."""

    def __init__(self, filepath: str | Path, *, stop: int | None = None) -> None:
        path = Path(filepath)
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the preference pairs of {path}: {error}") from None
        self.pairs = [
            _parse(line, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line.strip()
        ]
        if not self.pairs:
            raise UserError(f"{path} holds no preference pair")
        self.pairs = self.pairs[:stop]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Pair:
        return self.pairs[index]


def _parse(line: str, where: str) -> Pair:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise RowError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(row, dict) or not {"chosen", "rejected"} <= row.keys():
        raise RowError(f"{where}: a line must be an object with prompt (or messages), chosen and rejected")
    messages = row.get("messages", [{"role": "user", "content": row.get("prompt")}])
    if not isinstance(messages, list):
        raise RowError(f"{where}: messages must be a list, not {type(messages).__name__}")
    chosen, rejected = (_answered(messages, row[name], where, name) for name in ("chosen", "rejected"))
    return chosen, rejected


def _answered(messages: list[Any], answer: Any, where: str, name: str) -> Conversation:
    conversation = {"messages": [*messages, {"role": "assistant", "content": answer}]}
    try:
        checked_messages(conversation)
    except (ValueError, KeyError, TypeError) as error:
        raise RowError(f"{where}: {name}: {error}") from None
    return conversation


class SlippedSolutions:
    """Pairs made from word problems: the solution, and the same with a slip in its last calculation.

    task: whose answers are lists of parts that end with `#### number`, as those of GSM8K.
    """

    def __init__(self, task: Task) -> None:
        self.task = task

    def __len__(self) -> int:
        return len(self.task)

    def __getitem__(self, index: int) -> Pair:
        chosen = self.task[index]
        *messages, answer = chosen["messages"]
        slipped = slip(answer["content"], random.Random(index))
        return chosen, {"messages": [*messages, {"role": "assistant", "content": slipped}]}


def slip(parts: list[dict[str, str]], rng: random.Random) -> list[dict[str, str]]:
    """The parts of a solution that ends with another number, because of a wrong number in its last calculation.

    What the tool says and what follows from it agree with the wrong calculation: the slip is the model's own. Where no
    such slip changes the end, only the number there does.
    """
    final = extract_answer(parts[-1]["text"])
    if final is None:
        raise RowError(f"the solution {parts[-1]['text']!r} does not end with a number after ####")
    calls = [i for i, part in enumerate(parts) if part["type"] == "python"]
    if calls and parts[calls[-1] + 1]["text"] == final:
        call = calls[-1]
        numbers = list(re.finditer(_NUMBER, parts[call]["text"]))
        rng.shuffle(numbers)
        for number in numbers:
            expression = _put(parts[call]["text"], number.span(), _another(number.group(), rng))
            result = use_calculator(expression)
            if result is None or result == final:
                continue
            changed = [dict(part) for part in parts]
            if call:
                changed[call - 1]["text"] = _with_slip(
                    parts[call - 1]["text"], parts[call]["text"], expression
                )
            changed[call]["text"] = expression
            for part in changed[call + 1 :]:
                part["text"] = _renamed(part["text"], final, result)
            return changed
    return [*parts[:-1], {**parts[-1], "text": _renamed(parts[-1]["text"], final, _another(final, rng))}]


_NUMBER = r"\d+(?:\.\d+)?"


def _another(number: str, rng: random.Random) -> str:
    value, away = float(number), rng.choice((1, 2, 3, 10))
    return f"{value + away if value < away or rng.random() < 0.5 else value - away:.12g}"


def _put(text: str, span: tuple[int, int], new: str) -> str:
    return text[: span[0]] + new + text[span[1] :]


def _with_slip(text: str, before: str, after: str) -> str:
    """The words in front of a calculation, which often end with the same one, spaced."""
    tokens = [re.findall(rf"{_NUMBER}|\S", expression) for expression in (before, after)]
    found = list(re.finditer(r"(\s*)".join(map(re.escape, tokens[0])), text))
    if not found or len(tokens[0]) != len(tokens[1]):
        return text
    spaces = [*found[-1].groups(), ""]
    return _put(text, found[-1].span(), "".join(map("".join, zip(tokens[1], spaces, strict=True))))


def _renamed(text: str, before: str, after: str) -> str:
    """The text with one number in place of another; 1,010 is 1010."""
    plain = re.sub(r"(?<=\d),(?=\d{3})", "", text)
    return re.sub(rf"(?<![\d.,]){re.escape(before)}(?!\d|[.,]\d)", after, plain)
