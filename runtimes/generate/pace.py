"""How reading prompts and writing texts share the time of one session."""

from __future__ import annotations

import math
from dataclasses import dataclass

from artifacts.errors import UsageError

from .decoder import PREFILL_TOKENS

_GRAIN = 16
"""Tokens of the smallest piece of a prompt, and what sizes are multiples of."""
_UNKNOWN = 32
"""Tokens of a piece while nobody knows how fast prompts are read."""
_SIZES = 32
"""Calls within so many tokens are of one size: the last of them is remembered."""
_FORGET = 0.98
"""Weight of a call against the next one."""
_RECOVER = 0.7
_BELIEF = 0.01
"""Weight, against a call, of the belief that half a step is what a call takes beside its tokens."""


@dataclass(frozen=True)
class Pace:
    """What waits for what.

    Attributes:
        pause: Seconds, above 0: the gap that reading a prompt may put between two tokens of the texts that are written
            meanwhile, their own step included. Prompts are read in pieces that keep to it.
        share: Least share of its full speed at which a prompt is read, in (0, 1), whatever is written meanwhile: it
            goes before ``pause``, so that the first token of a text comes after at most ``1 / share`` times what
            reading its prompt, and those before it, takes alone. With 0.5 the gap is then two steps and two calls.
    """

    pause: float = 0.15
    share: float = 0.5

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            UsageError: One is out of its range.
        """
        if not 0.0 < self.pause < math.inf:
            raise UsageError(f"pause is {self.pause}", "Pass a positive number of seconds")
        if not 0.0 < self.share < 1.0:
            raise UsageError(f"share is {self.share}", "Pass a number between 0 and 1")


class Speed:
    """How long things took lately, and how many tokens of a prompt may be read in one go.

    A call that reads takes a time of its own and some for each token: a line through what calls of different sizes took
    last, by least squares of the relative errors. By how much the last calls of all were off it, the next one is
    expected to be.

    Args:
        pace: What to keep to.
    """

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._step = 0.0
        self._off = 1.0
        self._count = 0
        # By size: tokens and seconds of the last call, and its number.
        self._calls: dict[int, tuple[int, float, int]] = {}

    def wrote(self, seconds: float) -> None:
        """A decode step took so long."""
        self._step = seconds

    def read(self, tokens: int, seconds: float) -> None:
        """A call for so many tokens took so long. A slow one counts at once, a fast one little by little."""
        seconds = max(seconds, 1e-9)
        self._count += 1
        self._calls[tokens // _SIZES] = tokens, seconds, self._count
        call, token = self._line()
        ratio = seconds / (call + token * tokens)
        self._off = max(ratio, _RECOVER * self._off + (1.0 - _RECOVER) * ratio)

    def piece(self, *, writing: bool) -> int:
        """Most tokens of prompts to read in one go.

        Args:
            writing: Texts are being written, and wait for it.
        """
        if not writing:
            return PREFILL_TOKENS
        if not self._calls:
            return _UNKNOWN
        call, token = (self._off * one for one in self._line())
        step, pace = self._step, self._pace
        unhurried = (pace.pause - step - call) / token
        # The least n of which n / (step + call + token n) is that share of the speed of whole pieces.
        rate = pace.share * PREFILL_TOKENS / (call + token * PREFILL_TOKENS)
        least = rate * (step + call) / (1.0 - rate * token)
        tokens = max(unhurried // _GRAIN, math.ceil(least / _GRAIN), 1)
        return min(int(tokens) * _GRAIN, PREFILL_TOKENS)

    def _line(self) -> tuple[float, float]:
        """Seconds of a call beside its tokens, at least 0, and of each token, above 0."""
        weights = n = nn = t = nt = 0.0
        for tokens, seconds, count in self._calls.values():
            weight = _FORGET ** (self._count - count) / seconds**2
            weights, n, nn = weights + weight, n + weight * tokens, nn + weight * tokens**2
            t, nt = t + weight * seconds, nt + weight * tokens * seconds
        steepest = nt / nn
        if self._step:
            believed = self._step / 2.0
            weights, t = weights + _BELIEF * believed**-2, t + _BELIEF / believed
        spread = weights * nn - n * n
        token = (weights * nt - n * t) / spread if spread > 1e-9 * weights * nn else steepest
        token = min(max(token, steepest / 4.0), steepest)
        return max(0.0, (t - token * n) / weights), token
