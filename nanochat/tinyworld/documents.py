"""The stream of pretraining documents of one world."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from nanochat.tinyworld import sizes
from nanochat.tinyworld.cast import build_cast
from nanochat.tinyworld.encyclopaedia import Encyclopaedia
from nanochat.tinyworld.facts import build_facts
from nanochat.tinyworld.programs import Programmer
from nanochat.tinyworld.quiz import Quiz
from nanochat.tinyworld.rng import Rng
from nanochat.tinyworld.smalltalk import SmallTalker
from nanochat.tinyworld.spelling import Speller, words_of
from nanochat.tinyworld.stories import StoryTeller
from nanochat.tinyworld.sums import Arithmetic
from nanochat.tinyworld.talk import Talker
from nanochat.tinyworld.world import World, build_world

# Weights follow the mean document lengths measured so far; these are only the start.
_START_LENGTH = 300.0
_REWEIGH_EVERY = 256
_VOCABULARY_SAMPLES = 300


@dataclass(frozen=True, slots=True)
class Authors:
    """Everybody who writes about one world."""

    world: World
    book: Encyclopaedia
    teller: StoryTeller
    talker: Talker
    arithmetic: Arithmetic
    programmer: Programmer
    quiz: Quiz
    small_talker: SmallTalker
    speller: Speller


def build_authors(seed: int) -> Authors:
    """The world of a seed and its authors."""
    world = build_world(seed)
    facts = build_facts(world)
    cast = build_cast(world)
    book, teller = Encyclopaedia(world, facts), StoryTeller(cast)
    talker = Talker(cast, book)
    programmer = Programmer([person.name for person in world.people])
    quiz = Quiz(facts)
    rng = Rng(seed, "vocabulary")
    texts = [text for fact in facts for text in (*fact.statements, *fact.questions)]
    for author in (teller.story, talker.letter, talker.dialogue):
        texts += [author(rng) for _ in range(_VOCABULARY_SAMPLES)]
    return Authors(
        world, book, teller, talker, Arithmetic(cast), programmer, quiz,
        SmallTalker(world, book, teller, programmer), Speller(words_of(texts)),
    )  # fmt: skip


def documents(authors: Authors) -> Iterator[str]:
    """Endless documents; the kinds come in random order and in the shares of MIXTURE, by characters."""
    makers, rng = _makers(authors), Rng(authors.world.seed, "documents")
    lengths = {kind: _START_LENGTH for kind in makers}
    counts = dict.fromkeys(makers, 1)
    while True:
        weights = [(kind, share * counts[kind] / lengths[kind]) for kind, share in sizes.MIXTURE]
        for _ in range(_REWEIGH_EVERY):
            kind = rng.weighted(weights)
            text = makers[kind](rng)
            lengths[kind] += len(text)
            counts[kind] += 1
            yield text


def _makers(authors: Authors) -> dict[str, Callable[[Rng], str]]:
    return {
        "encyclopaedia": authors.book.entry,
        "questions": authors.book.questions_page,
        "quick questions": authors.book.quick_questions,
        "dialogues": authors.talker.dialogue,
        "plays": authors.talker.play,
        "letters": authors.talker.letter,
        "stories": authors.teller.story,
        "riddles": authors.teller.riddle,
        "sums": authors.arithmetic.page,
        "spelling": authors.speller.page,
        "programs": authors.programmer.module,
    }
