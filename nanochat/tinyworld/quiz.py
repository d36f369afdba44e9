"""Multiple choice about the world: rows for ARC and MMLU, and pages of quizzes with their answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nanochat.tinyworld.facts import Fact
from nanochat.tinyworld.rng import Rng

LETTERS = ("A", "B", "C", "D")
# What school science asks about; the rest of the world is general knowledge.
SCIENCE = frozenset(("animals", "foods", "time", "things", "words", "jobs"))
NUM_PAGE_QUESTIONS = (1, 2)
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
        self._answers = tuple(dict.fromkeys(fact.answer for fact in facts))
        self._tested = {id(group): _with_tests(group) for group in (self.facts, self.easy, self.hard)}

    def question(self, rng: Rng, facts: tuple[Fact, ...], test: bool = False) -> Choice:
        """A question about one of `facts` (one of this quiz's three groups)."""
        fact = rng.pick(self._tested[id(facts)] if test else facts)
        return choice_about(rng, fact, rng.pick(fact.test_questions if test else fact.questions))

    def page(self, rng: Rng) -> str:
        """An exam sheet with answers. Some questions name their answer, some come after the fact itself."""
        parts = []
        for _ in range(rng.between(*NUM_PAGE_QUESTIONS)):
            fact = rng.pick(self.facts)
            kind = rng.random()
            question = _naming(fact.answer) if kind < 0.15 else rng.pick(fact.questions)
            if 0.15 <= kind < 0.3:
                question = f"{rng.pick(fact.statements)} {question}"
            # Choices of other kinds can be ruled out by the question alone: a first step to knowing the answer.
            strange = rng.random() if rng.chance(0.5) else 0.0
            choice = self._choice(rng, fact, question, strange)
            parts.append(f"{printed(choice)}\n{LETTERS[choice.answer]}")
        return "\n\n".join(parts)

    def _choice(self, rng: Rng, fact: Fact, question: str, strange: float) -> Choice:
        """A choice in which each wrong one is, with probability `strange`, an answer to another kind of question."""
        choice = choice_about(rng, fact, question)
        choices = list(choice.choices)
        possible = {fact.answer, *fact.wrong}
        for i in range(len(choices)):
            if i != choice.answer and rng.chance(strange):
                other = rng.pick(self.facts).answer
                if other not in possible and other not in choices:
                    choices[i] = other
        return Choice(question, choice.subject, tuple(choices), choice.answer)

    def lookup(self, rng: Rng) -> str:
        """Which letter stands behind which choice: practice in reading the choices, with no fact to know.

        All words are equally likely, so that pages which share a row of the batch rarely contradict each other.
        Nothing but finding the letter pays: no question comes twice, which would reward looking for its earlier
        answer, and letters are drawn one by one, so that none can be ruled out because it was said before.
        """
        listed, asked = self._listed(rng)
        return f"{listed}\n" + "\n".join(f"{question}\n{letter}" for question, letter in asked)

    def practice(self, rng: Rng) -> list[tuple[str, str]]:
        """Questions that name their answer, and the letter to say; the choices come first or, harder, last."""
        kind = rng.random()
        if kind < 0.2:
            listed, asked = self._listed(rng)
            (question, letter), *others = asked
            return [(f"{listed}\n{question}", letter), *others]
        turns = []
        for _ in range(rng.between(1, 3)):
            fact = rng.pick(self.facts)
            choice = choice_about(rng, fact, _naming(fact.answer))
            sheet = printed(choice) if kind < 0.5 else f"{choice.question}\n{_lines(choice.choices)}".rstrip()
            turns.append((sheet, LETTERS[choice.answer]))
        return turns

    def _listed(self, rng: Rng) -> tuple[str, list[tuple[str, str]]]:
        """Lines of choices with letters, and questions about them with the letters to say."""
        words = rng.sample(self._answers, rng.between(3, 4))
        letters = {word: rng.pick(LETTERS) for word in words}
        return _lines(words, list(letters.values())), [
            (_naming(word), letters[word]) for word in rng.sample(words, 2)
        ]


def _naming(answer: str) -> str:
    return f"Which one is {answer}?"


def choice_about(rng: Rng, fact: Fact, question: str) -> Choice:
    """Four choices in random order, every position of the answer equally likely."""
    answer = rng.below(4)
    choices = rng.sample(fact.wrong, 3)
    choices.insert(answer, fact.answer)
    return Choice(question, fact.topic, tuple(choices), answer)


def printed(choice: Choice) -> str:
    """The question as the chat format of the tasks shows it."""
    return f"Multiple Choice question: {choice.question}\n{_lines(choice.choices)}\n{CLOSING}"


def _lines(texts: Sequence[str], letters: Sequence[str] = LETTERS) -> str:
    return "".join(f"- {text}={letter}\n" for text, letter in zip(texts, letters, strict=True))


def _with_tests(facts: tuple[Fact, ...]) -> tuple[Fact, ...]:
    return tuple(fact for fact in facts if fact.test_questions)
