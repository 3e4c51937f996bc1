"""The key of a request: equal where the answer is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from collections.abc import Set as AbstractSet

import numpy as np
from numpy.typing import NDArray

from artifacts.errors import UsageError

FORMAT = 1
"""Raised whenever the bytes of an answer, or what a request means, change: what older versions kept is not found."""


def request_key(
    digest: str, method: str, payload: Mapping[str, object], defaults: Mapping[str, object] | None = None
) -> str:
    """The key under which the answer to a request is kept.

    SHA-256 over `FORMAT`, the digest, the method, and the request as canonical JSON: texts as given (no Unicode
    normalisation), keys of objects sorted, tuples as lists, sets sorted; arrays by dtype, shape and bytes. Fields of
    the payload that are None, or equal to their default, are left out: they ask for the same as no field.

    Args:
        digest: ``Bundle.digest``.
        method: What is asked of the bundle: ``embed``, ``rows``, ``run``, ``generate`` …
        payload: The request: JSON values and numpy arrays.
        defaults: Name -> value that a field has where it is not given.

    Returns:
        64 lower-case hexadecimal digits.

    Raises:
        UsageError: The payload holds what JSON does not: an object of another kind, NaN or an infinity.
    """
    known = defaults or {}
    given = {name: value for name, value in payload.items() if value is not None}
    asked = {name: value for name, value in given.items() if not (name in known and _equal(value, known[name]))}
    arrays: list[NDArray[np.generic]] = []

    def plain(value: object) -> object:
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, np.ndarray):
            arrays.append(value)
            return {"array": [value.dtype.str, list(value.shape)]}
        if isinstance(value, Mapping):
            return dict(value)
        if isinstance(value, AbstractSet):
            return sorted(value)
        raise TypeError(f"{type(value).__name__} is not a value of JSON")

    document = [FORMAT, digest, method, asked]
    try:
        text = json.dumps(
            document, default=plain, ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":")
        )
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"the request has no key: {error}", "Pass values of JSON, or arrays") from error
    # A lone surrogate is no UTF-8, and still another text than the one with a replacement character.
    found = hashlib.sha256(text.encode("utf-8", "surrogatepass"))
    for array in arrays:
        if array.dtype.hasobject:
            found.update(b"\0" + json.dumps(array.tolist(), default=str).encode())
        else:
            found.update(b"\0" + hashlib.sha256(np.ascontiguousarray(array).data).digest())
    return found.hexdigest()


def _equal(value: object, default: object) -> bool:
    """Whether they are equal and of one type: True is not 1, and no array is compared."""
    return type(value) is type(default) and isinstance(value, bool | int | float | str) and value == default
