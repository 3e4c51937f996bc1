"""The statistics that calibration gathers, each as a value: how a value is seen, what that takes, where it is kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from passes.statistics import BINS, SAMPLE_ROWS, Activation, ActivationAccumulator, Moments, MomentsAccumulator

from . import moments_files, store
from .moments_files import MomentsFiles

Seen = TypeVar("Seen")
_Seen_co = TypeVar("_Seen_co", covariant=True)


class Accumulator(Protocol[_Seen_co]):
    """Sees one value batch by batch; see `passes.statistics`.

    Attributes:
        name: Of the value.
    """

    name: str

    def update(self, array: NDArray[np.floating]) -> None:
        """See an array [..., K]."""

    def result(self) -> _Seen_co:
        """All that was seen."""
        ...


class Statistic(Protocol[Seen]):
    """What is gathered of values. Its text form tells it from others, and is part of the key of what is kept.

    Attributes:
        stays: Every result is in memory until all values are seen; else only those of one pass over the data.
    """

    stays: ClassVar[bool]

    def accumulator(self, name: str) -> Accumulator[Seen]:
        """What sees the value of that name."""
        ...

    def held(self, channels: int) -> int:
        """Bytes of the accumulator of one value, or of its result."""
        ...

    def besides(self, channels: int) -> int:
        """Bytes that one value at a time takes besides, while it is seen and while its result is made."""
        ...

    def collect(self, names: Sequence[str], results: Iterable[tuple[str, Seen]], folder: Path) -> Mapping[str, Seen]:
        """The results, as they come, by name in the order of ``names``; files of its own go into the folder."""
        ...

    def recall(self, key: str, names: Sequence[str], folder: Path) -> Mapping[str, Seen] | None:
        """What the user's cache has of exactly these values under a key; None if it has not, or it is damaged."""
        ...

    def remember(self, key: str, found: Mapping[str, Seen]) -> None:
        """Keep what `collect` gave there. A cache that cannot be written is no error."""
        ...


@dataclass(frozen=True)
class Activations:
    """Ranges, histograms, means and sampled rows.

    Attributes:
        seed: Which rows the samples draw.
    """

    stays: ClassVar[bool] = True
    seed: int = 0

    def accumulator(self, name: str) -> ActivationAccumulator:
        """What sees the value of that name."""
        return ActivationAccumulator(name, seed=self.seed)

    def held(self, channels: int) -> int:
        """Limits and totals, the histogram, the sample with its keys."""
        return 8 * BINS + channels * (16 + 4 * SAMPLE_ROWS) + 16 * SAMPLE_ROWS

    def besides(self, channels: int) -> int:
        """The same once more, while a result is copied out."""
        return self.held(channels)

    def collect(
        self, names: Sequence[str], results: Iterable[tuple[str, Activation]], folder: Path
    ) -> Mapping[str, Activation]:
        """As a dictionary."""
        found = dict(results)
        return {name: found[name] for name in names}

    def recall(self, key: str, names: Sequence[str], folder: Path) -> Mapping[str, Activation] | None:
        """See `store.recall`."""
        return store.recall(key, names)

    def remember(self, key: str, found: Mapping[str, Activation]) -> None:
        """See `store.remember`."""
        store.remember(key, found)


@dataclass(frozen=True)
class SecondMoments:
    """Second moments, which leave memory as soon as they are complete: K² numbers a value."""

    stays: ClassVar[bool] = False

    def accumulator(self, name: str) -> MomentsAccumulator:
        """What sees the value of that name."""
        return MomentsAccumulator(name)

    def held(self, channels: int) -> int:
        """The sum of the products in float64, and the limits and totals."""
        return 8 * channels**2 + 12 * channels

    def besides(self, channels: int) -> int:
        """The result in float64 and half of it in float32 while it is written; less while a batch is seen."""
        return 10 * channels**2 + 64 * channels

    def collect(
        self, names: Sequence[str], results: Iterable[tuple[str, Moments]], folder: Path
    ) -> Mapping[str, Moments]:
        """As files, each read whenever it is asked for.

        Raises:
            OutputError: They cannot be written.
        """
        files = MomentsFiles(names, folder)
        with ExitStack() as failed:
            failed.callback(files.close)
            for name, moments in results:
                files.write(name, moments)
                del moments  # before the next is made
            failed.pop_all()
        return files

    def recall(self, key: str, names: Sequence[str], folder: Path) -> Mapping[str, Moments] | None:
        """See `moments_files.recall`."""
        return moments_files.recall(key, names, folder)

    def remember(self, key: str, found: Mapping[str, Moments]) -> None:
        """See `moments_files.remember`."""
        if isinstance(found, MomentsFiles):
            moments_files.remember(key, found)
