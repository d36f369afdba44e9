"""Short Python functions: prompts with docstrings, solutions, tests, and small modules made of them."""

from __future__ import annotations

from dataclasses import dataclass

from nanochat.tinyworld.function_families import FAMILIES, Family
from nanochat.tinyworld.lexicon import NUMBER_WORDS
from nanochat.tinyworld.rng import Rng, held_out

WORDS = (
    "apple", "bread", "cat", "door", "egg", "fish", "green", "hat", "lamp", "moon", "nut", "owl", "pet", "red",
    "salt", "town", "wood", "bell", "kettle", "button", "rabbit", "summer", "letter", "coffee",
)  # fmt: skip
# Short, because they are repeated and turned around
SOUNDS = ("ha", "la", "ho", "ab", "go", "cat", "owl", "red", "nut", "hat", "pet", "egg")
# Of each family's constants (or of its wordings, if it has no constant) one in this many is for tests only.
TEST_VARIANTS_EVERY = 5
CHECKS_PER_TEST = 4


@dataclass(frozen=True, slots=True)
class Function:
    """One function: everything that a HumanEval row, a chat or a module needs."""

    name: str
    signature: str
    summary: str
    examples: tuple[tuple[str, str], ...]
    body: str
    checks: tuple[tuple[str, str], ...]

    @property
    def prompt(self) -> str:
        """Signature and docstring with examples."""
        shown = "".join(f"    >>> {self.name}({given})\n    {result}\n" for given, result in self.examples)
        return f'{self.signature}\n    """{self.summary}\n\n{shown}    """\n'

    @property
    def canonical_solution(self) -> str:
        """The indented body."""
        return f"    {self.body}\n"

    @property
    def source(self) -> str:
        """The whole function without its docstring."""
        return f"{self.signature}\n{self.canonical_solution}"

    @property
    def test(self) -> str:
        """A check function with one assertion per line."""
        lines = "".join(f"    assert candidate({given}) == {result}\n" for given, result in self.checks)
        return f"def check(candidate):\n{lines}"


class Programmer:
    """Functions over the names of one world."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def function(self, rng: Rng, test: bool = False) -> Function:
        """A function whose constant, or else whose wording, belongs to training or to the tests."""
        family = rng.pick(FAMILIES)
        while True:
            k = rng.pick(family.constants) if family.constants else ""
            name = rng.pick(family.names).format(k=_identifier(k))
            parameter = rng.pick(family.parameters)
            summary = rng.pick(family.summaries).format(k=k, p=parameter)
            key = f"{family.body} {k}" if family.constants else f"{name} {parameter} {summary}"
            if held_out(key, TEST_VARIANTS_EVERY) == test:
                break
        cases = [self._case(rng, family, k) for _ in range(CHECKS_PER_TEST + 2)]
        signature = f"def {name}({parameter}):"
        body = family.body.format(k=k, p=parameter)
        examples = tuple(cases[: rng.between(1, 2)])
        return Function(name, signature, summary, examples, body, tuple(cases[2:]))

    def module(self, rng: Rng) -> str:
        """A small module: a docstring and two to four functions with docstrings."""
        functions = {f.name: f for f in (self.function(rng) for _ in range(rng.between(2, 4)))}
        title = rng.pick(_TITLES).format(rng.pick(self.names))
        parts = [f.prompt + f.canonical_solution for f in functions.values()]
        return "\n\n".join([f'"""{title}"""\n', *parts]).rstrip("\n")

    def _case(self, rng: Rng, family: Family, k: int | str) -> tuple[str, str]:
        """(arguments, result) as Python literals."""
        arguments = [self._argument(rng, kind, k) for kind in family.arguments]
        return ", ".join(map(_literal, arguments)), _literal(family.solve(k, *arguments))

    def _argument(self, rng: Rng, kind: str, k: int | str) -> int | str | list[int] | list[str]:
        if kind == "number":
            # around the constant, so that comparisons go both ways
            return rng.between(0, 2 * k) if isinstance(k, int) and k > 9 else rng.between(0, 30)
        if kind == "numbers":
            high = 2 * k if isinstance(k, int) and k > 9 else 30
            return [rng.between(1, high) for _ in range(rng.between(2, 4))]
        if kind == "words":
            return rng.sample(WORDS, rng.between(2, 3))
        return rng.pick({"name": self.names, "word": WORDS, "sound": SOUNDS}[kind])


_TITLES = (
    "Tools of {}.", "Small functions.", "What {} needs at work.", "Functions that {} wrote.", "Numbers and words.",
)  # fmt: skip


def _identifier(k: int | str) -> str:
    return NUMBER_WORDS[k] if isinstance(k, int) and k <= 12 else str(k)


def _literal(value: object) -> str:
    """A Python literal with double quotes, as formatters like it."""
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    return str(value)


def as_chat(function: Function) -> str:
    """The answer of an assistant that was given the prompt."""
    return f"```python\n{function.source}```"
