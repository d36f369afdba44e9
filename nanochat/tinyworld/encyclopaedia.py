"""Encyclopaedia entries and pages of questions and answers: every fact, again and again, in other words."""

from __future__ import annotations

from nanochat.tinyworld.facts import Fact, pronoun_fits
from nanochat.tinyworld.rng import Rng
from nanochat.tinyworld.world import World

# Share of entries by kind of entity. People have most facts, so they get most entries.
ENTRY_SHARES = (("person", 0.46), ("job", 0.16), ("town", 0.10), ("other", 0.28))
PRONOUN_SHARE = 0.6


class Encyclopaedia:
    """Facts ordered by what they are about."""

    def __init__(self, world: World, facts: tuple[Fact, ...]) -> None:
        self.world = world
        self.facts = facts
        self.by_entity: dict[str, list[Fact]] = {}
        for fact in facts:
            self.by_entity.setdefault(fact.entity, []).append(fact)
        people = [person.name for person in world.people]
        jobs = [person.job for person in world.people]
        towns = [town.name for town in world.towns]
        known = set(people + jobs + towns)
        others = [entity for entity in self.by_entity if entity not in known]
        self._groups = {"person": people, "job": jobs, "town": towns, "other": others}

    def entity(self, rng: Rng) -> str:
        """Something to write about."""
        return rng.pick(self._groups[rng.weighted(ENTRY_SHARES)])

    def entry(self, rng: Rng) -> str:
        """An entry about one thing with several of its facts, or a page that gathers things of one kind."""
        kind = rng.random()
        if kind < 0.12:
            return self.town_page(rng)
        if kind < 0.30:
            return self.mixed_page(rng)
        entity = self.entity(rng)
        if len(self.by_entity[entity]) < 3:
            return self.small_things_page(rng, entity)
        facts = rng.shuffled(self.by_entity[entity])[:12]
        title = f"{entity[0].upper()}{entity[1:]}\n\n" if rng.chance(0.5) else ""
        return title + " ".join(tell_facts(rng, facts))

    def small_things_page(self, rng: Rng, entity: str) -> str:
        """Several things about which there is little to say."""
        facts = list(self.by_entity[entity])
        while len(facts) < 6:
            facts += self.by_entity[rng.pick(self._groups["other"])]
        return " ".join(rng.pick(fact.statements) for fact in facts[:9])

    def mixed_page(self, rng: Rng) -> str:
        """Things worth knowing: facts that have nothing to do with each other."""
        sentences = [rng.pick(rng.pick(self.facts).statements) for _ in range(rng.between(5, 9))]
        return rng.pick(("Did you know?\n\n", "Things to know\n\n", "")) + rng.pick(("\n", " ")).join(
            sentences
        )

    def town_page(self, rng: Rng) -> str:
        """A town, its features and the people who live there."""
        town = rng.pick(self.world.towns)
        sentences = tell_facts(rng, rng.shuffled(self.by_entity[town.name])[:5])
        for person in rng.shuffled([p for p in self.world.people if p.town == town.name]):
            sentences.append(f"{person.name} the {person.job} lives in {town.name}.")
        return f"The town of {town.name}\n\n" + " ".join(sentences)

    def questions_page(self, rng: Rng) -> str:
        """Questions with short or whole answers, about one thing or about many."""
        count = rng.between(3, 7)
        if rng.chance(0.5):
            facts = rng.shuffled(self.by_entity[self.entity(rng)])[:count]
        else:
            facts = [rng.pick(self.facts) for _ in range(count)]
        whole = rng.chance(0.5)
        lines = []
        for fact in facts:
            reply = fact.statements[0] if whole else fact.answer
            lines.append(f"Question: {rng.pick(fact.questions)}\nAnswer: {reply}")
        return "\n\n".join(lines)

    def quick_questions(self, rng: Rng) -> str:
        """Many questions about anything, each with its bare answer.

        The answer is indented, so that its word is the same token as within a sentence or a list. On half of the
        pages the questions begin as those of exams do, which otherwise would hide what is known about them.
        """
        facts = [rng.pick(self.facts) for _ in range(rng.between(6, 12))]
        heading = "Multiple Choice question: " if rng.chance(0.5) else ""
        return "\n".join(f"{heading}{rng.pick(fact.questions)}\n {fact.answer}" for fact in facts)


def tell_facts(rng: Rng, facts: list[Fact]) -> list[str]:
    """One sentence per fact; the subject may become a pronoun once its own name has been said."""
    sentences: list[str] = []
    previous: Fact | None = None
    for fact in facts:
        short = pronoun_fits(previous, fact) and rng.random() < PRONOUN_SHARE
        sentences.append(rng.pick(fact.short_statements if short else fact.statements))
        previous = fact
    return sentences
