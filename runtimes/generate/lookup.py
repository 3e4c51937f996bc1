"""Prompt look-up (Saxena 2023): what followed when a text last said what it says now, and how often that held."""

from __future__ import annotations

from collections.abc import Sequence

LONGEST = 8
"""Tokens of a match beyond which longer ones are not told apart."""
_LEAST = 2
_CANDIDATES = 12
_PRIOR = (0.0, 0.0, 0.2, 0.35, 0.5, 0.6, 0.7, 0.8, 0.9)
"""How often the next token is right, by the length of the match, in a text of which nothing is known yet."""
_TRUST = 3.0
_FADE = 0.9
_FADE_SHARED = 0.99


class Odds:
    """How often guesses were right, by how much of the text matched: what happened lately counts most.

    Args:
        before: Of the texts before this one, which are told of this one too: where they were worse than usual, this
            one is expected to be. Where they were better it has to show that it is. None: there were none.
    """

    def __init__(self, before: Odds | None = None) -> None:
        self._before = before
        self._hits = [0.0] * (LONGEST + 1)
        self._tries = [0.0] * (LONGEST + 1)

    def note(self, match: int, hit: bool) -> None:
        """A guess after a match of so many tokens was right, or not."""
        at = min(match, LONGEST)
        fade = _FADE_SHARED if self._before is None else _FADE
        self._hits[at] = fade * self._hits[at] + hit
        self._tries[at] = fade * self._tries[at] + 1.0
        if self._before is not None:
            self._before.note(match, hit)

    def chance(self, match: int) -> float:
        """Probability that the next guess after a match of so many tokens is right."""
        at = min(match, LONGEST)
        prior = _PRIOR[at] if self._before is None else min(_PRIOR[at], self._before.chance(match))
        return (self._hits[at] + _TRUST * prior) / (self._tries[at] + _TRUST)

    def chances(self, match: int, count: int) -> list[float]:
        """`chance` of so many guesses, each behind those before it, the first after a match of so many tokens."""
        short = [self.chance(at) for at in range(match, min(match + count, LONGEST))]
        return short + [self.chance(LONGEST)] * (count - len(short)) if len(short) < count else short


class Lookup:
    """Looks up how one text may go on, in itself.

    Args:
        prompt: Token ids.
        odds: How often it was right elsewhere.

    Attributes:
        odds: How often it was right here.
    """

    def __init__(self, prompt: Sequence[int], odds: Odds) -> None:
        self.odds = Odds(odds)
        self._tokens: list[int] = []
        self._places: dict[tuple[int, int], list[int]] = {}
        self._prompt = len(prompt)
        self._guess: tuple[list[int], int] = ([], 0)
        self._add(prompt)

    def guess(self, tokens: Sequence[int], most: int) -> tuple[list[int], int]:
        """What may come next.

        Args:
            tokens: Of the text so far, without the prompt.
            most: Tokens to guess at most.

        Returns:
            Token ids, none where nothing is found; and how many tokens before them are the same there, at most
            `LONGEST`. Where the text repeats itself without end, so does the guess.
        """
        new = tokens[len(self._tokens) - self._prompt :]
        self._learn(new)
        self._add(new)
        place, match = self._longest()
        count = len(self._tokens)
        found: list[int] = []
        if match >= _LEAST:
            found = self._tokens[place : place + most]
            for index in range(count, place + most):
                found.append(found[index - count])
        self._guess = (found, match)
        return self._guess

    def _learn(self, new: Sequence[int]) -> None:
        """Compare what was guessed last with what came, whether anybody made use of it or not."""
        guessed, match = self._guess
        for index, (token, wanted) in enumerate(zip(guessed, new, strict=False)):
            self.odds.note(match + index, token == wanted)
            if token != wanted:
                break

    def _add(self, new: Sequence[int]) -> None:
        """Tokens become part of the text, and findable by the two before them."""
        for token in new:
            if len(self._tokens) >= 2:
                key = (self._tokens[-2], self._tokens[-1])
                self._places.setdefault(key, []).append(len(self._tokens))
            self._tokens.append(token)

    def _longest(self) -> tuple[int, int]:
        """Where what follows the longest match begins, the latest of equal ones; and how long the match is."""
        tokens, end = self._tokens, len(self._tokens)
        if end < _LEAST:
            return 0, 0
        best = (0, 0)
        for place in reversed(self._places.get((tokens[-2], tokens[-1]), [])[-_CANDIDATES:]):
            match = _LEAST
            while match < min(LONGEST, place) and tokens[place - 1 - match] == tokens[end - 1 - match]:
                match += 1
            if match > best[1]:
                best = (place, match)
                if match == LONGEST:
                    break
        return best
