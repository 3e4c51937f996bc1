"""Plain tensors of several callers in one run."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
import task_graphs
from onnx import helper

from artifacts.errors import ProviderError
from artifacts.manifest import TensorSpec
from runtimes.engine.calls import Call
from runtimes.engine.rows import form_of, has_rows, pack, run_together, unpack
from runtimes.load import load

ROUNDING = {"rtol": 1e-5, "atol": 1e-6}
"""float32, six terms: a matrix product of another size may add them in another order."""


def feeds(rows: int, length: int, seed: int) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(seed).integers(5, 40, (rows, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def graph(output: TensorSpec, *nodes: object, oracle: object) -> task_graphs.Graph:
    """`task_graphs.embedder` up to its ``pooled`` [n, 8], and on from there."""
    table, _ = task_graphs._weights()
    weights = {"table": table, **task_graphs._AXES, "first": np.array([0], np.int64)}
    pooled = lambda fed: {output.name: oracle(task_graphs._pooled(fed, table))}  # noqa: E731
    return task_graphs._graph([*task_graphs._POOL, *nodes], [output], weights, pooled)


def together(bundle, serve, asked, **options):
    """The answers to requests that come at once, and how many runs they took."""

    async def work(engine):
        before = engine.stats().batches
        found = await asyncio.gather(*(engine.run(one) for one in asked), return_exceptions=True)
        return found, engine.stats().batches - before

    return serve(bundle, work, **options)


def alone(bundle, asked):
    with load(bundle.path) as model:
        return [model.run(one) for one in asked]


@pytest.mark.parametrize("task", ["feature-extraction", "tensors"])
def test_requests_of_one_form_run_together_and_each_gets_its_rows(tmp_path, serve, task):
    """Of plain graphs too, where a golden row came out the same in company."""
    bundle = task_graphs.write_bundle(tmp_path / "b", task, task_graphs.embedder())
    asked = [feeds(1 + n % 3, 6, n) for n in range(12)]
    found, runs = together(bundle, serve, asked)
    assert runs == 1
    for got, wanted in zip(found, alone(bundle, asked), strict=True):
        assert list(got) == list(wanted)
        np.testing.assert_allclose(got["sentence_embedding"], wanted["sentence_embedding"], **ROUNDING)


def test_requests_of_other_shapes_or_types_run_by_themselves(sentences, serve):
    asked = [feeds(1, 6, 0), feeds(1, 7, 1), {n: a.astype(np.int32) for n, a in feeds(1, 6, 2).items()}, feeds(1, 6, 3)]
    found, runs = together(sentences, serve, asked)
    assert runs == 3
    for got, wanted in zip(found, alone(sentences, asked), strict=True):
        np.testing.assert_allclose(got["sentence_embedding"], wanted["sentence_embedding"], **ROUNDING)


def test_no_more_run_together_than_the_budget_allows(sentences, serve):
    asked = [feeds(2, 6, n) for n in range(8)]  # 12 token ids each
    assert together(sentences, serve, asked, max_batch_tokens=36)[1] == 3


def total() -> tuple[task_graphs.Graph, str]:
    """A sum over all rows: an output that is not per row."""
    node = helper.make_node("ReduceSum", ["pooled", "first"], ["total_of_all"], keepdims=0)
    spec = TensorSpec("total_of_all", "float32", (task_graphs.WIDTH,))
    return graph(spec, node, oracle=lambda pooled: pooled.sum(0)), "total_of_all"


def centred() -> tuple[task_graphs.Graph, str]:
    """Rows less their mean: by shapes each row has an output of its own; the golden row in company tells otherwise."""
    mean = helper.make_node("ReduceMean", ["pooled", "first"], ["mean"], keepdims=1)
    minus = helper.make_node("Sub", ["pooled", "mean"], ["centred"])
    spec = TensorSpec("centred", "float32", ("batch", task_graphs.WIDTH))
    return graph(spec, mean, minus, oracle=lambda pooled: pooled - pooled.mean(0)), "centred"


@pytest.mark.parametrize("make", [total, centred])
def test_rows_that_know_of_each_other_run_by_themselves(make, tmp_path, serve):
    made, name = make()
    bundle = task_graphs.write_bundle(tmp_path / "b", "tensors", made)
    asked = [feeds(2, 6, n) for n in range(5)]
    found, runs = together(bundle, serve, asked)
    assert runs == 5
    for got, one in zip(found, asked, strict=True):
        np.testing.assert_allclose(got[name], made.oracle(one)[name], **ROUNDING)


def test_a_request_that_the_graph_refuses_fails_alone(sentences, serve):
    asked = [feeds(1, 6, n) for n in range(4)]
    asked[2]["input_ids"][0, 0] = 1 << 40
    found, runs = together(sentences, serve, asked)
    assert runs == 1
    assert isinstance(found[2], ProviderError)
    good = [asked[0], asked[1], asked[3]]
    for got, wanted in zip([found[0], found[1], found[3]], alone(sentences, good), strict=True):
        np.testing.assert_allclose(got["sentence_embedding"], wanted["sentence_embedding"], **ROUNDING)


def test_the_urgent_one_goes_first_and_takes_its_like_along(sentences, serve):
    async def work(engine):
        calls = [Call(priority=9 if n == 3 else 0) for n in range(4)]
        asked = (engine.run(feeds(1, 6, n), call=call) for n, call in enumerate(calls))
        return len(await asyncio.gather(*asked)), engine.stats().batches

    assert serve(sentences, work) == (4, 1)


def test_what_the_manifest_says_of_rows(sentences):
    manifest = sentences.manifest
    ids, mask = manifest.inputs
    (vectors,) = manifest.outputs
    assert has_rows(manifest)
    for shape in ((), (8,), ("n", 8), ("batch", "batch"), ("batch", "found")):
        assert not has_rows(replace(manifest, outputs=(replace(vectors, shape=shape),))), shape
    assert has_rows(replace(manifest, outputs=(replace(vectors, shape=("batch", "length", 8)),)))
    for shape in ((1, "length"), ("other", "length"), ("batch", "batch")):
        assert not has_rows(replace(manifest, inputs=(ids, replace(mask, shape=shape)))), shape


def test_tensors_without_rows_have_no_form():
    ids = np.zeros((2, 3), np.int64)
    assert form_of({"a": ids}) == form_of({"a": np.ones((5, 3), np.int64)})
    assert form_of({"a": ids}) != form_of({"b": ids})
    for none in ({}, {"a": np.int64(3)}, {"a": ids[:0]}, {"a": ids, "b": ids[:1]}, {"a": np.zeros((2, 1 << 17))}):
        assert form_of({name: np.asarray(value) for name, value in none.items()}) is None


def test_parts_keep_their_names_on_the_wire():
    parts = [{"a b": np.arange(3)}, {}, {"a b": np.arange(2), "": np.ones(1)}]
    found = unpack(pack(enumerate(parts)), 3)
    assert [list(part) for part in found] == [list(part) for part in parts]
    np.testing.assert_array_equal(found[2]["a b"], [0, 1])


def test_outputs_that_are_not_rows_after_all_are_computed_one_by_one():
    parts = [{"x": np.full((n, 2), float(n))} for n in (1, 2, 3)]
    found = run_together(parts, lambda fed: {"sum": fed["x"].sum(0, keepdims=True)})
    assert [one["sum"].tolist() for one in found] == [[[1.0, 1.0]], [[4.0, 4.0]], [[9.0, 9.0]]]
