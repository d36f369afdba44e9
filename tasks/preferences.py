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
    """The parts of a solution with another final number, from the last tool output on."""
    final = extract_answer(parts[-1]["text"])
    if final is None:
        raise RowError(f"the solution {parts[-1]['text']!r} does not end with a number after ####")
    value, away = float(final), rng.choice((1, 2, 3, 10))
    wrong = f"{value + away if value < away or rng.random() < 0.5 else value - away:.12g}"
    number = re.compile(rf"(?<![\d.,]){re.escape(final)}(?!\d|[.,]\d)")
    outputs = [i for i, part in enumerate(parts) if part["type"] == "python_output"]
    start = outputs[-1] if outputs else len(parts) - 1
    changed = []
    for i, part in enumerate(parts):
        text = part["text"]
        if i >= start:
            plain = re.sub(r"(?<=\d),(?=\d{3})", "", text)  # 1,010 is 1010 in the answer
            text = number.sub(wrong, plain)
        changed.append({**part, "text": text})
    return changed
