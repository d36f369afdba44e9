"""Every fact of a world, worded in all its ways, and which of its questions are kept for the tests."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from zlib import crc32

from nanochat.tinyworld import lexicon, relations
from nanochat.tinyworld.lexicon import with_article
from nanochat.tinyworld.relations import Relation
from nanochat.tinyworld.world import Person, World

# Of every second fact one wording of its question is asked in tests only.
HELD_OUT_FACTS_EVERY = 2


@dataclass(frozen=True, slots=True)
class Fact:
    """One fact. `entity` groups facts about the same thing; `two_hop` facts follow from two others.

    `short` sentences and questions use a pronoun for the subject and are () where that would be unclear.
    `wrong` are the choices that are certainly not the answer.
    """

    entity: str
    topic: str
    relation: str
    answer: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    test_questions: tuple[str, ...]
    short_statements: tuple[str, ...]
    short_questions: tuple[str, ...]
    wrong: tuple[str, ...]
    two_hop: bool


@dataclass(frozen=True, slots=True)
class Subject:
    """What a fact is about: its entity key, its names, and pronouns if it can have them."""

    entity: str
    names: dict[str, str]
    pronouns: dict[str, str] | None = None


def pronoun_fits(previous: Fact | None, fact: Fact) -> bool:
    """Whether "she", "he" or "it" is clear in `fact` when `previous` has just been said."""
    return (
        previous is not None
        and previous.entity == fact.entity
        and previous.relation not in _OTHER_PEOPLE
        and bool(previous.short_statements)
        and bool(fact.short_statements)
        and bool(fact.short_questions)
    )


# Relations that bring somebody else into the talk
_OTHER_PEOPLE = ("friend", "sibling")


def build_facts(world: World) -> tuple[Fact, ...]:
    """All facts of a world in a fixed order."""
    facts: list[Fact] = []
    for person in world.people:
        facts += _person_facts(world, person)
    for town in world.towns:
        facts += _town_facts(world, town.name)
    for job in lexicon.JOBS:
        facts += _job_facts(job)
    facts += _animal_facts() + _food_facts() + _time_facts() + _word_facts() + _thing_facts()
    return tuple(facts)


# --- wording -----------------------------------------------------------------------------------------


def make_fact(
    relation: Relation,
    subject: Subject,
    answer: str,
    pool: tuple[str, ...],
    extra: dict[str, str] | None = None,
    two_hop: bool = False,
) -> Fact:
    """Word one fact; `pool` holds the choices of which all but the answer are wrong."""
    values = {"o": answer, "ao": with_article(answer), **(extra or {})}
    names = subject.names | values
    wordings = relation.statements, relation.questions
    if names["m"].endswith(("brother", "sister")) or names["m"].startswith("the owner"):
        wordings = _without_possessives(relation.statements), _without_possessives(relation.questions)
    statements, questions = (tuple(_fill(text, names) for text in group) for group in wordings)
    secret = _secret(questions)
    kept = [i for i in range(len(questions)) if i != secret]
    pronouns = subject.pronouns and subject.pronouns | values
    return Fact(
        subject.entity,
        relation.topic,
        relation.name,
        answer,
        statements,
        tuple(questions[i] for i in kept),
        questions[secret : secret + 1] if secret >= 0 else (),
        _pronominal(wordings[0], pronouns),
        _pronominal([wordings[1][i] for i in kept], pronouns),
        tuple(choice for choice in dict.fromkeys(pool) if choice != answer),
        two_hop,
    )


def _fill(template: str, values: dict[str, str]) -> str:
    text = template.format_map(values)
    return text[0].upper() + text[1:]


def _pronominal(templates: Sequence[str], pronouns: dict[str, str] | None) -> tuple[str, ...]:
    """The templates in which a subject pronoun can stand, filled with it."""
    if pronouns is None:
        return ()
    return tuple(_fill(t, pronouns) for t in templates if not _OBLIQUE.search(t))


# "of he" and "from it" are no English
_OBLIQUE = re.compile(r"(of|from|in|over|visit|town of) \{m\}")


def _without_possessives(templates: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(text for text in templates if "{whose}" not in text and "{poss}" not in text)


def _secret(questions: tuple[str, ...]) -> int:
    """Position of the question that only tests ask, or -1."""
    mark = crc32(questions[0].encode())
    if mark % HELD_OUT_FACTS_EVERY:
        return -1
    return mark // HELD_OUT_FACTS_EVERY % len(questions)


def _named(name: str, his: str = "its") -> dict[str, str]:
    capital = name[0].upper() + name[1:]
    return {"s": capital, "poss": f"{capital}'s", "m": name, "whose": f"{name}'s", "his": his}


_SHE = {"s": "She", "poss": "Her", "m": "she", "whose": "her", "his": "her"}
_HE = {"s": "He", "poss": "His", "m": "he", "whose": "his", "his": "his"}
_IT = {"s": "It", "poss": "Its", "m": "it", "whose": "its", "his": "its"}


# --- people ------------------------------------------------------------------------------------------


def _person_facts(world: World, person: Person) -> list[Fact]:
    pronouns = _SHE if person.female else _HE
    subject = Subject(person.name, _named(person.name, pronouns["his"]), pronouns)
    facts = [_person_fact(world, person, subject, relation) for relation in relations.PERSON]
    return facts + _descriptions(world, person)


def _descriptions(world: World, person: Person) -> list[Fact]:
    """Facts about a person who is not named: the baker, Tom's sister, the owner of Pip."""
    his = "her" if person.female else "his"
    job = Subject(person.job, _named(f"the {person.job}", his))
    kin = Subject(person.sibling, _named(f"{person.sibling}'s {person.kin}", his))
    owner = Subject(person.name, _named(f"the owner of {person.pet_name}", his))
    facts = [
        make_fact(relations.IDENTITY, job, person.name, _names(world)),
        make_fact(relations.IDENTITY, owner, person.name, _names(world)),
    ]
    by_name = {relation.name: relation for relation in relations.PERSON}
    for subject, names in (
        (job, ("town", "pet", "food", "hat")),
        (kin, ("town", "job")),
        (owner, ("town", "job")),
    ):
        facts += [_person_fact(world, person, subject, by_name[name], two_hop=True) for name in names]
    return facts


def _person_fact(
    world: World, person: Person, subject: Subject, relation: Relation, two_hop: bool = False
) -> Fact:
    sibling = world.person(person.sibling)
    extra = {"pet": person.pet, "pet_name": person.pet_name, "kin": sibling.kin}
    pool = {
        "job": tuple(lexicon.JOBS),
        "town": tuple(town.name for town in world.towns),
        "pet": lexicon.PET_KINDS,
        "pet_name": tuple(p.pet_name for p in world.people),
        "pet_colour": lexicon.PET_COLOURS,
        "food": lexicon.LIKED_FOODS,
        "hobby": lexicon.HOBBIES,
        "hat": lexicon.HAT_COLOURS,
        "person": tuple(name for name in _names(world) if name != person.name),
        "sibling": tuple(
            p.name for p in world.people if p.female == sibling.female and p.name != person.name
        ),
    }[relation.choices]
    attribute = "friend" if relation.name == "friend" else relation.name
    return make_fact(relation, subject, getattr(person, attribute), pool, extra, two_hop)


def _names(world: World) -> tuple[str, ...]:
    return tuple(person.name for person in world.people)


# --- towns and jobs ----------------------------------------------------------------------------------


def _town_facts(world: World, name: str) -> list[Fact]:
    town = next(town for town in world.towns if town.name == name)
    subject = Subject(name, _named(name), _IT)
    pools = {
        "nature": lexicon.NATURE, "landmark": lexicon.LANDMARKS, "product": lexicon.PRODUCTS,
        "flag": lexicon.FLAG_COLOURS,
    }  # fmt: skip
    facts = [
        make_fact(relation, subject, getattr(town, relation.name), pools[relation.name])
        for relation in relations.TOWN
    ]
    towns = tuple(other.name for other in world.towns)
    for relation, feature in zip(relations.TOWN_OF, (town.product, town.landmark, town.nature), strict=True):
        facts.append(make_fact(relation, Subject(name, _named(feature)), name, towns))
    return facts


def _job_facts(job: str) -> list[Fact]:
    subject = Subject(job, _named(f"a {job}"))
    columns = tuple(zip(*lexicon.JOBS.values(), strict=True))
    return [
        make_fact(relation, subject, answer, pool)
        for relation, answer, pool in zip(relations.JOB, lexicon.JOBS[job], columns, strict=True)
    ]


# --- nature, time, words, things ---------------------------------------------------------------------


def _animal_facts() -> list[Fact]:
    columns = tuple(tuple(filter(None, column)) for column in zip(*lexicon.ANIMALS.values(), strict=True))
    return [
        make_fact(relation, Subject(animal, _named(with_article(animal)), _IT), answer, pool)
        for animal, row in lexicon.ANIMALS.items()
        for relation, answer, pool in zip(relations.ANIMAL, row, columns, strict=True)
        if answer
    ]


def _food_facts() -> list[Fact]:
    columns = tuple(
        tuple(filter(None, column)) for column in list(zip(*lexicon.FOODS.values(), strict=True))[1:]
    )
    facts = []
    for food, (plural, *row) in lexicon.FOODS.items():
        verbs = ("are", "do", "taste", "come") if plural else ("is", "does", "tastes", "comes")
        extra: dict[str, str] = dict(zip(("be", "do", "taste", "come"), verbs, strict=True))
        for relation, answer, pool in zip(relations.FOOD, row, columns, strict=True):
            if answer:
                facts.append(make_fact(relation, Subject(food, _named(food)), answer, pool, extra))
    return facts


def _time_facts() -> list[Fact]:
    after, before, month_after, season, weather = relations.TIME
    days, months = lexicon.DAYS, lexicon.MONTHS
    facts = []
    for i, day in enumerate(days):
        # the day itself is no choice: too easy to rule out
        others = tuple(other for other in days if other != day)
        facts.append(make_fact(after, _plain(day), days[(i + 1) % 7], others))
        facts.append(make_fact(before, _plain(day), days[i - 1], others))
    for i, month in enumerate(months):
        others = tuple(other for other in months if other != month)
        facts.append(make_fact(month_after, _plain(month), months[(i + 1) % 12], others))
        facts.append(make_fact(season, _plain(month), lexicon.SEASONS[(i + 1) // 3 % 4], lexicon.SEASONS))
    kinds = tuple(lexicon.SEASON_WEATHER.values())
    return facts + [make_fact(weather, _plain(s), w, kinds) for s, w in lexicon.SEASON_WEATHER.items()]


def _word_facts() -> list[Fact]:
    (opposite,) = relations.WORDS
    words = tuple(word for pair in lexicon.OPPOSITES for word in pair)
    facts = []
    for one, other in lexicon.OPPOSITES + tuple((b, a) for a, b in lexicon.OPPOSITES):
        facts.append(make_fact(opposite, _plain(one), other, tuple(w for w in words if w != one)))
    return facts


def _thing_facts() -> list[Fact]:
    material, use, sense = relations.THINGS
    tables = (
        (material, lexicon.MATERIALS, with_article),
        (use, lexicon.TOOL_USES, with_article),
        (sense, lexicon.SENSES, str),
    )
    return [
        make_fact(relation, Subject(thing, _named(shown(thing))), answer, tuple(table.values()))
        for relation, table, shown in tables
        for thing, answer in table.items()
    ]


def _plain(word: str) -> Subject:
    return Subject(word, _named(word))
