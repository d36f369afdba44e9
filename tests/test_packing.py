from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.packing import BestFitBuffer


def _scan(buffer: list[tuple[int, int]], limit: int) -> int | None:
    """The specification, literally: index of the first longest that fits."""
    best = None
    for index, (_, length) in enumerate(buffer):
        if length <= limit and (best is None or length > buffer[best][1]):
            best = index
    return best


def _shortest(buffer: list[tuple[int, int]]) -> int:
    return min(range(len(buffer)), key=lambda index: buffer[index][1])


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=60),
    limits=st.lists(st.integers(0, 12), min_size=1, max_size=60),
)
def test_choices_equal_a_linear_scan(lengths, limits):
    fast: BestFitBuffer[int, int] = BestFitBuffer()
    slow = []
    for key, length in enumerate(lengths):
        fast.add(key, length, key)
        slow.append((key, length))
    for limit in limits:
        if not slow:
            break
        index = _scan(slow, limit)
        taken = fast.take_longest(limit)
        if index is None:
            assert taken is None
            index = _shortest(slow)
            taken = fast.take_shortest()
        assert taken == slow.pop(index)[0]
        assert fast.keys() == tuple(key for key, _ in slow)
        assert len(fast) == len(slow)


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=0, max_size=10),
    limit=st.integers(0, 40),
    slack=st.integers(0, 4),
)
def test_filling_comes_as_close_as_any_choice_can(lengths, limit, slack):
    buffer: BestFitBuffer[int, tuple[int, int]] = BestFitBuffer()
    for key, length in enumerate(lengths):
        buffer.add(key, length, (length, key))
    sums = {0}
    for length in lengths:
        sums |= {total + length for total in sums}
    taken = buffer.take_filling(limit, slack)
    filled = sum(length for length, _ in taken)
    best = max(total for total in sums if total <= limit)
    assert min(best, limit - slack) <= filled <= best
    # longest first, of equally long ones the first to arrive, and the others stay
    assert taken == sorted(taken, key=lambda item: (-item[0], item[1]))
    for length in {length for length, _ in taken}:
        same = [key for key, other in enumerate(lengths) if other == length]
        assert [key for other, key in taken if other == length] == same[: sum(o == length for o, _ in taken)]
    assert buffer.keys() == tuple(key for key in range(len(lengths)) if key not in {k for _, k in taken})
