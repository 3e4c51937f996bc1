"""Floors of the architecture: what the style page says of size, errors, words and registries."""

from __future__ import annotations

import ast
import dataclasses
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from passes.base import Effect, Pass, Purpose
from passes.registry import CLEAN, REGISTRY

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("artifacts", "passes", "runtimes", "compiler", "hasten")
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
LONGEST_FILE = 400
LONGEST_FUNCTION = 60
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def place(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def nodes(kind: type[ast.AST] | tuple[type[ast.AST], ...]) -> Iterator[tuple[Path, ast.AST]]:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, kind):
                yield path, node


def test_the_rooms_are_there() -> None:
    assert len(FILES) > 80
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(ROOMS)


def test_no_file_is_too_long() -> None:
    lengths = {place(path, 1): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE} == {}


def test_no_function_is_too_long() -> None:
    lengths = {
        f"{place(path, node.lineno)} {node.name}": node.end_lineno - node.lineno + 1
        for path, node in nodes(_FUNCTIONS)
        if isinstance(node, _FUNCTIONS) and node.end_lineno is not None
    }
    assert {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION} == {}


def test_no_exception_is_swallowed_without_a_reason() -> None:
    """``except Exception`` says why on its line; a bare ``except`` or BaseException raises again."""
    found = []
    for path, node in nodes(ast.ExceptHandler):
        assert isinstance(node, ast.ExceptHandler)
        line = path.read_text(encoding="utf-8").splitlines()[node.lineno - 1]
        name = node.type.id if isinstance(node.type, ast.Name) else ""
        again = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
        if (node.type is None or name == "BaseException") and not again:
            found.append(place(path, node.lineno))
        if name == "Exception" and (
            (not again and "noqa: BLE001" not in line) or not re.search(r"#.*\w+ \w+ \w+", line)
        ):
            found.append(place(path, node.lineno))
    assert found == []


def test_nothing_is_left_to_do() -> None:
    found = [
        place(path, token.start[0])
        for path in FILES
        for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
        if token.type == tokenize.COMMENT and re.search(r"\b(TODO|FIXME|XXX|HACK)\b", token.string)
    ]
    assert found == []


def test_nothing_is_asserted_outside_tests() -> None:
    assert [place(path, node.lineno) for path, node in nodes(ast.Assert) if isinstance(node, ast.Assert)] == []


def test_everything_public_is_described() -> None:
    found = []
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if not ast.get_docstring(tree):
            found.append(place(path, 1))
        found += [place(path, line) for line in _undescribed(tree.body)]
    assert found == []


def _undescribed(body: list[ast.stmt]) -> Iterator[int]:
    for node in body:
        if not isinstance(node, (ast.ClassDef, *_FUNCTIONS)) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            yield node.lineno
        if isinstance(node, ast.ClassDef):
            yield from _undescribed(node.body)


def test_every_function_is_annotated() -> None:
    found = []
    for path, node in nodes(_FUNCTIONS):
        assert isinstance(node, _FUNCTIONS)
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        bare = [item.arg for item in arguments if item.annotation is None and item.arg not in ("self", "cls")]
        if bare or node.returns is None:
            found.append(f"{place(path, node.lineno)} {node.name}")
    assert found == []


@pytest.mark.parametrize("kind", REGISTRY, ids=lambda kind: kind.name)
def test_every_pass_is_a_frozen_dataclass_with_defaults(kind: type[Pass]) -> None:
    assert dataclasses.is_dataclass(kind)
    assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert all(field.default is not dataclasses.MISSING for field in dataclasses.fields(kind))
    item = kind()
    assert isinstance(item, Pass)
    assert hash(item) == hash(kind())
    assert isinstance(kind.effect, Effect)
    assert isinstance(kind.purpose, Purpose)
    assert re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", kind.name)


def test_names_of_passes_are_unique_and_each_has_a_file_of_its_own() -> None:
    names = [kind.name for kind in REGISTRY]
    assert len(set(names)) == len(names)
    assert len({kind.__module__ for kind in REGISTRY}) == len(REGISTRY)
    for kind in REGISTRY:
        assert kind.__module__.rsplit(".", 1)[-1] == kind.name.replace("-", "_")
    assert {type(item) for item in CLEAN} <= set(REGISTRY)


def test_every_pass_file_is_registered() -> None:
    folders = ("cleanup", "fusion", "quantize", "precision", "prune", "factor", "repair", "share")
    defined = {
        node.name
        for path, node in nodes(ast.ClassDef)
        if isinstance(node, ast.ClassDef) and path.parent.name in folders and "effect" in ast.dump(node)
        and any(isinstance(item, ast.FunctionDef) and item.name == "run" for item in node.body)
    }  # fmt: skip
    assert defined == {kind.__name__ for kind in REGISTRY}
