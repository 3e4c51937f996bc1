"""What calibration knows of a value, in plain arrays: accumulators that see it batch by batch, and their results."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BINS = 2048
"""Bins of every histogram."""
SAMPLE_ROWS = 512
"""Rows that a sample holds at most."""
PRODUCT_ROWS = 512
"""Rows whose products are summed in float32, at most."""
PANEL = 256
"""Rows of a triangle that are summed together."""
_WIDE_ROWS = 64
_SMALLEST_REACH = 2.0**-64
_CHUNK = 1 << 16
_SQUARES = (2.0**-40, 2.0**56)
"""Largest elements whose squares, `PRODUCT_ROWS` of them summed, stay far from both ends of float32."""


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


@dataclass(frozen=True)
class Moments:
    """The second moments of one float32 value ``x [..., K]``: what the error of a linear operator is measured with.

    For an error ``E [K, N]`` of the weight, the mean squared error of the product is ``trace(Eᵀ second E)``. Padding is
    left out; rows are those of `Activation`.

    Attributes:
        rows: Number of rows seen; at least 1.
        second: Mean of ``x xᵀ``, float64 [K, K], symmetric; for rows fewer than K it has no full rank.
        absmax: Largest absolute value of each channel, float32 [K].
        mean: Mean of each channel, float64 [K].
    """

    rows: int
    second: NDArray[np.float64]
    absmax: NDArray[np.float32]
    mean: NDArray[np.float64]


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
        values = _as_rows(array)
        if not len(values):
            return
        channels = values.shape[1]
        low, high = _limits(self.name, values, len(self._low) if self._rows else channels)
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
        # What was below 0 by less than float32 tells lies below it still.
        np.subtract(place, 1.0, out=place, where=(place == 0.0) & (chunk < 0.0))
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


class MomentsAccumulator:
    """Sees one value batch by batch and keeps what `Moments` holds, in constant memory: 4 K² bytes and a panel.

    The products of `PRODUCT_ROWS` rows at a time are summed in float32 and these sums in float64. A float32 sum of c
    products is off by at most ``c 2^-24`` of the sum of their sizes to first order, in any order of summation (Higham
    2002, section 3.1), so that each element of the result is off by less than ``c 2^-24 mean|x_i x_j| + 2^-126`` with
    ``c = PRODUCT_ROWS``, however many rows there are. Numbers whose squares would leave float32 are multiplied in
    float64. Only the lower triangle is summed, in panels of `PANEL` rows.

    Attributes:
        name: What the value is called in an error.
    """

    def __init__(self, name: str) -> None:
        """Nothing is seen yet."""
        self.name = name
        self._rows = 0
        self._panels: list[NDArray[np.float64]] = []
        self._absmax = np.zeros(0, np.float32)
        self._total = np.zeros(0)

    def update(self, array: NDArray[np.floating]) -> None:
        """See ``array`` of shape [..., K], finite; other floats than float32 are converted to it.

        Raises:
            NotFiniteError: A ValueError: an element is NaN or infinite. The accumulator is as it was before.
            ValueError: K is not that of the arrays before. The accumulator is as it was before.
        """
        values = _as_rows(array)
        if not len(values):
            return
        channels = values.shape[1]
        low, high = _limits(self.name, values, len(self._absmax) if self._rows else channels)
        if not self._rows:
            ends = [min(start + PANEL, channels) for start in range(0, channels, PANEL)]
            self._panels = [np.zeros((end - index * PANEL, end)) for index, end in enumerate(ends)]
            self._absmax, self._total = np.zeros(channels, np.float32), np.zeros(channels)
        largest = np.maximum(-low, high)
        np.maximum(self._absmax, largest, out=self._absmax)
        for start in range(0, len(values), PRODUCT_ROWS):
            chunk = values[start : start + PRODUCT_ROWS]
            self._total += chunk.sum(axis=0, dtype=np.float64)
            _add_products(self._panels, chunk, float(largest.max()))
        self._rows += len(values)

    @property
    def rows(self) -> int:
        """Rows seen.

        Raises:
            ValueError: None were.
        """
        if not self._rows:
            raise ValueError(f"nothing was seen of {self.name}")
        return self._rows

    @property
    def absmax(self) -> NDArray[np.float32]:
        """Largest absolute value of each channel, float32 [K]."""
        return self._absmax.copy()

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean of each channel, float64 [K]; raises what `rows` does."""
        return self._total / self.rows

    def triangle(self) -> Iterator[NDArray[np.float64]]:
        """Rows of the lower triangle of the mean of ``x xᵀ``, float64 [1], [2], ... [K]; raises what `rows` does."""
        for index, panel in enumerate(self._panels):
            for place, row in enumerate(panel):
                yield row[: index * PANEL + place + 1] / self.rows

    def result(self) -> Moments:
        """All that was seen, as arrays of its own.

        Raises:
            ValueError: Nothing was.
        """
        second = np.empty((len(self._absmax), len(self._absmax)))
        for index, row in enumerate(self.triangle()):
            second[index, : index + 1] = row
            second[: index + 1, index] = row
        return Moments(rows=self.rows, second=second, absmax=self.absmax, mean=self.mean)


def _add_products(panels: Sequence[NDArray[np.float64]], chunk: NDArray[np.float32], reach: float) -> None:
    """Add the sum of ``x xᵀ`` over the rows of ``chunk [n, K]``, none larger than ``reach``, to its lower triangle.

    What lies above the diagonal in the last block of a panel is summed too, and means nothing to anyone.
    """
    smallest, largest = _SQUARES
    if reach and not smallest <= reach < largest:
        for start in range(0, len(chunk), _WIDE_ROWS):
            _add_triangle(panels, chunk[start : start + _WIDE_ROWS].astype(np.float64))
    else:
        _add_triangle(panels, chunk)


def _add_triangle(panels: Sequence[NDArray[np.float64]], rows: NDArray[np.floating]) -> None:
    for panel in panels:
        count, end = panel.shape
        own, before = rows[:, end - count : end], rows[:, : end - count]
        if count < end:
            panel[:, : end - count] += own.T @ before
        panel[:, end - count :] += own.T @ own


def _as_rows(array: NDArray[np.floating]) -> NDArray[np.float32]:
    """Any array as float32 [n, K]; one without axes or without channels is a column."""
    values = np.asarray(array, np.float32)
    return values.reshape(-1, values.shape[-1]) if values.ndim and values.shape[-1] else values.reshape(-1, 1)


def _limits(name: str, values: NDArray[np.float32], channels: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Smallest and largest value of each channel of ``values [n, K]``, n at least 1.

    Raises:
        NotFiniteError: An element is NaN or infinite.
        ValueError: K is not ``channels``.
    """
    if values.shape[1] != channels:
        raise ValueError(f"{name} has {values.shape[1]} channels, and {channels} before")
    low, high = values.min(axis=0), values.max(axis=0)
    # NaN goes through minimum and maximum, so these two tell of every element.
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        row = int(np.argmin(np.isfinite(values).all(axis=1)))
        found = values[row]
        raise NotFiniteError(name, float(found[~np.isfinite(found)][0]), row)
    return low, high
