"""A recipe: which passes to try for each target, in which order. Saved as TOML with a schema version."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import cast

from artifacts.errors import UsageError
from artifacts.target import TARGETS, Target
from passes.base import Effect, Pass, Purpose
from passes.pipeline import Pipeline, parse
from passes.registry import CLEAN

from .tasks import GENERATION

SCHEMA = 1
BUILT_IN = ("reference", "safe", "balanced", "int8", "int4", "int4-fast", "int4-serve")
_KEYS = {"schema", "name", "description", "tune"}
_TABLES = ("stages", "generation")
_ALIASES = {"clean": Pipeline(CLEAN)}


@dataclass(frozen=True)
class PerSite:
    """Forms among which each linear operator gets the one that costs least on the target, or is left as it is.

    What a stage ends with is one if it can be told which operators it is for: then those that cost most quality can be
    stepped back to gentler forms where the budget is missed.

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
            ``a / b``: each linear operator gets the form that costs least on the target. Empty: for decoders only.
        generation: The same for decoders. Empty: it is not for them.
    """

    name: str
    description: str
    tune: bool
    stages: Mapping[str, tuple[str, ...]]
    generation: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def stages_for(self, target: Target, task: str = "") -> tuple[Stage, ...]:
        """The stages for ``target``, each with its alternatives in order.

        Raises:
            UsageError: The recipe has none for the task; a stage names no pass, or offers for each operator what cannot
                be told which operators.
        """
        decoder = task == GENERATION
        table = self.generation if decoder else self.stages
        if not table:
            where = "its [generation] table" if decoder else "its [stages] table"
            remedy = f"Choose {' or '.join(_serving(decoder))}; or give the recipe {where}"
            raise UsageError(f"the recipe {self.name} is not for {task or 'encoders'}", remedy)
        texts = table.get(target.name, table["default"])
        return tuple(tuple(_alternative(part.strip()) for part in text.split("|")) for text in texts)


def _serving(decoder: bool) -> list[str]:
    """Names of the built-in recipes for decoders, or for the other tasks."""
    return [name for name in BUILT_IN if getattr(load_recipe(name), _TABLES[decoder])]


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
    known = _KEYS.union(_TABLES)
    if unknown := sorted(set(table) - known):
        raise UsageError(f"recipe {where} has the unknown key {unknown[0]!r}", f"Known: {', '.join(sorted(known))}")
    missing = sorted(_KEYS - set(table)) or [key for key in _TABLES[:1] if not table.keys() & set(_TABLES)]
    if missing:
        raise UsageError(f"recipe {where} lacks the key {missing[0]!r}")
    _check_types(table, where)
    stages, generation = (
        {target: tuple(cast(list[str], texts)) for target, texts in table.get(key, {}).items()} for key in _TABLES
    )
    recipe = Recipe(table["name"], table["description"], table["tune"], stages, generation)
    for target in TARGETS:
        for task in ("",) * bool(stages) + (GENERATION,) * bool(generation):
            recipe.stages_for(target, task)
    return recipe


def _check_types(table: Mapping[str, object], where: str) -> None:
    tables = [key for key in _TABLES if key in table]
    for key, kind in (("name", str), ("description", str), ("tune", bool), *((key, dict) for key in tables)):
        if not isinstance(table[key], kind):
            raise UsageError(f"recipe {where}: {key} must be a {kind.__name__}")
    name = cast(str, table["name"])
    if not name.replace("-", "").isalnum() or not name.islower():
        raise UsageError(f"recipe {where}: name {name!r} must be lower case letters, digits and hyphens")
    for name in tables:
        _check_stages(name, cast(dict[str, object], table[name]), where)


def _check_stages(table: str, stages: Mapping[str, object], where: str) -> None:
    names = {"default", *(target.name for target in TARGETS)}
    if "default" not in stages:
        raise UsageError(f"recipe {where}: [{table}] lacks 'default'")
    for key, value in stages.items():
        if key not in names:
            raise UsageError(f"recipe {where}: [{table}] has the unknown target {key!r}")
        if not isinstance(value, list) or not all(isinstance(stage, str) for stage in value):
            raise UsageError(f"recipe {where}: {table}.{key} must be a list of texts")
        for stage in value:
            if not all(part.strip() for part in re.split(r"\||(?:^|\s)/(?:\s|$)", stage)):
                raise UsageError(f"recipe {where}: {table}.{key} has an empty alternative in {stage!r}")
