"""Sums and word problems of one to three steps, worked out line by line with calculator marks.

The numbers of the first step decide whether a problem is for training or for the tests; texts never use
the numbers of the tests.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from nanochat.tinyworld.cast import Cast
from nanochat.tinyworld.lexicon import CONTAINERS, DAYS, NUMBER_WORDS, THINGS
from nanochat.tinyworld.rng import Rng, held_out

LARGEST_RESULT = 999
# Ranges of operands: any two-digit number, a factor, a price
RANGES = {"big": (10, 99), "any": (2, 99), "part": (2, 40), "few": (2, 12), "wide": (2, 999)}


@dataclass(frozen=True, slots=True)
class Family:
    """Word problems with the same calculation.

    `numbers` gives each variable its range. Every step is (text before, "x+y", text after); its result is
    called r, s, t in this order.
    """

    numbers: tuple[tuple[str, str], ...]
    questions: tuple[str, ...]
    steps: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """A question and its worked answer in the format of GSM8K."""

    question: str
    answer: str

    @property
    def plain_answer(self) -> str:
        """The answer without calculator marks, as a text would print it."""
        return re.sub("<<[^>]*>>", "", self.answer)


FAMILIES = (
    Family(
        (("a", "any"), ("b", "any")),
        ("{p} has {a} {things}. {p} finds {b} more. How many {things} does {p} have now?",
         "{p} had {a} {things} and got {b} {things} from {q}. How many {things} does {p} have?",
         "There were {a} {things} in the {box}. {p} put {b} more into it. How many {things} are in the {box}?"),
        (("There are", "a+b", "{things}"),),
    ),
    Family(
        (("a", "any"), ("b", "any")),
        ("{p} has {a} {things} and {q} has {b} {things}. How many {things} do they have together?",
         "{p} made {a} {things}. {q} made {b} {things}. How many {things} did they make in all?"),
        (("Together they have", "a+b", "{things}"),),
    ),
    Family(
        (("a", "big"), ("b", "part")),
        ("{p} has {a} {things}. {p} gives {b} {things} to {q}. How many {things} are left?",
         "There were {a} {things} in the {box}. {q} took {b} of them. How many {things} are left?",
         "{p} had {a} {things} and lost {b} of them. How many {things} are left?"),
        (("There are", "a-b", "{things} left"),),
    ),
    Family(
        (("a", "any"), ("b", "part")),
        ("{p} has {a} {things}. {q} has {b} more than {p}. How many {things} does {q} have?",
         "{q} has {b} more {things} than {p}. {p} has {a} {things}. How many {things} does {q} have?"),
        (("{q} has", "a+b", "{things}"),),
    ),
    Family(
        (("a", "big"), ("b", "part")),
        ("{p} has {a} {things}. {q} has {b} fewer than {p}. How many {things} does {q} have?",
         "{q} has {b} fewer {things} than {p}. {p} has {a} {things}. How many {things} does {q} have?"),
        (("{q} has", "a-b", "{things}"),),
    ),
    Family(
        (("a", "few"), ("b", "few")),
        ("{p} has {a} {boxes}. There are {b} {things} in each {box}. How many {things} does {p} have?",
         "There are {b} {things} in one {box}. How many {things} are in {a} {boxes}?",
         "{p} fills {a} {boxes} with {b} {things} each. How many {things} are there?"),
        (("There are", "a*b", "{things}"),),
    ),
    Family(
        (("a", "few"), ("b", "few")),
        ("One {thing} costs {b} coins. How much do {a} {things} cost?",
         "{p} buys {a} {things} for {b} coins each. How many coins does {p} pay?"),
        (("The {things} cost", "a*b", "coins"),),
    ),
    Family(
        (("a", "few"), ("b", "few"), ("c", "part")),
        ("{p} has {a} {boxes} with {b} {things} each. {q} brings {c} more. How many {things} are there?",
         "{p} buys {a} {boxes} of {b} {things} and finds {c} more {things}. How many {things} does {p} have?"),
        (("In the {boxes} there are", "a*b", "{things}"), ("Then there are", "r+c", "{things}")),
    ),
    Family(
        (("a", "few"), ("b", "few"), ("c", "few")),
        ("{p} has {a} {boxes} with {b} {things} each. {p} gives {c} {things} to {q}. How many {things} are left?",
         "There are {b} {things} in each of {a} {boxes}. {q} takes {c} of them. How many {things} are left?"),
        (("In the {boxes} there are", "a*b", "{things}"), ("Then there are", "r-c", "{things} left")),
    ),
    Family(
        (("a", "few"), ("b", "few"), ("c", "any")),
        ("{p} has {c} coins and buys {a} {things} for {b} coins each. How many coins are left?",
         "One {thing} costs {b} coins. {p} pays for {a} {things} and had {c} coins. How many coins are left?"),
        (("The {things} cost", "a*b", "coins"), ("Then there are", "c-r", "coins left")),
    ),
    Family(
        (("a", "big"), ("b", "part"), ("c", "part")),
        ("{p} has {a} {things}. {p} gives {b} {things} to {q} and loses {c}. How many {things} are left?",
         "There were {a} {things}. {p} took {b} and {q} took {c}. How many {things} are left?"),
        (("First there are", "a-b", "{things} left"), ("Then there are", "r-c", "{things} left")),
    ),
    Family(
        (("a", "any"), ("b", "any"), ("c", "part")),
        ("{p} has {a} {things} and {q} has {b}. They give {c} {things} away. How many {things} are left?",
         "{p} found {a} {things} and {q} found {b} {things}. They lost {c}. How many {things} do they have now?"),
        (("Together they have", "a+b", "{things}"), ("Then there are", "r-c", "{things} left")),
    ),
    Family(
        (("a", "any"), ("b", "part"), ("c", "any")),
        ("On {day} {p} found {a} {things}, then {b} and then {c} {things}. How many {things} is that in all?",
         "{p} has {a} {things}, {q} has {b} and a friend has {c}. How many {things} are there in all?"),
        (("First there are", "a+b", "{things}"), ("Then there are", "r+c", "{things}")),
    ),
    Family(
        (("a", "few"), ("b", "few"), ("c", "few"), ("d", "few")),
        ("{p} has {a} {boxes} with {b} {things} each. {q} has {c} {boxes} with {d} {things} each."
         " How many {things} do they have together?",
         "{p} fills {a} {boxes} with {b} {things} each and {c} {boxes} with {d} {things} each."
         " How many {things} are there in all?"),
        (("First there are", "a*b", "{things}"), ("Then there are", "c*d", "{things}"),
         ("Together there are", "r+s", "{things}")),
    ),
    Family(
        (("a", "few"), ("b", "few"), ("c", "part"), ("d", "few")),
        ("{p} has {a} {boxes} with {b} {things} each. {p} finds {c} more and gives {d} to {q}."
         " How many {things} are left?",
         "{p} buys {a} {boxes} of {b} {things}. {q} brings {c} {things}, and they lose {d}."
         " How many {things} are left?"),
        (("In the {boxes} there are", "a*b", "{things}"), ("Then there are", "r+c", "{things}"),
         ("At the end there are", "s-d", "{things} left")),
    ),
)  # fmt: skip

# Bare sums as people type them, by sign; the last ones fit every sign.
PLAIN = {
    "+": ("What is {a} plus {b}?", "How much is {a} plus {b}?", "Add {a} and {b}.", "Can you add {a} and {b}?",
          "What is the sum of {a} and {b}?"),
    "-": ("What is {a} minus {b}?", "How much is {a} minus {b}?", "Take {b} from {a}.", "Subtract {b} from {a}."),
    "*": ("What is {a} times {b}?", "How much is {a} times {b}?", "Multiply {a} by {b}.", "Multiply {a} and {b}."),
}  # fmt: skip
PLAIN_ANY = (
    "What is {a} {sign} {b}?", "What is {a} {sign} {b}?", "How much is {a} {sign} {b}?", "{a} {sign} {b} = ?",
    "{a} {sign} {b}", "{a}{sign}{b}", "what is {a} {sign} {b}", "Please work out {a} {sign} {b}.",
    "What is {a}{sign}{b}?",
)  # fmt: skip
PLAIN_RANGES = {"+": ("any", "any"), "-": ("any", "any"), "*": ("part", "few")}
WIDE_SHARE = 0.2  # bare sums of numbers up to three digits


class Arithmetic:
    """Sums and problems about the people of one world."""

    def __init__(self, cast: Cast) -> None:
        self.names = [person.name for person in cast.people]

    def word_problem(self, rng: Rng, test: bool = False) -> Problem:
        """A word problem with numbers of the training or of the test side."""
        family = rng.pick(FAMILIES)
        values = _draw(rng, family, test)
        p, q = rng.sample(self.names, 2)
        (thing, things), (box, boxes) = rng.pick(THINGS), rng.pick(CONTAINERS)
        words = {
            "p": p,
            "q": q,
            "thing": thing,
            "things": things,
            "box": box,
            "boxes": boxes,
            "day": rng.pick(DAYS),
        }
        question = rng.pick(family.questions).format_map(words | values)
        lines = [
            _work(before.format_map(words), step, after.format_map(words), values)
            for before, step, after in family.steps
        ]
        last = values["rst"[len(lines) - 1]]
        return Problem(question, "\n".join(lines) + f"\n#### {last}")

    def plain_sum(self, rng: Rng, test: bool = False) -> Problem:
        """A bare sum as people type it."""
        sign = rng.pick("++-*")
        kinds = ("wide", "wide") if rng.chance(WIDE_SHARE) else PLAIN_RANGES[sign]
        while True:
            a, b = (rng.between(*RANGES[kind]) for kind in kinds)
            if held_out(f"{a} {b}") == test and not (sign == "-" and b > a):
                break
        result = _apply(a, sign, b)
        question = rng.pick(rng.pick((PLAIN[sign], PLAIN_ANY))).format(a=a, b=b, sign=sign)
        return Problem(question, f"{a} {sign} {b} = <<{a}{sign}{b}={result}>>{result}.\n#### {result}")

    def page(self, rng: Rng) -> str:
        """A page of an arithmetic book: worked problems, or a list of small sums in digits or words."""
        kind = rng.random()
        if kind < 0.75:
            problems = [self.word_problem(rng) for _ in range(rng.between(1, 3))]
            return "\n\n".join(f"Question: {p.question}\nAnswer: {p.plain_answer}" for p in problems)
        if kind < 0.9:
            problems = [self.plain_sum(rng) for _ in range(rng.between(3, 6))]
            return "\n\n".join(f"Question: {p.question}\nAnswer: {p.plain_answer}" for p in problems)
        return "\n".join(_small_sum(rng) for _ in range(rng.between(5, 10)))


def _draw(rng: Rng, family: Family, test: bool) -> dict[str, int]:
    """Numbers for all variables and results of a family; all results lie in 2..LARGEST_RESULT."""
    while True:
        values = {name: rng.between(*RANGES[kind]) for name, kind in family.numbers}
        if held_out(f"{values['a']} {values['b']}") != test:
            continue
        for name, (_, step, _) in zip("rst", family.steps, strict=False):
            values[name] = _apply(values[step[0]], step[1], values[step[2]])
            if not 2 <= values[name] <= LARGEST_RESULT:
                break
        else:
            return values


def _work(before: str, step: str, after: str, values: dict[str, int]) -> str:
    x, sign, y = values[step[0]], step[1], values[step[2]]
    result = _apply(x, sign, y)
    return f"{before} {x} {sign} {y} = <<{x}{sign}{y}={result}>>{result} {after}."


def _apply(x: int, sign: str, y: int) -> int:
    return x + y if sign == "+" else x - y if sign == "-" else x * y


def _small_sum(rng: Rng) -> str:
    """A sum of numbers up to twenty, true in words and in digits."""
    sign, word = rng.pick((("+", "plus"), ("-", "minus")))
    while True:
        a, b = rng.between(0, 20), rng.between(0, 10)
        result = _apply(a, sign, b)
        if 0 <= result <= 20 and not held_out(f"{a} {b}"):
            break
    if rng.chance(0.5):
        return f"{a} {sign} {b} = {result}"
    return f"{NUMBER_WORDS[a].capitalize()} {word} {NUMBER_WORDS[b]} is {NUMBER_WORDS[result]}."
