"""The options of a pass that say how clipping ranges are chosen."""

from __future__ import annotations

from .ranges import METHODS


def check_range_options(ranges: str, percentile: float, *more: str) -> None:
    """Hold the options to what they may be.

    Args:
        ranges: One of `passes.quantize.ranges.METHODS`.
        percentile: Percent of the values to keep inside.
        more: Further ways that the pass knows.

    Raises:
        ValueError: One of them is something else.
    """
    known = (*METHODS, *more)
    if ranges not in known:
        raise ValueError(f"ranges is {ranges!r}, not one of {', '.join(known)}")
    if not 0.0 < percentile <= 100.0:
        raise ValueError(f"percentile is {percentile}, not in (0, 100]")
