"""Conversations about the world: questions that build on each other, small tasks, memory, and honest ignorance."""

from __future__ import annotations

from nanochat.tinyworld import identity, lexicon, outside
from nanochat.tinyworld.cast import OBJECTS, PLACES
from nanochat.tinyworld.encyclopaedia import Encyclopaedia
from nanochat.tinyworld.facts import Fact, pronoun_fits
from nanochat.tinyworld.identity import Messages, exchange
from nanochat.tinyworld.programs import Programmer, as_chat
from nanochat.tinyworld.rng import Rng
from nanochat.tinyworld.stories import StoryTeller
from nanochat.tinyworld.world import World

# Share of each kind of conversation.
KIND_SHARES = (
    ("questions", 0.34), ("programming", 0.23), ("memory", 0.09), ("lists", 0.06), ("rewriting", 0.07),
    ("yes_no", 0.06), ("ignorance", 0.05), ("reading", 0.04), ("story", 0.04), ("manners", 0.02),
)  # fmt: skip
CARELESS_SHARE = 0.08  # questions typed without capitals and question mark
FOLLOW_UPS = ("And {}", "And {}", "Now tell me: {}")
COLOURS = lexicon.HAT_COLOURS


class SmallTalker:
    """Writes conversations between a user and the assistant."""

    def __init__(
        self, world: World, book: Encyclopaedia, teller: StoryTeller, programmer: Programmer
    ) -> None:
        self.world, self.book, self.teller, self.programmer = world, book, teller, programmer
        self.names = [person.name for person in world.people]
        self.strangers = [name for name in lexicon.WOMEN + lexicon.MEN if name not in self.names]

    def conversation(self, rng: Rng) -> Messages:
        """A conversation of a random kind."""
        messages = getattr(self, rng.weighted(KIND_SHARES))(rng)
        if rng.chance(0.05):
            messages += exchange(rng.pick(identity.THANKS), rng.pick(identity.THANKS_ANSWERS))
        return messages

    def questions(self, rng: Rng) -> Messages:
        """One to four questions; later ones about the same person say "she" or "he"."""
        if rng.chance(0.3):
            return self._about(rng) if rng.chance(0.5) else self._family(rng)
        if rng.chance(0.25):
            return exchange(*self._asked(rng, rng.pick(self.book.facts)))
        messages: Messages = []
        last: Fact | None = None
        entity = rng.pick(self.names) if rng.chance(0.7) else self.book.entity(rng)
        for fact in rng.shuffled(self.book.by_entity[entity])[: rng.between(2, 4)]:
            same = pronoun_fits(last, fact)
            messages += exchange(*self._asked(rng, fact, follow_up=same))
            last = fact
        return messages

    def _family(self, rng: Rng) -> Messages:
        """Somebody's brother or sister, and then questions about him or her."""
        person = rng.pick(self.world.people)
        relation = rng.pick(("sibling", "friend"))
        fact = next(f for f in self.book.by_entity[person.name] if f.relation == relation)
        messages = exchange(*self._asked(rng, fact))
        about = [f for f in self.book.by_entity[fact.answer] if f.short_statements and f.relation != relation]
        for follower in rng.sample(about, rng.between(1, 2)):
            messages += exchange(*self._asked(rng, follower, follow_up=True))
            if not pronoun_fits(follower, follower):
                break
        return messages

    def _about(self, rng: Rng) -> Messages:
        """Everything that comes to mind about a person or a town."""
        entity = rng.pick([*self.names, *(town.name for town in self.world.towns)])
        facts = [fact for fact in self.book.by_entity[entity] if fact.short_statements]
        sentences: list[str] = []
        previous: Fact | None = None
        for fact in rng.sample(facts, rng.between(3, 4)):
            short = pronoun_fits(previous, fact)
            sentences.append((fact.short_statements if short else fact.statements)[0])
            previous = fact
        return exchange(rng.pick(_ABOUT).format(entity), " ".join(sentences))

    def _asked(self, rng: Rng, fact: Fact, follow_up: bool = False) -> tuple[str, str]:
        if not follow_up:
            question = rng.pick(fact.questions)
            if rng.chance(CARELESS_SHARE):
                question = question.lower().rstrip("?")
            return question, fact.statements[0]
        question = rng.pick(fact.short_questions)
        if rng.chance(0.6):
            question = rng.pick(FOLLOW_UPS).format(question[0].lower() + question[1:])
        return question, fact.short_statements[0]

    def yes_no(self, rng: Rng) -> Messages:
        """Is it so? Yes, or no and what is right."""
        fact = rng.pick(self.book.facts)
        if rng.chance(0.5):
            return exchange(f"Is it true? {rng.pick(fact.statements)}", f"Yes. {fact.statements[0]}")
        wrong = rng.pick(fact.wrong)
        claim = rng.pick(fact.statements).replace(f" {fact.answer}", f" {wrong}")
        if wrong not in claim or fact.answer in claim:
            return exchange(*self._asked(rng, fact))
        return exchange(f"Is it true? {claim}", f"No. {fact.statements[0]}")

    def memory(self, rng: Rng) -> Messages:
        """The user says something about himself and asks for it later."""
        name = rng.pick(lexicon.WOMEN + lexicon.MEN)
        food, colour, thing = rng.pick(lexicon.LIKED_FOODS), rng.pick(COLOURS), rng.pick(OBJECTS)
        town = rng.pick(self.world.towns).name
        said, asked, answer = rng.pick(
            (
                (f"My name is {name}.", "What is my name?", f"Your name is {name}."),
                (f"I am {name}.", "Who am I?", f"You are {name}."),
                (f"I like {food}.", "What do I like?", f"You like {food}."),
                (f"I have a {colour} {thing}.", "What do I have?", f"You have a {colour} {thing}."),
                (f"I have a {colour} {thing}.", f"What colour is my {thing}?", f"Your {thing} is {colour}."),
                (f"I live in {town}.", "Where do I live?", f"You live in {town}."),
                (f"Hello, my name is {name}.", "Do you know my name?", f"Yes. Your name is {name}."),
            )
        )
        reply = (
            rng.pick((f"Hello, {name}!", f"Nice to meet you, {name}.")) if name in said else rng.pick(_NOTED)
        )
        messages = exchange(said, reply)
        if rng.chance(0.6):
            messages += exchange(*self._asked(rng, rng.pick(self.book.facts)))
        return messages + exchange(asked, answer)

    def lists(self, rng: Rng) -> Messages:
        """Lists of things of one kind, or of the people of a town."""
        town = rng.pick(self.world.towns).name
        living = [person.name for person in self.world.people if person.town == town]
        number = rng.between(2, 4)
        word = lexicon.NUMBER_WORDS[number]
        kind, items = rng.pick(
            (
                ("animals", tuple(lexicon.ANIMALS)), ("foods", tuple(lexicon.FOODS)), ("people", tuple(self.names)),
                ("colours", COLOURS), ("towns", tuple(t.name for t in self.world.towns)), ("jobs", tuple(lexicon.JOBS)),
                ("months", lexicon.MONTHS), ("days", lexicon.DAYS),
            )
        )  # fmt: skip
        return exchange(
            *rng.pick(
                (
                    (f"Name {word} {kind}.", _listed(rng.sample(items, number))),
                    (f"Can you name {word} {kind}?", _listed(rng.sample(items, number))),
                    (
                        f"Give me a list of {word} {kind}.",
                        "\n".join(f"- {x}" for x in rng.sample(items, number)),
                    ),
                    (f"Who lives in {town}?", f"{_and(living)} live in {town}."),
                    (f"Name the people of {town}.", _listed(living)),
                    ("What are the days of the week?", _listed(lexicon.DAYS)),
                    ("Name the four seasons.", _listed(lexicon.SEASONS)),
                )
            )
        )

    def rewriting(self, rng: Rng) -> Messages:
        """A sentence to repeat or to change in one place."""
        first, other = rng.sample(self.names, 2)
        colour, new_colour = rng.sample(COLOURS, 2)
        thing, new_thing = rng.sample(OBJECTS, 2)
        place, new_place = rng.sample(PLACES, 2)
        base = f"{first} {{}} the {colour} {thing} in the {place}."
        present, past = rng.pick((("sees", "saw"), ("finds", "found"), ("has", "had"), ("takes", "took")))
        now = base.format(present)
        return exchange(
            *rng.pick(
                (
                    (f"Repeat this sentence: {now}", now),
                    (f"Write this with {other}: {now}", now.replace(first, other)),
                    (f"Make it {new_colour}: {now}", now.replace(colour, new_colour)),
                    (f"Write {new_thing} for {thing}: {now}", now.replace(thing, new_thing)),
                    (f"Write {new_place} for {place}: {now}", now.replace(place, new_place)),
                    (f"Put this into the past: {now}", base.format(past)),
                    (
                        f"Make a question of this: {now}",
                        f"Who {present} the {colour} {thing} in the {place}?",
                    ),
                    (f"Say {thing} three times.", f"{thing}, {thing}, {thing}"),
                )
            )
        )

    def ignorance(self, rng: Rng) -> Messages:
        """Somebody or something outside the world."""
        if rng.chance(0.3):
            name = rng.pick(self.strangers)
            return exchange(
                rng.pick(_STRANGER_QUESTIONS).format(name), rng.pick(_STRANGER_ANSWERS).format(name)
            )
        if rng.chance(0.6):
            question = rng.pick(outside.QUESTIONS).format(rng.pick(outside.PLACES))
        else:
            question = rng.pick(outside.OTHER_QUESTIONS)
        messages = exchange(question, rng.pick(outside.ANSWERS))
        if rng.chance(0.3):
            messages += exchange(*self._asked(rng, rng.pick(self.book.facts)))
        return messages

    def reading(self, rng: Rng) -> Messages:
        """A short text and questions about it."""
        *story, who, where, person = self.teller.passing_on(rng)
        questions = [text.split("? ") for text in rng.shuffled((who, where, person))]
        first, *others = questions[: rng.between(1, 2)]
        messages = exchange(f"{' '.join(story)} {first[0]}?", first[1])
        for question, answer in others:
            messages += exchange(f"{question}?", answer)
        return messages

    def story(self, rng: Rng) -> Messages:
        """A short story on request."""
        person = rng.pick(self.world.people)
        request = rng.pick(_STORY_REQUESTS).format(person.name)
        return exchange(request, self.teller.short_story(rng, person))

    def programming(self, rng: Rng) -> Messages:
        """A function for its docstring, or for a description of it."""
        function = self.programmer.function(rng)
        if rng.chance(0.75):
            return exchange(function.prompt, as_chat(function))
        header = function.signature[4:-1]
        return exchange(f"Write a Python function {header}. {function.summary}", as_chat(function))

    def manners(self, rng: Rng) -> Messages:
        """A greeting, a question, thanks and a farewell."""
        messages = exchange(rng.pick(identity.HELLOS), rng.pick(identity.HELLO_ANSWERS))
        messages += exchange(*self._asked(rng, rng.pick(self.book.facts)))
        if rng.chance(0.5):
            messages += exchange(rng.pick(identity.THANKS), rng.pick(identity.THANKS_ANSWERS))
        return messages + exchange(rng.pick(identity.BYES), rng.pick(identity.BYE_ANSWERS))


_ABOUT = ("Tell me about {}.", "What do you know about {}?", "Do you know {}?", "Tell me something about {}.")
_STRANGER_QUESTIONS = (
    "Where does {} live?", "What is {}'s job?", "Who is {}?", "Tell me about {}.", "What pet does {} have?",
    "What does {} like to eat?", "Do you know {}?",
)  # fmt: skip
_STRANGER_ANSWERS = (
    "I do not know {}. Nobody in TinyWorld has that name.",
    "I know nobody called {} in TinyWorld.",
)
_NOTED = ("That is good to know.", "I see. Thank you.", "I will remember that.")
_STORY_REQUESTS = (
    "Tell me a story about {}.", "Please write a story about {}.", "I want to hear a story about {}.",
    "Can you tell a story about {}?",
)  # fmt: skip


def _listed(items: list[str] | tuple[str, ...]) -> str:
    text = _and(list(items))
    return f"{text[0].upper()}{text[1:]}."


def _and(items: list[str]) -> str:
    return ", ".join(items[:-1]) + f" and {items[-1]}"
