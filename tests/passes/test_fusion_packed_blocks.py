"""pack-products on MatMulNBits: structure, numbers, what is refused, idempotence."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from builders import CONTEXT, GraphBuilder, apply, apply_equal, operators, random

from passes.fusion import PackProducts
from passes.quantize.weight_only import WeightOnly
from passes.sites import NAME_SCOPES, module_path

K, WIDTHS = 64, {"q": 48, "k": 16, "v": 32}
X = {"x": random(0, 2, 5, K)}
PARTS = {2: "int2", 4: "int4", 8: "uint8"}


def three(biased: str = "", *, bits: int = 4, symmetric: bool = True, skip: tuple[str, ...] = ()) -> ir.Model:
    """Products of one value whose weights are in blocks of 32."""
    g = GraphBuilder()
    x = g.input("x", ("batch", "sequence", K))
    made = []
    for seed, (name, width) in enumerate(WIDTHS.items(), start=1):
        shape = ("batch", "sequence", width)
        product = g.add("MatMul", x, g.constant(random(seed, K, width), f"{name}.weight"), shape=shape, name=name)
        node = product.producer()
        assert node is not None
        node.metadata_props[NAME_SCOPES] = repr(["", f"layer.{name}", "matmul"])
        if name in biased:
            product = g.add("Add", product, g.constant(random(seed + 9, width), f"{name}.bias"), shape=shape)
        made.append(product)
    model = g.finish(*made)
    WeightOnly(bits=bits, symmetric=symmetric, method="rtn", skip=skip).run(model, CONTEXT)
    return model


def initializers(model: ir.Model, part: str) -> list[ir.TensorProtocol]:
    found = [value.const_value for value in model.graph.initializers.values() if str(value.name).endswith(part)]
    return [tensor for tensor in found if tensor is not None]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("biased", ["", "qkv", "q"])
def test_structure_and_numbers(bits: int, symmetric: bool, biased: str) -> None:
    model = three(biased, bits=bits, symmetric=symmetric)
    parts = [PARTS[bits], "scale", *(["zero_point"] if not symmetric else [])]
    before = {part: [tensor.numpy() for tensor in initializers(model, part)] for part in parts}
    names = [value.name for value in model.graph.outputs]
    assert apply_equal(PackProducts(), model, X, exact=True).changed == 1
    product, split = model.graph
    assert (product.op_type, split.op_type) == ("MatMulNBits", "Split")
    assert product.attributes["N"].as_int() == sum(WIDTHS.values())
    assert product.attributes["bits"].as_int() == bits
    assert module_path(product) == "layer.q"
    assert [value.name for value in split.outputs] == names
    assert str(product.outputs[0].shape) == "[batch,sequence,96]"
    for part, arrays in before.items():
        (tensor,) = initializers(model, f"q.weight.packed_{part}")
        np.testing.assert_array_equal(tensor.numpy(), np.concatenate(arrays))
    assert len(model.graph.initializers) == len(parts) + 1 + bool(biased)


def test_weights_in_other_blocks_are_refused() -> None:
    model = three(skip=("layer.v",))
    WeightOnly(bits=8, method="rtn").run(model, CONTEXT)
    before = operators(model)
    assert before == {"MatMulNBits": 3}
    (refusal,) = apply(PackProducts(), model).refused
    assert "blocks" in refusal.reason
    assert operators(model) == before


def test_weights_that_others_read_are_refused() -> None:
    model = three()
    query = next(iter(model.graph))
    again = ir.node("MatMulNBits", [*query.inputs], dict(query.attributes), domain="com.microsoft", name="again")
    again.outputs[0].name = "again"
    model.graph.insert_after(query, again)
    (refusal,) = PackProducts().run(model, CONTEXT).refused
    assert "used elsewhere" in refusal.reason
    assert operators(model) == {"MatMulNBits": 4}


def test_products_of_different_values_are_left() -> None:
    model = three()
    for index, node in enumerate(list(model.graph)[:2]):
        own = ir.Value(name=f"x{index}", type=ir.TensorType(ir.DataType.FLOAT), shape=model.graph.inputs[0].shape)
        model.graph.inputs.append(own)
        node.replace_input_with(0, own)
    outcome = apply(PackProducts(), model)
    assert (outcome.changed, outcome.refused) == (0, ())
