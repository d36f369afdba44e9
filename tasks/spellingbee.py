"""Spelling: count a letter in a word, by hand and then with Python; and the simpler task of spelling a word.

Tokens hide letters from the model, so it learns to write a word out, letter by letter, before it counts.
"""

from __future__ import annotations

import random
from pathlib import Path

from nanochat.conversation import Conversation
from nanochat.hub import data_file
from tasks.common import FinalAnswer, Task

WORDS_URL = "https://raw.githubusercontent.com/dwyl/english-words/refs/heads/master/words_alpha.txt"
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_QUOTES = ("", "'", '"')

# Python seeds n and -n alike, so the test examples have an offset of their own.
_TEST_SEED_OFFSET = 10_000_000

# Their number, 51, is fixed: every draw that follows the choice of a template depends on it.
TEMPLATES = (
    "How many {letter} are in {word}",
    "How many {letter} are there in the word {word}",
    "How many {letter} does {word} have",
    "How many times does {letter} occur in {word}",
    "How many times do you see {letter} in {word}",
    "How many times is the letter {letter} used in {word}",
    "In {word}, how many {letter} are there",
    "In the word {word}, how many times does {letter} come up",
    "In {word}, how often does the letter {letter} occur",
    "Count the {letter} in {word}",
    "Count every {letter} you find in {word}",
    "Count how many times {letter} is in the word {word}",
    "Please count the letter {letter} in {word}",
    "Take the word {word} and count the letter {letter}",
    "Number of {letter} in {word}",
    "The number of {letter} in the word {word}",
    "What is the number of {letter} in {word}",
    "Give me the number of {letter} in {word}",
    "Tell me the number of times {letter} is in {word}",
    "What is the frequency of {letter} in {word}",
    "What is the frequency of the letter {letter} in the word {word}",
    "For the word {word}, what is the frequency of {letter}",
    "How frequent is {letter} in {word}",
    "How often is {letter} in {word}",
    "How often do I write {letter} when I spell {word}",
    "If I spell {word}, how many {letter} do I need",
    "Looking at {word}, how many {letter} can you find",
    "Do you know how many {letter} there are in {word}",
    "Can you tell me how many {letter} are in {word}",
    "Could you count {letter} in the word {word} for me",
    "¿Cuántas veces está {letter} en {word}?",
    "¿Cuántas {letter} hay en la palabra {word}?",
    "¿Cuántas {letter} tiene {word}?",
    "Cuenta las {letter} de la palabra {word}",
    "{word}里有几个{letter}",
    "单词{word}中一共有多少个{letter}",
    "请数一数{word}里的{letter}",
    "{letter}在{word}中出现几次",
    "{word}에 {letter}가 몇 개 있어",
    "{word}라는 단어에서 {letter}는 몇 번 나오니",
    "{word} 속의 {letter} 개수를 세어 줘",
    "단어 {word}에는 {letter}가 모두 몇 개일까",
    "Combien de {letter} y a-t-il dans {word}",
    "Combien de fois trouve-t-on {letter} dans le mot {word}",
    "Compte les {letter} du mot {word}",
    "Wie viele {letter} sind in {word}",
    "Wie oft steht {letter} im Wort {word}",
    "Zähle alle {letter} in {word}",
    "{word}に{letter}はいくつありますか",
    "{word}という単語の中に{letter}は何回出てくる",
    "{word}の{letter}を数えてください",
)


class SpellingBee(FinalAnswer):
    """Generated examples: how often does a letter occur in a word? Split train or test, `size` of them."""

    def __init__(
        self,
        size: int = 1000,
        split: str = "train",
        *,
        start: int = 0,
        stop: int | None = None,
        step: int = 1,
    ) -> None:
        super().__init__(start, stop, step)
        self._seed_offset = _seed_offset(split)
        self.size = size
        self.words = _read_words(words_file(split))

    def num_examples(self) -> int:
        """The size given."""
        return self.size

    def get_example(self, index: int) -> Conversation:
        """A question in one of the templates, and an answer by counting and by a call of Python."""
        rng = random.Random(self._seed_offset + index)
        # The order of the draws is part of the format. Nine letters of ten are taken from the word.
        word = rng.choice(self.words)
        letter = rng.choice(word if rng.random() < 0.9 else _LETTERS)
        template = rng.choice(TEMPLATES)
        if rng.random() < 0.3:
            template = template.lower()
        letter_quote, word_quote = rng.choice(_QUOTES), rng.choice(_QUOTES)
        question = template.format(
            letter=f"{letter_quote}{letter}{letter_quote}", word=f"{word_quote}{word}{word_quote}"
        )
        if rng.random() < 0.5:
            question += "?"
        return {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": _solution(word, letter)},
            ]
        }


class SimpleSpelling(Task):
    """Generated examples: spell a word. Split train or test, `size` of them. The answer counts if it matches exactly."""

    def __init__(
        self,
        size: int = 1000,
        split: str = "train",
        *,
        start: int = 0,
        stop: int | None = None,
        step: int = 1,
    ) -> None:
        super().__init__(start, stop, step)
        self._seed_offset = _seed_offset(split)
        self.size = size
        self.words = _read_words(words_file(split))
        random.Random(42).shuffle(self.words)  # so that an index means another word than in SpellingBee

    @property
    def eval_type(self) -> str:
        return "generative"

    def num_examples(self) -> int:
        """The size given."""
        return self.size

    def get_example(self, index: int) -> Conversation:
        """A word and its letters."""
        word = random.Random(self._seed_offset + index).choice(self.words)
        return {
            "messages": [
                {"role": "user", "content": f"Spell the word: {word}"},
                {"role": "assistant", "content": _spelled(word)},
            ]
        }

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Whether the completion is the spelling, to the letter."""
        return completion.strip() == conversation["messages"][-1]["content"]


def words_file(split: str = "train") -> Path:
    """The word list, one word per line, downloaded if the data source is the hub.

    For the test split it is the list of held-out words beside it, where the data source has one.
    """
    words = data_file("words_alpha.txt", WORDS_URL)
    held_out = words.with_name("words_alpha_test.txt")
    return held_out if split == "test" and held_out.exists() else words


def _read_words(path: Path) -> list[str]:
    with open(path, encoding="utf-8") as file:
        return [line.strip() for line in file]


def _seed_offset(split: str) -> int:
    assert split in ("train", "test"), f"there is no split {split!r}"
    return 0 if split == "train" else _TEST_SEED_OFFSET


def _spelled(word: str) -> str:
    # No blank after the colon or a comma: " a" and "a" are different tokens.
    return f"{word}:{','.join(word)}"


def _solution(word: str, letter: str) -> list[dict[str, str]]:
    lines = []
    count = 0
    for position, char in enumerate(word, start=1):
        count += char == letter
        lines.append(f"{position}:{char}" + (f" hit! count={count}" if char == letter else ""))
    by_hand = (
        f"Let me find every '{letter}' in '{word}', first by hand.\n\n"
        f"The word, spelled out:\n{_spelled(word)}\n\n"
        "Now letter by letter:\n" + "\n".join(lines) + f"\n\nThis gives us {count}."
    )
    return [
        {"type": "text", "text": by_hand},
        {"type": "text", "text": "\n\nNow the same with Python, to be sure.\n\n"},
        {"type": "python", "text": f"'{word}'.count('{letter}')"},
        {"type": "python_output", "text": str(count)},
        {"type": "text", "text": f"\n\nPython counts {count} too.\n\nThe answer is:\n\n#### {count}"},
    ]
