"""The options of a pass that say how clipping ranges are chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .ranges import METHODS


@dataclass(frozen=True)
class RangeOptions:
    """Base of the passes that quantize activations of known range.

    Attributes:
        methods: What ``ranges`` may be.
        ranges: How a range is chosen: absmax, percentile, mse or entropy. See `passes.quantize.ranges`.
        percentile: Percent of the values that the percentile method keeps inside.

    Raises:
        ValueError: An option is something else.
    """

    methods: ClassVar[tuple[str, ...]] = METHODS

    ranges: str = "mse"
    percentile: float = 99.99

    def __post_init__(self) -> None:
        if self.ranges not in self.methods:
            raise ValueError(f"ranges is {self.ranges!r}, not one of {', '.join(self.methods)}")
        if not 0.0 < self.percentile <= 100.0:
            raise ValueError(f"percentile is {self.percentile}, not in (0, 100]")
