"""Values in memory, before any store: what is asked for often costs a look into a dictionary."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

_ENTRY_BYTES = 256
"""What an entry costs beside its value: the key, the dictionary, the object."""


@dataclass
class _Held:
    value: bytes
    until: float
    seen: float


class Front:
    """Least recently used values, up to a number of bytes. For one thread.

    Attributes:
        size: Bytes held, keys and bookkeeping included.
    """

    def __init__(self, limit: int) -> None:
        """Hold nothing yet.

        Args:
            limit: Most bytes; a value larger than an eighth of it is not held.
        """
        self.limit = limit
        self.size = 0
        self._values: OrderedDict[str, _Held] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: str, now: float) -> bytes | None:
        """The value; None if it is not held or its time (seconds, as ``now``) is over."""
        found = self._values.get(key)
        if found is None:
            return None
        if found.until <= now:
            self.drop(key)
            return None
        self._values.move_to_end(key)
        return found.value

    def unseen(self, key: str, now: float, longest: float) -> bool:
        """Whether the store has not seen a value that is held used for longer than that; it is taken to see it now."""
        found = self._values[key]
        if now - found.seen <= longest:
            return False
        found.seen = now
        return True

    def put(self, key: str, value: bytes, now: float, until: float) -> None:
        """Hold the value until that time; those not asked for the longest give way."""
        self.drop(key)
        cost = len(value) + _ENTRY_BYTES
        if cost * 8 > self.limit:
            return
        self._values[key] = _Held(value, until, now)
        self.size += cost
        while self.size > self.limit:
            self.drop(next(iter(self._values)))

    def drop(self, key: str) -> None:
        """Forget a value, if it is held."""
        found = self._values.pop(key, None)
        if found is not None:
            self.size -= len(found.value) + _ENTRY_BYTES
