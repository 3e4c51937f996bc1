"""What a user gives as texts, checked as it is read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from artifacts.errors import UsageError

Item = str | tuple[str, str]
"""One input: a text, or a pair of texts."""


def read_texts(texts: object, *, method: str = "it", pairs: bool = False) -> Iterator[Item]:
    """The texts in ``texts``, read lazily; lone surrogates, which no tokenizer takes, become U+FFFD.

    Args:
        texts: What the user gave: any iterable of str, and of (str, str) where ``pairs``.
        method: Name of the method for the error text.
        pairs: Whether pairs of texts are allowed.

    Raises:
        UsageError: At once: it is a single str or bytes, or not iterable. When it is read: an element is not a text
            (its index is named).
    """
    if isinstance(texts, str | bytes):
        raise UsageError(f"{method} takes a list of texts, got one {type(texts).__name__}", "Pass [text]")
    if isinstance(texts, Mapping) or not isinstance(texts, Iterable):
        raise UsageError(f"{method} takes a list of texts, got {type(texts).__name__}", "Pass a list of str")
    return (_check_item(item, index, method, pairs) for index, item in enumerate(texts))


def check_texts(texts: object, *, method: str = "it", pairs: bool = False) -> list[Item]:
    """`read_texts`, all of them.

    Raises:
        UsageError: As there.
    """
    return list(read_texts(texts, method=method, pairs=pairs))


def check_text(text: object, name: str) -> str:
    """The text, with lone surrogates replaced; ``name`` says in an error what it was meant to be.

    Raises:
        UsageError: It is not a str.
    """
    if not isinstance(text, str):
        raise UsageError(f"{name} is {type(text).__name__}, not a str", "Pass a text")
    return _clean(text)


def _check_item(item: object, index: int, method: str, pairs: bool) -> Item:
    if isinstance(item, str):
        return _clean(item)
    if pairs and isinstance(item, tuple | list) and len(item) == 2:
        first, second = item
        if isinstance(first, str) and isinstance(second, str):
            return _clean(first), _clean(second)
    wanted = "a str or a pair of str" if pairs else "a str"
    raise UsageError(f"{method}: element {index} is {type(item).__name__}, not {wanted}", "Pass a list of str")


def _clean(text: str) -> str:
    # One for one, so that offsets into the cleaned text are offsets into the user's.
    if text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text):
        return text
    return "".join("\ufffd" if "\ud800" <= character <= "\udfff" else character for character in text)
