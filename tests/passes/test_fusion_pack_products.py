"""pack-products: structure, numbers, what is refused, what is none of its business, idempotence."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from builders import CONTEXT, Array, GraphBuilder, apply, apply_equal, operators, random
from encoder_graphs import Encoder, feeds, relative, run

from passes.base import Effect, Purpose
from passes.cleanup import InferShapes
from passes.fusion import PackProducts
from passes.sites import NAME_SCOPES, linear_sites

K = 16
WIDTHS = {"query": 12, "key": 8, "value": 8}
X = {"x": random(0, 2, 5, K)}
EPS = float(np.finfo(np.float32).eps)


def weight(name: str) -> Array:
    return random(sum(map(ord, name)), K, WIDTHS[name])


def bias(name: str) -> Array:
    return random(sum(map(ord, name)) + 1, WIDTHS[name])


def site(g: GraphBuilder, x: ir.Value, name: str, *, biased: bool = True, held: ir.Value | None = None) -> ir.Value:
    shape = ("b", "s", WIDTHS[name])
    product = g.add("MatMul", x, held or g.constant(weight(name), f"{name}.w"), shape=shape, name=f"{name}.product")
    node = product.producer()
    assert node is not None
    node.metadata_props[NAME_SCOPES] = repr(["", f"layer.{name}", "matmul"])
    return g.add("Add", g.constant(bias(name), f"{name}.b"), product, shape=shape, name=name) if biased else product


def three(*biased: str, opset: int = 21) -> ir.Model:
    g = GraphBuilder(opset)
    x = g.input("x", ("b", "s", K))
    made = [site(g, x, name, biased=name in biased) for name in WIDTHS]
    relu = g.add("Relu", made[1], shape=made[1].shape, name="relu")
    return g.finish(made[0], relu, made[2])


def test_it_is_exact_and_for_speed() -> None:
    assert (PackProducts.effect, PackProducts.purpose) == (Effect.EXACT, Purpose.SPEED)


@pytest.mark.parametrize("biased", [tuple(WIDTHS), ()], ids=["biases", "none"])
def test_structure_and_numbers(biased: tuple[str, ...]) -> None:
    model = three(*biased)
    names = [value.name for node in model.graph for value in node.outputs]
    assert apply_equal(PackProducts(), model, X).changed == 1
    (packed,) = linear_sites(model)
    assert (packed.shape, packed.path) == ((K, 28), "layer.query")
    tensor = packed.weight.const_value
    assert tensor is not None
    np.testing.assert_array_equal(tensor.numpy(), np.concatenate([weight(name) for name in WIDTHS], axis=1))
    split = next(node for node in model.graph if node.op_type == "Split")
    whole = "Add" if biased else "MatMul"
    assert split.inputs[0] is next(node for node in model.graph if node.op_type == whole).outputs[0]
    assert str(split.inputs[0].shape) == "[b,s,28]"
    assert [output.name for output in split.outputs] == [
        f"{name}_out" if biased else f"{name}.product_out" for name in WIDTHS
    ]
    assert {output.name for output in split.outputs} <= set(names)
    assert [str(output.shape) for output in split.outputs] == ["[b,s,12]", "[b,s,8]", "[b,s,8]"]
    assert split.outputs[0] is model.graph.outputs[0]
    assert split.attributes["axis"].as_int() == -1
    assert split.metadata_props[NAME_SCOPES] == packed.node.metadata_props[NAME_SCOPES]
    assert operators(model) == {**({"Add": 1} if biased else {}), "MatMul": 1, "Relu": 1, "Split": 1}
    assert len(model.graph.initializers) == 2 + bool(biased)


@pytest.mark.parametrize("transposed", [(1, 1), (0, 1)])
def test_gemm(transposed: tuple[int, int]) -> None:
    g = GraphBuilder()
    x = g.input("x", ("m", K))
    made = []
    for name, flag in zip(("query", "key"), transposed, strict=True):
        held = g.constant(np.ascontiguousarray(weight(name).T) if flag else weight(name))
        made.append(g.add("Gemm", x, held, g.constant(bias(name)), transB=flag, shape=("m", WIDTHS[name])))
    model = g.finish(*made)
    assert apply_equal(PackProducts(), model, {"x": random(0, 7, K)}).changed == 1
    assert operators(model) == {"Add": 1, "MatMul": 1, "Split": 1}


def test_halves_are_packed_bit_for_bit() -> None:
    g = GraphBuilder()
    half = ir.DataType.FLOAT16
    x = g.input("x", ("m", K), half)
    parts = [
        g.add("MatMul", x, g.constant(weight(name).astype(np.float16)), shape=("m", WIDTHS[name]), dtype=half)
        for name in WIDTHS
    ]
    model = g.finish(*parts)
    assert apply_equal(PackProducts(), model, {"x": random(0, 7, K, dtype=np.float16)}).changed == 1


def shared(*, within: bool) -> ir.Model:
    g = GraphBuilder()
    x = g.input("x", ("b", "s", K))
    key = site(g, x, "key")
    other = x if within else g.input("y", ("b", "s", K))
    value = site(g, other, "value", held=g.graph.initializers["key.w"])
    return g.finish(key, value, *([] if within else [site(g, x, "query")]))


def odd_bias() -> ir.Model:
    g = GraphBuilder()
    x, c = g.input("x", ("m", K)), g.input("c", (12,))
    left = g.add("Gemm", x, g.constant(weight("query")), c, shape=("m", 12))
    return g.finish(left, g.add("MatMul", x, g.constant(weight("key")), shape=("m", 8)))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (three("query", "value"), "some of the products that read its input have a bias"),
        (shared(within=True), "weight is used elsewhere"),
        (shared(within=False), "weight is used elsewhere"),
        (odd_bias(), "a bias is no constant vector"),
        (three(*WIDTHS, opset=12), "opset 13"),
    ],
)
def test_refused(model: ir.Model, reason: str) -> None:
    before = operators(model)
    outcome = apply(PackProducts(), model)
    assert outcome.changed == 0
    (refusal,) = outcome.refused
    assert reason in refusal.reason
    assert operators(model) == before


def test_sites_of_different_inputs_are_left() -> None:
    g = GraphBuilder()
    x, y = g.input("x", ("b", "s", K)), g.input("y", ("b", "s", K))
    model = g.finish(site(g, x, "query"), site(g, y, "key"))
    outcome = apply(PackProducts(), model)
    assert (outcome.changed, outcome.refused, operators(model)) == (0, (), {"Add": 2, "MatMul": 2})


def test_a_whole_encoder() -> None:
    """A column of a product is one sum, packed or not; only the order of the sum may change: eps sqrt(K) a layer."""
    model = Encoder(layers=2).build()
    InferShapes().run(model, CONTEXT)
    expected = run(model, feeds())
    assert apply(PackProducts(), model).changed == 2
    paths = [site.path for site in linear_sites(model) if site.path.startswith("encoder.layer.0")]
    assert paths[0] == "encoder.layer.0.query"
    assert len(paths) == 4
    assert relative(run(model, feeds()), expected) < 2 * 8 * EPS
