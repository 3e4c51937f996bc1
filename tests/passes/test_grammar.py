"""The grammar of graphs: everything malformed is told, with the node."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from builders import GraphBuilder

from artifacts.errors import PassError, UnsupportedError
from artifacts.target import CPU, TENSORRT
from passes.grammar import check, signature


def plain(opset: int = 21) -> ir.Model:
    g = GraphBuilder(opset)
    x = g.input("x", ("n", 4))
    y = g.add("Mul", x, g.constant(2.0, "two"), name="double")
    return g.finish(g.add("Neg", y, shape=("n", 4), name="negative"))


def test_a_plain_graph_passes() -> None:
    model = plain()
    check(model, CPU)
    check(model, TENSORRT)
    check(model, CPU, finished=True)
    assert signature(model) == (("input", "x", "FLOAT", "[n,4]"), ("output", "negative_out", "FLOAT", "[n,4]"))


def duplicate(model: ir.Model) -> None:
    next(iter(model.graph)).outputs[0].name = "x"


def twin_nodes(model: ir.Model) -> None:
    for node in model.graph:
        node.name = "same"


def unordered(model: ir.Model) -> None:
    first, last = model.graph
    first.replace_input_with(1, last.outputs[0])


def no_data(model: ir.Model) -> None:
    model.graph.initializers["two"].const_value = None


def other_type(model: ir.Model) -> None:
    model.graph.initializers["two"].const_value = ir.tensor(np.int64(2))


def other_shape(model: ir.Model) -> None:
    model.graph.initializers["two"].const_value = ir.tensor(np.ones(3, np.float32))


def unknown_output(model: ir.Model) -> None:
    model.graph.outputs.append(ir.Value(name="nowhere"))


def nameless(model: ir.Model) -> None:
    next(iter(model.graph)).outputs[0].name = ""


def no_import(model: ir.Model) -> None:
    del model.graph.opset_imports["com.microsoft"]
    next(iter(model.graph)).domain = "com.microsoft"


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (duplicate, "'x' is used twice"),
        (twin_nodes, "two nodes are called 'same'"),
        (unordered, "'double' (Mul) reads 'negative_out'"),
        (no_data, "'two' has no data"),
        (other_type, "states FLOAT and holds INT64"),
        (other_shape, "holds [3]"),
        (unknown_output, "'nowhere'"),
        (nameless, "no name"),
        (no_import, "does not import"),
    ],
)
def test_malformed_graphs(spoil: Callable[[ir.Model], None], told: str) -> None:
    model = plain()
    spoil(model)
    with pytest.raises(PassError) as raised:
        check(model, CPU)
    assert told in str(raised.value)


def test_operators_the_target_lacks_are_named_with_their_node() -> None:
    g = GraphBuilder()
    x = g.input("x", ("n", 4))
    model = g.finish(g.add("QuickGelu", x, domain="com.microsoft", shape=("n", 4), name="quick"))
    check(model, CPU)
    with pytest.raises(UnsupportedError, match=r"'quick' \(QuickGelu\).*tensorrt"):
        check(model, TENSORRT)


@pytest.mark.parametrize(("op_type", "opset"), [("Gelu", 19), ("Invented", 21), ("Upsample", 21)])
def test_operators_that_are_not_in_the_opset_are_named(op_type: str, opset: int) -> None:
    model = plain(opset)
    next(iter(model.graph)).op_type = op_type
    with pytest.raises(UnsupportedError, match=f"no operator {op_type} in opset {opset}"):
        check(model, CPU)


def test_branches_may_share_names_but_not_shadow() -> None:
    def branch(name: str) -> ir.Graph:
        node = ir.Node("", "Neg", [x], name=f"negate_{name}")
        node.outputs[0].name = "inside"
        return ir.Graph([], [node.outputs[0]], nodes=[node], name=name)

    g = GraphBuilder()
    x, on = g.input("x", ("n", 4)), g.input("on", (), ir.DataType.BOOL)
    model = g.finish(g.add("If", on, then_branch=branch("then"), else_branch=branch("else"), shape=("n", 4)))
    check(model, CPU)
    for node in model.graph.all_nodes():
        if node.op_type == "Neg":
            node.outputs[0].name = "x"
    with pytest.raises(PassError, match="used twice"):
        check(model, CPU)


@pytest.mark.parametrize(("ir_version", "opset"), [(11, 21), (10, 25)])
def test_a_finished_graph_has_pinned_versions(ir_version: int, opset: int) -> None:
    model = plain(opset)
    model.ir_version = ir_version
    check(model, CPU)
    with pytest.raises(PassError, match="finish"):
        check(model, CPU, finished=True)


def test_a_finished_graph_has_named_nodes() -> None:
    model = plain()
    next(iter(model.graph)).name = ""
    check(model, CPU)
    with pytest.raises(PassError, match="no name"):
        check(model, CPU, finished=True)
