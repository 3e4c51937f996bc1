"""What measurement decided, as readable TOML: compiling again with it makes the same bytes without measuring."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from artifacts.errors import SchemaError, UsageError
from artifacts.manifest import SessionOptions, Variant
from artifacts.strict import At, decode
from artifacts.target import Target
from passes.pipeline import parse

SCHEMA = 3
_TOP = {
    "schema": int,
    "source": str,
    "task": str,
    "pooling": str,
    "seed": int,
    "calibration": str,
    "calibration_rows": int,
    "vocabulary": str,
    "variant": list,
}
_VARIANT = {
    "id": str,
    "target": str,
    "recipe": str,
    "precision": str,
    "pipeline": str,
    "optimization_level": str,
    "disabled_optimizers": list,
    "compute": str,
    "tolerance": float,
}


@dataclass(frozen=True)
class PlannedVariant:
    """How one variant is made.

    Attributes:
        id: Its id in the bundle.
        target: Name of its target.
        recipe: Name of the recipe that was searched.
        precision: Narrowest format it computes in.
        pipeline: Text form of the passes that stayed.
        session: How ONNX Runtime is to load it.
        tolerance: Relative L2 error allowed on the golden outputs.
    """

    id: str
    target: str
    recipe: str
    precision: str
    pipeline: str
    session: SessionOptions
    tolerance: float


@dataclass(frozen=True)
class Plan:
    """The decisions of a compile.

    Attributes:
        source: Digest of the model it was made for.
        task: Task of the graph.
        pooling: The pooling that was asked for; empty for the model's own.
        seed: Seed of the compile.
        calibration: Digest of the data that ranges were learnt from; empty where none were.
        calibration_rows: Most rows of it that were asked for.
        vocabulary: Digest of the tokens that were kept; empty where all were.
        variants: In the order of the bundle.
    """

    source: str
    task: str
    pooling: str
    seed: int
    calibration: str
    calibration_rows: int
    vocabulary: str
    variants: tuple[PlannedVariant, ...]

    def to_toml(self) -> bytes:
        """The file form; the same plan gives the same bytes."""
        rows = [
            {
                "id": variant.id,
                "target": variant.target,
                "recipe": variant.recipe,
                "precision": variant.precision,
                "pipeline": variant.pipeline,
                "optimization_level": variant.session.optimization_level,
                "disabled_optimizers": list(variant.session.disabled_optimizers),
                "compute": variant.session.precision,
                "tolerance": variant.tolerance,
            }
            for variant in self.variants
        ]
        table = {"schema": SCHEMA, **{key: value for key, value in vars(self).items() if key != "variants"}}
        return tomli_w.dumps({**table, "variant": rows}).encode()


def load_plan(path: Path) -> Plan:
    """The plan in a TOML file, or in a bundle.

    Raises:
        UsageError: There is none, or it breaks the form.
    """
    file = path / "plan.toml" if path.is_dir() else path
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"no plan at {file}", "Pass a bundle or its plan.toml") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"plan {file} is not TOML: {error}") from error
    if table.get("schema") != SCHEMA:
        raise UsageError(f"plan {file} has schema {table.get('schema')!r}, this hasten reads {SCHEMA}")
    _check(table, _TOP, f"plan {file}")
    variants = tuple(_variant(row, f"plan {file}: variant {index}") for index, row in enumerate(table["variant"]))
    ids = [variant.id for variant in variants]
    if twice := sorted({name for name in ids if ids.count(name) > 1}):
        raise UsageError(f"plan {file} has the variant {twice[0]!r} twice")
    if not variants or table["seed"] < 0 or table["calibration_rows"] < 1:
        wrong = "a negative seed" if table["seed"] < 0 else "no calibration_rows"
        raise UsageError(f"plan {file} has {wrong if variants else 'no variants'}")
    return Plan(**{key: table[key] for key in _TOP if key not in ("schema", "variant")}, variants=variants)


def _variant(row: object, where: str) -> PlannedVariant:
    if not isinstance(row, dict):
        raise UsageError(f"{where} is not a table")
    _check(row, _VARIANT, where)
    try:
        providers = list(Target.parse(row["target"]).providers)
        parse(row["pipeline"])
        entry = _manifest_entry(row, providers, At(where))
    except (SchemaError, UsageError) as error:
        raise UsageError(error.what if where in error.what else f"{where}: {error.what}", error.remedy) from error
    return PlannedVariant(
        entry.id, entry.target, row["recipe"], entry.precision, entry.pipeline, entry.session, entry.tolerance
    )


def _manifest_entry(row: dict[str, Any], providers: list[str], at: At) -> Variant:
    """What the manifest will say of the variant: held now to what a manifest may say, and not after the compile."""
    session = {
        "optimization_level": row["optimization_level"],
        "disabled_optimizers": row["disabled_optimizers"],
        "precision": row["compute"],
    }
    same = {key: row[key] for key in ("id", "target", "precision", "pipeline", "tolerance")}
    model = f"{row['id']}.onnx"
    return decode(Variant, {**same, "providers": providers, "model": model, "session": session, "weights": []}, at)


def _check(table: dict[str, Any], kinds: dict[str, type], where: str) -> None:
    if wrong := sorted(set(table) ^ set(kinds)):
        raise UsageError(f"{where} {'lacks' if wrong[0] in kinds else 'has the unknown'} key {wrong[0]!r}")
    for key, kind in kinds.items():
        if not isinstance(table[key], kind) or isinstance(table[key], bool):
            raise UsageError(f"{where}: {key} must be a {kind.__name__}")
