"""How often a client may ask: a bucket of permissions for each key or address, refilled steadily."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable

from nanochat.serve.errors import ApiError
from nanochat.serve.settings import Rate

# A bucket that nobody touched for a whole period is full, so forgetting the oldest ones is nearly harmless;
# the bound keeps a crowd of addresses from filling the memory (about 200 bytes each).
MAX_CLIENTS = 100_000


class RateLimiter:
    """Token buckets: a client may spend `rate.count` requests at once and regains them over the period.

    Used from the event loop alone. clock returns seconds.
    """

    def __init__(self, rate: Rate, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._clock = rate, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # permissions left, and when

    def spend(self, client: str) -> None:
        """Take one permission; raises ApiError 429 with the seconds until the next one."""
        per_s = self._rate.count / self._rate.period_s
        now = self._clock()
        left, since = self._buckets.pop(client, (float(self._rate.count), now))
        left = min(self._rate.count, left + (now - since) * per_s)
        allowed = left >= 1
        self._buckets[client] = (left - allowed, now)
        if len(self._buckets) > MAX_CLIENTS:
            self._buckets.popitem(last=False)
        if not allowed:
            seconds = max(1, math.ceil((1 - left) / per_s))
            text = (
                f"more than {self._rate.count} requests in {self._rate.period_s} s; try again in {seconds} s"
            )
            raise ApiError(429, "rate_limited", text, retry_after=seconds)
