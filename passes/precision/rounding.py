"""float32 constants as float16: what rounds well, what must be saturated, what must not be rounded at all."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Halves = NDArray[np.float16]

LARGEST = 65504.0
"""Largest finite float16."""

SMALLEST_NORMAL = 2.0**-14
"""Below this, float16 loses its relative precision (6.1e-5), and below 2**-25 everything."""

MASK_THRESHOLD = -1e6
"""A constant at or below this stands for minus infinity in an attention mask."""

MASK_MINIMUM = -32752.0
"""What such a constant becomes: half of the range, so that adding a score to it stays finite.

exp of it is 0 all the same, and a row that is masked entirely does not become NaN, as it would at -65504, where the sum
with a score of -16 already rounds to minus infinity.
"""


def to_half(array: Floats) -> Halves:
    """Round to float16: ties to even, mask minima to `MASK_MINIMUM`, all else saturated at ±65504; inf and nan stay.

    Args:
        array: float32 of any shape.

    Returns:
        float16 of that shape.
    """
    return _round(np.where((array <= MASK_THRESHOLD) & np.isfinite(array), np.float32(MASK_MINIMUM), array))


def to_half_limit(array: Floats) -> Halves:
    """The same for a limit (of Clip, Max, Min), where a large negative number means no limit: saturated at ±65504."""
    return _round(array)


def underflows(array: Floats) -> bool:
    """Whether every number in it that is not 0 is too small for float16: an epsilon, as opposed to a weight matrix."""
    largest = float(np.abs(array).max(initial=0.0))
    return 0.0 < largest < SMALLEST_NORMAL


def overflows(array: Floats) -> bool:
    """Whether it holds finite numbers beyond the range of float16 that are no mask minima."""
    beyond = np.isfinite(array) & (np.abs(array) > LARGEST) & (array > MASK_THRESHOLD)
    return bool(beyond.any())


def _round(array: Floats) -> Halves:
    return np.where(np.isinf(array), array, np.clip(array, -LARGEST, LARGEST)).astype(np.float16)
