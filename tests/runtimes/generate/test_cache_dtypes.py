"""Variants whose KV cache is narrower than the manifest's: loaded, tested, told, and generated from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from decoder_graphs import llama_graph, llama_specs
from observing import Observer

from artifacts.bundle import Bundle, BundleWriter, open_bundle
from artifacts.errors import BundleError, ProviderError, UsageError
from artifacts.manifest import TensorSpec, Variant
from artifacts.proof import Proof
from artifacts.signature import STEP_INPUTS
from artifacts.target import CPU
from hasten.look import _cache_sizes
from hasten.verify import verify
from passes.base import Context
from passes.precision import KvCache
from runtimes.client import Worker
from runtimes.generate.feeds import fitted, random_feeds
from runtimes.golden import load_golden
from runtimes.load import load
from runtimes.tasks import Generator

TEXTS = ["the cat sat", "a dog ran after the red ball and", "once upon"]
SIZES = {"int8": 1, "int4": 0.5, "float16": 2, "float32": 4}
TOLERANCES = {"int8": 0.1, "int4": 1.0, "float16": 0.005}
"""Of the golden test: attention of random weights is uneven, and 15 levels are few for it."""
PAIR = 2 * 2 * 2 * 8
"""Numbers of a token: layers, keys and values, heads, width."""


def narrowed(model: Any, dtype: str) -> tuple[bytes, tuple[TensorSpec, ...]]:
    """The graph with such a cache, scaled on random prompts, and the inputs of the cache."""
    graph = ir.serde.deserialize_model(llama_graph(model))
    feeds = random_feeds(llama_specs(model.config)[0], model.config.vocab_size, 16, 32, np.random.default_rng(0))
    assert KvCache(dtype).run(graph, Context(CPU, Observer(feeds))).changed == 2
    specs = []
    for value in graph.graph.inputs[len(STEP_INPUTS) :]:
        assert value.dtype is not None
        shape = tuple(size if isinstance(size, int) else str(size.value) for size in value.shape or ())
        specs.append(TensorSpec(str(value.name), value.dtype.numpy().name, shape))
    return ir.to_proto(graph).SerializeToString(), tuple(specs)


def with_variants(base: Bundle, out: Path, model: Any, *dtypes: str) -> Bundle:
    with BundleWriter(out) as writer:
        for entry in base.manifest.files:
            writer.add_bytes(entry.path, (base.path / entry.path).read_bytes())
        variants = list(base.manifest.variants)
        for dtype in dtypes:
            graph, cache = narrowed(model, dtype)
            writer.add_bytes(f"cpu-{dtype}.onnx", graph)
            narrow: Variant = replace(variants[0], id=f"cpu-{dtype}", model=f"cpu-{dtype}.onnx", cache=cache)
            variants.append(replace(narrow, tolerance=TOLERANCES[dtype]))
        manifest = replace(base.manifest, variants=tuple(variants), files=())
        return writer.commit(manifest, Proof("sha256:" + "0" * 64, (), ()))


@pytest.fixture(scope="module")
def bundle(decoder_bundle: Bundle, llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return with_variants(decoder_bundle, tmp_path_factory.mktemp("narrow") / "bundle", llama, "int8", "int4", "float16")


def loaded(bundle: Bundle, variant: str) -> Generator:
    model = load(bundle.path, cache=False, variant=variant)
    assert isinstance(model, Generator)
    return model


@pytest.mark.parametrize("dtype", SIZES)
def test_the_cache_takes_the_bytes_of_its_variant(bundle: Bundle, dtype: str) -> None:
    with loaded(bundle, "cpu-fp32" if dtype == "float32" else f"cpu-{dtype}") as model:
        assert model.layout.token_bytes == PAIR * SIZES[dtype]
        decoder = model.decoder(3, 64)
        assert decoder.cache.nbytes == 3 * 64 * PAIR * SIZES[dtype]
        with pytest.raises(UsageError, match="KV cache of 1000000000000 tokens") as raised:
            model.decoder(1, 10**12)
        assert f"takes {10**12 * PAIR * SIZES[dtype] / 1e9:.3g} GB" in str(raised.value)


@pytest.mark.parametrize("dtype", ["int8", "int4", "float16"])
def test_texts_do_not_depend_on_what_is_written_beside_them(bundle: Bundle, dtype: str) -> None:
    """Slots of one buffer, prompts in pieces, rows that end sooner: as with a float32 cache."""
    with loaded(bundle, f"cpu-{dtype}") as model:
        options = {"max_new_tokens": 12, "temperature": 0.0}
        together = model.generate(TEXTS, **options)
        assert [one.tokens for one in together] == [model.generate(text, **options).tokens for text in TEXTS]
        several = model.generate(TEXTS[0], n=2, temperature=0.7, seed=5, max_new_tokens=8)
        assert several[0].tokens == model.generate(TEXTS[0], temperature=0.7, seed=5, max_new_tokens=8).tokens
        assert model.generate(TEXTS[1], beams=3, max_new_tokens=8).tokens
        cache = model.new_cache()
        first = model.generate(TEXTS[1], cache=cache, **options)
        assert first.tokens == together[1].tokens
        assert model.generate(TEXTS[1] + " the", cache=cache, **options).tokens
        assert cache.reused > 3


@pytest.mark.parametrize("dtype", ["int8", "int4", "float16"])
def test_prefixes_are_kept_as_the_cache_holds_them(bundle: Bundle, dtype: str) -> None:
    """A prompt that goes on behind a prefix of the cache is that which was read from its beginning on."""
    shared = np.random.default_rng(1).integers(5, 300, 70).tolist()
    with loaded(bundle, f"cpu-{dtype}") as model:
        loop, results = model.loop(2, 128, prefix_bytes=10**6), {}
        prompts = [[*shared, *range(20 + seed, 26 + seed)] for seed in range(3)]
        for request in model.requests(prompts, max_new_tokens=12):
            loop.add(request)
            while loop.busy:
                results |= {one.prompt: one.result for one in loop.step() if one.result is not None}
        assert loop.stats.saved == 2 * 64
        for number, prompt in enumerate(prompts):
            assert results[number] == model.generate(prompt, max_new_tokens=12)


def test_all_variants_pass_their_golden_test(bundle: Bundle) -> None:
    model = load(bundle.path, cache=False)
    told = model.explain()
    model.close()
    assert "wrong" not in told
    assert "failed" not in told
    status = {finding.name: finding.status for finding in verify(bundle.path)}
    assert {name for name, one in status.items() if one == "ok"} >= {
        f"cpu-{d} on CPUExecutionProvider" for d in ("int8", "int4", "float16")
    }


def test_a_cache_that_the_graph_does_not_take_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    variants = tuple(replace(one, cache=bundle.manifest.variants[3].cache) for one in bundle.manifest.variants[:2])
    with BundleWriter(tmp_path / "bundle") as writer:
        for entry in bundle.manifest.files:
            if not entry.path.endswith(".onnx") or entry.path in [one.model for one in variants]:
                writer.add_bytes(entry.path, (bundle.path / entry.path).read_bytes())
        lying = writer.commit(
            replace(bundle.manifest, variants=variants, files=()), Proof("sha256:" + "0" * 64, (), ())
        )
    for variant in variants:
        with pytest.raises((BundleError, ProviderError)):
            load(lying.path, cache=False, variant=variant.id)


def test_inspect_tells_the_bytes_of_each_cache(bundle: Bundle) -> None:
    told = _cache_sizes(open_bundle(bundle.path).manifest)
    assert told.startswith("0.3 kB a token, 0.1 kB a token in cpu-int8")


def test_feeds_are_fitted_to_the_cache_of_a_graph(bundle: Bundle) -> None:
    manifest = bundle.manifest
    feeds = load_golden(bundle).feeds
    assert fitted(feeds, manifest.inputs) is feeds
    assert fitted({"x": np.zeros(3)}, manifest.inputs).keys() == {"x"}
    drawn = random_feeds(manifest.inputs, 97, 2, 1, np.random.default_rng(0), held=4)
    for variant in manifest.variants[1:]:
        inputs = manifest.inputs_of(variant)
        found = fitted(drawn, inputs)
        assert {name: array.dtype.name for name, array in found.items()} == {one.name: one.dtype for one in inputs}
        with Worker(bundle.path / variant.model, "CPUExecutionProvider", options=variant.session) as worker:
            assert worker.run(found)["logits"].shape == worker.run(drawn)["logits"].shape
    fewer = [replace(one, shape=("batch", 1, "capacity", 8)) for one in manifest.inputs[5:7]]
    kept = fitted(drawn, (*manifest.inputs[:5], *fewer))
    assert len(kept) == 7
    assert (kept[fewer[0].name] == drawn[fewer[0].name][:, :1]).all()
    more = fitted(kept, manifest.inputs[:7])
    assert (more[fewer[0].name][:, 1] == kept[fewer[0].name][:, 0]).all()
