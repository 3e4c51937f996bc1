from __future__ import annotations

from pathlib import Path

import pytest

from artifacts.errors import UsageError
from artifacts.target import CPU, CUDA, OPENVINO, TARGETS, TENSORRT
from compiler.recipe import BUILT_IN, load_recipe
from passes.base import Effect
from passes.pipeline import parse
from passes.registry import CLEAN

GOOD = """schema = 1
name = "mine"
description = "What I like."
tune = true

[stages]
default = ["clean", "dynamic-int8 | dynamic-int8(reduce_range=true)", "fuse-gelu; remove-unused"]
cuda = ["float16"]
"""


def write(folder: Path, text: str) -> str:
    (folder / "mine.toml").write_text(text)
    return str(folder / "mine.toml")


ENCODING = ("reference", "safe", "balanced")
GENERATION = "text-generation"


@pytest.mark.parametrize(
    ("name", "task"), [*((name, "fill-mask") for name in ENCODING), *((name, GENERATION) for name in BUILT_IN)]
)
def test_the_built_in_recipes_have_stages_for_every_target(name: str, task: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    for target in TARGETS:
        stages = recipe.stages_for(target, task)
        assert str(stages[-1][0]) == "finish"
        assert any(alternative.passes == CLEAN for stage in stages for alternative in stage)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_recipe_that_names_a_precision_takes_it_as_it_is_and_is_for_decoders(name: str) -> None:
    recipe = load_recipe(name)
    assert not recipe.tune
    with pytest.raises(UsageError, match=f"the recipe {name} is not for fill-mask. Choose reference or safe"):
        recipe.stages_for(CPU, "fill-mask")


def test_a_recipe_without_stages_for_decoders(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    with pytest.raises(UsageError, match=r"is not for text-generation. Choose reference or .* or int8 or int4"):
        recipe.stages_for(CPU, GENERATION)
    text = GOOD.replace("[stages]", '[generation]\ndefault = ["finish"]\n\n[stages]')
    both = load_recipe(write(tmp_path, text))
    assert both.stages_for(CUDA, GENERATION) == ((parse("finish"),),)
    assert both.stages_for(CUDA) == recipe.stages_for(CUDA)
    alone = load_recipe(write(tmp_path, GOOD.replace("[stages]", "[generation]")))
    assert alone.stages_for(CUDA, GENERATION) == recipe.stages_for(CUDA)


@pytest.mark.parametrize("task", ["", GENERATION])
@pytest.mark.parametrize("name", ["reference", "safe"])
def test_reference_and_safe_change_no_numbers(name: str, task: str) -> None:
    for target in TARGETS:
        passes = [item for stage in load_recipe(name).stages_for(target, task) for one in stage for item in one.passes]
        assert all(item.effect is Effect.EXACT for item in passes)


def test_tensorrt_gets_standard_operators_only_from_the_first_stage_on() -> None:
    for name in ENCODING:
        stages = load_recipe(name).stages_for(TENSORRT)
        assert str(stages[0][0]) == "unfuse-attention"
        assert not {"fuse-attention", "fuse-bias-gelu", "fuse-skip-layer-norm"} & {str(stage[0]) for stage in stages}


def test_stages_alternatives_and_the_default(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    assert (recipe.name, recipe.description, recipe.tune) == ("mine", "What I like.", True)
    clean, quantize, last = recipe.stages_for(CPU)
    assert clean[0].passes == CLEAN
    assert [str(one) for one in quantize] == ["dynamic-int8", "dynamic-int8(reduce_range=true)"]
    assert last == (parse("fuse-gelu; remove-unused"),)
    assert recipe.stages_for(OPENVINO) == recipe.stages_for(CPU)
    assert recipe.stages_for(CUDA) == ((parse("float16"),),)


BROKEN = {
    "is not TOML": ("tune = true", "tune = tru"),
    "schema 2, this hasten reads 1": ("schema = 1", "schema = 2"),
    "schema None": ("schema = 1\n", ""),
    "unknown key 'flavour'": ("tune = true", "tune = true\nflavour = 1"),
    "lacks the key 'description'": ('description = "What I like."\n', ""),
    "tune must be a bool": ("tune = true", "tune = 1"),
    "name must be a str": ('name = "mine"', "name = 3"),
    "name 'Mi ne' must be lower case": ('"mine"', '"Mi ne"'),
    "name '' must be lower case": ('"mine"', '""'),
    "stages must be a dict": ("[stages]", "stages = 3\n[other]"),
    "lacks 'default'": ("default =", "cpu ="),
    "unknown target 'tpu'": ("cuda =", "tpu ="),
    "stages.cuda must be a list of texts": ('["float16"]', '["float16", 3]'),
    "lacks the key 'stages'": (GOOD[GOOD.index("[stages]") :], ""),
    "generation must be a dict": ("tune = true", "tune = true\ngeneration = 1"),
    "[generation] lacks 'default'": ("[stages]", '[generation]\ncuda = ["finish"]\n\n[stages]'),
    "generation.cuda must be a list": ("[stages]", "[generation]\ndefault = []\ncuda = 1\n\n[stages]"),
    "unknown pass 'float61'": ('["float16"]', '["float61"]'),
    "no option 'range'": ("reduce_range", "range"),
}


@pytest.mark.parametrize("told", BROKEN)
def test_what_breaks_the_form_is_named(tmp_path: Path, told: str) -> None:
    before, after = BROKEN[told]
    assert before in GOOD
    text = GOOD.replace(before, after, 1)
    if "[other]" in after:
        text = text.replace("[other]", "").split("default")[0]
    with pytest.raises(UsageError) as raised:
        load_recipe(write(tmp_path, text))
    assert told in str(raised.value)
    assert raised.value.exit_code == 2


def test_an_empty_stage_or_alternative_is_refused(tmp_path: Path) -> None:
    for stage in ('""', '"dynamic-int8 |"', '"| dynamic-int8"', '"dynamic-int8 | | float16"'):
        with pytest.raises(UsageError, match="empty"):
            load_recipe(write(tmp_path, GOOD.replace('"float16"', stage)))


def test_no_such_recipe(tmp_path: Path) -> None:
    for name in ("fast", str(tmp_path / "missing.toml"), str(tmp_path), "balanced.toml"):
        with pytest.raises(UsageError, match="Give one of reference, safe, balanced"):
            load_recipe(name)


def test_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_bytes(b"\xff\xfe" + GOOD.encode())
    with pytest.raises(UsageError, match="is not TOML"):
        load_recipe(str(tmp_path / "mine.toml"))
