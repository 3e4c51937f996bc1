"""A recipe with kv-cache: the variant says what its cache is, the reference keeps its own, a plan makes it again."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_decoders import write_decoder

import hasten
from artifacts.bundle import Bundle
from compiler.compile import compile_model

RECIPE = """
schema = 1
name = "narrow"
description = "float32 with a KV cache of 8 bits."
tune = false

[generation]
default = [
  "clean",
  "raise-opset(minimum=23); fuse-rms-norm; fuse-rotary; pack-products; pack-attention",
  "kv-cache",
  "finish",
]
"""


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bundle]:
    root = tmp_path_factory.mktemp("narrow")
    source = write_decoder(root / "tiny", head_dim=16)
    (root / "narrow.toml").write_text(RECIPE)
    recipe = str(root / "narrow.toml")
    return source, compile_model(source, root / "out", recipe=recipe, max_drop=5.0, keep_reference=True)


@pytest.mark.slow
def test_the_manifest_tells_the_cache_of_each_variant(narrow: tuple[Path, Bundle]) -> None:
    manifest = narrow[1].manifest
    own, reference = manifest.variants
    assert (own.id, reference.id) == ("cpu-fp32", "reference")
    assert own.pipeline.endswith("; kv-cache; finish") or own.pipeline.endswith("; kv-cache")
    assert reference.cache is None
    assert own.cache is not None
    assert {spec.dtype for spec in own.cache} == {"int8"}
    assert [spec.name for spec in own.cache] == [spec.name for spec in manifest.inputs[5:]]
    assert [spec.shape for spec in own.cache] == [spec.shape for spec in manifest.inputs[5:]]
    assert {spec.dtype for spec in manifest.inputs[5:]} == {"float32"}


@pytest.mark.slow
def test_both_variants_load_and_write(narrow: tuple[Path, Bundle]) -> None:
    sizes = {}
    for variant in ("cpu-fp32", "reference"):
        with hasten.load(narrow[1].path, variant=variant) as model:
            assert len(model.generate("the cat", max_new_tokens=8, temperature=0.0).tokens) <= 8
            sizes[variant] = model.layout.token_bytes
    assert sizes["reference"] == 4 * sizes["cpu-fp32"]


@pytest.mark.slow
def test_a_plan_makes_the_same_cache(narrow: tuple[Path, Bundle], tmp_path: Path) -> None:
    source, bundle = narrow
    again = compile_model(source, tmp_path / "again", plan=bundle.path / "plan.toml")
    assert again.manifest.variants[0].cache == bundle.manifest.variants[0].cache
    assert again.manifest.variants[0].weights == bundle.manifest.variants[0].weights
