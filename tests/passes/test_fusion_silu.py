"""fuse-silu: structure, numbers, non-matches, idempotence."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir
import pytest
from builders import CONTEXT, GraphBuilder, apply, apply_equal, operators, random

from artifacts.target import TENSORRT
from passes.fusion import FuseSilu

SHAPE = ("batch", "sequence", 16)
FEEDS = {"x": random(0, 2, 5, 16), "gate": random(1, 2, 5, 16)}


def silu(order: str = "x first", *, opset: int = 21) -> ir.Model:
    g = GraphBuilder(opset)
    x, gate = g.input("x", SHAPE), g.input("gate", SHAPE)
    sigmoid = g.add("Sigmoid", x, shape=SHAPE)
    operands = {"x first": (x, sigmoid), "x last": (sigmoid, x), "gate": (sigmoid, gate)}[order]
    product = g.add("Mul", *operands, shape=SHAPE, name="silu")
    return g.finish(g.add("Mul", product, gate, shape=SHAPE))


@pytest.mark.parametrize("order", ["x first", "x last"])
def test_structure_and_numbers(order: str) -> None:
    model = silu(order)
    assert apply_equal(FuseSilu(), model, FEEDS).changed == 1
    node, product = model.graph
    assert (node.domain, node.op_type) == ("com.microsoft", "QuickGelu")
    assert node.inputs[0] is model.graph.inputs[0]
    assert node.attributes["alpha"].as_float() == 1.0
    assert product.inputs[0] is node.outputs[0]


@pytest.mark.parametrize("alpha", [1.0, 1.702])
def test_swish(alpha: float) -> None:
    g = GraphBuilder(24)
    x = g.input("x", SHAPE)
    model = g.finish(g.add("Swish", x, alpha=alpha, shape=SHAPE))
    assert apply_equal(FuseSilu(), model, {"x": FEEDS["x"]}).changed == 1
    assert operators(model) == {"QuickGelu": 1}


def test_gates_are_none() -> None:
    model = silu("gate")
    before = operators(model)
    outcome = apply(FuseSilu(), model)
    assert (outcome.changed, outcome.refused) == (0, ())
    assert operators(model) == before


def test_targets_without_the_operator_are_refused() -> None:
    outcome = FuseSilu().run(silu(), dataclasses.replace(CONTEXT, target=TENSORRT))
    assert (outcome.changed, len(outcome.refused)) == (0, 1)
