"""Multiple choice about the world, for the rows of ARC and MMLU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nanochat.tinyworld.facts import Fact
from nanochat.tinyworld.rng import Rng

LETTERS = ("A", "B", "C", "D")
# What school science asks about; the rest of the world is general knowledge.
SCIENCE = frozenset(("animals", "foods", "time", "things", "words", "jobs"))
CLOSING = "Respond only with the letter of the correct answer."


@dataclass(frozen=True, slots=True)
class Choice:
    """One question with four choices of one type; `answer` is the index of the right one."""

    question: str
    subject: str
    choices: tuple[str, ...]
    answer: int


class Quiz:
    """Questions with choices about facts; each set of facts has its own kind of exam."""

    def __init__(self, facts: tuple[Fact, ...]) -> None:
        self.facts = facts
        self.easy = tuple(fact for fact in facts if fact.topic in SCIENCE and not fact.two_hop)
        self.hard = tuple(fact for fact in facts if fact.two_hop)
        self.answers = tuple(dict.fromkeys(fact.answer for fact in facts))
        self._tested = {id(group): _with_tests(group) for group in (self.facts, self.easy, self.hard)}

    def question(self, rng: Rng, facts: tuple[Fact, ...], test: bool = False) -> Choice:
        """A question about one of `facts` (one of this quiz's three groups)."""
        fact = rng.pick(self._tested[id(facts)] if test else facts)
        return choice_about(rng, fact, rng.pick(fact.test_questions if test else fact.questions))


def naming(answer: str) -> str:
    """A question that says what is asked for, so that nothing has to be known."""
    return f"Which one is {answer}?"


def choice_about(rng: Rng, fact: Fact, question: str) -> Choice:
    """Four choices in random order, every position of the answer equally likely."""
    answer = rng.below(4)
    choices = rng.sample(fact.wrong, 3)
    choices.insert(answer, fact.answer)
    return Choice(question, fact.topic, tuple(choices), answer)


def printed(choice: Choice, shown: Sequence[int] = range(len(LETTERS))) -> str:
    """The question as the chat format of the tasks shows it. shown: indices of the choices that are printed."""
    choices = printed_choices([choice.choices[i] for i in shown], [LETTERS[i] for i in shown])
    return f"Multiple Choice question: {choice.question}\n{choices}\n{CLOSING}"


def printed_choices(texts: Sequence[str], letters: Sequence[str]) -> str:
    """Lines of choices, each with its letter behind it."""
    return "".join(f"- {text}={letter}\n" for text, letter in zip(texts, letters, strict=True))


def _with_tests(facts: tuple[Fact, ...]) -> tuple[Fact, ...]:
    return tuple(fact for fact in facts if fact.test_questions)
