"""fuse-qkv-attention: structure, numbers, bit-exactness where sums are exact, non-matches, idempotence."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from builders import CONTEXT, Array, GraphBuilder, apply_equal, operators, random
from encoder_graphs import Encoder
from encoder_graphs import feeds as encoder_feeds

from passes.fusion import FuseQkvAttention, PackProducts

HEADS, WIDTH, BATCH, LENGTH = 3, 4, 2, 5
HIDDEN = HEADS * WIDTH
FLAT = ("b", "s", HIDDEN)
WINDOW = np.tril(np.ones((BATCH, LENGTH, LENGTH), np.int32))
PADDING = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], np.int32)
BIAS = random(9, BATCH, HEADS, LENGTH, LENGTH)


def eighths(seed: int, *shape: int) -> Array:
    """Numbers whose products and sums float32 holds exactly, in whatever order they are added."""
    return (np.random.default_rng(seed).integers(-8, 9, shape) / 8).astype(np.float32)


def attention(
    *,
    biased: tuple[bool, bool, bool] = (True, True, True),
    padding: tuple[int | str, ...] | None = ("b", "s"),
    added: tuple[int | str, ...] | None = None,
    own_bias: bool = False,
    sources: int = 1,
    value_width: int = HIDDEN,
    shared: bool = False,
    read_again: bool = False,
    flat: tuple[int | str, ...] | None = FLAT,
    **attributes: object,
) -> ir.Model:
    g = GraphBuilder()
    xs = [g.input(f"x{index}", FLAT) for index in range(sources)]
    if flat is None:
        xs[0].shape = None
    mask = g.input("padding", padding, ir.DataType.INT32) if padding else None
    bias = g.input("bias", added) if added else None
    qkv: list[ir.Value] = []
    kept = None
    for index, (name, wanted) in enumerate(zip("qkv", biased, strict=True)):
        width = value_width if name == "v" else HIDDEN
        weight = kept if shared and kept is not None else g.constant(eighths(index, HIDDEN, width), f"w{name}")
        kept = weight
        product = g.add("MatMul", xs[index % sources], weight, shape=("b", "s", width))
        if wanted:
            product = g.add("Add", product, g.constant(eighths(index + 3, width), f"b{name}"), shape=("b", "s", width))
        qkv.append(product)
    inner = g.constant(eighths(7, 3 * HIDDEN), "inner") if own_bias else None
    inputs: list[ir.Value | None] = [*qkv, inner, mask, bias]
    while inputs[-1] is None:
        inputs.pop()
    y = g.add(
        "MultiHeadAttention", *inputs, domain="com.microsoft", shape=("b", "s", value_width), num_heads=HEADS,
        **attributes,
    )  # fmt: skip
    outputs = [y, g.add("Identity", qkv[0])] if read_again else [y]
    return g.finish(*outputs)


def given(**more: Array) -> dict[str, Array]:
    return {"x0": eighths(20, BATCH, LENGTH, HIDDEN), **more}


def test_structure() -> None:
    model = attention(scale=0.3, mask_filter_value=-50.0)
    x, mask = model.graph.inputs
    outcome = apply_equal(FuseQkvAttention(), model, given(padding=PADDING), exact=True)
    assert (outcome.changed, outcome.refused) == (1, ())
    (node,) = model.graph
    assert (node.op_type, node.domain) == ("Attention", "com.microsoft")
    held = model.graph.initializers
    assert list(node.inputs) == [x, held["wq.qkv"], held["wq.qkv.bias"], mask]
    assert set(held) == {"wq.qkv", "wq.qkv.bias"}
    assert node.attributes["num_heads"].as_int() == HEADS
    assert node.attributes["scale"].as_float() == pytest.approx(0.3)
    assert node.attributes["mask_filter_value"].as_float() == -50.0
    weight = held["wq.qkv"].const_value
    assert weight is not None
    np.testing.assert_array_equal(weight.numpy(), np.hstack([eighths(index, HIDDEN, HIDDEN) for index in range(3)]))
    assert list(node.outputs[0].shape or ()) == list(ir.Shape(FLAT))


@pytest.mark.parametrize(
    ("model", "extra"),
    [
        (attention(), {"padding": PADDING}),
        (attention(biased=(False, False, False)), {"padding": PADDING}),
        (attention(biased=(True, False, True)), {"padding": PADDING}),
        (attention(padding=("b", "s", "s")), {"padding": WINDOW}),
        (attention(padding=None, added=("b", HEADS, "s", "s")), {"bias": BIAS}),
        (attention(padding=None, added=(1, 1, "s", "s")), {"bias": BIAS[:1, :1]}),
        (attention(added=("b", HEADS, "s", "s")), {"padding": PADDING, "bias": BIAS}),
        (attention(unidirectional=1), {"padding": PADDING}),
    ],
    ids=["plain", "no biases", "some biases", "rank 3", "bias", "broadcast bias", "both", "causal"],
)
def test_it_is_exact_to_the_bit_where_the_products_are(model: ir.Model, extra: dict[str, Array]) -> None:
    model = model.clone()
    assert apply_equal(FuseQkvAttention(), model, given(**extra), exact=True).changed == 1
    assert operators(model) == {"Attention": 1}


def test_without_a_mask_another_kernel_rounds_otherwise() -> None:
    model = attention(padding=None)
    assert apply_equal(FuseQkvAttention(), model, given()).changed == 1


@pytest.mark.parametrize("packed", [False, True])
def test_all_attentions_of_an_encoder(packed: bool) -> None:
    model = Encoder(fused=True).build()
    for node in model.graph:
        if node.op_type in ("LayerNormalization", "SkipLayerNormalization"):
            node.outputs[0].shape = ir.Shape(["batch", "sequence", 64])
        elif str(node.outputs[0].name).endswith(".keys"):
            node.outputs[0].shape = ir.Shape(["batch", "sequence"])
    if packed:
        assert PackProducts().run(model, CONTEXT).changed == 2
    outcome = apply_equal(FuseQkvAttention(), model, encoder_feeds())
    assert (outcome.changed, outcome.refused) == (2, ())
    found = operators(model)
    assert found["Attention"] == 2
    assert "Split" not in found
    assert "MultiHeadAttention" not in found


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (attention(sources=3), "not three products of one value"),
        (attention(read_again=True), "not three products of one value"),
        (attention(shared=True), "a weight is used elsewhere too"),
        (attention(own_bias=True), "adds biases"),
        (attention(value_width=2 * HIDDEN), "not equally wide"),
        (attention(padding=("b",)), "key_padding_mask has rank 1"),
        (attention(flat=None), "not known to be [B, S, K]"),
    ],
)
def test_what_attention_cannot_do_is_refused(model: ir.Model, reason: str) -> None:
    before = operators(model)
    outcome = FuseQkvAttention().run(model, CONTEXT)
    assert outcome.changed == 0
    assert reason in outcome.refused[0].reason
    assert operators(model) == before


def test_unequal_parts_of_one_product_are_refused() -> None:
    model = attention()
    assert PackProducts().run(model, CONTEXT).changed == 1
    split = next(node for node in model.graph if node.op_type == "Split")
    sizes = split.inputs[1]
    assert sizes is not None
    sizes.const_value = ir.tensor(np.array([HIDDEN - 1, HIDDEN + 1, HIDDEN]))
    assert FuseQkvAttention().run(model, CONTEXT).changed == 0
