"""A task is a list of conversations made from rows, with a judgement of the answers to them."""

from __future__ import annotations

import random
import re
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from nanochat.common import UserError
from nanochat.conversation import Conversation, Message, checked_messages


class RowError(UserError, ValueError):
    """A row that does not have the form its task needs."""


class Task:
    """A list-like view of conversations: every step-th one of start..stop of the underlying rows."""

    def __init__(self, start: int = 0, stop: int | None = None, step: int = 1) -> None:
        assert start >= 0, f"start={start} must not be negative"
        assert stop is None or stop >= start, f"stop={stop} must not lie before start={start}"
        assert step >= 1, f"step={step} must be positive"
        self.start, self.stop, self.step = start, stop, step

    @property
    def eval_type(self) -> str:
        """ "generative" (an answer is sampled) or "categorical" (a letter is chosen)."""
        raise NotImplementedError(f"{type(self).__name__} is for training only")

    def num_examples(self) -> int:
        """Number of underlying rows."""
        raise NotImplementedError

    def get_example(self, index: int) -> Conversation:
        """The conversation of an underlying row."""
        raise NotImplementedError

    def evaluate(self, conversation: Conversation, completion: str) -> bool | int:
        """Whether the completion answers the conversation rightly."""
        raise NotImplementedError(f"{type(self).__name__} is for training only")

    def reward(self, conversation: Conversation, completion: str) -> float:
        """The evaluation as a reward for reinforcement learning, 0.0 or 1.0."""
        return float(self.evaluate(conversation, completion))

    def __len__(self) -> int:
        return len(self._rows())

    def __getitem__(self, index: int) -> Conversation:
        rows = self._rows()
        if not 0 <= index < len(rows):
            raise IndexError(f"example {index} of {len(rows)}")
        return self.get_example(rows[index])

    def _rows(self) -> range:
        count = self.num_examples()
        return range(self.start, count if self.stop is None else min(self.stop, count), self.step)


class TaskSequence(Task):
    """Several tasks one after the other."""

    def __init__(
        self, tasks: Sequence[Task], *, start: int = 0, stop: int | None = None, step: int = 1
    ) -> None:
        super().__init__(start, stop, step)
        self.tasks = list(tasks)
        self._ends = list(accumulate(len(task) for task in self.tasks))

    def num_examples(self) -> int:
        """Sum of the lengths of the tasks."""
        return self._ends[-1] if self._ends else 0

    def get_example(self, index: int) -> Conversation:
        """The example at a position of the concatenation."""
        position = bisect_right(self._ends, index)
        task = self.tasks[position]
        return task[index - self._ends[position] + len(task)]


class TaskMixture(TaskSequence):
    """All examples of several tasks in one fixed shuffled order. A task given twice counts twice."""

    def __init__(
        self, tasks: Sequence[Task], *, start: int = 0, stop: int | None = None, step: int = 1
    ) -> None:
        super().__init__(tasks, start=start, stop=stop, step=step)
        self._order = array("q", range(self.num_examples()))
        random.Random(42).shuffle(self._order)

    def get_example(self, index: int) -> Conversation:
        """The example at a shuffled position."""
        return super().get_example(self._order[index])


# --- multiple choice ---------------------------------------------------------------------------------


def render_mc(question: str, letters: Sequence[str], choices: Sequence[str]) -> str:
    """The user message of a multiple-choice question.

    The letter follows its choice, because small models bind the two better in this order, and stands right
    after `=`, because the answer is the bare letter: " A" and "A" are different tokens.
    """
    lines = "".join(f"- {choice}={letter}\n" for letter, choice in zip(letters, choices, strict=True))
    return (
        f"Multiple Choice question: {question}\n{lines}\nRespond only with the letter of the correct answer."
    )


class MultipleChoice(Task):
    """A task whose answer is one of the conversation's `letters`."""

    @property
    def eval_type(self) -> str:
        return "categorical"

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Whether the letter is the right one; asserts that it is one of the letters."""
        letters = conversation["letters"]
        assert completion in letters, f"answer {completion!r} is not one of {letters}"
        return completion == conversation["messages"][-1]["content"]

    def reward(self, conversation: Conversation, completion: str) -> float:
        """1.0 for the right letter and nothing else; a sampled answer may be any text."""
        return float(completion.strip() == conversation["messages"][-1]["content"])

    @staticmethod
    def conversation(
        question: str, letters: Sequence[str], choices: Sequence[str], answer: str
    ) -> Conversation:
        """Question and answer letter as a conversation."""
        return {
            "messages": [
                {"role": "user", "content": render_mc(question, letters, choices)},
                {"role": "assistant", "content": answer},
            ],
            "letters": list(letters),
        }


# --- answers that are a number -----------------------------------------------------------------------

_FINAL_ANSWER = re.compile(r"#### (\-?[0-9\.\,]+)")


def extract_answer(text: str) -> str | None:
    """The number after the first `#### `, without thousands separators; None if there is none."""
    found = _FINAL_ANSWER.search(text)
    return found.group(1).strip().replace(",", "") if found else None


class FinalAnswer(Task):
    """A task whose solution ends in `#### number`, in the last part of the assistant's message.

    Numbers are compared as strings, as the official normalisation does: 10 and 10.0 differ.
    """

    @property
    def eval_type(self) -> str:
        return "generative"

    def evaluate(self, conversation: Conversation, completion: str) -> int:
        """1 if the completion gives the same number as the solution, else 0."""
        assert isinstance(completion, str), f"the completion is a {type(completion).__name__}, not a str"
        solution = conversation["messages"][-1]["content"][-1]["text"]
        return int(extract_answer(completion) == extract_answer(solution))


# --- dialogues ---------------------------------------------------------------------------------------


def check_dialogue(messages: Sequence[Message], where: str) -> None:
    """Raise RowError unless these are messages of a conversation (see conversation.py), of both sides.

    where: what to call the conversation in the error.
    """
    for index, message in enumerate(messages):
        if not (isinstance(message, dict) and "role" in message and "content" in message):
            raise RowError(f"{where}: message {index} must have a role and a content")
    try:
        turns = len(checked_messages({"messages": list(messages)})) if messages else 0
    except (ValueError, KeyError, TypeError) as error:
        raise RowError(f"{where}: {error}") from None
    if turns < 2:
        raise RowError(f"{where}: a conversation needs at least two messages, not {turns}")
