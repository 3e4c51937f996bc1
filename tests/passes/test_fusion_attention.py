"""fuse-attention and unfuse-attention: structure, numbers, non-matches, idempotence, fully masked rows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import pytest
from builders import CONTEXT, Array, GraphBuilder, apply, apply_equal, evaluate, operators, random, tolerance

from artifacts.target import TENSORRT
from passes.fusion import FuseAttention, UnfuseAttention

HEADS, WIDTH, BATCH, LENGTH = 3, 4, 2, 5
HIDDEN = HEADS * WIDTH
FLAT, FOUR = ("b", "s", HIDDEN), ("b", "s", HEADS, WIDTH)
SPLIT, SCORES = ("b", HEADS, "s", WIDTH), ("b", HEADS, "s", "s")
SCALE = 1 / math.sqrt(WIDTH)


def feeds(mask: Array | None = None) -> dict[str, Array]:
    made = {name: random(seed, BATCH, LENGTH, HIDDEN) for seed, name in enumerate("qkv")}
    return made if mask is None else {**made, "mask": mask}


def additive(*lengths: int, rows: int = 1, low: float = -1e4) -> Array:
    mask = np.zeros((BATCH, 1, rows, LENGTH), np.float32)
    for row, length in enumerate(lengths):
        mask[row, :, :, length:] = low
    return mask


def split(g: GraphBuilder, value: ir.Value, heads: int = HEADS) -> ir.Value:
    return g.add("Reshape", value, g.constant(np.array([0, 0, heads, WIDTH])), shape=("b", "s", heads, WIDTH))


def key_of(g: GraphBuilder, value: ir.Value, form: str) -> ir.Value:
    """The key [b, h, d, s], transposed in one of the ways that exporters know."""
    swapped = ("b", HEADS, WIDTH, "s")
    if form == "once":
        return g.add("Transpose", split(g, value), perm=[0, 2, 3, 1], shape=swapped)
    k = g.add("Transpose", split(g, value), perm=[0, 2, 1, 3], shape=SPLIT)
    if form == "twice":
        return g.add("Transpose", k, perm=[0, 1, 3, 2], shape=swapped)
    if form == "never":  # wrong: a product of q with k as it is
        return k
    sizes = g.add("Shape", k, dtype=ir.DataType.INT64, shape=(4,))

    def part(start: int, end: int) -> ir.Value:
        return g.add(
            "Slice", sizes, g.constant(np.array([start])), g.constant(np.array([end])), dtype=ir.DataType.INT64,
            shape=(end - start,),
        )  # fmt: skip

    length, width, outer = part(2, 3), part(3, 4), part(0, 2)
    three = g.add("Concat", g.constant(np.array([-1])), length, width, axis=0, dtype=ir.DataType.INT64, shape=(3,))
    four = g.add("Concat", outer, width, length, axis=0, dtype=ir.DataType.INT64, shape=(4,))
    flat = g.add("Transpose", g.add("Reshape", k, three), perm=[0, 2, 1])
    return g.add("Reshape", flat, four)


def chain(
    key_form: str = "twice",
    scaled: str = "scores",
    mask_shape: tuple[int | str, ...] | None = ("b", 1, 1, "s"),
    *,
    guard: bool = False,
    layers: int = 1,
    axis: int = -1,
    joined: bool = True,
) -> ir.Model:
    g = GraphBuilder()
    q, k, v = (g.input(name, FLAT) for name in "qkv")
    mask = g.input("mask", mask_shape) if mask_shape else None
    for _ in range(layers):
        queries = g.add("Transpose", split(g, q), perm=[0, 2, 1, 3], shape=SPLIT)
        keys = key_of(g, k, key_form)
        values = g.add("Transpose", split(g, v), perm=[0, 2, 1, 3], shape=SPLIT)
        if scaled == "both":
            root = g.constant(math.sqrt(SCALE))
            queries, keys = g.add("Mul", queries, root), g.add("Mul", root, keys)
        scores = g.add("MatMul", queries, keys, shape=SCORES)
        if scaled == "scores":
            scores = g.add("Div", scores, g.constant(1 / SCALE), shape=SCORES)
        if mask is not None:
            scores = g.add("Add", scores, mask, shape=SCORES)
        weights = g.add("Softmax", scores, axis=axis, shape=SCORES)
        if guard:
            check = g.add("IsNaN", weights, dtype=ir.DataType.BOOL, shape=SCORES)
            weights = g.add("Where", check, g.constant(0.0), weights, shape=SCORES)
        mixed = g.add("MatMul", weights, values, shape=SPLIT)
        back = g.add("Transpose", mixed, perm=[0, 2, 1, 3], shape=FOUR)
        q = g.add("Reshape", back, g.constant(np.array([0, 0, HIDDEN])), shape=FLAT) if joined else back
    return g.finish(q)


@pytest.mark.parametrize("key_form", ["once", "twice", "three dimensions"])
@pytest.mark.parametrize("scaled", ["scores", "both", "never"])
def test_fuses_every_form(key_form: str, scaled: str) -> None:
    model = chain(key_form, scaled)
    q, k, v, _ = model.graph.inputs
    outcome = apply_equal(FuseAttention(), model, feeds(additive(5, 3)))
    assert (outcome.changed, outcome.refused) == (1, ())
    (node,) = (node for node in model.graph if node.op_type == "MultiHeadAttention")
    assert [node.inputs[0], node.inputs[1], node.inputs[2]] == [q, k, v]
    assert node.attributes["num_heads"].as_int() == HEADS
    assert node.attributes["scale"].as_float() == pytest.approx(1.0 if scaled == "never" else SCALE)
    assert "Softmax" not in operators(model)
    assert "MatMul" not in operators(model)


def test_fuses_without_a_mask() -> None:
    model = chain(mask_shape=None)
    assert apply_equal(FuseAttention(), model, feeds()).changed == 1
    assert operators(model) == {"MultiHeadAttention": 1}


def test_a_mask_with_rows_is_taken_as_it_is() -> None:
    model = chain(mask_shape=("b", 1, "s", "s"))
    assert apply_equal(FuseAttention(), model, feeds(additive(5, 3, rows=LENGTH))).changed == 1
    assert operators(model) == {"MultiHeadAttention": 1}
    node = next(iter(model.graph))
    assert node.inputs[5] is model.graph.inputs[3]


def test_layers_share_one_prepared_mask() -> None:
    model = chain(layers=3)
    assert apply_equal(FuseAttention(), model, feeds(additive(4, 2))).changed == 3
    assert operators(model) == {"Concat": 1, "Expand": 1, "MultiHeadAttention": 3, "Shape": 1}
    prepared = next(node for node in model.graph if node.op_type == "Expand").outputs[0]
    assert prepared.shape == ir.Shape(["b", 1, "s", "s"]), "passes behind this one prove what they do from shapes"


def test_guarded_chain_keeps_fully_masked_rows_finite() -> None:
    model = chain(guard=True, mask_shape=("b", 1, "s", "s"))
    given = feeds(additive(5, 3, rows=LENGTH, low=-np.inf))
    expected = evaluate(model, given)
    reach = {name: tolerance(model, array) for name, array in expected.items()}
    assert apply(FuseAttention(), model).changed == 1
    for name, array in evaluate(model, given).items():
        np.testing.assert_allclose(array, expected[name], rtol=0, atol=reach[name])
    masked = evaluate(model, feeds(additive(5, 0, rows=LENGTH, low=-np.inf)))
    assert all(np.isfinite(array).all() for array in masked.values())


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (chain("never", mask_shape=None), "key is not split"),
        (chain(axis=2), "last of four axes"),
        (chain(joined=False), "[B, S, H*D]"),
        (chain(mask_shape=("b", 1, 1, 1)), "mask"),
        (chain(mask_shape=("b", 1, "t", "s")), "mask"),
    ],
)
def test_what_is_not_provably_attention_is_refused(model: ir.Model, reason: str) -> None:
    before = operators(model)
    outcome = FuseAttention().run(model, CONTEXT)
    assert outcome.changed == 0
    assert reason in outcome.refused[0].reason
    assert operators(model) == before


def test_refused_for_a_target_without_the_operator() -> None:
    outcome = FuseAttention().run(chain(), dataclasses.replace(CONTEXT, target=TENSORRT))
    assert (outcome.changed, len(outcome.refused)) == (0, 1)


def test_a_softmax_over_no_product_is_not_even_refused() -> None:
    g = GraphBuilder()
    model = g.finish(g.add("MatMul", g.add("Softmax", g.input("q", FLAT)), g.constant(random(0, HIDDEN, 2))))
    assert apply(FuseAttention(), model) == apply(FuseAttention(), model)
    assert apply(FuseAttention(), model).refused == ()


def fused(
    *,
    padding: tuple[int | str, ...] | None = None,
    bias: tuple[int | str, ...] | None = None,
    layers: int = 1,
    dtype: ir.DataType = ir.DataType.FLOAT,
    **attributes: object,
) -> ir.Model:
    g = GraphBuilder()
    q, k, v = (g.input(name, FLAT, dtype) for name in "qkv")
    mask = g.input("padding", padding, ir.DataType.INT32) if padding else None
    added = g.input("bias", bias, dtype) if bias else None
    inputs = [None, mask, added] if mask is not None or added is not None else []
    while inputs and inputs[-1] is None:
        inputs.pop()
    for _ in range(layers):
        q = g.add(
            "MultiHeadAttention", q, k, v, *inputs, domain="com.microsoft", num_heads=HEADS, shape=FLAT, dtype=dtype,
            **attributes,
        )  # fmt: skip
    return g.finish(q)


PADDING = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], np.int32)
WINDOW = np.tril(np.ones((BATCH, LENGTH, LENGTH), np.int32))
BIAS = random(9, BATCH, HEADS, LENGTH, LENGTH)


@pytest.mark.parametrize(
    ("model", "extra"),
    [
        (fused(), {}),
        (fused(scale=0.3), {}),
        (fused(padding=("b", "s")), {"padding": PADDING}),
        (fused(padding=("b", "s"), mask_filter_value=-5.0), {"padding": PADDING}),
        (fused(padding=("b", "s", "s")), {"padding": WINDOW}),
        (fused(bias=("b", HEADS, "s", "s")), {"bias": BIAS}),
        (fused(bias=(1, 1, "s", "s")), {"bias": BIAS[:1, :1]}),
        (fused(padding=("b", "s"), bias=("b", HEADS, "s", "s")), {"padding": PADDING, "bias": BIAS}),
    ],
    ids=["plain", "scale", "padding", "filter value", "padding of rank 3", "bias", "broadcast bias", "both"],
)
def test_unfuses_to_what_the_operator_computes(model: ir.Model, extra: Mapping[str, Array]) -> None:
    model = model.clone()
    outcome = apply_equal(UnfuseAttention(), model, {**feeds(), **extra})
    assert (outcome.changed, outcome.refused) == (1, ())
    assert all(node.domain == "" for node in model.graph)
    found = operators(model)
    assert (found["Transpose"], found["Reshape"], found["MatMul"], found["Mul"]) == (4, 4, 2, 1)


def test_layers_share_one_additive_mask() -> None:
    model = fused(padding=("b", "s"), layers=4)
    assert apply_equal(UnfuseAttention(), model, {**feeds(), "padding": PADDING}).changed == 4
    found = operators(model)
    assert (found["Greater"], found["Unsqueeze"], found["Where"], found["Add"]) == (1, 1, 1, 4)
    masks = {id(node.inputs[1]) for node in model.graph if node.op_type == "Add"}
    assert len(masks) == 1
    assert len(model.graph.initializers) == 7


def test_fully_masked_rows_stay_finite_and_equal_the_operator() -> None:
    model = fused(padding=("b", "s"))
    given = {**feeds(), "padding": np.zeros_like(PADDING)}
    expected = evaluate(model, given)
    apply(UnfuseAttention(), model)
    for name, array in evaluate(model, given).items():
        assert np.isfinite(array).all()
        # scores near -10000 are rounded to half a unit there: 10000 * 2^-24 each, in an exponent
        np.testing.assert_allclose(array, expected[name], rtol=0, atol=2e4 * 2.0**-24 * np.abs(given["v"]).max())


def test_a_bias_of_minus_infinity_stays_finite() -> None:
    model = fused(bias=("b", HEADS, "s", "s"))
    bias = BIAS.copy()
    bias[1] = -np.inf
    apply(UnfuseAttention(), model)
    for array in evaluate(model, {**feeds(), "bias": bias}).values():
        assert np.isfinite(array).all()


def test_half_precision_masks_do_not_overflow() -> None:
    model = fused(padding=("b", "s"), bias=("b", HEADS, "s", "s"), dtype=ir.DataType.FLOAT16)
    apply(UnfuseAttention(), model)
    given = {name: array.astype(np.float16) for name, array in feeds().items()}
    bias = np.full_like(BIAS, np.finfo(np.float16).min, np.float16)
    for array in evaluate(model, {**given, "padding": np.zeros_like(PADDING), "bias": bias}).values():
        assert array.dtype == np.float16
        assert np.isfinite(array).all()


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (fused(unidirectional=1), "causal"),
        (fused(padding=("b",)), "key_padding_mask"),
        (fused(bias=("s", "s")), "attention_bias"),
    ],
)
def test_unfuse_refuses_what_it_does_not_know(model: ir.Model, reason: str) -> None:
    model = model.clone()
    outcome = apply(UnfuseAttention(), model)
    assert outcome.changed == 0
    assert reason in outcome.refused[0].reason
    assert operators(model) == {"MultiHeadAttention": 1}


def test_fuse_undoes_unfuse() -> None:
    model = fused(layers=2)
    given = feeds()
    expected = evaluate(model, given)
    apply(UnfuseAttention(), model)
    from passes.cleanup import InferShapes

    apply(InferShapes(), model)
    assert apply(FuseAttention(), model).changed == 2
    for name, array in evaluate(model, given).items():
        np.testing.assert_allclose(array, expected[name], rtol=0, atol=tolerance(chain(layers=2), array))
