"""Conversations that lead to multiple choice, which a small network does not learn from exams alone.

Answering an exam takes three steps: to know the answer, to carry it behind the choices, and to find the letter that
stands behind it there. The lessons practise them one after the other, see sizes.LESSONS and the plan.
"""

from __future__ import annotations

from collections.abc import Iterator

from nanochat.tinyworld import sizes
from nanochat.tinyworld.facts import Fact
from nanochat.tinyworld.identity import Messages, exchange
from nanochat.tinyworld.quiz import (
    CLOSING,
    LETTERS,
    Choice,
    Quiz,
    choice_about,
    naming,
    printed,
    printed_choices,
)
from nanochat.tinyworld.rng import Rng

_WORD_CLOSING = "Respond only with the correct answer."


class Lessons:
    """Writes the lessons about the facts of a quiz.

    An answer begins with a space: only so is its word the same token as in the list of choices.
    """

    def __init__(self, quiz: Quiz) -> None:
        self.facts = quiz.facts
        self._words = quiz.answers
        self._by_relation: dict[str, list[Fact]] = {}
        for fact in self.facts:
            self._by_relation.setdefault(fact.relation, []).append(fact)

    def conversations(self, lesson: str, rng: Rng) -> Iterator[Messages]:
        """All conversations of a lesson."""
        count, shares = sizes.LESSONS[lesson]
        for _ in range(count):
            yield getattr(self, rng.weighted(shares))(rng)

    def answers(self, rng: Rng) -> Messages:
        """Questions with bare answers; some name what they ask for."""
        messages: Messages = []
        for _ in range(rng.between(4, 8)):
            fact = rng.pick(self.facts)
            question = naming(fact.answer) if rng.chance(0.25) else rng.pick(fact.questions)
            messages += exchange(question, f" {fact.answer}")
        return messages

    def named_letters(self, rng: Rng) -> Messages:
        """Choices, then which letter stands behind one of them."""
        words = rng.sample(self._words, rng.between(2, 4))
        return self._ask(rng, words, [naming(word) for word in words])

    def fact_letters(self, rng: Rng) -> Messages:
        """Choices, then which letter stands behind the answer to a question."""
        facts = self._rivals(rng)
        return self._ask(rng, [fact.answer for fact in facts], [rng.pick(fact.questions) for fact in facts])

    def _rivals(self, rng: Rng) -> list[Fact]:
        """Three or four facts of one kind; the answer of each is wrong for all others."""
        wanted = rng.between(3, 4)
        while True:
            chosen: list[Fact] = []
            for fact in rng.shuffled(self._by_relation[rng.pick(self.facts).relation]):
                if all(_exclude_each_other(fact, other) for other in chosen):
                    chosen.append(fact)
                if len(chosen) == wanted:
                    return chosen

    def _ask(self, rng: Rng, words: list[str], questions: list[str]) -> Messages:
        """Two of the questions; each word's letter is drawn by itself, so that none can be ruled out."""
        letters = [rng.pick(LETTERS) for _ in words]
        first, second = rng.sample(range(len(words)), 2)
        sheet = f"{printed_choices(words, letters)}\n{questions[first]}"
        return exchange(sheet, letters[first]) + exchange(questions[second], letters[second])

    def exam_words(self, rng: Rng) -> Messages:
        """Exams with any number of choices, also none, that are answered with the choice itself."""
        messages: Messages = []
        for _ in range(rng.between(1, 3)):
            fact = rng.pick(self.facts)
            question = naming(fact.answer) if rng.chance(0.2) else rng.pick(fact.questions)
            sheet = _shortened(rng, choice_about(rng, fact, question), fewest=0)
            messages += exchange(sheet.replace(CLOSING, _WORD_CLOSING), f" {fact.answer}")
        return messages

    def exam_letters(self, rng: Rng) -> Messages:
        """Exams as the tasks have them, with two to four choices."""
        messages: Messages = []
        for _ in range(rng.between(1, 3)):
            fact = rng.pick(self.facts)
            choice = choice_about(rng, fact, rng.pick(fact.questions))
            messages += exchange(_shortened(rng, choice, fewest=2), LETTERS[choice.answer])
        return messages


def _shortened(rng: Rng, choice: Choice, fewest: int) -> str:
    """An exam without some of its wrong choices: a network first learns to carry the answer over short ways."""
    count = rng.between(fewest, len(LETTERS))
    wrong = [i for i in range(len(LETTERS)) if i != choice.answer]
    shown = [choice.answer, *rng.sample(wrong, count - 1)] if count else []
    return printed(choice, sorted(shown))


def _exclude_each_other(a: Fact, b: Fact) -> bool:
    return a.answer in b.wrong and b.answer in a.wrong
