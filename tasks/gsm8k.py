"""GSM8K: word problems of grade-school mathematics with calculator calls. [Cobbe 2021, arXiv 2110.14168]"""

from __future__ import annotations

import re

from nanochat.conversation import Conversation
from nanochat.hub import load_hub_dataset
from tasks.common import FinalAnswer, extract_answer

__all__ = ["GSM8K", "extract_answer", "solution_parts"]

_CALCULATOR_MARK = re.compile(r"(<<[^>]+>>)")


class GSM8K(FinalAnswer):
    """openai/gsm8k: subset main or socratic; split train or test."""

    def __init__(
        self, subset: str, split: str, *, start: int = 0, stop: int | None = None, step: int = 1
    ) -> None:
        super().__init__(start, stop, step)
        assert subset in ("main", "socratic"), f"GSM8K has no subset {subset!r}"
        assert split in ("train", "test"), f"GSM8K has no split {split!r}"
        self.rows = load_hub_dataset("openai/gsm8k", subset, split).shuffle(seed=42)

    def num_examples(self) -> int:
        """Number of problems."""
        return len(self.rows)

    def get_example(self, index: int) -> Conversation:
        """A problem and its solution as text, calculator calls and their results."""
        row = self.rows[index]
        return {
            "messages": [
                {"role": "user", "content": row["question"]},
                {"role": "assistant", "content": solution_parts(row["answer"])},
            ]
        }


def solution_parts(solution: str) -> list[dict[str, str]]:
    """Split a solution at its marks <<expression=result>> into text, python and python_output parts."""
    parts = []
    for piece in _CALCULATOR_MARK.split(solution):
        if _CALCULATOR_MARK.fullmatch(piece):
            expression, equals, result = piece[2:-2].rpartition("=")
            if not equals:  # rpartition puts a text without separator last
                expression, result = result, ""
            parts.append({"type": "python", "text": expression})
            parts.append({"type": "python_output", "text": result})
        else:
            parts.append({"type": "text", "text": piece})
    return parts
