"""The people and towns of one TinyWorld: who they are, drawn from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nanochat.tinyworld import lexicon
from nanochat.tinyworld.rng import Rng

NUM_PEOPLE = 24  # half women, half men; as many as there are jobs
NUM_TOWNS = 8


@dataclass(frozen=True, slots=True)
class Person:
    """Somebody, with everything there is to know; friend and sibling are names."""

    name: str
    female: bool
    job: str
    town: str
    pet: str
    pet_name: str
    pet_colour: str
    food: str
    hobby: str
    hat: str
    friend: str
    sibling: str

    @property
    def kin(self) -> str:
        """What this person is to a sibling."""
        return "sister" if self.female else "brother"


@dataclass(frozen=True, slots=True)
class Town:
    """A place to live; no two towns share any of their features."""

    name: str
    nature: str
    landmark: str
    product: str
    flag: str


@dataclass(frozen=True, slots=True)
class World:
    """Everybody and every town of one seed."""

    seed: int
    people: tuple[Person, ...]
    towns: tuple[Town, ...]

    def person(self, name: str) -> Person:
        """The person of this name; KeyError if there is none."""
        for person in self.people:
            if person.name == name:
                return person
        raise KeyError(name)


def build_world(seed: int) -> World:
    """The world of a seed: same sizes and pools for each, other people, towns and ties."""
    rng = Rng(seed, "world")
    women = rng.sample(lexicon.WOMEN, NUM_PEOPLE // 2)
    names: list[str] = rng.shuffled([*women, *rng.sample(lexicon.MEN, NUM_PEOPLE // 2)])
    towns = _build_towns(rng)
    friends, siblings = _pairs(rng, names)
    columns = {
        "job": rng.shuffled(list(lexicon.JOBS)),
        "town": _spread(rng, [town.name for town in towns]),
        "pet": _spread(rng, lexicon.PET_KINDS),
        "pet_name": rng.sample(lexicon.PET_NAMES, NUM_PEOPLE),
        "pet_colour": _spread(rng, lexicon.PET_COLOURS),
        "food": _spread(rng, lexicon.LIKED_FOODS),
        "hobby": _spread(rng, lexicon.HOBBIES),
        "hat": _spread(rng, lexicon.HAT_COLOURS),
    }
    people = tuple(
        Person(
            name=name,
            female=name in women,
            friend=friends[name],
            sibling=siblings[name],
            **{key: column[i] for key, column in columns.items()},
        )
        for i, name in enumerate(names)
    )
    return World(seed, people, towns)


def _build_towns(rng: Rng) -> tuple[Town, ...]:
    columns = zip(
        rng.sample(lexicon.TOWNS, NUM_TOWNS),
        rng.shuffled(lexicon.NATURE),
        rng.shuffled(lexicon.LANDMARKS),
        rng.shuffled(lexicon.PRODUCTS),
        rng.shuffled(lexicon.FLAG_COLOURS),
        strict=True,
    )
    return tuple(Town(*column) for column in columns)


def _spread(rng: Rng, values: Sequence[str]) -> list[str]:
    """One value per person, every value equally often."""
    return rng.shuffled(list(values) * (NUM_PEOPLE // len(values)))


def _pairs(rng: Rng, names: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Two symmetric pairings of all names in which nobody's sibling is also the best friend."""
    order = rng.shuffled(names)
    friends, siblings = {}, {}
    for i in range(0, NUM_PEOPLE, 2):
        friends[order[i]], friends[order[i + 1]] = order[i + 1], order[i]
    # shifting the circle by one makes neighbours of people from different pairs
    shifted = order[1:] + order[:1]
    for i in range(0, NUM_PEOPLE, 2):
        siblings[shifted[i]], siblings[shifted[i + 1]] = shifted[i + 1], shifted[i]
    return friends, siblings
