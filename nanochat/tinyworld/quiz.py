"""Multiple choice about the world: rows for ARC and MMLU, and pages of quizzes with their answers."""

from __future__ import annotations

from dataclasses import dataclass

from nanochat.tinyworld.facts import Fact
from nanochat.tinyworld.rng import Rng

LETTERS = ("A", "B", "C", "D")
# What school science asks about; the rest of the world is general knowledge.
SCIENCE = frozenset(("animals", "foods", "time", "things", "words", "jobs"))
NUM_PAGE_QUESTIONS = (1, 3)


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
        self._tested = {id(group): _with_tests(group) for group in (self.facts, self.easy, self.hard)}

    def question(self, rng: Rng, facts: tuple[Fact, ...], test: bool = False) -> Choice:
        """A question about one of `facts` (one of this quiz's three groups)."""
        fact = rng.pick(self._tested[id(facts)] if test else facts)
        return choice_about(rng, fact, rng.pick(fact.test_questions if test else fact.questions))

    def page(self, rng: Rng) -> str:
        """An exam sheet with answers. Some questions come after the fact itself, some name their answer."""
        parts = []
        for _ in range(rng.between(*NUM_PAGE_QUESTIONS)):
            fact = rng.pick(self.facts)
            kind = rng.below(10)
            question = f"Which one is {fact.answer}?" if kind < 2 else rng.pick(fact.questions)
            choice = choice_about(rng, fact, question)
            if 2 <= kind < 6:
                parts.append(rng.pick(fact.statements))
            reason = f"\n{rng.pick(fact.statements)}" if rng.chance(0.2) else ""
            parts.append(f"{printed(choice)}\n{LETTERS[choice.answer]}{reason}")
        return "\n\n".join(parts)

    def echo(self, rng: Rng) -> str:
        """Words in no order, said again and again: what comes next was said before."""
        words = [rng.pick(self.facts).answer for _ in range(rng.between(8, 30))]
        return " ".join(words * rng.between(2, 4))

    def lookup(self, rng: Rng) -> str:
        """Which letter stands behind which choice: practice in reading the choices, with no fact to know."""
        parts = []
        for _ in range(rng.between(*NUM_PAGE_QUESTIONS)):
            fact = rng.pick(self.facts)
            choice = choice_about(rng, fact, "")
            pairs = rng.shuffled(list(zip(choice.choices, LETTERS, strict=True)))
            asked = "\n".join(f"Which letter is {text}? {letter}" for text, letter in pairs)
            parts.append(f"{_lines(choice)}\n{asked}")
        return "\n\n".join(parts)

    def register(self, rng: Rng) -> str:
        """A list that is read three times, each time in another order: practice in finding things again."""
        words = list(dict.fromkeys(rng.pick(self.facts).answer for _ in range(rng.between(6, 12))))
        if rng.chance(0.5):
            lines = [f"- {word}={rng.pick(LETTERS)}" for word in words]
        else:
            lines = [f"- {word} {rng.pick(self.facts).answer}" for word in words]
        return "\n".join([*lines, "", *rng.shuffled(lines), "", *rng.shuffled(lines)])


def choice_about(rng: Rng, fact: Fact, question: str) -> Choice:
    """Four choices in random order, every position of the answer equally likely."""
    answer = rng.below(4)
    choices = rng.sample(fact.wrong, 3)
    choices.insert(answer, fact.answer)
    return Choice(question, fact.topic, tuple(choices), answer)


def printed(choice: Choice) -> str:
    """The question as the chat format of the tasks shows it."""
    return (
        f"Multiple Choice question: {choice.question}\n{_lines(choice)}"
        "\nRespond only with the letter of the correct answer."
    )


def _lines(choice: Choice) -> str:
    return "".join(f"- {text}={letter}\n" for text, letter in zip(choice.choices, LETTERS, strict=True))


def _with_tests(facts: tuple[Fact, ...]) -> tuple[Fact, ...]:
    return tuple(fact for fact in facts if fact.test_questions)
