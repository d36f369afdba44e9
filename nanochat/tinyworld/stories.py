"""Stories in which the text keeps track of who has what, who is where and how many are left."""

from __future__ import annotations

from nanochat.tinyworld.cast import OBJECTS, PLACES, Cast
from nanochat.tinyworld.lexicon import DAYS, NUMBER_WORDS, THINGS
from nanochat.tinyworld.rng import Rng
from nanochat.tinyworld.world import Person

SHORTEST_STORY_WORDS = 80
OPENINGS = (
    "One {weather} day {p_name} was in the {place1}.",
    "It was a {weather} {day} in {p_town}. {p_name} was in the {place1}.",
    "On {day} {p_name} the {p_job} woke up early and went to the {place1}.",
    "It was {day}. {p_name} put on {p_his} {p_hat} hat and walked to the {place1}.",
    "Once, on a {weather} morning, {p_name} went out to the {place1}.",
)
MOODS = (
    "The sky was grey.", "The birds sang.", "A soft wind came over the hill.", "The sun was warm.",
    "There was nobody else.", "It was very quiet.", "{p_name} was happy.", "A cart went by.",
)  # fmt: skip
LOSSES = (
    "{p_name} looked for {p_his} {colour} {thing}, but it was gone.",
    '"Where is my {colour} {thing}?" said {p_name}.',
    "Then {p_name} saw that the {colour} {thing} was not there.",
    "{p_name} had lost the {colour} {thing}.",
)
ASKING = (
    '{q_name} came by. "Did you see my {thing}?" asked {p_name}. "No," said {q_name}, "but I will help you."',
    '{p_name} asked {q_name} for help. "Of course," said {q_name} and put on {q_his} {q_hat} hat.',
    "{q_name} the {q_job} heard about it and came to help.",
)
SEARCHES = (
    "First they looked in the {place2}. The {thing} was not there.",
    "They went to the {place2}, but there was no {thing}.",
    "They looked everywhere in the {place2} and found nothing.",
)
FINDS = (
    "Then they went to the {place3}. There, {hiding}, was the {colour} {thing}!",
    "At last {q_name} found the {thing} in the {place3}. It was {hiding}.",
    "In the {place3} {q_name} looked {hiding}, and there was the {thing}.",
)
THANKS = (
    '"Thank you!" said {p_name}. {q_name} gave {p_him} the {thing}.',
    '{q_name} gave the {thing} to {p_name}. "You are a good friend," said {p_name}.',
    "{p_name} took the {thing} and was very happy.",
)
LOST_ENDINGS = (
    "Now {p_name} has the {thing} again.",
    "So the {colour} {thing} came home with {p_name}.",
    "That evening the {thing} was back in the house of {p_name}.",
)
GIFT_WISHES = (
    "{q_name} had a birthday. {p_name} wanted to give {q_him} something.",
    "It was the birthday of {q_name}, and {p_name} had no gift yet.",
    '"Today is the birthday of {q_name}," said {p_name}. "I need a gift."',
)
GIFT_SHOPS = (
    "At the market there was a {colour} {thing}. It cost {number} coins, and {p_name} bought it.",
    "{p_name} went to the market and bought a {colour} {thing} for {number} coins.",
    "{p_name} made a {thing} and painted it {colour}. It took {number} hours.",
)
GIFT_GIVING = (
    '"This is for you," said {p_name} and gave {q_name} the {thing}.',
    "{p_name} gave the {colour} {thing} to {q_name}.",
    '{q_name} opened the box. "A {colour} {thing}!" {q_he} said.',
)
GIFT_ENDINGS = (
    "Now {q_name} has a {colour} {thing}.",
    "Since that day the {thing} belongs to {q_name}.",
    "{q_name} still has the {colour} {thing}.",
)
MEALS = (
    "Then they ate {q_food}, because {q_name} loves {q_food}.",
    "They sat down and ate {p_food}, the favourite food of {p_name}.",
    "{p_name} ate {p_food} and {q_name} ate {q_food}.",
)
PET_RUNS = (
    "{p_name} has a {p_pet_colour} {p_pet} called {p_pet_name}. {p_pet_name} ran away.",
    "The door was open, and {p_pet_name} the {p_pet} ran out.",
    '"{p_pet_name}! {p_pet_name}!" called {p_name}. But the {p_pet_colour} {p_pet} did not come.',
)
PET_LOOKS = (
    '{p_name} asked {q_name}: "Did you see a {p_pet_colour} {p_pet}?" "Yes," said {q_name}, "it ran to the {place3}."',
    "{q_name} had seen the {p_pet} on the way to the {place3}.",
    "{q_name} said that a {p_pet_colour} {p_pet} was in the {place3}.",
)
PET_FINDS = (
    "They ran to the {place3}. {p_call} There it was, {hiding}.",
    "In the {place3} they stood still. {p_call} {p_name} laughed.",
    "And really, in the {place3}, {hiding}, sat {p_pet_name}. {p_call}",
)
PET_ENDINGS = (
    "{p_name} took {p_pet_name} home. That night the {p_pet} slept well.",
    "Now {p_pet_name} is at home with {p_name} again.",
    "They all went back to {p_town}, {p_name}, {q_name} and the {p_pet}.",
)
WORK_DAYS = (
    "{p_name} is a {p_job}. {p_He} worked until noon.",
    "A {p_job} has much to do. {p_name} did not stop before noon.",
    "{p_name} likes to be a {p_job}. All morning {p_he} worked.",
)
WORK_VISITS = (
    "{q_name} came from {q_town} to see {p_him}.",
    "Then {q_name}, the {q_job} from {q_town}, knocked at the door.",
    '"Good day," said {q_name}. "Good day," said {p_name}.',
)
EVENINGS = (
    "In the evening {p_name} likes to {p_hobby}, and {q_name} likes to {q_hobby}. So they did.",
    "When the work was done, {p_name} wanted to {p_hobby}.",
    "Later {p_name} fed {p_his} {p_pet} {p_pet_name} and went to bed.",
)
TRAVELS = (
    "{p_name} lives in {p_town}. {p_He} wanted to see {q_name} in {q_town}.",
    "From {p_town} to {q_town} it is a long way, but {p_name} wanted to visit {q_name}.",
    '"I will go to {q_town}," said {p_name}, "and visit {q_name} the {q_job}."',
)
ARRIVALS = (
    "In the evening {p_he} came to {q_town}. {q_name} stood at the door with {q_his} {q_pet} {q_pet_name}.",
    "At last {p_he} was there. {q_name} wore {q_his} {q_hat} hat and smiled.",
    "{q_name} was at home in {q_town} and gave {p_him} tea and {q_food}.",
)
RETURNS = (
    "At the end of the day {p_name} went home to {p_town}.",
    "Late at night {p_name} was in {p_town} again.",
    "Then {p_name} went back to {p_town}, and {p_he} was tired.",
)
SHARING = (
    "{p_name} had {a} {things}. {p_He} gave {b} {things} to {q_name}.",
    "In the basket of {p_name} there were {a} {things}. {q_name} took {b} of them.",
    "{p_name} found {a} {things}. {q_name} wanted {b} {things}, and {p_name} gave them to {q_him}.",
)
SHARED = (
    "Now {p_name} had {c} {things} and {q_name} had {b}.",
    "So {c} {things} were left for {p_name}.",
    "After that there were {c} {things} in the basket of {p_name}.",
)
JOKES = (
    '"{c_} is enough for me," said {p_name}.',
    '"Thank you," said {q_name}.',
    "They sat in the {place2} and counted the {things} once more.",
)
BEATS = {
    "lost": (LOSSES, ASKING, SEARCHES, FINDS, THANKS, LOST_ENDINGS),
    "gift": (GIFT_WISHES, GIFT_SHOPS, GIFT_GIVING, MEALS, GIFT_ENDINGS),
    "pet": (PET_RUNS, PET_LOOKS, PET_FINDS, PET_ENDINGS),
    "work": (WORK_DAYS, WORK_VISITS, MEALS, EVENINGS),
    "travel": (TRAVELS, ARRIVALS, MEALS, EVENINGS, RETURNS),
    "share": (SHARING, SHARED, JOKES),
}
KINDS = tuple(BEATS)
NEXT_DAY = (
    "\n\nThe next day was a {day}.",
    "\n\nOn {day}, a {weather} day, they met again.",
    "\n\nThen it was {day}.",
)


class StoryTeller:
    """Stories about the people of one world."""

    def __init__(self, cast: Cast) -> None:
        self.cast = cast

    def story(self, rng: Rng) -> str:
        """Two friends or siblings through two to four days, 80 to 300 words."""
        first = rng.pick(self.cast.people)
        second = self.cast.pair(rng, first)
        today, num_chapters = rng.below(7), rng.between(2, 4)
        text = ""
        for number, kind in enumerate(rng.shuffled(KINDS), 1):
            if rng.chance(0.5):
                first, second = second, first
            chapter = self.chapter(rng, first, second, kind, today, opening=number == 1)
            text += " ".join(chapter)
            today = (today + 1) % 7
            if number >= num_chapters and text.count(" ") >= SHORTEST_STORY_WORDS:
                break
        return text

    def riddle(self, rng: Rng) -> str:
        """People move, a thing changes hands, and the text says where everything is at the end."""
        return " ".join(self.passing_on(rng))

    def short_story(self, rng: Rng, person: Person) -> str:
        """One chapter about somebody, for a chat."""
        kind = rng.pick(KINDS)
        return " ".join(
            self.chapter(rng, person, self.cast.pair(rng, person), kind, rng.below(7), opening=True)
        )

    def chapter(
        self, rng: Rng, first: Person, second: Person, kind: str, today: int, opening: bool
    ) -> list[str]:
        """The sentences of one chapter, in order; every beat is told in one of its wordings."""
        scene = self.cast.scene(rng, first, second)
        scene["day"] = DAYS[today]
        _count(rng, scene)
        sentences = [rng.pick(OPENINGS if opening else NEXT_DAY).format_map(scene)]
        if rng.chance(0.4):
            sentences.append(rng.pick(MOODS).format_map(scene))
        return sentences + [rng.pick(beat).format_map(scene) for beat in BEATS[kind]]

    def passing_on(self, rng: Rng) -> list[str]:
        """Sentences in which people move and a thing changes hands, then who has it and where everybody is."""
        people = [person.name for person in rng.sample(self.cast.people, 3)]
        thing = f"{rng.pick(('red', 'blue', 'green', 'yellow'))} {rng.pick(OBJECTS)}"
        where = dict(zip(people, rng.sample(PLACES, 3), strict=True))
        holder = people[0]
        sentences = [f"{name} is in the {place}." for name, place in where.items()]
        sentences.append(f"{holder} has the {thing}.")
        for _ in range(rng.between(4, 8)):
            name = rng.pick(people)
            if name != holder and where[name] == where[holder]:
                sentences.append(rng.pick(_HANDOVERS).format(holder, thing, name))
                holder = name
            else:
                where[name] = rng.pick([place for place in PLACES if place != where[name]])
                if rng.chance(0.6) and name != holder:
                    where[name] = where[holder]
                sentences.append(rng.pick(_MOVES).format(name, where[name]))
        sentences.append(f"Who has the {thing} now? {holder} has it.")
        sentences.append(f"Where is the {thing}? It is in the {where[holder]}.")
        asked = rng.pick(people)
        sentences.append(f"Where is {asked}? {asked} is in the {where[asked]}.")
        return sentences


_MOVES = ("{} goes to the {}.", "{} walks to the {}.", "Then {} goes to the {}.", "Now {} is in the {}.")
_HANDOVERS = ("{0} gives the {1} to {2}.", "{2} gets the {1} from {0}.", "{2} takes the {1} from {0}.")


def _count(rng: Rng, scene: dict[str, str]) -> None:
    """Put a subtraction in words into the scene: a things, b given away, c left."""
    a = rng.between(4, 12)
    b = rng.between(2, a - 2)
    scene["things"] = rng.pick(THINGS)[1]
    scene["number"] = NUMBER_WORDS[rng.between(2, 12)]
    scene["a"], scene["b"], scene["c"] = NUMBER_WORDS[a], NUMBER_WORDS[b], NUMBER_WORDS[a - b]
    scene["c_"] = scene["c"].capitalize()
