"""Calls of tools, found in a text whatever the pieces that it comes in."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtimes.serve.tools import ToolCall, ToolParser, split_calls

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'


def told(parts: list[str | ToolCall]) -> list[object]:
    """Neighbouring texts joined, calls as (name, arguments)."""
    found: list[object] = []
    for part in parts:
        if isinstance(part, ToolCall):
            found.append((part.name, json.loads(part.arguments)))
        elif found and isinstance(found[-1], str):
            found[-1] += part
        else:
            found.append(part)
    return found


def test_a_call() -> None:
    said, (call,) = split_calls(CALL)
    assert said == ""
    document = call.to_dict()
    assert document["type"] == "function"
    assert str(document["id"]).startswith("call_")
    assert document["function"] == {"name": "weather", "arguments": '{"city":"Paris"}'}


def test_text_around_calls_and_several_of_them() -> None:
    said, calls = split_calls(f"Let me see. {CALL}{CALL} ")
    assert said == "Let me see."
    assert [call.name for call in calls] == ["weather", "weather"]
    assert calls[0].identity != calls[1].identity


def test_arguments_by_other_names() -> None:
    _, (one,) = split_calls('<tool_call>{"name": "f", "parameters": {"x": 1}}</tool_call>')
    assert one.arguments == '{"x":1}'
    _, (two,) = split_calls('<tool_call>{"name": "f", "arguments": "{\\"x\\": 2}"}</tool_call>')
    assert two.arguments == '{"x": 2}'
    _, (three,) = split_calls('<tool_call>{"name": "f"}</tool_call>')
    assert three.arguments == "{}"


def test_a_call_that_the_end_cut_but_for_its_object() -> None:
    said, calls = split_calls('<tool_call>{"name": "f", "arguments": {}}')
    assert (said, [call.name for call in calls]) == ("", ["f"])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no call",
        "<tool_call",
        "<tool_call>",
        "<tool_call></tool_call>",
        "<tool_call>not JSON</tool_call>",
        '<tool_call>{"name": 1}</tool_call>',
        '<tool_call>["f"]</tool_call>',
        '<tool_call>{"name": "f", "argum',
        "a < b and </tool_call>",
        " spaces stay ",
    ],
)
def test_what_is_no_call_stays_text(text: str) -> None:
    assert split_calls(text) == (text, [])


@given(st.data())
def test_pieces_change_nothing(data: st.DataObject) -> None:
    bits = data.draw(
        st.lists(st.sampled_from([CALL, "<tool", "_call>", "<", "text", "</tool_call>", "{", "é"]), max_size=8)
    )
    text = "".join(bits)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=12)))
    parser = ToolParser()
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    found = [part for piece in pieces for part in parser.push(piece)] + parser.flush()
    whole = ToolParser()
    assert told(found) == told(whole.push(text) + whole.flush())


def test_text_is_not_held_back_longer_than_it_must() -> None:
    parser = ToolParser()
    assert parser.push("hello <to") == ["hello "]
    assert parser.push("day") == ["<today"]
    assert parser.push("<tool_call>{") == []
    assert parser.flush() == ["<tool_call>{"]
