"""Calls of tools in a text: ``<tool_call>{"name": …, "arguments": {…}}</tool_call>``, as most open models do."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass

import orjson

BEGIN, END = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class ToolCall:
    """A call that the model wants made.

    Attributes:
        name: Of the function.
        arguments: JSON.
        identity: What the answer to it will refer to.
    """

    name: str
    arguments: str
    identity: str

    def to_dict(self) -> dict[str, object]:
        """As OpenAI writes it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.identity, "type": "function", "function": function}


class ToolParser:
    """Takes calls out of a text that comes in pieces. What looks like a call and is none stays text."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, text: str) -> list[str | ToolCall]:
        """What can be said for sure now: text and calls in order."""
        self._held += text
        return [found for found in self._found() if found != ""]

    def flush(self) -> list[str | ToolCall]:
        """What is left at the end of the text."""
        held, self._held = self._held, ""
        call = _call(held.removeprefix(BEGIN)) if held.startswith(BEGIN) else None
        left = held if call is None else call
        return [left] if left != "" else []

    def _found(self) -> Iterator[str | ToolCall]:
        while self._held:
            begin = self._held.find(BEGIN)
            if begin < 0:
                keep = _overlap(self._held)
                cut = len(self._held) - keep
                said, self._held = self._held[:cut], self._held[cut:]
                yield said
                return
            yield self._held[:begin]
            self._held = self._held[begin:]
            end = self._held.find(END)
            if end < 0:
                return
            whole, self._held = self._held[: end + len(END)], self._held[end + len(END) :]
            yield _call(whole[len(BEGIN) : -len(END)]) or whole


def split_calls(text: str) -> tuple[str, list[ToolCall]]:
    """A whole text without its calls, and the calls."""
    parser = ToolParser()
    found = [*parser.push(text), *parser.flush()]
    said = "".join(part for part in found if isinstance(part, str))
    calls = [part for part in found if isinstance(part, ToolCall)]
    return (said.strip() if calls else said), calls


def _call(text: str) -> ToolCall | None:
    try:
        document = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(document, dict) or not isinstance(document.get("name"), str):
        return None
    arguments = document.get("arguments", document.get("parameters", {}))
    told = arguments if isinstance(arguments, str) else orjson.dumps(arguments).decode()
    return ToolCall(document["name"], told, "call_" + secrets.token_hex(12))


def _overlap(text: str) -> int:
    """Characters at the end of a text that may begin a call."""
    return next((size for size in range(min(len(BEGIN) - 1, len(text)), 0, -1) if text.endswith(BEGIN[:size])), 0)
