"""What a caller may constrain a text to, checked and bounded before a grammar is made of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal
from urllib.parse import unquote

from artifacts.errors import UsageError

MOST_SCHEMA = 64 << 10
"""Characters of a schema as JSON, and of all choices together."""
MOST_REGEX = 8 << 10
"""Characters of a regular expression."""
MOST_CHOICES = 1000
_DEEPEST = 64
_ROUNDS = 64
_MOST_MULTIPLE = 10_000
"""Largest least common multiple of all ``multipleOf``: remainders are states of an automaton."""
_JSON = {"whitespace_flexible": True, "whitespace_pattern": r" |\n(?: {0,16}|\t{0,8})", "lenient": False}
"""Between the parts of a JSON text there may be a space, or a line break and indentation, and no more."""


@dataclass(frozen=True)
class Form:
    """What a text has to look like.

    Attributes:
        kind: ``schema``: JSON that is valid against it; ``regex``: all of the text matches; ``choices``: one of them.
        text: The schema as JSON, the expression, or the choices as JSON.
    """

    kind: Literal["schema", "regex", "choices"]
    text: str


def form_of(schema: object = None, regex: object = None, choices: object = None) -> Form | None:
    """What was asked for; None: nothing was.

    Args:
        schema: JSON schema as a mapping or as text; True: any JSON object.
        regex: Regular expression in the syntax of Rust's regex crate, without look-around and
            back-references; digits are 0 to 9.
        choices: Texts.

    Raises:
        UsageError: More than one was, or it is none of these, or too large.
    """
    given = [
        (name, value)
        for name, value in (("schema", schema), ("regex", regex), ("choices", choices))
        if value is not None
    ]
    if len(given) > 1:
        raise UsageError(f"{given[0][0]} and {given[1][0]} were both given", "Give one of them")
    if schema is not None:
        return Form("schema", _schema(schema))
    if regex is not None:
        if not isinstance(regex, str):
            raise UsageError(f"regex is {type(regex).__name__}", "Pass a text")
        _bounded(len(regex), MOST_REGEX, "regex")
        return Form("regex", regex)
    return None if choices is None else Form("choices", _choices(choices))


def _schema(schema: object) -> str:
    if schema is True:
        schema = {"type": "object"}
    if isinstance(schema, str):
        _bounded(len(schema), MOST_SCHEMA, "schema")
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"schema is no JSON: {error}", "Pass a JSON schema") from error
    if not isinstance(schema, Mapping):
        raise UsageError(f"schema is {type(schema).__name__}", "Pass a JSON schema, an object; True for any object")
    try:
        text = json.dumps({**schema, "x-guidance": _JSON}, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"schema is no JSON: {error}", "Pass a JSON schema") from error
    _bounded(len(text), MOST_SCHEMA, "schema")
    least = Fraction(1)
    for key, value, depth in _items(json.loads(text)):
        if depth > _DEEPEST:
            raise UsageError(f"schema is nested deeper than {_DEEPEST}", "Pass a flatter one, or use $ref")
        if key == "multipleOf" and isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            least = _common_multiple(least, Fraction(str(value)))
    if max(least.numerator, least.denominator) > _MOST_MULTIPLE:
        raise UsageError("multipleOf of the schema is too large", f"Together at most {_MOST_MULTIPLE}")
    if not has_end(json.loads(text)):
        raise UsageError("the schema requires itself: no text satisfies it", "Leave a way out of the recursion")
    return text


def _items(value: object, depth: int = 0) -> Iterator[tuple[str, object, int]]:
    """(key, value, depth) of everything in a JSON value."""
    left: list[tuple[object, int]] = [(value, depth)]
    while left:
        one, depth = left.pop()
        pairs = one.items() if isinstance(one, dict) else (("", item) for item in one) if isinstance(one, list) else ()
        for key, item in pairs:
            yield key, item, depth + 1
            left.append((item, depth + 1))


def _common_multiple(left: Fraction, right: Fraction) -> Fraction:
    """Numerators and denominators apart, so that decimals count as the digits that they have."""
    return Fraction(math.lcm(left.numerator, right.numerator), 1) / math.lcm(left.denominator, right.denominator)


def has_end(schema: Mapping[str, Any]) -> bool:
    """Whether a text can satisfy it that is finite, as far as references that require each other are concerned.

    A least fixed point: a reference has an end once what it names has one that needs no other reference. What is not
    sure counts as having one.
    """
    names = {str(value) for key, value, _ in _items(schema) if key == "$ref"}
    targets = {name: found for name in names if (found := _target(schema, name)) is not None}
    known = names - set(targets)
    for _ in range(_ROUNDS):
        more = {name for name, target in targets.items() if name not in known and _ends(target, known)}
        known |= more
        if not more:
            return _ends(schema, known)
    return True


def _target(schema: object, name: str) -> object:
    """What a reference into the same schema names; None: something else."""
    if not name.startswith("#") or name[1:2] not in ("", "/"):
        return None
    for part in unquote(name[1:]).split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(schema, dict) or key not in schema:
            return None
        schema = schema[key]
    return schema


def _ends(schema: object, known: Set[str]) -> bool:
    """Whether it has an end, given the references that have one."""
    if not isinstance(schema, dict):
        return True
    if "$ref" in schema and schema["$ref"] not in known:
        return False
    for key, enough in (("anyOf", any), ("oneOf", any), ("allOf", all)):
        parts = schema.get(key)
        if isinstance(parts, list) and parts and not enough(_ends(part, known) for part in parts):
            return False
    if schema.get("type") == "array":
        return not schema.get("minItems") or _ends(schema.get("items"), known)
    needed, properties = schema.get("required"), schema.get("properties")
    if schema.get("type") != "object" or not isinstance(needed, list) or not isinstance(properties, dict):
        return True
    return all(_ends(properties.get(name), known) for name in needed if isinstance(name, str))


def _choices(choices: object) -> str:
    if isinstance(choices, str | bytes) or not isinstance(choices, Sequence):
        raise UsageError(f"choices is {type(choices).__name__}", "Pass a list of texts")
    for choice in choices:
        if not isinstance(choice, str) or not choice:
            raise UsageError(f"choices holds {choice!r}", "Pass texts that are not empty")
    if not choices:
        raise UsageError("choices is empty", "Pass at least one text")
    _bounded(len(choices), MOST_CHOICES, "choices", "texts")
    _bounded(sum(map(len, choices)), MOST_SCHEMA, "choices")
    return json.dumps(list(dict.fromkeys(choices)))


def _bounded(size: int, most: int, name: str, unit: str = "characters") -> None:
    if size > most:
        raise UsageError(f"{name} has {size} {unit}", f"At most {most} are allowed")


def grammar_of(form: Form, library: Any, *, strips: bool) -> str:
    """The grammar, in llguidance's Lark.

    Args:
        form: What the text has to look like.
        library: llguidance.
        strips: Whether the text loses a space at its beginning, see `Pieces`: then it has to have one to lose where
            it is to begin with a space, and may have one otherwise.
    """
    if form.kind == "schema":
        return f'start: {"SPACE? " if strips else ""}json\nSPACE: " "\njson: %json {form.text}\n'
    whole = "|".join(map(_escaped, json.loads(form.text))) if form.kind == "choices" else form.text
    # A line break would end the line of the grammar.
    pattern = library.regex_to_lark(f"(?:{whole})".replace("\n", "\\n").replace("\r", "\\r"), use_ascii="d")
    if not strips:
        return f"start: TEXT\nTEXT: /{pattern}/\n"
    return f'start: SPACED | PLAIN\nSPACED: " " /{pattern}/\nPLAIN: /{pattern}/ & ~/ (?s:.*)/\n'


def _escaped(text: str) -> str:
    """The text as a regular expression, for it alone."""
    return "".join(one if one.isascii() and one.isalnum() else f"\\x{{{ord(one):X}}}" for one in text)
