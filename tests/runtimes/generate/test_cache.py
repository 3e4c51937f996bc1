"""The KV cache: memory told before it is taken, slots copied and reordered."""

from __future__ import annotations

import numpy as np
import pytest
from bundle_builders import decoder_specs
from hypothesis import given, settings
from hypothesis import strategies as st

from artifacts.errors import UsageError
from runtimes.generate.cache import KVCache, check_memory, layout_of, rows_that_fit

LAYOUT = layout_of(decoder_specs(layers=2, heads=2, size=8)[0])


def test_the_layout_is_read_from_the_inputs():
    assert [one[:4] for one in LAYOUT.tensors[:2]] == [
        ("past_key_values.0.key", "present.0.key", 2, 8),
        ("past_key_values.0.value", "present.0.value", 2, 8),
    ]
    assert LAYOUT.token_bytes == 2 * 2 * 2 * 8 * 4
    assert layout_of(decoder_specs(dtype="float16")[0]).token_bytes == LAYOUT.token_bytes // 2


def test_what_does_not_fit_is_told_with_the_most_that_fits():
    free = 1_000_000
    most = int(0.9 * free) // (3 * LAYOUT.token_bytes)
    check_memory(LAYOUT, 3, most, free)
    with pytest.raises(UsageError, match=rf"KV cache of {most + 1} tokens for 3 texts at once") as raised:
        check_memory(LAYOUT, 3, most + 1, free)
    assert f"At most {most} tokens fit" in raised.value.remedy
    assert "\n" not in str(raised.value)


def test_the_memory_of_this_machine_is_asked_for():
    with pytest.raises(UsageError, match="KV cache"):
        check_memory(LAYOUT, 1, 1 << 50)
    check_memory(LAYOUT, 1, 1)


def test_rows_that_fit():
    assert rows_that_fit(LAYOUT, 8, 10, free=100 * LAYOUT.token_bytes) == 8
    assert rows_that_fit(LAYOUT, 100, 10, free=100 * LAYOUT.token_bytes) == 9
    assert rows_that_fit(LAYOUT, 8, 10, free=0) == 0


def filled(rows: int, length: int) -> KVCache:
    cache = KVCache(LAYOUT, rows, 10)
    inputs, _ = cache.views(0, rows)
    for number, array in enumerate(inputs.values()):
        for row in range(rows):
            array[row, :, :length] = 100 * number + row
    return cache


def contents(cache: KVCache, length: int) -> list[int]:
    inputs, _ = cache.views(0, cache.rows)
    rows = [[int(array[row, 0, 0, 0]) % 100 for array in inputs.values()] for row in range(cache.rows)]
    for row, found in zip(range(cache.rows), rows, strict=True):
        assert len(set(found)) == 1
        assert all((array[row, :, :length] == array[row, 0, 0, 0]).all() for array in inputs.values())
    return [found[0] for found in rows]


def test_capacity_is_a_multiple_of_32_and_memory_is_what_was_said():
    cache = KVCache(LAYOUT, 3, 33)
    assert cache.capacity == 64
    assert cache.nbytes == 3 * 64 * LAYOUT.token_bytes


def test_past_and_present_are_the_same_memory():
    inputs, outputs = KVCache(LAYOUT, 4, 8).views(1, 3)
    for (old, new, heads, size, _), *_ in zip(LAYOUT.tensors, strict=True):
        assert inputs[old] is outputs[new]
        assert inputs[old].shape == (2, heads, 32, size)
        assert inputs[old].flags.c_contiguous


def test_copy_takes_the_first_tokens():
    cache = filled(3, 5)
    cache.copy(2, 0, 3)
    assert contents(cache, 3) == [2, 1, 2]
    assert cache.views(0, 1)[0][LAYOUT.tensors[0][0]][0, 0, 4, 0] == 0


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 6).flatmap(lambda n: st.lists(st.integers(0, n - 1), min_size=n, max_size=n)))
def test_any_reordering(sources):
    cache = filled(len(sources), 4)
    cache.reorder(sources, 4)
    assert contents(cache, 4) == sources


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 20), st.integers(1, 12), st.integers(0, 20), st.sampled_from(["float32", "float16", "int8"]))
def test_a_stretch_of_a_slot_is_taken_out_and_put_back(start, count, target, dtype):
    cache = KVCache(layout_of(decoder_specs(layers=2, heads=2, size=8, dtype=dtype)[0]), 2, 32)
    rng = np.random.default_rng(start)
    for array in cache.views(0, 2)[0].values():
        array[...] = rng.integers(-100, 100, array.shape)
    before = {name: array.copy() for name, array in cache.views(0, 2)[0].items()}
    block = cache.read(1, start, start + count)
    assert block.nbytes == count * cache.layout.token_bytes
    cache.write(0, target, block)
    for name, array in cache.views(0, 2)[0].items():
        np.testing.assert_array_equal(array[0, :, target : target + count], before[name][1, :, start : start + count])
        np.testing.assert_array_equal(array[1], before[name][1])
        outside = np.delete(np.arange(32), np.arange(target, target + count))
        np.testing.assert_array_equal(array[0][:, outside], before[name][0][:, outside])


def test_growing_with_fewer_slots():
    cache = filled(3, 5)
    cache.grow(100, [5], rows=2)
    assert (cache.rows, cache.capacity) == (2, 128)
    assert contents(cache, 5)[0] == 0


def test_growing_keeps_what_is_there():
    cache = filled(3, 5)
    cache.grow(100, [5, 0, 4])
    assert cache.capacity == 128
    first = cache.views(0, 3)[0][LAYOUT.tensors[1][0]]
    assert first[0, :, :5].min() == 100
    assert first[1].max() == 0
    assert np.array_equal(np.unique(first[2]), [0, 102])
