"""What calibration knows of a value, in plain arrays: the accumulator that sees it batch by batch, and the result."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BINS = 2048
"""Bins of every histogram."""
SAMPLE_ROWS = 512
"""Rows that a sample holds at most."""
_SMALLEST_REACH = 2.0**-64
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Activation:
    """What calibration knows of one float32 value ``x [..., K]``: any leading axes, the last one is the channel.

    Padding is left out. A row is ``x[i, j, ..., :]``: for hidden states ``[batch, length, K]``, one token.

    Attributes:
        rows: Number of rows seen; at least 1.
        low: Smallest value of each channel, float32 [K], finite.
        high: Largest value of each channel, float32 [K], finite.
        mean: Mean of each channel, float64 [K].
        histogram: How many elements, of all channels, fell in each bin, int64 [BINS]. Bin ``i`` holds
            ``-reach + i * width <= x < -reach + (i + 1) * width`` with ``width = 2 * reach / BINS``.
        reach: A power of two above every ``|x|``, and at most twice the largest; 1 where all is zero.
        sample: Rows drawn evenly over the data without replacement, in its order, float32 [n, K] with
            ``n = min(rows, SAMPLE_ROWS)``. Values with the same number of rows, seen with the same seed, have the same
            rows drawn.
    """

    rows: int
    low: NDArray[np.float32]
    high: NDArray[np.float32]
    mean: NDArray[np.float64]
    histogram: NDArray[np.int64]
    reach: float
    sample: NDArray[np.float32]


class NotFiniteError(ValueError):
    """A value holds NaN or an infinity.

    Attributes:
        number: NaN or the infinity.
        row: The first row that does, counted within the array that was given.
    """

    def __init__(self, name: str, number: float, row: int) -> None:
        super().__init__(f"{name} is {number} in row {row}")
        self.number = number
        self.row = row


class ActivationAccumulator:
    """Sees one value batch by batch and keeps what an `Activation` holds, in constant memory.

    How the data is cut into batches changes nothing but the rounding of ``mean``. The histogram begins narrow; when a
    value lies beyond its reach, the reach is doubled until it does not and neighbouring bins are merged, which is
    exact because the reach is a power of two. The sample keeps the rows with the smallest of uniformly random keys
    (Fan, Muller & Rezucha 1962).

    Attributes:
        name: What the value is called in an error.
    """

    def __init__(self, name: str, *, seed: int = 0) -> None:
        """Nothing is seen yet.

        Args:
            name: What to call the value in an error.
            seed: Which rows the sample draws.
        """
        self.name = name
        self._generator = np.random.default_rng(seed)
        self._rows = 0
        self._reach = 0.0
        self._histogram = np.zeros(BINS, np.int64)
        self._low = self._high = np.zeros(0, np.float32)
        self._total = np.zeros(0)
        self._sample = np.zeros((0, 0), np.float32)
        self._keys = np.zeros(0)
        self._places = np.zeros(0, np.int64)

    def update(self, array: NDArray[np.floating]) -> None:
        """See ``array`` of shape [..., K], finite; other floats than float32 are converted to it.

        Raises:
            NotFiniteError: A ValueError: an element is NaN or infinite. The accumulator is as it was before.
            ValueError: K is not that of the arrays before. The accumulator is as it was before.
        """
        values = np.asarray(array, np.float32)
        values = values.reshape(-1, values.shape[-1]) if values.ndim and values.shape[-1] else values.reshape(-1, 1)
        if not len(values):
            return
        channels = values.shape[1]
        if self._rows and channels != len(self._low):
            raise ValueError(f"{self.name} has {channels} channels, and {len(self._low)} before")
        low, high = values.min(axis=0), values.max(axis=0)
        self._check_finite(values, low, high)
        if not self._rows:
            self._low, self._high, self._total = low, high, np.zeros(channels)
            self._sample = np.empty((SAMPLE_ROWS, channels), np.float32)
        np.minimum(self._low, low, out=self._low)
        np.maximum(self._high, high, out=self._high)
        self._extend(max(-float(low.min()), float(high.max())))
        self._draw(values)
        self._rows += len(values)
        step = max(1, _CHUNK // channels)
        for start in range(0, len(values), step):
            chunk = values[start : start + step]
            self._total += chunk.sum(axis=0, dtype=np.float64)
            self._count(chunk)

    def result(self) -> Activation:
        """All that was seen, as arrays of its own.

        Raises:
            ValueError: Nothing was.
        """
        if not self._rows:
            raise ValueError(f"nothing was seen of {self.name}")
        return Activation(
            rows=self._rows,
            low=self._low.copy(),
            high=self._high.copy(),
            mean=self._total / self._rows,
            histogram=self._histogram.copy(),
            reach=self._reach or 1.0,
            sample=self._sample[np.argsort(self._places)],
        )

    def _check_finite(self, values: NDArray[np.float32], low: NDArray[np.float32], high: NDArray[np.float32]) -> None:
        # NaN goes through minimum and maximum, so these two tell of every element.
        if np.isfinite(low).all() and np.isfinite(high).all():
            return
        row = int(np.argmin(np.isfinite(values).all(axis=1)))
        found = values[row]
        raise NotFiniteError(self.name, float(found[~np.isfinite(found)][0]), row)

    def _extend(self, largest: float) -> None:
        """Make the reach larger than ``largest``; nothing to do where all that was seen is zero."""
        if largest < self._reach or largest == 0.0:
            return
        reach = max(_SMALLEST_REACH, 2.0 ** math.frexp(largest)[1])
        if self._reach:
            index = np.arange(BINS) - BINS // 2
            merged = BINS // 2 + (index >> (math.frexp(reach / self._reach)[1] - 1))
        else:
            # Only zeros so far, all in the bin that begins at 0, wherever the histogram ends.
            merged = np.arange(BINS)
        histogram = np.zeros(BINS, np.int64)
        np.add.at(histogram, merged, self._histogram)
        self._histogram, self._reach = histogram, reach

    def _count(self, chunk: NDArray[np.float32]) -> None:
        # A factor that is a power of two keeps every digit, so the bins are exact.
        place = chunk * np.float32(BINS / 2 / (self._reach or 1.0))
        np.floor(place, out=place)
        place += np.float32(BINS // 2)
        self._histogram += np.bincount(place.astype(np.intp).ravel(), minlength=BINS)

    def _draw(self, values: NDArray[np.float32]) -> None:
        keys = self._generator.random(len(values))
        held = len(self._keys)
        near = np.flatnonzero(keys < self._keys.max()) if held == SAMPLE_ROWS else np.arange(len(keys))
        every = np.concatenate([self._keys, keys[near]])
        chosen = np.argsort(every, kind="stable")[:SAMPLE_ROWS]
        new = np.sort(chosen[chosen >= held])
        lost = np.setdiff1d(np.arange(held), chosen)
        slots = np.concatenate([lost, np.arange(held, held + len(new) - len(lost))])
        rows = near[new - held]
        self._sample[slots] = values[rows]
        more = len(slots) - len(lost)
        self._keys = np.concatenate([self._keys, np.zeros(more)])
        self._places = np.concatenate([self._places, np.zeros(more, np.int64)])
        self._keys[slots] = keys[rows]
        self._places[slots] = self._rows + rows
