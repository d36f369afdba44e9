"""What can be known in TinyWorld: each kind of fact with its statements, questions and choices.

Templates are filled with a subject and its answer:
{s} {poss} subject and its possessive at the start of a sentence; {m} {whose} the same inside one;
{his} possessive pronoun; {o} {ao} answer, and answer with article; other fields belong to one relation.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Relation:
    """A kind of fact. `topic` is its school subject; wrong choices come from the pool `choices`."""

    name: str
    topic: str
    choices: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]


PERSON = (
    Relation(
        "job", "people", "job",
        ("{s} is a {o}.", "{s} works as a {o}.", "{s} became a {o} years ago.", "{poss} job is to be a {o}."),
        ("What is {whose} job?", "What does {m} work as?", "What work does {m} do?", "Which job does {m} have?"),
    ),
    Relation(
        "town", "people", "town",
        ("{s} lives in {o}.", "{poss} home is in {o}.", "{s} has a house in {o}.", "{s} comes from {o}."),
        ("Where does {m} live?", "In which town does {m} live?", "Where is {whose} home?",
         "Which town does {m} come from?"),
    ),
    Relation(
        "pet", "pets", "pet",
        ("{s} has a {o}.", "{poss} pet is a {o}.", "{s} takes care of a {o}.", "{s} lives with a {o}."),
        ("What pet does {m} have?", "What kind of animal is {whose} pet?", "Which pet does {m} take care of?",
         "Which animal does {m} live with?"),
    ),
    Relation(
        "pet_name", "pets", "pet_name",
        ("{poss} {pet} is called {o}.", "The name of {whose} {pet} is {o}.", "{s} calls {his} {pet} {o}.",
         "{poss} pet is called {o}."),
        ("What is {whose} pet called?", "What is the name of {whose} pet?", "What is {whose} {pet} called?",
         "What is the name of {whose} {pet}?"),
    ),
    Relation(
        "pet_colour", "pets", "pet_colour",
        ("{poss} {pet} is {o}.", "{s} has a {o} {pet}.", "{poss} {pet} {pet_name} is {o}.",
         "The colour of {whose} {pet} is {o}."),
        ("What colour is {whose} {pet}?", "What is the colour of {whose} {pet}?",
         "Which colour does {whose} {pet} have?", "What colour is {whose} pet?"),
    ),
    Relation(
        "food", "people", "food",
        ("{s} likes to eat {o}.", "{poss} favourite food is {o}.", "{s} loves {o}.", "{s} eats {o} every day."),
        ("What does {m} like to eat?", "What is {whose} favourite food?", "Which food does {m} love?",
         "What does {m} eat every day?"),
    ),
    Relation(
        "hobby", "people", "hobby",
        ("{s} likes to {o}.", "In the evening {m} likes to {o}.", "{poss} hobby is to {o}.",
         "When {m} is free, {m} likes to {o}."),
        ("What does {m} like to do?", "What is {whose} hobby?", "What does {m} like to do in the evening?",
         "What does {m} do when {m} is free?"),
    ),
    Relation(
        "hat", "people", "hat",
        ("{s} wears a {o} hat.", "{poss} hat is {o}.", "{s} has a {o} hat.", "The colour of {whose} hat is {o}."),
        ("What colour is {whose} hat?", "What is the colour of {whose} hat?", "Which colour does {whose} hat have?",
         "What colour of hat does {m} wear?"),
    ),
    Relation(
        "friend", "families", "person",
        ("{poss} best friend is {o}.", "{s} and {o} are best friends.", "The best friend {m} has is {o}.",
         "The name of {whose} best friend is {o}."),
        ("Who is {whose} best friend?", "What is the name of {whose} best friend?", "Which friend does {m} like most?",
         "Who is the best friend {m} has?"),
    ),
    Relation(
        "sibling", "families", "sibling",
        ("{poss} {kin} is {o}.", "{s} has a {kin} called {o}.", "{o} is {whose} {kin}.",
         "The name of {whose} {kin} is {o}."),
        ("Who is {whose} {kin}?", "What is {whose} {kin} called?", "What is the name of {whose} {kin}?",
         "Which person is {whose} {kin}?"),
    ),
)  # fmt: skip

# The person behind a description: "the baker", "the owner of Pip".
IDENTITY = Relation(
    "identity", "people", "person",
    ("{s} is {o}.", "{o} is {m}.", "{s} is called {o}.", "The name of {m} is {o}."),
    ("Who is {m}?", "What is the name of {m}?", "Which person is {m}?", "What is {m} called?"),
)  # fmt: skip

TOWN = (
    Relation(
        "nature", "towns", "nature",
        ("{s} lies near the {o}.", "{s} is a town near the {o}.", "The {o} is not far from {m}.",
         "From {m} you can see the {o}."),
        ("What does {m} lie near?", "What is not far from {m}?", "What can you see from {m}?",
         "What is near the town of {m}?"),
    ),
    Relation(
        "landmark", "towns", "landmark",
        ("{s} has a famous {o}.", "{s} is known for its {o}.", "In the middle of {m} stands a {o}.",
         "People visit {m} to see the {o}."),
        ("What is {m} known for?", "What stands in the middle of {m}?", "What do people visit in {m}?",
         "What is famous in {m}?"),
    ),
    Relation(
        "product", "towns", "product",
        ("{s} makes {o}.", "The people of {m} make {o}.", "{s} sells {o} to all the other towns.",
         "The best {o} in the world comes from {m}." ),
        ("What does {m} make?", "What do the people of {m} make?", "What does {m} sell?",
         "What comes from {m}?"),
    ),
    Relation(
        "flag", "towns", "flag",
        ("The flag of {m} is {o}.", "{s} has a {o} flag.", "{poss} flag is {o}.", "A {o} flag flies over {m}."),
        ("What colour is the flag of {m}?", "What colour is {whose} flag?", "Which colour does the flag of {m} have?",
         "What colour of flag flies over {m}?"),
    ),
)  # fmt: skip

# The town behind one of its features.
TOWN_OF = (
    Relation(
        "town_of_product", "towns", "town",
        ("The town that makes {m} is {o}.", "The {m} comes from {o}.", "People make {m} in {o}."),
        ("Which town makes {m}?", "Where do people make {m}?", "In which town is {m} made?"),
    ),
    Relation(
        "town_of_landmark", "towns", "town",
        ("The famous {m} is in {o}.", "The {m} stands in {o}.", "You find the {m} in {o}."),
        ("Where is the famous {m}?", "Which town has a famous {m}?", "In which town do you find the {m}?"),
    ),
    Relation(
        "town_of_nature", "towns", "town",
        ("The town near the {m} is {o}.", "Near the {m} lies {o}.", "The {m} is near {o}."),
        ("Which town lies near the {m}?", "What is the town near the {m}?", "Which town is not far from the {m}?"),
    ),
)  # fmt: skip

JOB = (
    Relation(
        "workplace", "jobs", "workplace",
        ("{s} works at the {o}.", "You find {m} at the {o}.", "The place where {m} works is the {o}."),
        ("Where does {m} work?", "Where do you find {m} at work?", "What is the place where {m} works?"),
    ),
    Relation(
        "tool", "jobs", "tool",
        ("{s} uses {ao}.", "For the work {m} needs {ao}.", "The tool of {m} is {ao}."),
        ("What does {m} use?", "What does {m} need for the work?", "What is the tool of {m}?"),
    ),
)  # fmt: skip

ANIMAL = (
    Relation(
        "sound", "animals", "sound",
        ("{s} says {o}.", "The sound of {m} is {o}.", "When {m} calls, you hear {o}."),
        ("What does {m} say?", "What sound does {m} make?", "What do you hear when {m} calls?"),
    ),
    Relation(
        "legs", "animals", "legs",
        ("{s} has {o} legs.", "{s} stands on {o} legs.", "The number of legs of {m} is {o}."),
        ("How many legs does {m} have?", "On how many legs does {m} stand?", "What is the number of legs of {m}?"),
    ),
    Relation(
        "home", "animals", "home",
        ("{s} lives in a {o}.", "The home of {m} is a {o}.", "At night {m} sleeps in a {o}."),
        ("Where does {m} live?", "What is the home of {m}?", "Where does {m} sleep at night?"),
    ),
    Relation(
        "diet", "animals", "diet",
        ("{s} eats {o}.", "The food of {m} is {o}.", "{s} is hungry for {o}."),
        ("What does {m} eat?", "What is the food of {m}?", "What is {m} hungry for?"),
    ),
    Relation(
        "young", "animals", "young",
        ("The young of {m} is called {ao}.", "{ao} is the child of {m}.", "A baby of {m} is {ao}."),
        ("What is the young of {m} called?", "What is the child of {m}?", "What is a baby of {m}?"),
    ),
)  # fmt: skip

FOOD = (
    Relation(
        "food_colour", "foods", "food_colour",
        ("{s} {be} {o}.", "The colour of {m} is {o}.", "You can see that {m} {be} {o}."),
        ("What colour {be} {m}?", "What is the colour of {m}?", "Which colour {do} {m} have?"),
    ),
    Relation(
        "taste", "foods", "taste",
        ("{s} {taste} {o}.", "The taste of {m} is {o}.", "In the mouth {m} {be} {o}."),
        ("How {do} {m} taste?", "What is the taste of {m}?", "What taste {do} {m} have?"),
    ),
    Relation(
        "source", "foods", "source",
        ("{s} {come} from {o}.", "We get {m} from {o}.", "Thanks to {o} we have {m}."),
        ("Where {do} {m} come from?", "What do we get {m} from?", "Where do we get {m}?"),
    ),
)  # fmt: skip

TIME = (
    Relation(
        "day_after", "time", "day",
        ("The day after {m} is {o}.", "After {m} comes {o}.", "If today is {m}, tomorrow is {o}."),
        ("Which day comes after {m}?", "What is the day after {m}?", "If today is {m}, what is tomorrow?"),
    ),
    Relation(
        "day_before", "time", "day",
        ("The day before {m} is {o}.", "Before {m} comes {o}.", "If today is {m}, yesterday was {o}."),
        ("Which day comes before {m}?", "What is the day before {m}?", "If today is {m}, what was yesterday?"),
    ),
    Relation(
        "month_after", "time", "month",
        ("The month after {m} is {o}.", "After {m} comes {o}.", "When {m} ends, {o} begins."),
        ("Which month comes after {m}?", "What is the month after {m}?", "Which month begins when {m} ends?"),
    ),
    Relation(
        "season", "time", "season",
        ("{s} is in {o}.", "The season of {m} is {o}.", "In {m} it is {o}."),
        ("In which season is {m}?", "What is the season of {m}?", "What season is it in {m}?"),
    ),
    Relation(
        "weather", "time", "weather",
        ("In {m} there is {o}.", "{s} brings {o}.", "The weather of {m} is {o}."),
        ("What does {m} bring?", "What weather is there in {m}?", "What is the weather of {m}?"),
    ),
)  # fmt: skip

WORDS = (
    Relation(
        "opposite", "words", "opposite",
        ("The opposite of {m} is {o}.", "What is not {m} is {o}.", "{s} and {o} are opposites."),
        ("What is the opposite of {m}?", "Which word is the opposite of {m}?", "What do you call a thing that is not {m}?"),
    ),
)  # fmt: skip

THINGS = (
    Relation(
        "material", "things", "material",
        ("{s} is made of {o}.", "We make {m} from {o}.", "To make {m} you need {o}."),
        ("What is {m} made of?", "What do we make {m} from?", "What do you need to make {m}?"),
    ),
    Relation(
        "use", "things", "use",
        ("You use {m} to {o}.", "{s} helps you to {o}.", "With {m} you can {o}."),
        ("What do you use {m} for?", "What does {m} help you to do?", "What can you do with {m}?"),
    ),
    Relation(
        "sense", "things", "sense",
        ("We {o} with our {m}.", "Our {m} help us to {o}.", "With our {m} we {o}."),
        ("What do we do with our {m}?", "What do our {m} help us to do?", "What are our {m} for?"),
    ),
)  # fmt: skip
