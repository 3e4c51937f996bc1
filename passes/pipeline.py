"""A pipeline: a tuple of passes that run in reading order, and its text form.

Text form, the one that logs, manifests and errors share::

    pipeline = [ pass { ";" pass } ] .
    pass     = name [ "(" option { "," option } ")" ] .
    option   = field "=" ( word | string | "[" [ item { "," item } ] "]" ) .
    item     = word | string .

Options are the fields of the pass's dataclass; those at their default are left out, so ``parse(str(p)) == p``.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import time
import typing
from collections.abc import Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from artifacts.errors import HastenError, PassError, UsageError

from .base import Context, Outcome, Pass
from .observers import Observer
from .registry import REGISTRY

_TOKEN = re.compile(r'\s*(?:(?P<word>[A-Za-z0-9_.*/?+:-]+)|(?P<string>"(?:[^"\\]|\\.)*")|(?P<mark>[()\[\],;=]))')
_WORD = re.compile(r"[A-Za-z0-9_.*/?+:-]+")

FAILURES = (
    HastenError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    onnx.checker.ValidationError,
    onnx.shape_inference.InferenceError,
)
"""What a pass may die of and still leave a reproducer: everything but an interrupt and exhausted memory."""


@dataclass(frozen=True)
class Pipeline:
    """Passes that run one after the other."""

    passes: tuple[Pass, ...] = ()

    def __str__(self) -> str:
        return "; ".join(format_pass(item) for item in self.passes)

    def run(
        self, model: ir.Model, context: Context, observers: Sequence[Observer] = ()
    ) -> tuple[tuple[Pass, Outcome], ...]:
        """Run every pass on ``model``, in place.

        Raises:
            PassError: A pass failed or broke a promise; names it and what the observers left behind.
            UnsupportedError: The model holds something that no pass can make runnable on the target.
        """
        outcomes: list[tuple[Pass, Outcome]] = []
        for position, item in enumerate(self.passes):
            before = model.clone() if observers else model
            try:
                outcome = _run_one(item, model, context, observers)
            except FAILURES as error:
                rest = Pipeline(self.passes[position:])
                remarks = [observer.failed(item, before, str(rest), error) for observer in observers]
                raise _explained(item, error, [remark for remark in remarks if remark]) from error
            outcomes.append((item, outcome))
        return tuple(outcomes)


def format_pass(item: Pass) -> str:
    """Text form of one pass: its name, and the options that differ from their defaults."""
    options = []
    for field in _fields(type(item)):
        value = getattr(item, field.name)
        if value != field.default:
            options.append(f"{field.name}={_format_value(value)}")
    return f"{item.name}({', '.join(options)})" if options else item.name


def parse(text: str, registry: Sequence[type[Pass]] = REGISTRY) -> Pipeline:
    """The pipeline of that text form.

    Raises:
        UsageError: Names the token that is wrong, and close matches.
    """
    return _Parser(text, registry).pipeline()


def _run_one(item: Pass, model: ir.Model, context: Context, observers: Sequence[Observer]) -> Outcome:
    for observer in observers:
        observer.before(item, model)
    start = time.perf_counter()
    outcome = item.run(model, context)
    seconds = time.perf_counter() - start
    for observer in observers:
        observer.after(item, model, outcome, seconds)
    return outcome


def _explained(item: Pass, error: Exception, remarks: list[str]) -> HastenError:
    kind = type(error) if isinstance(error, HastenError) else PassError
    what = error.what if isinstance(error, HastenError) else f"{type(error).__name__}: {error}"
    remedy = [error.remedy] if isinstance(error, HastenError) and error.remedy else []
    return kind(f"pass {item.name}: {what}", ". ".join([*remedy, *remarks]))


def _fields(kind: type[Pass]) -> tuple[dataclasses.Field[object], ...]:
    return dataclasses.fields(kind)  # type: ignore[arg-type]  # a Protocol cannot say that it is implemented by dataclasses


def _format_value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return f"[{', '.join(_format_value(item) for item in value)}]"
    if isinstance(value, str):
        return value if _WORD.fullmatch(value) else json.dumps(value)
    if isinstance(value, (int, float)):
        return repr(value)
    raise TypeError(f"an option of a pass is a bool, int, float, str or tuple of str, not {type(value).__name__}")


class _Parser:
    """Recursive descent over the tokens; every error names the token and where it stands."""

    def __init__(self, text: str, registry: Sequence[type[Pass]]) -> None:
        self._text = text
        self._tokens = _tokens(text)
        self._next = 0
        self._registry = {kind.name: kind for kind in registry}

    def pipeline(self) -> Pipeline:
        passes: list[Pass] = []
        while self._peek():
            passes.append(self._pass())
            if self._peek():
                self._expect(";")
        return Pipeline(tuple(passes))

    def _pass(self) -> Pass:
        name = self._take("the name of a pass")
        kind = self._registry.get(name)
        if kind is None:
            known = sorted(self._registry)
            raise UsageError(f"unknown pass {name!r} in pipeline {self._text!r}", _choices(name, known))
        options: dict[str, object] = {}
        if self._peek() == "(":
            self._expect("(")
            while self._peek() != ")":
                if options:
                    self._expect(",")
                self._option(kind, options)
            self._expect(")")
        try:
            return kind(**options)
        except (TypeError, ValueError) as error:
            raise UsageError(f"pass {name!r} refuses its options: {error}") from error

    def _option(self, kind: type[Pass], options: dict[str, object]) -> None:
        field = self._take("the name of an option")
        types = typing.get_type_hints(kind)
        names = [item.name for item in _fields(kind)]
        if field not in names:
            raise UsageError(f"pass {kind.name!r} has no option {field!r}", _choices(field, names))
        if field in options:
            raise UsageError(f"option {field!r} of pass {kind.name!r} is given twice")
        self._expect("=")
        if self._peek() == "[":
            value: object = self._list()
        else:
            value = self._take("a value")
        options[field] = _convert(value, types[field], f"option {field!r} of pass {kind.name!r}")

    def _list(self) -> tuple[str, ...]:
        items: list[str] = []
        self._expect("[")
        while self._peek() != "]":
            if items:
                self._expect(",")
            items.append(self._take("an item of the list"))
        self._expect("]")
        return tuple(items)

    def _peek(self) -> str:
        return self._tokens[self._next][0] if self._next < len(self._tokens) else ""

    def _take(self, what: str) -> str:
        token, is_mark = self._tokens[self._next] if self._next < len(self._tokens) else ("", True)
        if is_mark:
            raise UsageError(f"expected {what}, found {token or 'the end'!r} in pipeline {self._text!r}")
        self._next += 1
        if not token.startswith('"'):
            return token
        try:
            return str(json.loads(token))
        except json.JSONDecodeError as error:
            raise UsageError(f"bad string {token} in pipeline: {error}") from error

    def _expect(self, mark: str) -> None:
        if self._peek() != mark:
            raise UsageError(f"expected {mark!r}, found {self._peek() or 'the end'!r} in pipeline {self._text!r}")
        self._next += 1


def _tokens(text: str) -> list[tuple[str, bool]]:
    """Tokens with whether each is a punctuation mark."""
    tokens: list[tuple[str, bool]] = []
    position, end = 0, len(text.rstrip())
    while position < end:
        match = _TOKEN.match(text, position)
        if match is None:
            raise UsageError(f"cannot read {text[position : position + 20].strip()!r} in pipeline {text!r}")
        tokens.append((match.group().strip(), match.group("mark") is not None))
        position = match.end()
    return tokens


def _convert(value: object, kind: object, where: str) -> object:
    listed = typing.get_origin(kind) is tuple
    if listed != isinstance(value, tuple):
        raise UsageError(f"{where} is {'a list' if listed else 'no list'}")
    if isinstance(value, tuple) and kind == tuple[float, ...]:
        return tuple(_convert(item, float, where) for item in value)
    if isinstance(value, tuple) or kind is str:
        return value
    text = str(value)
    if kind is bool and text in ("true", "false"):
        return text == "true"
    try:
        if kind is int:
            return int(text)
        if kind is float and math.isfinite(float(text)):
            return float(text)
    except ValueError as error:
        raise UsageError(f"{where} cannot be {text!r}") from error
    raise UsageError(f"{where} cannot be {text!r}", "Write true or false" if kind is bool else "Write a finite number")


def _choices(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=3)
    if close:
        return f"Did you mean {' or '.join(close)}?"
    return f"Known: {', '.join(known)}" if known else "It has none"
