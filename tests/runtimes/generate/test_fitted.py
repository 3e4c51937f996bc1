"""Feeds made for one cache, fitted to another."""

from __future__ import annotations

import numpy as np

from artifacts.manifest import TensorSpec
from runtimes.generate.feeds import fitted

IDS = TensorSpec("input_ids", "int64", ("batch", "sequence"))


def cache(layer: int, heads: int, dtype: str = "float32") -> tuple[TensorSpec, ...]:
    shape = ("batch", heads, "capacity", 8)
    return tuple(TensorSpec(f"past_key_values.{layer}.{part}", dtype, shape) for part in ("key", "value"))


def feeds(layers: int, heads: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    found: dict[str, np.ndarray] = {"input_ids": np.zeros((2, 3), np.int64)}
    for layer in range(layers):
        found |= {spec.name: rng.standard_normal((2, heads, 16, 8), np.float32) for spec in cache(layer, heads)}
    return found


def test_feeds_of_the_same_signature_stay_what_they_are():
    given = feeds(2, 4)
    found = fitted(given, (IDS, *cache(0, 4), *cache(1, 4)))
    assert list(found) == list(given)
    assert all(found[name] is array for name, array in given.items())


def test_a_smaller_cache_has_fewer_heads_and_layers_and_another_type():
    found = fitted(feeds(3, 4), (IDS, *cache(0, 2), *cache(1, 4, "float16")))
    assert list(found) == ["input_ids", *(spec.name for spec in (*cache(0, 2), *cache(1, 4)))]
    assert found["past_key_values.0.key"].shape == (2, 2, 16, 8)
    assert found["past_key_values.1.value"].dtype == np.float16
    assert all(array.flags.c_contiguous for array in found.values())


def test_feeds_of_other_models_are_not_looked_at():
    given = {"x": np.zeros(3, np.float32)}
    assert fitted(given, (TensorSpec("y", "float32", (4,)),)) is given
