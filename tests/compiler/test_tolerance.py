from __future__ import annotations

import encoder_graphs
import numpy as np
import onnx_ir as ir
import pytest
from encoder_graphs import DISABLED, Encoder

from compiler.tolerance import UNIT_ROUNDOFF, rounding_tolerance


def chain(depth: int, width: int) -> ir.Model:
    builder = encoder_graphs.Builder()
    x = builder.input("x", encoder_graphs.FLOAT, ["n", width])
    for index in range(depth):
        weight = builder.constant(f"w{index}", np.ones((width, width), np.float32))
        x = builder.add("MatMul", x, weight, name=f"h{index}")
    return builder.model(x, shape=["n", width])


def test_it_grows_with_the_root_of_depth_and_of_contraction_length() -> None:
    base = rounding_tolerance(chain(2, 16))
    assert base == pytest.approx(8 * 2.0**-24 * np.sqrt(16 * 2))
    assert rounding_tolerance(chain(8, 16)) == pytest.approx(2 * base)
    assert rounding_tolerance(chain(2, 64)) == pytest.approx(2 * base)


def test_depth_is_the_longest_path_not_the_number_of_products() -> None:
    builder = encoder_graphs.Builder()
    x = builder.input("x", encoder_graphs.FLOAT, ["n", 16])
    weight = builder.constant("w", np.ones((16, 16), np.float32))
    sides = [builder.add("MatMul", x, weight, name=f"side{index}") for index in range(5)]
    total = sides[0]
    for index, side in enumerate(sides[1:]):
        total = builder.add("Add", total, side, name=f"sum{index}")
    model = builder.model(total, shape=["n", 16])
    assert rounding_tolerance(model) == pytest.approx(rounding_tolerance(chain(1, 16)))


def test_narrower_types_are_allowed_their_unit_roundoff() -> None:
    model = chain(3, 64)
    half, brain = rounding_tolerance(model, "fp16"), rounding_tolerance(model, "bf16")
    assert half == pytest.approx(8 * 2.0**-11 * np.sqrt(3))
    assert brain == pytest.approx(8 * half)
    assert UNIT_ROUNDOFF["fp32"] == np.finfo(np.float32).eps / 2
    assert UNIT_ROUNDOFF["fp16"] == np.finfo(np.float16).eps / 2


def test_a_graph_without_products_has_a_tolerance_too() -> None:
    builder = encoder_graphs.Builder()
    x = builder.input("x", encoder_graphs.FLOAT, ["n"])
    model = builder.model(builder.add("Neg", x, name="y"), shape=["n"])
    assert 0.0 < rounding_tolerance(model) < 1e-5


def test_another_order_of_the_same_sums_is_within_it() -> None:
    model = Encoder(layers=4).build()
    tolerance = rounding_tolerance(model)
    inputs = encoder_graphs.feeds(4, 40)
    reference = encoder_graphs.run(model, inputs, DISABLED)
    fused = Encoder(layers=4, fused=True).build()
    assert encoder_graphs.operators(fused)["MultiHeadAttention"] == 4
    assert 0.0 < encoder_graphs.relative(encoder_graphs.run(fused, inputs), reference) < tolerance
    permuted = _permuted(model)
    error = encoder_graphs.relative(encoder_graphs.run(permuted, inputs, DISABLED), reference)
    assert 0.0 < error < tolerance


def _permuted(model: ir.Model) -> ir.Model:
    """The same function with the hidden units of every feed-forward layer in another order."""
    model = model.clone()
    order = np.random.default_rng(3).permutation(128)
    table = model.graph.initializers
    for layer in range(4):
        path = f"encoder.layer.{layer}"
        for name, axis in (("intermediate.weight", 1), ("intermediate.bias", 0), ("output.weight", 0)):
            value = table[f"{path}.{name}"]
            assert value.const_value is not None
            value.const_value = ir.tensor(np.take(value.const_value.numpy(), order, axis), name=value.name)
    return model


def test_mistakes_are_beyond_it_by_far() -> None:
    model = Encoder(layers=4).build()
    tolerance = rounding_tolerance(model)
    inputs = encoder_graphs.feeds(4, 40)
    reference = encoder_graphs.run(model, inputs, DISABLED)
    one_token = inputs["attention_mask"].copy()
    one_token[3, 19] = 0
    wrong = {**inputs, "attention_mask": one_token}
    assert encoder_graphs.relative(encoder_graphs.run(model, wrong, DISABLED), reference) > 10 * tolerance

    epsilon = model.clone()
    for node in epsilon.graph:
        if node.op_type == "LayerNormalization":
            node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-2)
    assert encoder_graphs.relative(encoder_graphs.run(epsilon, inputs, DISABLED), reference) > 10 * tolerance
    tanh = model.clone()
    for node in tanh.graph:
        if node.op_type == "Gelu":
            node.attributes["approximate"] = ir.AttrString("approximate", "tanh")
    assert encoder_graphs.relative(encoder_graphs.run(tanh, inputs, DISABLED), reference) > 4 * tolerance
