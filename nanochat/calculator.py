"""The calculator tool: a parser for two shapes of expression, never `eval`.

    12/60 + 3*(4-1)              numbers, + - * / //, unary + and -, parentheses
    'strawberry'.count('r')      counting in a string literal, with .lower() .upper() .strip() before it

Work is bounded by the input length, so that no expression can hang, exhaust memory or run code.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Literal

ToolFormat = Literal["python", "gsm8k"]

MAX_EXPRESSION_CHARS = 256
MAX_OPERATORS = 64
MAX_INTEGER = 2**1024
MAX_RESULT_CHARS = 64
MAX_DEPTH = 64

_TOKEN = re.compile(
    r"""\s*(?:(?P<number>[0-9]+\.?[0-9]*|\.[0-9]+)
          |(?P<string>(?!'{3}|"{3})(?:'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*"))  # not Python's long strings
          |(?P<name>[a-z]+)
          |(?P<symbol>//|[-+*/().]))""",
    re.VERBOSE,
)
_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9])")
_ESCAPE = re.compile(r"\\(.)")
_ESCAPED = {"\\": "\\", "'": "'", '"': '"', "n": "\n", "t": "\t"}
_BINARY: dict[str, Callable[[int | float, int | float], int | float]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
}
_STRING_METHODS: dict[str, Callable[[str], str]] = {
    "lower": str.lower,
    "upper": str.upper,
    "strip": str.strip,
}


def use_calculator(expression: str, tool_format: ToolFormat = "gsm8k") -> str | None:
    """The result of an expression as text of at most 64 characters, or None for anything not understood."""
    value = evaluate(expression)
    return None if value is None else format_result(value, tool_format)


def evaluate(expression: str) -> int | float | None:
    """The value of an expression, or None where it is malformed, unbounded or undefined. Never raises."""
    text = expression.strip(" \t\r\n")
    if not 0 < len(text) <= MAX_EXPRESSION_CHARS:
        return None
    try:
        if "'" in text or '"' in text:
            return _count(_tokens(text))
        return _Arithmetic(_tokens(_THOUSANDS.sub("", text))).value()
    except (_Rejected, ZeroDivisionError, OverflowError):
        return None


def format_result(value: int | float, tool_format: ToolFormat = "gsm8k") -> str | None:
    """A number as the tool output shows it; None when longer than 64 characters.

    "gsm8k" is how people write it, and how the training data does: 10 for 10.0, others rounded to 10
    significant digits, no exponent. "python" is `str(value)`, what upstream nanochat injects.
    """
    if tool_format == "gsm8k" and isinstance(value, float):
        value = float(f"{value:.10g}")
        text = str(int(value)) if value.is_integer() else format(Decimal(repr(value)), "f")
    else:
        text = str(value)
    return text if len(text) <= MAX_RESULT_CHARS else None


class _Rejected(Exception):
    pass


def _tokens(text: str) -> list[tuple[str, str]]:
    """Split into (kind, text) pairs. A newline between tokens is refused, as Python's parser would."""
    tokens, position = [], 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None or "\n" in text[position : match.start(match.lastgroup or 0)]:
            raise _Rejected
        kind = match.lastgroup or ""
        tokens.append((kind, match[kind]))
        position = match.end()
    return [*tokens, ("end", "")]


class _Arithmetic:
    """Recursive descent over tokens: sum of products of signed atoms."""

    def __init__(self, tokens: list[tuple[str, str]]):
        self.tokens, self.position, self.operators, self.depth = tokens, 0, 0, 0

    def value(self) -> int | float:
        result = self._sum()
        if self._peek() != ("end", ""):
            raise _Rejected
        return result

    def _peek(self) -> tuple[str, str]:
        return self.tokens[self.position]

    def _take(self, *symbols: str) -> str | None:
        kind, text = self._peek()
        if kind != "symbol" or text not in symbols:
            return None
        self.position += 1
        return text

    def _operator(self, *symbols: str) -> str | None:
        symbol = self._take(*symbols)
        if symbol is not None:
            self.operators += 1
            if self.operators > MAX_OPERATORS:
                raise _Rejected
        return symbol

    def _sum(self) -> int | float:
        return self._chain(self._product, "+", "-")

    def _product(self) -> int | float:
        return self._chain(self._signed, "*", "/", "//")

    def _chain(self, operand: Callable[[], int | float], *symbols: str) -> int | float:
        left = operand()
        while symbol := self._operator(*symbols):
            left = _bounded(_BINARY[symbol](left, operand()))
        return left

    def _signed(self) -> int | float:
        negative = False
        while sign := self._operator("+", "-"):
            negative ^= sign == "-"
        value = self._atom()
        return -value if negative else value

    def _atom(self) -> int | float:
        kind, text = self._peek()
        if kind == "number":
            self.position += 1
            return _number(text)
        self.depth += 1
        if self.depth > MAX_DEPTH or not self._take("("):
            raise _Rejected
        value = self._sum()
        if not self._take(")"):
            raise _Rejected
        self.depth -= 1
        return value


def _number(text: str) -> int | float:
    if "." in text:
        return _bounded(float(text))
    if text[0] == "0" and text.strip("0"):
        raise _Rejected  # 007 is not a number in Python either
    return _bounded(int(text))


def _bounded(value: int | float) -> int | float:
    if abs(value) > MAX_INTEGER if isinstance(value, int) else not math.isfinite(value):
        raise _Rejected
    return value


def _count(tokens: list[tuple[str, str]]) -> int:
    """STRING+ { .lower() | .upper() | .strip() } .count( STRING+ )"""
    text, position = _literal(tokens, 0)
    while True:
        kinds = [word for _, word in tokens[position : position + 3]]
        if len(kinds) < 3 or kinds[0] != "." or kinds[2] != "(":
            raise _Rejected
        position += 3
        if kinds[1] == "count":
            break
        if kinds[1] not in _STRING_METHODS or tokens[position] != ("symbol", ")"):
            raise _Rejected
        text, position = _STRING_METHODS[kinds[1]](text), position + 1
    wanted, position = _literal(tokens, position)
    if tokens[position:] != [("symbol", ")"), ("end", "")]:
        raise _Rejected
    return text.count(wanted)


def _literal(tokens: list[tuple[str, str]], position: int) -> tuple[str, int]:
    """Join the adjacent string literals that start at position."""
    parts = []
    while tokens[position][0] == "string":
        parts.append(_ESCAPE.sub(_unescape, tokens[position][1][1:-1]))
        position += 1
    if not parts:
        raise _Rejected
    return "".join(parts), position


def _unescape(match: re.Match[str]) -> str:
    if match[1] not in _ESCAPED:
        raise _Rejected
    return _ESCAPED[match[1]]
