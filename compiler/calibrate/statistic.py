"""The statistics that calibration gathers, each as a value: what it takes, and what its results are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol, TypeVar

from passes.statistics import BINS, PANEL, SAMPLE_ROWS, Activation, Moments

from .moments_files import MomentsFiles
from .results import Results
from .store import ActivationResults

Seen = TypeVar("Seen")


class Statistic(Protocol[Seen]):
    """What is gathered of values. Its text form tells it from others, and is part of the key of what is kept.

    Attributes:
        stays: Every result is in memory until all values are seen; else only those of one pass over the data.
    """

    stays: ClassVar[bool]

    def held(self, channels: int) -> int:
        """Bytes of the accumulator of one value, or of its result."""
        ...

    def besides(self, channels: int) -> int:
        """Bytes that a value takes besides, while it is seen and while its result is made."""
        ...

    def results(self, names: Sequence[str], folder: Path) -> Results[Seen]:
        """Where the statistics of values of these names go; files of its own into the folder.

        Raises:
            OutputError: They cannot be written.
        """
        ...


@dataclass(frozen=True)
class Activations:
    """Ranges, histograms, means and sampled rows.

    Attributes:
        seed: Which rows the samples draw.
    """

    stays: ClassVar[bool] = True
    seed: int = 0

    def held(self, channels: int) -> int:
        """Limits and totals, the histogram, the sample with its keys."""
        return 8 * BINS + channels * (16 + 4 * SAMPLE_ROWS) + 16 * SAMPLE_ROWS

    def besides(self, channels: int) -> int:
        """The same once more, while a result is copied out."""
        return self.held(channels)

    def results(self, names: Sequence[str], folder: Path) -> Results[Activation]:
        """In memory."""
        return ActivationResults(names, seed=self.seed)


@dataclass(frozen=True)
class SecondMoments:
    """Second moments, which leave memory as soon as they are complete: K² numbers a value."""

    stays: ClassVar[bool] = False

    def held(self, channels: int) -> int:
        """A triangle of the sum of the products in float64, in panels, and the limits and totals."""
        return 8 * channels * (channels + min(channels, PANEL)) // 2 + 12 * channels

    def besides(self, channels: int) -> int:
        """The products of a panel, also where they are in float64; rows in float64, while seen and while written."""
        return 8 * channels * min(channels, PANEL) + 640 * channels

    def results(self, names: Sequence[str], folder: Path) -> Results[Moments]:
        """As files, each read whenever it is asked for."""
        return MomentsFiles(names, folder)
