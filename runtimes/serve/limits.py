"""How much a client may ask: token buckets, and what a server bears at once."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable

_MOST_CLIENTS = 1 << 16
_TICK = 0.01


class Rates:
    """A token bucket for each client: ``rate`` requests a second, ``burst`` of them at once.

    Args:
        rate: Requests a second that flow into a bucket, above 0.
        burst: Requests that a bucket holds, at least 1.
        clock: Seconds; monotonic.
    """

    def __init__(self, rate: float, burst: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._burst = max(1.0, burst)
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str) -> float:
        """Take one request out of a client's bucket.

        Returns:
            0 where there was one; otherwise the seconds until there is.
        """
        now = self._clock()
        left, since = self._buckets.pop(client, (self._burst, now))
        left = min(self._burst, left + (now - since) * self._rate)
        wait = 0.0 if left >= 1.0 else (1.0 - left) / self._rate
        self._buckets[client] = (left - 1.0 if wait == 0.0 else left, now)
        if len(self._buckets) > _MOST_CLIENTS:  # the one not seen for longest: its bucket is the fullest
            self._buckets.popitem(last=False)
        return wait


class Load:
    """What is held at once: requests that are worked on, and bytes of bodies.

    Args:
        requests: Most requests.
        size: Most bytes.
    """

    def __init__(self, requests: int, size: int) -> None:
        self._most_requests = requests
        self._most_bytes = size
        self.requests = 0
        self.bytes = 0

    def begin(self) -> bool:
        """Take a place for a request; False where there is none."""
        if self.requests >= self._most_requests:
            return False
        self.requests += 1
        return True

    def end(self) -> None:
        """Give it back."""
        self.requests -= 1

    def hold(self, size: int) -> bool:
        """Take room for some bytes; False where there is none. A body that is alone always has room."""
        if self.bytes and self.bytes + size > self._most_bytes:
            return False
        self.bytes += size
        return True

    def free(self, size: int) -> None:
        """Give the room back."""
        self.bytes -= size


class Lag:
    """How late this process is with what it has to do: what it reads now came so long ago at least.

    A request that is refused costs work too. Where more come than can be read, those that wait unread in the system's
    buffers are refused by nobody; so the more is refused before it is read, until the loop is in time again. Where what
    was read waits for long as it is, nothing is lost by that, and a smaller delay is enough.

    Args:
        most: Seconds of delay from which on it is late.
        some: The same where there is a long queue.
    """

    def __init__(self, most: float = 0.04, some: float = 0.01) -> None:
        self._most = most
        self._some = some
        self._delay = 0.0
        self._seen = 0.0
        self._pending = False

    def late(self, queued: Callable[[], bool] = lambda: False) -> bool:
        """Whether it is late; ``queued`` tells whether there is a long queue.

        It looks soon after it was asked, and only then: idle processes run no clock.
        """
        loop = asyncio.get_running_loop()
        if not self._pending:
            self._pending = True
            loop.call_later(_TICK, self._tick, loop.time() + _TICK)
        return self._delay > self._most or (self._delay > self._some and queued())

    def _tick(self, due: float) -> None:
        loop = asyncio.get_running_loop()
        now, self._pending = loop.time(), False
        # An old delay says nothing of now; in between the latest weigh most.
        kept = 0.7 if now - self._seen < 10 * _TICK else 0.0
        self._delay, self._seen = kept * self._delay + (1.0 - kept) * (now - due), now
