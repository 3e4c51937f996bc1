"""Strict reading of JSON documents into frozen dataclasses: the types of the fields are the whole schema.

A field's type says what JSON may stand there, and ``Annotated`` constraints narrow it:

    str, int, float, bool          that JSON type exactly (an int may stand for a float; true is no number)
    tuple[T, ...]                  an array
    tuple[tuple[str, str], ...]    an object from strings to strings, kept sorted
    T | None                       null, or T
    a dataclass                    an object with exactly its fields as keys
    Annotated[T, constraint]       T, and ``constraint.problem(value)`` is empty
    Annotated[T | None, Omitted()] T where the key is there; where it is not, None; null is refused
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from .constraints import MAX_INTEGER, MAX_TEXT, UNSAFE, Unbounded, shown
from .digest import canonical_json
from .errors import SchemaError

SCHEMA = 1
"""The format that this hasten reads and writes."""
MAX_DOCUMENT = 16 << 20
"""Most bytes that manifest.json or proof.json may have."""
MAX_ITEMS = 200_000
"""Most items of any one array."""

_PAIRS = tuple[tuple[str, str], ...]
T = TypeVar("T")


@dataclass(frozen=True)
class Omitted:
    """A field whose key is left out where the value is None."""

    def problem(self, value: object) -> str:
        """What is wrong with ``value``; empty if nothing is."""
        return "the key is left out where there is none, not null" if value is None else ""


@dataclass(frozen=True)
class At:
    """A place in a document, for errors.

    Attributes:
        document: File name of the document.
        key: Path of keys in it, such as ``variants[0].id``.
    """

    document: str
    key: str = ""

    def field(self, name: str) -> At:
        """The value of a key of the object here."""
        return At(self.document, f"{self.key}.{name}" if self.key else name)

    def item(self, index: int) -> At:
        """An item of the array here."""
        return At(self.document, f"{self.key}[{index}]")

    def error(self, problem: str) -> SchemaError:
        """What to raise to refuse the document for what stands here."""
        place = f"{self.document}: {self.key}" if self.key else self.document
        return SchemaError(f"{place}: {problem}")


def read_json(data: bytes, at: At) -> dict[str, Any]:
    """The object that ``data`` holds as JSON.

    Raises:
        SchemaError: Too long, no UTF-8, no JSON, NaN or infinity in it, a key twice in one object, too deeply nested,
            or no object.
    """
    if len(data) > MAX_DOCUMENT:
        raise at.error(f"{len(data)} bytes; {MAX_DOCUMENT} are allowed")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise at.error(f"the key {shown(name)} stands twice in one object")
            found[name] = value
        return found

    def constant(text: str) -> float:
        raise at.error(f"{text} is no number of JSON")

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except RecursionError as error:
        raise at.error("nested too deeply") from error
    except ValueError as error:
        raise at.error(f"no JSON: {error}") from error
    if not isinstance(value, dict):
        raise at.error("no object")
    return value


def check_schema(document: dict[str, Any], at: At) -> None:
    """Refuse a document of another format than ours.

    Raises:
        SchemaError: No schema number, or one that is not ours.
    """
    schema = document.get("schema")
    if type(schema) is not int:
        raise at.field("schema").error("missing or no integer; this is no bundle of hasten")
    if schema > SCHEMA:
        raise SchemaError(
            f"{at.document}: schema {shown(schema)} was made by a newer hasten; this one reads schema {SCHEMA}",
            "upgrade hasten",
        )
    if schema != SCHEMA:
        raise at.field("schema").error(f"there is no schema {shown(schema)}")


def decode(kind: type[T], value: object, at: At) -> T:
    """The instance of the dataclass ``kind`` that a parsed JSON object stands for.

    Raises:
        SchemaError: It stands for none; names the key.
    """
    hints = _hints(kind)
    if not isinstance(value, dict):
        raise at.error(f"an object was expected, not {shown(value)}")
    for name in value:
        if name not in hints:
            raise at.error(f"unknown key {shown(name)}")
    for name, hint in hints.items():
        if name not in value and not _may_be_omitted(hint):
            raise at.error(f"the key {name!r} is missing")
    return kind(
        **{name: _decode(hint, value[name], at.field(name)) if name in value else None for name, hint in hints.items()}
    )


def encode(value: object) -> dict[str, object]:
    """The JSON value of an instance of a dataclass; the inverse of `decode`."""
    found = ((name, hint, getattr(value, name)) for name, hint in _hints(type(value)).items())
    return {name: _encode(hint, held) for name, hint, held in found if held is not None or not _may_be_omitted(hint)}


def encode_document(value: object) -> bytes:
    """An instance of a dataclass as a document with our schema number, in canonical form."""
    return canonical_json({"schema": SCHEMA, **encode(value)})


def require_unique(names: Sequence[str], at: At, what: str) -> None:
    """Refuse a list that names something twice.

    Raises:
        SchemaError: Two names are equal.
    """
    seen: set[str] = set()
    for index, name in enumerate(names):
        if name in seen:
            raise at.item(index).error(f"{what} {shown(name)} stands twice")
        seen.add(name)


def _may_be_omitted(hint: Any) -> bool:
    return get_origin(hint) is Annotated and Omitted() in get_args(hint)[1:]


def _read_hints(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in fields(kind)}


_hints: Callable[[Any], dict[str, Any]] = cache(_read_hints)


def _decode(hint: Any, value: object, at: At) -> object:
    origin = get_origin(hint)
    if origin is Annotated:
        return _decode_annotated(hint, value, at)
    if origin in (Union, types.UnionType):
        return _decode_union(get_args(hint), value, at)
    if hint == _PAIRS:
        return _decode_pairs(value, at)
    if origin is tuple:
        if not isinstance(value, list):
            raise at.error(f"an array was expected, not {shown(value)}")
        if len(value) > MAX_ITEMS:
            raise at.error(f"{len(value)} items; {MAX_ITEMS} are allowed")
        return tuple(_decode(get_args(hint)[0], item, at.item(index)) for index, item in enumerate(value))
    if isinstance(hint, type) and is_dataclass(hint):
        return decode(hint, value, at)
    return _SCALARS[hint](value, at)


def _decode_annotated(hint: object, value: object, at: At) -> object:
    inner, *constraints = get_args(hint)
    if value is None and Unbounded() in constraints:
        return math.inf
    decoded = _decode(inner, value, at)
    for constraint in constraints:
        if problem := constraint.problem(decoded):
            raise at.error(problem)
    return decoded


def _decode_union(choices: tuple[Any, ...], value: object, at: At) -> object:
    if value is None and type(None) in choices:
        return None
    for choice in choices:
        listed = get_origin(choice) is tuple and isinstance(value, list)
        if listed or choice is type(value) or (is_dataclass(choice) and isinstance(value, dict)):
            return _decode(choice, value, at)
    raise at.error(f"{shown(value)} has the wrong type")


def _decode_pairs(value: object, at: At) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, dict):
        raise at.error(f"an object was expected, not {shown(value)}")
    for name in value:
        _text(name, at)
    return tuple(sorted((name, _text(text, at.field(shown(name)))) for name, text in value.items()))


def _text(value: object, at: At) -> str:
    if not isinstance(value, str):
        raise at.error(f"a string was expected, not {shown(value)}")
    if len(value) > MAX_TEXT:
        raise at.error(f"a string of {len(value)} characters; {MAX_TEXT} are allowed")
    if UNSAFE.search(value):
        raise at.error(f"{shown(value)} has a control character or half a surrogate pair")
    return value


def _integer(value: object, at: At) -> int:
    if type(value) is not int:
        raise at.error(f"an integer was expected, not {shown(value)}")
    if abs(value) > MAX_INTEGER:
        raise at.error(f"{shown(value)} is out of range")
    return value


def _number(value: object, at: At) -> float:
    if type(value) is int:
        return float(_integer(value, at))
    if type(value) is not float:
        raise at.error(f"a number was expected, not {shown(value)}")
    if not math.isfinite(value):
        raise at.error("the number is out of range")
    return value


def _flag(value: object, at: At) -> bool:
    if not isinstance(value, bool):
        raise at.error(f"true or false was expected, not {shown(value)}")
    return value


_SCALARS: dict[type, Callable[[Any, At], Any]] = {str: _text, int: _integer, float: _number, bool: _flag}


def _encode(hint: Any, value: Any) -> object:
    origin = get_origin(hint)
    if origin is Annotated:
        inner, *constraints = get_args(hint)
        if Unbounded() in constraints and not math.isfinite(value):
            return None
        return _encode(inner, value)
    if hint == _PAIRS:
        return {str(name): str(text) for name, text in value}
    if isinstance(value, tuple):
        listed = next(one for one in (hint, *get_args(hint)) if get_origin(one) is tuple)
        return [_encode(get_args(listed)[0], item) for item in value]
    if is_dataclass(value):
        return encode(value)
    # Numbers that came out of numpy are written as Python's own.
    return hint(value) if hint in (int, float, bool) else value
