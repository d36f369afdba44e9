"""Families of short Python functions: how each is named, described, written and computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

GREETINGS = ("Hello", "Goodbye", "Welcome", "Thank you", "Good day", "Dear", "Happy birthday", "Sleep well")
LETTERS = "abdeglmnoprst"
MARKS = ("-", "+", "/", "_", ".", ":")
CONSTANTS = tuple(range(2, 60))
SMALL_CONSTANTS = tuple(range(2, 13))


@dataclass(frozen=True, slots=True)
class Family:
    """Functions with the same body but for a constant {k}.

    `solve(k, *arguments)` computes what the body does; `arguments` names how to draw each argument.
    """

    names: tuple[str, ...]
    parameters: tuple[str, ...]
    summaries: tuple[str, ...]
    body: str
    solve: Callable[..., object]
    arguments: tuple[str, ...]
    constants: tuple[int | str, ...] = ()


FAMILIES = (
    Family(
        ("add_{k}", "plus_{k}"),
        ("n", "x"),
        ("Add {k} to {p}.", "Return {p} plus {k}.", "Return the sum of {p} and {k}."),
        "return {p} + {k}",
        lambda k, n: n + k,
        ("number",),
        CONSTANTS,
    ),
    Family(
        ("subtract_{k}", "minus_{k}"),
        ("n", "x"),
        ("Subtract {k} from {p}.", "Return {p} minus {k}.", "Take {k} away from {p}."),
        "return {p} - {k}",
        lambda k, n: n - k,
        ("number",),
        CONSTANTS,
    ),
    Family(
        ("times_{k}", "multiply_by_{k}"),
        ("n", "x"),
        ("Multiply {p} by {k}.", "Return {p} times {k}.", "Return {k} times {p}."),
        "return {p} * {k}",
        lambda k, n: n * k,
        ("number",),
        CONSTANTS,
    ),
    Family(
        ("more_than_{k}", "is_above_{k}"),
        ("n", "x"),
        ("Say whether {p} is more than {k}.", "Return True if {p} is larger than {k}.", "Is {p} above {k}?"),
        "return {p} > {k}",
        lambda k, n: n > k,
        ("number",),
        CONSTANTS,
    ),
    Family(
        ("less_than_{k}", "is_below_{k}"),
        ("n", "x"),
        ("Say whether {p} is less than {k}.", "Return True if {p} is smaller than {k}.", "Is {p} below {k}?"),
        "return {p} < {k}",
        lambda k, n: n < k,
        ("number",),
        CONSTANTS,
    ),
    Family(
        ("divides_by_{k}", "multiple_of_{k}"),
        ("n", "x"),
        ("Say whether {p} can be divided by {k}.", "Return True if {p} is a multiple of {k}."),
        "return {p} % {k} == 0",
        lambda k, n: n % k == 0,
        ("number",),
        SMALL_CONSTANTS,
    ),
    Family(
        ("repeat_{k}", "say_{k}_times"),
        ("text", "word"),
        ("Repeat {p} {k} times.", "Return {p} written {k} times."),
        "return {p} * {k}",
        lambda k, t: t * k,
        ("sound",),
        tuple(range(2, 10)),
    ),
    Family(
        ("count_{k}", "number_of_{k}"),
        ("text", "word"),
        ('Count the letter "{k}" in {p}.', 'Return how often "{k}" is in {p}.'),
        'return {p}.count("{k}")',
        lambda k, t: t.count(k),
        ("word",),
        tuple(LETTERS),
    ),
    Family(
        ("starts_with_{k}", "begins_with_{k}"),
        ("text", "word"),
        ('Say whether {p} starts with "{k}".', 'Return True if {p} begins with "{k}".'),
        'return {p}.startswith("{k}")',
        lambda k, t: t.startswith(k),
        ("word",),
        tuple(LETTERS),
    ),
    Family(
        ("greet", "greeting"),
        ("name", "person"),
        ('Say "{k}" to {p}.', 'Greet {p} with "{k}".'),
        'return "{k}, " + {p} + "!"',
        lambda k, t: f"{k}, {t}!",
        ("name",),
        GREETINGS,
    ),
    Family(
        ("join_words", "join_all"),
        ("words", "items"),
        ('Join {p} with "{k}".', 'Put "{k}" between all {p}.'),
        'return "{k}".join({p})',
        lambda k, v: k.join(v),
        ("words",),
        MARKS,
    ),
    Family(
        ("all_plus_{k}", "add_{k}_to_all"),
        ("values", "numbers"),
        ("Add {k} to all {p}.", "Return a list of {p} plus {k}."),
        "return [x + {k} for x in {p}]",
        lambda k, v: [x + k for x in v],
        ("numbers",),
        CONSTANTS,
    ),
    Family(
        ("all_times_{k}", "multiply_all_by_{k}"),
        ("values", "numbers"),
        ("Multiply all {p} by {k}.", "Return a list of {p} times {k}."),
        "return [x * {k} for x in {p}]",
        lambda k, v: [x * k for x in v],
        ("numbers",),
        SMALL_CONSTANTS,
    ),
    Family(
        ("keep_above_{k}", "larger_than_{k}"),
        ("values", "numbers"),
        ("Keep the {p} that are more than {k}.", "Return all {p} above {k}."),
        "return [x for x in {p} if x > {k}]",
        lambda k, v: [x for x in v if x > k],
        ("numbers",),
        CONSTANTS,
    ),
    Family(
        ("largest", "biggest", "largest_number", "find_largest"),
        ("values", "numbers"),
        ("Return the largest of {p}.", "Find the biggest of {p}.", "What is the largest of {p}?"),
        "return max({p})",
        lambda _, v: max(v),
        ("numbers",),
    ),
    Family(
        ("smallest", "lowest", "smallest_number", "find_smallest"),
        ("values", "numbers"),
        ("Return the smallest of {p}.", "Find the lowest of {p}.", "What is the smallest of {p}?"),
        "return min({p})",
        lambda _, v: min(v),
        ("numbers",),
    ),
    Family(
        ("total", "sum_of", "add_up", "sum_all"),
        ("values", "numbers"),
        ("Return the sum of {p}.", "Add up all {p}.", "What is the sum of {p}?"),
        "return sum({p})",
        lambda _, v: sum(v),
        ("numbers",),
    ),
    Family(
        ("how_many", "count_all", "size_of", "length_of"),
        ("values", "items"),
        ("Return how many {p} there are.", "Count {p}.", "Return the number of {p}."),
        "return len({p})",
        lambda _, v: len(v),
        ("numbers",),
    ),
    Family(
        ("backwards", "reverse", "turn_around", "reverse_text"),
        ("text", "word"),
        ("Return {p} backwards.", "Reverse {p}.", "Return the letters of {p} in reverse."),
        "return {p}[::-1]",
        lambda _, t: t[::-1],
        ("sound",),
    ),
    Family(
        ("first_item", "first_of", "get_first", "first"),
        ("values", "items"),
        ("Return the first of {p}.", "Which of {p} comes first?", "Get the first of {p}."),
        "return {p}[0]",
        lambda _, v: v[0],
        ("numbers",),
    ),
    Family(
        ("last_item", "last_of", "get_last", "last"),
        ("values", "items"),
        ("Return the last of {p}.", "Which of {p} comes last?", "Get the last of {p}."),
        "return {p}[-1]",
        lambda _, v: v[-1],
        ("numbers",),
    ),
    Family(
        ("is_even", "even", "even_number"),
        ("n", "x"),
        ("Say whether {p} is even.", "Return True if {p} is even.", "Is {p} an even number?"),
        "return {p} % 2 == 0",
        lambda _, n: n % 2 == 0,
        ("number",),
    ),
    Family(
        ("is_odd", "odd", "odd_number"),
        ("n", "x"),
        ("Say whether {p} is odd.", "Return True if {p} is odd.", "Is {p} an odd number?"),
        "return {p} % 2 == 1",
        lambda _, n: n % 2 == 1,
        ("number",),
    ),
    Family(
        ("shout", "loud", "capitals", "in_capitals"),
        ("text", "word"),
        ("Return {p} in capitals.", "Write {p} in capitals.", "Turn {p} into capitals."),
        "return {p}.upper()",
        lambda _, t: t.upper(),
        ("word",),
    ),
)
