"""What may be asked for, and what is refused before a grammar is made of it."""

from __future__ import annotations

import json

import pytest

from artifacts.errors import UsageError
from runtimes.generate.grammars import MOST_CHOICES, MOST_REGEX, MOST_SCHEMA, Form, form_of


def nested(depth):
    schema = {"type": "null"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


def test_nothing_asked_for_is_nothing():
    assert form_of() is None


def test_a_schema_is_an_object_text_or_true():
    asked = {"type": "object"}
    assert form_of(schema=asked) == form_of(schema=json.dumps(asked)) == form_of(schema=True)
    assert form_of(schema=asked).kind == "schema"
    assert form_of(regex="a") == Form("regex", "a")
    assert form_of(choices=("b", "a", "b")) == Form("choices", '["b", "a"]')


def test_what_a_schema_says_of_our_library_is_not_obeyed():
    told = json.loads(form_of(schema={"x-guidance": {"lenient": True}}).text)
    assert told["x-guidance"]["lenient"] is False


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"schema": {}, "regex": "a"}, "schema and regex were both given"),
        ({"regex": "a", "choices": ["a"]}, "regex and choices were both given"),
        ({"schema": False}, "schema is bool"),
        ({"schema": 3}, "schema is int"),
        ({"schema": "[1]"}, "schema is list"),
        ({"schema": "{"}, "schema is no JSON"),
        ({"schema": "[" * 5000}, "schema is no JSON"),
        ({"schema": {"a": {1, 2}}}, "schema is no JSON"),
        ({"schema": {"minimum": float("nan")}}, "schema is no JSON"),
        ({"schema": nested(65)}, "nested deeper than 64"),
        ({"schema": nested(100_000)}, "schema is no JSON"),
        ({"schema": {"description": "x" * MOST_SCHEMA}}, "At most 65536"),
        ({"schema": " " * (MOST_SCHEMA + 1)}, "At most 65536"),
        ({"schema": {"multipleOf": 999983}}, "multipleOf"),
        ({"schema": {"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}}, "multipleOf"),
        ({"schema": {"multipleOf": 1e-9}}, "multipleOf"),
        ({"regex": 3}, "regex is int"),
        ({"regex": "a" * (MOST_REGEX + 1)}, "At most 8192"),
        ({"choices": "yes"}, "choices is str"),
        ({"choices": []}, "choices is empty"),
        ({"choices": ["a", ""]}, "choices holds ''"),
        ({"choices": ["a", 1]}, "choices holds 1"),
        ({"choices": [str(index) for index in range(MOST_CHOICES + 1)]}, "At most 1000"),
        ({"choices": ["x" * MOST_SCHEMA, "y"]}, "At most 65536"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(asked, message):
    with pytest.raises(UsageError, match=message) as caught:
        form_of(**asked)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_schema_that_contains_itself_is_refused():
    schema = {}
    schema["items"] = schema
    with pytest.raises(UsageError, match="no JSON"):
        form_of(schema=schema)


LIST = {"type": "object", "properties": {"next": {"$ref": "#/$defs/link"}}, "required": ["next"]}


@pytest.mark.parametrize(
    ("link", "ends"),
    [
        ({"$ref": "#"}, False),
        ({"anyOf": [{"type": "null"}, {"$ref": "#"}]}, True),
        ({"anyOf": [{"$ref": "#"}, {"$ref": "#/$defs/link"}]}, False),
        ({"allOf": [{"type": "null"}, {"$ref": "#"}]}, False),
        ({"type": "array", "items": {"$ref": "#"}}, True),
        ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, False),
        ({"type": "object", "properties": {"a/b~": {"$ref": "#"}}}, True),
        ({"$ref": "#/$defs/link"}, False),
        ({"$ref": "#/$defs/nope"}, True),
        ({"$ref": "elsewhere"}, True),
    ],
)
def test_a_schema_that_requires_itself_is_refused(link, ends):
    schema = {**LIST, "$defs": {"link": link}}
    if ends:
        assert form_of(schema=schema) is not None
        return
    with pytest.raises(UsageError, match="requires itself"):
        form_of(schema=schema)


def test_names_of_references_are_unescaped():
    inside = {"type": "object", "properties": {"x": {"$ref": "#/$defs/a~1b%20~0"}}, "required": ["x"]}
    with pytest.raises(UsageError, match="requires itself"):
        form_of(schema={"$ref": "#/$defs/a~1b%20~0", "$defs": {"a/b ~": inside}})


def test_multiples_that_are_usual_pass():
    assert form_of(schema={"anyOf": [{"multipleOf": 0.01}, {"multipleOf": 25}, {"multipleOf": 100}]}) is not None
    assert form_of(schema={"properties": {"multipleOf": {"type": "boolean", "default": True}}}) is not None
