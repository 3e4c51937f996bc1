from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from artifacts.errors import UsageError
from artifacts.manifest import SessionOptions
from compiler.plan import Plan, PlannedVariant, load_plan

SESSION = SessionOptions("all", ("SkipLayerNormFusion", "BiasGeluFusion"), "fp32")
FIRST = PlannedVariant(
    "cpu-int8", "cpu", "balanced", "int8", 'finish; dynamic-int8(skip=[a, "b c"])', SESSION, 0.0123456789
)
PLAN = Plan(
    "sha256:" + "ab" * 32,
    "feature-extraction",
    "",
    7,
    "sha",
    512,
    "",
    (FIRST, replace(FIRST, id="reference", tolerance=1e-6)),
)


def edited(tmp_path: Path, before: str, after: str) -> Path:
    text = PLAN.to_toml().decode()
    assert before in text
    (tmp_path / "plan.toml").write_text(text.replace(before, after, 1))
    return tmp_path / "plan.toml"


def test_round_trip_from_a_file_and_from_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_bytes(PLAN.to_toml())
    assert load_plan(tmp_path / "plan.toml") == PLAN
    assert load_plan(tmp_path) == PLAN
    assert load_plan(tmp_path).to_toml() == PLAN.to_toml()


def test_it_is_readable() -> None:
    table = tomllib.loads(PLAN.to_toml().decode())
    assert table["schema"] == 3
    assert table["variant"][0]["disabled_optimizers"] == ["SkipLayerNormFusion", "BiasGeluFusion"]
    assert "[[variant]]" in PLAN.to_toml().decode()


BROKEN = {
    "is not TOML": ("seed = 7", "seed ="),
    "schema 9, this hasten reads 3": ("schema = 3", "schema = 9"),
    "lacks key 'source'": ('source = "sha256:' + "ab" * 32 + '"\n', ""),
    "unknown key 'speed'": ("seed = 7", "seed = 7\nspeed = 3"),
    "seed must be a int": ("seed = 7", 'seed = "7"'),
    "seed must be a int ": ("seed = 7", "seed = true"),
    "variant 0 lacks key 'recipe'": ('recipe = "balanced"\n', ""),
    "variant 0 has the unknown key 'extra'": ('recipe = "balanced"', 'recipe = "balanced"\nextra = 1'),
    "variant 0: session.disabled_optimizers[0]: ": ('"SkipLayerNormFusion"', "3"),
    "tolerance must be a float": ("tolerance = 0.0123456789", "tolerance = 1"),
    "variant 0: unknown target 'tpu'": ('target = "cpu"', 'target = "tpu"'),
    "variant 0: id": ('id = "cpu-int8"', 'id = "../cpu"'),
    "variant 0: session.optimization_level": ('optimization_level = "all"', 'optimization_level = "most"'),
    "variant 0: session.precision": ('compute = "fp32"', 'compute = "fp8"'),
    "variant 0: session.disabled_optimizers[0]": ('"SkipLayerNormFusion"', '"Skip Layer"'),
    "variant 0: tolerance": ("tolerance = 0.0123456789", "tolerance = nan"),
    "variant 0: tolerance ": ("tolerance = 0.0123456789", "tolerance = -1.0"),
    "variant 0: tolerance  ": ("tolerance = 0.0123456789", "tolerance = inf"),
    "variant 0: unknown pass 'dynamic-int9'": ("dynamic-int8", "dynamic-int9"),
    "variant 'cpu-int8' twice": ('id = "reference"', 'id = "cpu-int8"'),
    "seed": ("seed = 7", "seed = -7"),
}


@pytest.mark.parametrize("told", BROKEN)
def test_what_breaks_the_form_is_named(tmp_path: Path, told: str) -> None:
    with pytest.raises(UsageError) as raised:
        load_plan(edited(tmp_path, *BROKEN[told]))
    assert told.strip() in str(raised.value)
    assert str(tmp_path) in str(raised.value)


def test_no_variants(tmp_path: Path) -> None:
    for text in (PLAN.to_toml().decode().split("[[variant]]")[0] + "variant = []\n", "schema = 3\n", ""):
        (tmp_path / "plan.toml").write_text(text)
        with pytest.raises(UsageError):
            load_plan(tmp_path)


def test_a_variant_that_is_no_table(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(PLAN.to_toml().decode().split("[[variant]]")[0] + "variant = [3]\n")
    with pytest.raises(UsageError, match="variant 0 is not a table"):
        load_plan(tmp_path)


def test_missing_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no plan at .*plan\.toml"):
        load_plan(tmp_path)
    with pytest.raises(UsageError, match="no plan at"):
        load_plan(tmp_path / "missing.toml")
    (tmp_path / "plan.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="is not TOML"):
        load_plan(tmp_path)
