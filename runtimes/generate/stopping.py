"""Where a text ends: stop strings wherever tokens happen to cut them, token ids, and half a stop string held back."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from artifacts.errors import UsageError

_MOST = 64
_LONGEST = 4096


class StopStrings:
    """Looks for the first of some strings in a text that arrives in pieces.

    Args:
        strings: What ends the text; it is no part of it.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """What of the text may be shown now that ``piece`` was added; :attr:`found` says whether the text ended.

        The end of it that may become a stop string is held back.
        """
        if not self._strings:
            return piece
        text = self._held + piece
        places = [(place, string) for string in self._strings if (place := text.find(string)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)[0]]
        kept = max(_overlap(text, string) for string in self._strings)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


def check_stops(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """The stop strings that a user gave.

    Raises:
        UsageError: One is empty or not a str, they are too many, or one is too long.
    """
    if stop is None:
        return ()
    if not isinstance(stop, str | list | tuple):
        raise UsageError(f"stop is {type(stop).__name__}", "Pass a text, or a list of texts")
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    for string in strings:
        if not isinstance(string, str) or not string:
            raise UsageError(f"stop holds {string!r}", "Pass texts that are not empty")
        if len(string) > _LONGEST:
            raise UsageError(f"a stop string has {len(string)} characters", f"At most {_LONGEST} are allowed")
    if len(strings) > _MOST:
        raise UsageError(f"{len(strings)} stop strings", f"At most {_MOST} are allowed")
    return strings


def check_stop_ids(ids: Collection[int] | None, vocabulary: int) -> frozenset[int]:
    """The token ids that a user gave to end a text.

    Raises:
        UsageError: One is no token.
    """
    if ids is not None and not isinstance(ids, list | tuple | set | frozenset):
        raise UsageError(f"stop_ids is {type(ids).__name__}", "Pass a list of token ids")
    for token in ids or ():
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocabulary:
            raise UsageError(f"stop_ids holds {token!r}", f"Token ids are 0 to {vocabulary - 1}")
    return frozenset(ids or ())


def _overlap(text: str, string: str) -> int:
    """Characters at the end of ``text`` that ``string`` begins with, at most all but one of ``string``."""
    for count in range(min(len(text), len(string) - 1), 0, -1):
        if text.endswith(string[:count]):
            return count
    return 0
