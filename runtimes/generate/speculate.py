"""Speculative decoding: several guessed tokens are checked in one step, where measured times say that it pays.

Guesses are looked up in the text itself (`Lookup`), written by a smaller model (`Draft`), or forced by a constraint. At
each position the text's own sampler chooses from the model's own logits; a guess that it chooses too saves a step, and
the first that it does not ends the check. That is rejection sampling for a proposal without randomness (Leviathan et
al. 2023, https://arxiv.org/abs/2211.17192): a guess is accepted with its probability, and what is drawn instead of it
is distributed as if it had been left out. The random numbers are those of plain sampling, one a token.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from .draft import Draft
from .lookup import Lookup, Odds
from .rows import Row

MOST = 16
"""Tokens that are guessed at once, at most."""
MOST_ROWS = 4
"""Texts at once with which guesses are checked: each is a call of its own, and a batch fills the machine anyway."""
_COUNTS = (1, 2, 4, 8, 16)
"""Numbers of guesses: few, so that each has been measured soon."""
_GAIN = 1.15
"""Least gain that a check must promise: times and odds are estimates, and a loss counts more than a gain."""
_SLOPE = 0.12
"""Of a step's time that each further token takes, until it was measured: hopeful, so that it is."""
_REMEMBERED = 8
_FRESH = 20.0
"""Seconds after which what a check took is forgotten, so that it is tried again."""
_RETRY = 64
"""Steps after which a model that did not pay guesses again."""
_PATIENCE = 8
_REST = 3
"""Steps between two looks, at most, where nothing was worth a check: one more for each so many looks in vain."""


class Costs:
    """How long calls took lately: the median of the last ones."""

    def __init__(self) -> None:
        self._steps: dict[int, deque[float]] = {}
        self._checks: dict[int, deque[float]] = {}
        self._step: dict[int, float] = {}
        # (seconds, when it was measured last); a check of one token is a step.
        self._check: dict[int, tuple[float, float]] = {}

    def stepped(self, rows: int, seconds: float) -> None:
        """A step of so many texts took so long."""
        times = self._steps.setdefault(rows, deque(maxlen=_REMEMBERED))
        times.append(seconds)
        self._step[rows] = sorted(times)[len(times) // 2]

    def checked(self, width: int, seconds: float) -> None:
        """A call for so many tokens of one text took so long."""
        times = self._checks.setdefault(width, deque(maxlen=_REMEMBERED))
        times.append(seconds)
        self._check[width] = sorted(times)[len(times) // 2], time.monotonic()

    def step(self, rows: int) -> float:
        """Seconds of a step of so many texts, or of the slowest that was measured; 0 for none, infinite if unknown."""
        if not rows:
            return 0.0
        return self._step.get(rows) or max(self._step.values(), default=math.inf)

    def check(self, width: int) -> float:
        """Seconds of a call for so many tokens of one text: measured, or drawn through what was."""
        since = time.monotonic() - _FRESH
        known = self._check.get(width)
        if known is not None and known[1] >= since:
            return known[0]
        below, above = (1, self.step(1)), (0, 0.0)
        for one, (seconds, at) in self._check.items():
            if at < since:
                continue
            if below[0] < one <= width:
                below = one, seconds
            if one > width and (one < above[0] or not above[0]):
                above = one, seconds
        if width == 1:
            return below[1]
        if above[0]:
            return below[1] + (width - below[0]) / (above[0] - below[0]) * (above[1] - below[1])
        return below[1] + _SLOPE * self.step(1) * (width - below[0])


@dataclass(frozen=True)
class Guess:
    """What a text may go on with.

    Attributes:
        tokens: Token ids.
        chances: Probability of each to be right if those before it are.
    """

    tokens: Sequence[int] = ()
    chances: Sequence[float] = ()

    def expected(self, count: int) -> float:
        """Tokens that checking the first ``count`` of them is expected to write, the one after them included."""
        total = right = 1.0
        for chance in self.chances[:count]:
            right *= chance
            total += right
        return total


_NOTHING = Guess()


class Speculator:
    """Decides what to check, for one session. What it learned serves all texts that come.

    Args:
        draft: Model that guesses where nothing is found in the text; None: none.

    Attributes:
        costs: What calls take.
        drafted: Tokens checked so far.
        accepted: How many of them were right.
    """

    def __init__(self, draft: Draft | None = None) -> None:
        self.costs = Costs()
        self.drafted = self.accepted = 0
        self._draft = draft
        self._idle = 0
        # Looks in vain since the last check, and steps until the next look.
        self._vain = self._rest = 0
        self._odds = Odds()
        self._known: dict[int, tuple[Row, Lookup]] = {}

    def plan(self, rows: Sequence[Row], capacity: int) -> list[list[int]]:
        """Tokens to check for each text; empty if a plain step is expected to be as good.

        Args:
            rows: Texts that are written, in the order of their slots.
            capacity: Tokens of a slot.

        Raises:
            ProviderError: ONNX Runtime failed in the draft.
        """
        if self._rest:
            self._rest -= 1
            return []
        if any(one[0] not in rows for one in self._known.values()):
            self._known = {key: one for key, one in self._known.items() if one[0] in rows}
        most = [self._most(row, capacity) for row in rows]
        if len(rows) > MOST_ROWS or not any(most) or math.isinf(self.costs.step(len(rows))):
            return []
        guesses = [self._guess(row, count) for row, count in zip(rows, most, strict=True)]
        counts = self._worth(guesses)
        if not any(counts) and self._draft is not None and len(rows) == 1:
            guesses = [self._written(self._draft, rows[0], most[0])]
            counts = [len(guesses[0].tokens)]
        if not any(counts):
            self._vain += 1
            self._rest = 0 if self._draft is not None else min(self._vain // _PATIENCE, _REST)
            return []
        self._vain = 0
        found = [list(guess.tokens[:count]) for guess, count in zip(guesses, counts, strict=True)]
        for row, tokens in zip(rows, found, strict=True):
            row.foresee(tokens)
        return found

    def note(self, drafts: Sequence[Sequence[int]], right: Sequence[int], seconds: float) -> None:
        """What became of a check.

        Args:
            drafts: Tokens checked, of each text.
            right: How many of them each text said.
            seconds: What it took.
        """
        self.drafted += sum(map(len, drafts))
        self.accepted += sum(right)
        if len(drafts) == 1:
            self.costs.checked(1 + len(drafts[0]), seconds)

    def _most(self, row: Row, capacity: int) -> int:
        """Tokens that may be guessed for a text: it ends before more, or its slot does."""
        asked = row.job.speculate
        most = (MOST if self._draft is not None else 0) if asked is None else asked
        return max(0, min(most, MOST, row.request.limit - len(row.tokens) - 1, capacity - row.length - 1))

    def _guess(self, row: Row, most: int) -> Guess:
        """What costs nothing to guess: what a constraint leaves, or what the text said before."""
        if not most:
            return _NOTHING
        if forced := row.forced()[:most]:
            return Guess(forced, [1.0] * len(forced))
        known = self._known.get(id(row))
        if known is None:
            known = self._known[id(row)] = row, Lookup(row.request.prompt, self._odds)
        lookup = known[1]
        found, match = lookup.guess(row.tokens, most)
        if not found:
            return _NOTHING
        tokens = _admitted(row, found)
        return Guess(tokens, lookup.odds.chances(match, len(tokens)))

    def _worth(self, guesses: Sequence[Guess]) -> list[int]:
        """How many tokens of each guess to check, so that most is written in a second; zeros: none is worth it."""
        rows, counts = len(guesses), [self._count(guess) if guess.tokens else 0 for guess in guesses]
        if not any(counts):
            return counts
        order = sorted((at for at in range(rows) if counts[at]), key=lambda at: -guesses[at].expected(counts[at]))
        best, chosen = _GAIN * rows / self.costs.step(rows), set[int]()
        for size in range(1, len(order) + 1):
            some = order[:size]
            tokens = sum(guesses[at].expected(counts[at]) for at in some) + rows - size
            seconds = sum(self.costs.check(1 + counts[at]) for at in some) + self.costs.step(rows - size)
            if tokens / seconds > best:
                best, chosen = tokens / seconds, set(some)
        return [count if at in chosen else 0 for at, count in enumerate(counts)]

    def _count(self, guess: Guess, each: float = 0.0) -> int:
        """How many tokens of it to check, were the text alone; ``each``: seconds that guessing one takes."""
        best, chosen, start, total, right = 0.0, 0, 0, 1.0, 1.0
        for count in _COUNTS:
            if count > len(guess.tokens):
                break
            # As `Guess.expected`, each chance looked at once.
            for chance in guess.chances[start:count]:
                right *= chance
                total += right
            start = count
            rate = total / (self.costs.check(1 + count) + each * count)
            if rate > best:
                best, chosen = rate, count
        return chosen

    def _written(self, draft: Draft, row: Row, most: int) -> Guess:
        """What the draft writes; nothing where that does not pay, but for a try now and then."""
        asked = Guess([0] * most, [draft.chance] * most)
        count = self._count(asked, draft.seconds)
        seconds = self.costs.check(1 + count) + draft.seconds * count
        if not count or asked.expected(count) / seconds < _GAIN / self.costs.step(1):
            self._idle += 1
            if self._idle % _RETRY:
                return Guess()
            count = 1
        tokens = _admitted(row, draft.guess((*row.request.prompt, *row.tokens), count))
        return Guess(tokens, [draft.chance] * len(tokens))


def _admitted(row: Row, tokens: Sequence[int]) -> Sequence[int]:
    """As much of it as the text may say, and before its end."""
    count = next((at for at, token in enumerate(tokens) if token in row.job.end), len(tokens))
    return tokens[: row.admissible(tokens[:count])]
