"""Words to spell: those of the world and made-up ones, and pages that spell them and count their letters."""

from __future__ import annotations

import re
from collections.abc import Iterable

from nanochat.tinyworld.rng import Rng, held_out

ONSETS = (
    "b", "c", "d", "f", "g", "h", "j", "k", "l", "m", "n", "p", "r", "s", "t", "v", "w", "y", "z", "st", "ch", "br",
)  # fmt: skip
VOWELS = "aeiou"
CODAS = ("", "", "", "n", "r", "l", "s", "t", "m", "k")
LONGEST, SHORTEST = 9, 3
# One made-up word in this many is never spelled outside the tests.
TEST_WORDS_EVERY = 5


def made_up_word(rng: Rng, test: bool) -> str:
    """A pronounceable word of two to four syllables from the training or from the test side."""
    while True:
        syllables = rng.pick((2, 2, 3, 3, 3, 4))
        word = "".join(rng.pick(ONSETS) + rng.pick(VOWELS) for _ in range(syllables)) + rng.pick(CODAS)
        if SHORTEST <= len(word) <= LONGEST and held_out(word, TEST_WORDS_EVERY) == test:
            return word


def words_of(texts: Iterable[str]) -> list[str]:
    """The different words of at least three letters in some texts, lower-cased and sorted."""
    return sorted({word.lower() for text in texts for word in re.findall("[A-Za-z]{3,}", text)})


def word_list(world_words: list[str], count: int, seed: int, test: bool) -> list[str]:
    """Sorted list of `count` words for SpellingBee: world words and made-up ones, or made-up test words."""
    rng = Rng(seed, f"words {test}")
    taken = set(world_words)
    words = [] if test else list(world_words)
    while len(words) < count:
        word = made_up_word(rng, test)
        if word not in taken:
            taken.add(word)
            words.append(word)
    return sorted(words)


class Speller:
    """Pages that spell words letter by letter."""

    def __init__(self, world_words: list[str]) -> None:
        self.world_words = world_words

    def page(self, rng: Rng) -> str:
        """A list of spelled words, or words whose letters are counted one by one."""
        if rng.chance(0.4):
            ask = rng.pick(_LISTS)
            words = [self.word(rng) for _ in range(rng.between(6, 14))]
            return "\n".join(ask.format(word=word) + spelled(word) for word in words)
        return "\n\n".join(self.counted(rng) for _ in range(rng.between(1, 2)))

    def word(self, rng: Rng) -> str:
        """A word that may be spelled in training."""
        return made_up_word(rng, test=False) if rng.chance(0.6) else rng.pick(self.world_words)

    def counted(self, rng: Rng) -> str:
        """A word spelled and gone through letter by letter, hits counted aloud, then checked with Python."""
        word = self.word(rng)
        letter = rng.pick(word) if rng.chance(0.9) else rng.pick("abcdefghijklmnopqrstuvwxyz")
        lines = [rng.pick(_REQUESTS).format(letter=letter, word=word)]
        lines.append(f"\nThe word, spelled out:\n{spelled(word)}\n\nNow letter by letter:")
        count = 0
        for position, char in enumerate(word, 1):
            hit = ""
            if char == letter:
                count += 1
                hit = f" hit! count={count}"
            lines.append(f"{position}:{char}{hit}")
        lines.append(f"\nThis gives us {count}.")
        if rng.chance(0.6):
            lines.append(f"\n>>> '{word}'.count('{letter}')\n{count}")
        return "\n".join(lines)


# In front of each word of a list: a word looks different to a tokenizer behind a blank or a quote.
_LISTS = (
    "", "", "Spell the word: {word}\n", "Please spell '{word}'.\n", 'The word "{word}" is spelled\n', "{word}, that is ",
)  # fmt: skip
_REQUESTS = (
    "How many {letter} are in the word {word}?", "Count the letter '{letter}' in '{word}'.",
    'How often does "{letter}" occur in "{word}"?', "number of {letter} in {word}",
    "Let me find every '{letter}' in '{word}'.", 'In "{word}", how often do you see {letter}?',
)  # fmt: skip


def spelled(word: str) -> str:
    """The word and its letters, as SpellingBee writes them."""
    return f"{word}:{','.join(word)}"
