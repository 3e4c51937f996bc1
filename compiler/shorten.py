"""Long texts made short enough to judge by and to calibrate with."""

from __future__ import annotations

from runtimes.text import Tokens

LONGEST = 128
"""Tokens of a text that is judged or calibrated with; what lies beyond is cut off."""


def shortened(row: Tokens, longest: int = LONGEST) -> Tokens:
    """The first tokens of a row and its last one, the closing special token: ``longest`` of them at most.

    A row that is cut loses its ``offsets`` and ``words``.
    """
    if len(row) <= longest:
        return row
    keep = [*range(longest - 1), len(row) - 1]
    return Tokens(row.ids[keep], row.types[keep], row.special[keep], row.offsets[:0], row.context[keep], row.words[:0])
