"""The child process that renders a chat template: code of a stranger, held to seconds, memory and output.

``python sandbox.py SYS_PATH`` (a JSON list) reads one JSON object a line from stdin and answers each with one line on
stdout. The first request is ``{"template": text, "seconds": s, "characters": n, "bytes": n}``, each later one
``{"variables": {...}}``, answered by ``{"ok": true, "text": ...}`` or ``{"ok": false, "kind": kind, "what": text}``:

    broken    the template is no Jinja template, or failed
    refused   it called raise_exception: it does not take these messages
    unsafe    it did what the sandbox forbids
    long      it wrote more than ``characters``
    memory    it needed more than ``bytes`` (where the system can limit a process: not on Windows or macOS)

A request that takes more than ``seconds`` ends the process, even within one C call that no Python code interrupts; so
does the end of stdin. This file imports nothing of hasten, so that it starts in the time of jinja2 alone.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

Reply = dict[str, object]
_SHOWN = 200


class RefusedError(Exception):
    """What ``raise_exception`` of a template raises."""


class TooLongError(Exception):
    """The text is longer than allowed."""


def environment() -> ImmutableSandboxedEnvironment:
    """The Jinja environment that transformers 5 renders chat templates in, so that they give the same text here.

    Blocks trimmed, loop controls, ``{% generation %}``, ``tojson`` that escapes nothing, ``raise_exception``,
    ``strftime_now``, and ``dict`` and ``namespace`` without ways to Python's internals.
    """
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Plain(Namespace):
        def __init__(*args: Any, **kwargs: Any) -> None:
            self, pairs = args[0], dict(*args[1:], **kwargs)  # jinja2's trick: a field may be called self
            for name in pairs:
                Plain.check(name)
            Namespace.__init__(self, pairs)

        def __setitem__(self, name: str, value: object) -> None:
            Plain.check(name)
            Namespace.__setitem__(self, name, value)

        @staticmethod
        def check(name: object) -> None:
            if isinstance(name, str) and name.startswith("_"):
                raise SecurityError(f"a namespace takes no field {name!r}")

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_generation_tag(), "jinja2.ext.loopcontrols"]
    )
    made.filters["tojson"] = _to_json
    made.globals |= {"raise_exception": _refuse, "strftime_now": _strftime_now, "dict": _Dict(), "namespace": Plain}
    return made


def _generation_tag() -> type[Extension]:
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class Generation(Extension):
        """``{% generation %} … {% endgeneration %}`` marks the assistant's words for training: its body, as it is."""

        tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Generation


class _Dict:
    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: object) -> None:
    raise RefusedError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)  # the user's own day, as transformers has it


def render(template: Template, variables: Mapping[str, object], characters: int) -> Reply:
    """The reply to a request; see the head of this file."""
    from jinja2.exceptions import SecurityError

    try:
        return {"ok": True, "text": _joined(template.generate(**variables), characters)}
    except RefusedError as error:
        return _failure("refused", str(error))
    except TooLongError:
        return _failure("long", f"it wrote more than {characters} characters")
    except SecurityError as error:
        return _failure("unsafe", str(error))
    except MemoryError:
        return _failure("memory", "it ran out of memory")
    except Exception as error:  # noqa: BLE001 - whatever a template does wrong is an answer, not our end
        return _failure("broken", f"{type(error).__name__}: {error}")


def _joined(pieces: Iterable[str], characters: int) -> str:
    kept, count = [], 0
    for piece in pieces:
        count += len(piece)
        if count > characters:
            raise TooLongError
        kept.append(piece)
    return "".join(kept)


def _failure(kind: str, what: str) -> Reply:
    return {"ok": False, "kind": kind, "what": what[:_SHOWN]}


def _compile(text: str) -> Template | Reply:
    from jinja2.exceptions import TemplateSyntaxError

    try:
        return environment().from_string(text)
    except TemplateSyntaxError as error:
        return _failure("broken", f"line {error.lineno}: {error.message}")
    except MemoryError:
        return _failure("memory", "it ran out of memory")
    except Exception as error:  # noqa: BLE001 - jinja2 and Python's compiler fail in many ways on nonsense
        return _failure("broken", f"{type(error).__name__}: {error}")


def _confine(memory: int) -> None:
    """No more memory than that, no file written, no process started: where the system has such limits."""
    try:
        import resource
    except ImportError:  # Windows
        return
    for name, limit in (("RLIMIT_AS", memory), ("RLIMIT_FSIZE", 0), ("RLIMIT_NPROC", 0), ("RLIMIT_CORE", 0)):
        with suppress(AttributeError, OSError, ValueError):  # macOS has some of them in name only
            resource.setrlimit(getattr(resource, name), (limit, limit))


def serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answer until the requests end."""
    first = json.loads(requests.readline())
    with Path(os.devnull).open("wb") as nowhere:
        faulthandler.dump_traceback_later(first["seconds"], exit=True, file=nowhere)
        _confine(first["bytes"])
        template = _compile(first["template"])
        faulthandler.cancel_dump_traceback_later()
        for line in requests:
            faulthandler.dump_traceback_later(first["seconds"], exit=True, file=nowhere)
            reply = template
            if not isinstance(reply, dict):
                reply = render(reply, json.loads(line)["variables"], first["characters"])
            faulthandler.cancel_dump_traceback_later()
            answers.write(json.dumps(reply).encode() + b"\n")
            answers.flush()


if __name__ == "__main__":
    sys.path[:] = json.loads(sys.argv[1])
    serve(sys.stdin.buffer, sys.stdout.buffer)
