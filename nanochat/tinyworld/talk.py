"""Letters and dialogues in which the people of the world tell each other what they know."""

from __future__ import annotations

from nanochat.tinyworld.cast import WEATHER, Cast
from nanochat.tinyworld.encyclopaedia import Encyclopaedia
from nanochat.tinyworld.facts import Fact, pronoun_fits
from nanochat.tinyworld.lexicon import DAYS, OPPOSITES
from nanochat.tinyworld.rng import Rng

GREETINGS = ("Dear {}", "My dear {}", "Hello {}")
LETTER_OPENINGS = (
    "How are you? I am well.", "Thank you for your letter.", "It is {weather} here in {p_town} today.",
    "I am sitting in my house in {p_town} and thinking of you.", "It is {day} and I have time to write.",
)  # fmt: skip
LETTER_SELF = (
    "My {p_pet} {p_pet_name} is well.", "I still work as a {p_job}.", "Today I wear my {p_hat} hat.",
    "I ate {p_food} again. You know that I love {p_food}.", "In the evening I like to {p_hobby}.",
    "My {p_pet} is as {p_pet_colour} as ever.", "My best friend {p_friend} was here.",
)  # fmt: skip
LETTER_YOU = (
    "How is your {q_pet} {q_pet_name}?", "Do you still like to {q_hobby}?", "I have some {q_food} for you.",
    "Is it {weather} in {q_town}?", "Do not forget your {q_hat} hat!",
    "It must be hard to be a {q_job}.", "I want to visit you in {q_town} on {day}.",
)  # fmt: skip
LETTER_NEWS = ("Do you know this? {}", "I learned something: {}", "People say: {}", "It is true: {}")
FAREWELLS = ("Your friend,\n{}", "Love,\n{}", "With best wishes,\n{}", "See you soon,\n{}")

ASKED = (
    '"{question}" asked {p_name}.',
    '{p_name} asked: "{question}"',
    '"Tell me, {q_name}. {question}" said {p_name}.',
)
REPLIED = ('"{spoken}" said {q_name}.', '{q_name} said: "{reply}"', '"I know that," said {q_name}. "{reply}"')
CLOSINGS = (
    '"Thank you," said {p_name}.', '"You know a lot," said {p_name}.', '"That is good to know," said {p_name}.',
    "Then they went home.", '"Goodbye!" said {q_name}.',
)  # fmt: skip


class Talker:
    """Writes what people say to each other."""

    def __init__(self, cast: Cast, encyclopaedia: Encyclopaedia) -> None:
        self.cast = cast
        self.encyclopaedia = encyclopaedia

    def letter(self, rng: Rng) -> str:
        """A letter from one person to a friend or sibling."""
        writer = rng.pick(self.cast.people)
        reader = self.cast.pair(rng, writer)
        scene = self.cast.scene(rng, writer, reader)
        scene["day"], scene["weather"] = rng.pick(DAYS), rng.pick(WEATHER)
        lines = [rng.pick(LETTER_OPENINGS)]
        lines += rng.sample(LETTER_SELF, rng.between(2, 4))
        lines += rng.sample(LETTER_YOU, rng.between(1, 3))
        body = " ".join(lines).format_map(scene)
        for _ in range(rng.between(0, 3)):
            news = rng.pick(rng.pick(self.encyclopaedia.facts).statements)
            body += " " + rng.pick(LETTER_NEWS).format(news)
        greeting = rng.pick(GREETINGS).format(reader.name)
        return f"{greeting},\n\n{body}\n\n" + rng.pick(FAREWELLS).format(writer.name)

    def dialogue(self, rng: Rng) -> str:
        """Two people meet; one asks, the other knows. Later questions may use pronouns."""
        first = rng.pick(self.cast.people)
        second = self.cast.other(rng, first)
        scene = self.cast.scene(rng, first, second)
        lines = [f"{first.name} met {second.name} in the {scene['place1']}."]
        facts = self._topic(rng, rng.between(2, 4))
        for i, fact in enumerate(facts):
            short = pronoun_fits(facts[i - 1] if i else None, fact)
            scene["question"] = rng.pick(fact.short_questions if short else fact.questions)
            replies = fact.short_statements or fact.statements
            reply = replies[0] if rng.chance(0.6) else rng.pick(replies)
            scene["reply"], scene["spoken"] = reply, reply[:-1] + ","  # a comma before "said"
            lines.append(rng.pick(ASKED).format_map(scene))
            lines.append(rng.pick(REPLIED).format_map(scene))
        lines.append(rng.pick(CLOSINGS).format_map(scene))
        return rng.pick((" ", "\n")).join(lines)

    def play(self, rng: Rng) -> str:
        """The same as lines of a play, with greetings, guesses and opposites."""
        first = rng.pick(self.cast.people)
        second = self.cast.other(rng, first)
        a, b = first.name, second.name
        lines = [f"{a}: Hello, {b}!", f"{b}: Hello, {a}!"]
        for fact in self._topic(rng, rng.between(2, 4)):
            lines.append(f"{a}: {rng.pick(fact.questions)}")
            if rng.chance(0.3):
                lines.append(f"{b}: Is it {rng.pick(fact.wrong)}?")
                lines.append(f"{a}: No. {fact.statements[0]}")
            else:
                lines.append(f"{b}: {rng.pick(fact.statements)}")
        if rng.chance(0.3):
            one, other = rng.pick(OPPOSITES)
            lines += [f"{a}: I say {one}.", f"{b}: I say {other}."]
        return "\n".join(lines)

    def _topic(self, rng: Rng, count: int) -> list[Fact]:
        """Facts to talk about: of one thing, or of anything."""
        book = self.encyclopaedia
        if rng.chance(0.5):
            return rng.shuffled(book.by_entity[book.entity(rng)])[:count]
        return [rng.pick(book.facts) for _ in range(count)]
