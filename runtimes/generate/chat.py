"""Messages to a prompt: a model's chat template, rendered in a child process that its author cannot leave.

A chat template is a program from a stranger, in Jinja's language. It runs in the environment that transformers uses
(an immutable sandbox), in a process that is ended after a few seconds, may use so much memory, and returns so much
text: a sandbox alone stops neither ``{{ 10 ** 10 ** 9 }}`` nor ten nested loops, since no thread can.
"""

from __future__ import annotations

import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from artifacts.constraints import printable
from artifacts.errors import BundleError, HastenError, InstallationError, UsageError

from ..environment import import_paths
from ..items import check_text

Message = Mapping[str, object]
"""``{"role": "user", "content": "…"}``; other fields (tool_calls, reasoning_content …) are the template's business."""

SECONDS = 5.0
"""Longest time that a rendering may take; real templates take milliseconds."""
MAX_TEMPLATE = 1 << 20
"""Most characters of a template; those of 2026 have at most 20,000."""
MAX_MESSAGES = 1 << 22
"""Most characters of messages as JSON."""
MAX_PROMPT = 1 << 23
"""Most characters of a rendered prompt."""
_MEMORY = 1 << 29
_START_SECONDS = 30.0
_BYTES_PER_CHARACTER = 12  # JSON in ASCII: two \\uXXXX
_MARK, _UNMARK = "\ufdd0", "\ufdd1"  # Unicode's noncharacters for a program's own use
_MARKS = re.compile(f"[{_MARK}{_UNMARK}]")
_KEPT_VARIABLES = ("SYSTEMROOT", "TZ", "TZDIR")
_RESERVED = ("messages", "tools", "documents", "add_generation_prompt")
_REASONING = ("reasoning_content", "thinking", "reasoning")
_RECOMPILE = "Correct the model's chat_template and compile again, or pass a prompt instead of messages"


@dataclass(frozen=True)
class Segment:
    """A stretch of a rendered prompt.

    Attributes:
        text: Its characters, at least one.
        plain: The text is a control token's, and a message said it: it must become ordinary tokens.
    """

    text: str
    plain: bool = False


class ChatTemplate:
    """A chat template, ready to render. Safe to use from several threads; the child process starts when first needed.

    Args:
        text: The template; empty: the model has none, and `render` says so.
        special: Role -> text of the special tokens, such as ``("bos_token", "<s>")``: variables of the template.
        control: Texts that the tokenizer makes control tokens of; where a message contains one, it becomes a plain
            segment of its own.
        seconds: Longest time that a rendering may take, the start of the child (once) not counted.

    Raises:
        BundleError: The template is longer than 1 MiB.
    """

    def __init__(
        self,
        text: str,
        *,
        special: Sequence[tuple[str, str]] = (),
        control: Collection[str] = (),
        seconds: float = SECONDS,
    ) -> None:
        if len(text) > MAX_TEMPLATE:
            raise BundleError(f"the chat template has {len(text)} characters; {MAX_TEMPLATE} are allowed", _RECOMPILE)
        self._text = text
        self._special = dict(special)
        self._seconds = seconds
        longest = sorted((token for token in control if token), key=lambda token: (-len(token), token))
        self._control = "|".join(map(re.escape, longest)) or "(?!)"
        self._lock = threading.Lock()
        self._child: _Child | None = None

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
        variables: Mapping[str, object] | None = None,
    ) -> tuple[Segment, ...]:
        """The prompt for some messages, as transformers' ``apply_chat_template(tokenize=False)`` gives it.

        The texts of the segments, joined, are that prompt. Lone surrogates in messages become U+FFFD.

        Args:
            messages: The conversation, oldest first; each has a ``role`` and a ``content``.
            add_generation_prompt: End with what begins an answer.
            tools: JSON schemas of functions that the model may call.
            variables: What else the template reads, such as ``{"enable_thinking": False}``.

        Raises:
            UsageError: There is no template, the messages are none, or the template refuses them.
            BundleError: The template is broken, does what the sandbox forbids, or takes too much time, memory or text.
            InstallationError: jinja2 is not installed.
        """
        if not self._text:
            raise UsageError("this model has no chat template", "Pass a prompt (a text) instead of messages")
        plain = check_messages(messages)
        told = _as_json({} if variables is None else dict(variables), "template variables")
        if not isinstance(told, dict) or (taken := [name for name in _RESERVED if name in told]):
            raise UsageError(f"template variable {taken[0]!r} has a meaning of its own", "Pass it as an argument")
        given = {
            "messages": [_alias_reasoning(message) for message in plain],
            "tools": _as_json(tools, "tools"),
            **told,
        }
        request = {
            **self._special,
            **{name: self._marked(value) for name, value in given.items()},
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        return tuple(self._segments(self._render(request)))

    def close(self) -> None:
        """End the child process; a later `render` starts another."""
        with self._lock:
            self._end()

    def _render(self, variables: Mapping[str, object]) -> str:
        line = json.dumps({"variables": variables}).encode() + b"\n"
        with self._lock:
            if self._child is None:
                self._child = _Child(self._text, self._seconds)
            try:
                reply = self._child.ask(line)
            except BaseException:
                self._end()
                raise
            if not reply["ok"] and reply["kind"] == "memory":
                self._end()  # what is left of it may not have enough for the next one
        if not reply["ok"]:
            raise _error(str(reply["kind"]), printable(str(reply["what"])))
        return str(reply["text"])

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.close()

    def _marked(self, value: object) -> object:
        """The value with each control token in its texts between marks, and no other marks."""
        if isinstance(value, str):
            return re.sub(self._control, rf"{_MARK}\g<0>{_UNMARK}", _MARKS.sub("", check_text(value, "a message")))
        if isinstance(value, dict):
            return {key: self._marked(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._marked(item) for item in value]
        return value

    def _segments(self, text: str) -> Iterator[Segment]:
        # A template may split a message next to a mark; one that is left alone still parts what stands around it.
        pieces = re.split(f"{_MARK}({self._control}){_UNMARK}|[{_MARK}{_UNMARK}]", text)
        for index, piece in enumerate(pieces):
            if piece:
                yield Segment(piece, plain=index % 2 == 1)


class _Child:
    """The process of `runtimes.generate.sandbox`."""

    def __init__(self, template: str, seconds: float) -> None:
        if find_spec("jinja2") is None:
            raise InstallationError("jinja2, which renders chat templates, is not installed", "pip install jinja2")
        self._seconds = seconds
        self._allowed = seconds + _START_SECONDS
        script = str(Path(__file__).with_name("sandbox.py"))
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-X", "utf8", script, json.dumps(import_paths())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ},
            start_new_session=True,  # Ctrl-C is for the program that asked
        )
        self._finalizer = weakref.finalize(self, _end, self._process)
        self._answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=_read, args=(self._process.stdout, self._answers), daemon=True).start()
        first = {"template": template, "seconds": seconds, "characters": MAX_PROMPT, "bytes": _MEMORY}
        self._first = json.dumps(first).encode() + b"\n"

    def ask(self, line: bytes) -> dict[str, object]:
        """The reply to a request.

        Raises:
            BundleError: The process ended, or gave no reply in time.
        """
        allowed, self._allowed = self._allowed, self._seconds + 1.0
        line, self._first = self._first + line, b""
        begin = time.monotonic()
        answer = b""
        with suppress(OSError, queue.Empty):
            if self._process.stdin is not None:
                self._process.stdin.write(line)
                self._process.stdin.flush()
            answer = self._answers.get(timeout=allowed)
        if answer.endswith(b"\n"):
            reply: dict[str, object] = json.loads(answer)
            return reply
        if time.monotonic() - begin >= self._seconds:
            raise BundleError(f"the chat template did not end within {self._seconds:g} s and was stopped", _RECOMPILE)
        raise BundleError("the process that renders the chat template died", _RECOMPILE)

    def close(self) -> None:
        """End the process now."""
        self._finalizer()


def check_messages(messages: object) -> list[dict[str, object]]:
    """The messages as plain JSON values.

    Raises:
        UsageError: They are no list of objects with a ``role``, none, not JSON, or longer than 4 Mi characters.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise UsageError(
            f"messages are {type(messages).__name__}, not a list", 'Pass [{"role": "user", "content": "…"}]'
        )
    if not messages:
        raise UsageError("there are no messages", 'Pass at least one: [{"role": "user", "content": "…"}]')
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UsageError(f"message {index} has no role", 'Write {"role": "user", "content": "…"}')
        if not isinstance(message.get("content"), str | list | tuple | Mapping) and "tool_calls" not in message:
            raise UsageError(
                f"message {index} has no content", f'Write {{"role": "{message["role"]}", "content": "…"}}'
            )
    plain = _as_json([dict(message) for message in messages], "messages")
    return [dict(message) for message in plain] if isinstance(plain, list) else []


def joined(segments: Sequence[Segment]) -> str:
    """The prompt as one text."""
    return "".join(segment.text for segment in segments)


def _as_json(value: object, name: str) -> object:
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"{name} hold what JSON cannot: {error}", "Use texts, numbers, lists and dicts") from error
    if len(text) > MAX_MESSAGES:
        raise UsageError(f"{name} have {len(text)} characters; {MAX_MESSAGES} are allowed", "Shorten them")
    return json.loads(text)


def _alias_reasoning(message: dict[str, object]) -> dict[str, object]:
    """As transformers: what a message calls its reasoning is given under the names that templates read."""
    found = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    return message if found is None else {"thinking": found, **message, "reasoning_content": found}


def _error(kind: str, what: str) -> HastenError:
    errors: dict[str, HastenError] = {
        "refused": UsageError(f"the model's chat template refuses these messages: {what}", "Change the messages"),
        "unsafe": BundleError(f"the chat template does what is forbidden: {what}", _RECOMPILE),
        "long": BundleError(f"the chat template was stopped: {what}", _RECOMPILE),
        "memory": BundleError("the chat template was stopped: it needs too much memory", _RECOMPILE),
    }
    return errors.get(kind, BundleError(f"the chat template is broken: {what}", _RECOMPILE))


def _read(stream: IO[bytes] | None, answers: queue.SimpleQueue[bytes]) -> None:
    if stream is not None:
        with stream:
            while line := stream.readline(MAX_PROMPT * _BYTES_PER_CHARACTER):
                answers.put(line)
    answers.put(b"")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    with suppress(OSError):
        if process.stdin is not None:
            process.stdin.close()
    process.wait()
