"""Statistics by name, as calibration fills them in."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

Seen = TypeVar("Seen")


class Accumulator(Protocol):
    """Sees one value batch by batch; see `passes.statistics`.

    Attributes:
        name: Of the value.
    """

    name: str

    def update(self, array: NDArray[np.floating]) -> None:
        """See an array [..., K]."""


class Results(Mapping[str, Seen]):
    """Statistics of some values by name, in the order asked for, each either seen or recalled from the user's cache.

    Each is kept in that cache by itself, under a key of all that it depends on, as soon as it is complete: what asks
    for other values of the same graph later, or again after an interruption, finds it there.
    """

    @property
    @abstractmethod
    def held(self) -> int:
        """Bytes of memory that the statistics take that are complete."""

    @abstractmethod
    def begin(self, name: str) -> Accumulator:
        """What sees the value of that name from now on."""

    @abstractmethod
    def finish(self, name: str) -> None:
        """All was seen of that value.

        Raises:
            OutputError: It goes to a file, which cannot be written.
            ValueError: Nothing was seen.
        """

    @abstractmethod
    def recall(self, name: str, key: str) -> bool:
        """Take it from the user's cache; whether it was there, undamaged."""

    @abstractmethod
    def remember(self, name: str, key: str) -> None:
        """Keep it in the user's cache. A cache that cannot be written is no error."""

    @abstractmethod
    def close(self) -> None:
        """Let go of everything."""
