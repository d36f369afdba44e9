"""The fields that stories, letters and talk fill into their templates: people, pronouns, places, things."""

from __future__ import annotations

from dataclasses import dataclass

from nanochat.tinyworld.lexicon import ANIMALS, HAT_COLOURS
from nanochat.tinyworld.rng import Rng
from nanochat.tinyworld.world import Person, World

PLACES = ("garden", "kitchen", "barn", "park", "library", "bakery", "station", "meadow")
OBJECTS = ("ball", "key", "map", "ring", "lamp", "cup", "kite", "drum", "scarf", "book")
HIDING_PLACES = (
    "under a basket", "behind a box", "next to a big stone", "under a bag", "under a chair", "behind a wall",
    "in an old boot", "under an old hat",
)  # fmt: skip
WEATHER = ("sunny", "rainy", "windy", "cold", "warm", "cloudy")


@dataclass(frozen=True, slots=True)
class Cast:
    """Template fields of everybody in a world, computed once."""

    people: tuple[Person, ...]
    fields: dict[str, dict[str, str]]

    def pair(self, rng: Rng, person: Person) -> Person:
        """Somebody close: the friend or the sibling."""
        name = person.friend if rng.chance(0.5) else person.sibling
        return next(other for other in self.people if other.name == name)

    def other(self, rng: Rng, *present: Person) -> Person:
        """Somebody who is not there yet."""
        while True:
            person = rng.pick(self.people)
            if person not in present:
                return person

    def scene(self, rng: Rng, first: Person, second: Person) -> dict[str, str]:
        """Fields of two people, prefixed p_ and q_, with a thing, three places, a day and a number."""
        scene = dict(self.fields[f"p {first.name}"])
        scene.update(self.fields[f"q {second.name}"])
        places = rng.sample(PLACES, 3)
        scene["thing"], scene["colour"] = rng.pick(OBJECTS), rng.pick(HAT_COLOURS)
        scene["place1"], scene["place2"], scene["place3"] = places
        scene["hiding"], scene["weather"] = rng.pick(HIDING_PLACES), rng.pick(WEATHER)
        return scene


def build_cast(world: World) -> Cast:
    """All fields of a world's people."""
    fields = {}
    for person in world.people:
        for role in "pq":
            plain = _person_fields(person)
            fields[f"{role} {person.name}"] = {f"{role}_{key}": value for key, value in plain.items()}
    return Cast(world.people, fields)


def _person_fields(person: Person) -> dict[str, str]:
    he, his, him = ("she", "her", "her") if person.female else ("he", "his", "him")
    sound = ANIMALS[person.pet][0] if person.pet in ANIMALS else ""
    return {
        "name": person.name, "he": he, "his": his, "him": him, "He": he.capitalize(), "His": his.capitalize(),
        "job": person.job, "town": person.town, "pet": person.pet, "pet_name": person.pet_name,
        "pet_colour": person.pet_colour, "food": person.food, "hobby": person.hobby, "hat": person.hat,
        "friend": person.friend, "sibling": person.sibling, "kin": person.kin,
        "call": f'"{sound.capitalize()}!" said {person.pet_name}.' if sound else f"{person.pet_name} made a small sound.",
    }  # fmt: skip
