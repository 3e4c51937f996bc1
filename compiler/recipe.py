"""A recipe: which passes to try for each target, in which order. Saved as TOML with a schema version."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import cast

from artifacts.errors import UsageError
from artifacts.target import TARGETS, Target
from passes.base import Effect, Pass, Purpose
from passes.pipeline import Pipeline, parse
from passes.registry import CLEAN

SCHEMA = 1
BUILT_IN = ("reference", "safe", "balanced")
_KEYS = {"schema", "name", "description", "tune", "stages"}
_ALIASES = {"clean": Pipeline(CLEAN)}


@dataclass(frozen=True)
class PerSite:
    """Forms among which each linear operator gets the one that costs least on the target, or is left as it is.

    What a stage ends with is one if it can be told which operators it is for: then those that cost most quality can be
    given back where the budget is missed.

    Attributes:
        before: Passes that run first.
        forms: Passes with the options ``only`` and ``skip``, the preferred first.
    """

    before: Pipeline
    forms: tuple[Pass, ...]

    @property
    def passes(self) -> tuple[Pass, ...]:
        """All that may run."""
        return (*self.before.passes, *self.forms)

    def __str__(self) -> str:
        forms = " / ".join(str(Pipeline((form,))) for form in self.forms)
        return f"{self.before}; {forms}" if self.before.passes else forms


Stage = tuple[Pipeline | PerSite, ...]
"""Alternatives, the preferred first."""


@dataclass(frozen=True)
class Recipe:
    """What to try.

    Attributes:
        name: Short name; part of the variant's id.
        description: One line for ``hasten recipes``.
        tune: Whether speed decides what stays, ONNX Runtime's own load-time optimizers and the provider's compute
            precision included. If not, the stages are taken as they are, under every gate but speed.
        stages: Per target name, or ``default``, the stages in order. A stage is judged as a whole: its numbers,
            its speed and, where it may change the numbers, its quality. ``a | b``: b is tried where a did not stand.
            ``a / b``: each linear operator gets the form that costs least on the target.
    """

    name: str
    description: str
    tune: bool
    stages: Mapping[str, tuple[str, ...]]

    def stages_for(self, target: Target) -> tuple[Stage, ...]:
        """The stages for ``target``, each with its alternatives in order.

        Raises:
            UsageError: A stage names no pass, or offers for each operator what cannot be told which operators.
        """
        texts = self.stages.get(target.name, self.stages["default"])
        return tuple(tuple(_alternative(part.strip()) for part in text.split("|")) for text in texts)


def _alternative(text: str) -> Pipeline | PerSite:
    if text in _ALIASES:
        return _ALIASES[text]
    first, *others = (parse(part) for part in text.split(" / "))
    forms = (first.passes[-1], *(one for other in others for one in other.passes))
    unfit = [form.name for form in forms if not _is_form(form)]
    if others and unfit:
        raise UsageError(f"{unfit[0]} is no form of a linear operator", "Join passes that quantize them by ' / '")
    return first if unfit else PerSite(Pipeline(first.passes[:-1]), forms)


def _is_form(item: Pass) -> bool:
    """Whether the pass gives linear operators another form, and can be told which."""
    options = {option.name for option in fields(item)}  # type: ignore[arg-type]  # passes are dataclasses
    return item.effect is Effect.LOSSY and item.purpose is Purpose.SIZE and {"only", "skip"} <= options


def load_recipe(name: str) -> Recipe:
    """The built-in recipe of that name, or the one in that TOML file.

    Raises:
        UsageError: There is none, or the file breaks the form.
    """
    if name in BUILT_IN:
        return _parse((resources.files("compiler") / "recipes" / f"{name}.toml").read_bytes(), name)
    path = Path(name)
    if path.suffix == ".toml" and path.is_file():
        return _parse(path.read_bytes(), str(path))
    raise UsageError(f"no recipe {name!r}", f"Give one of {', '.join(BUILT_IN)} or the path of a .toml file")


def _parse(data: bytes, where: str) -> Recipe:
    try:
        table = tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"recipe {where} is not TOML: {error}") from error
    if table.get("schema") != SCHEMA:
        raise UsageError(f"recipe {where} has schema {table.get('schema')!r}, this hasten reads {SCHEMA}")
    if unknown := sorted(set(table) - _KEYS):
        raise UsageError(f"recipe {where} has the unknown key {unknown[0]!r}", f"Known: {', '.join(sorted(_KEYS))}")
    if missing := sorted(_KEYS - set(table)):
        raise UsageError(f"recipe {where} lacks the key {missing[0]!r}")
    _check_types(table, where)
    stages = {key: tuple(cast(list[str], value)) for key, value in table["stages"].items()}
    recipe = Recipe(table["name"], table["description"], table["tune"], stages)
    for target in TARGETS:
        recipe.stages_for(target)
    return recipe


def _check_types(table: Mapping[str, object], where: str) -> None:
    for key, kind in (("name", str), ("description", str), ("tune", bool), ("stages", dict)):
        if not isinstance(table[key], kind):
            raise UsageError(f"recipe {where}: {key} must be a {kind.__name__}")
    name = cast(str, table["name"])
    if not name.replace("-", "").isalnum() or not name.islower():
        raise UsageError(f"recipe {where}: name {name!r} must be lower case letters, digits and hyphens")
    stages = cast(dict[str, object], table["stages"])
    names = {"default", *(target.name for target in TARGETS)}
    if "default" not in stages:
        raise UsageError(f"recipe {where}: [stages] lacks 'default'")
    for key, value in stages.items():
        if key not in names:
            raise UsageError(f"recipe {where}: [stages] has the unknown target {key!r}")
        if not isinstance(value, list) or not all(isinstance(stage, str) for stage in value):
            raise UsageError(f"recipe {where}: stages.{key} must be a list of texts")
        for stage in value:
            if not all(part.strip() for part in re.split(r"\||(?:^|\s)/(?:\s|$)", stage)):
                raise UsageError(f"recipe {where}: stages.{key} has an empty alternative in {stage!r}")
