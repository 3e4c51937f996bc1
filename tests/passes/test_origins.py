"""Where the columns of products come from, through the passes that pack, sort and scale them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from artifacts.target import CPU
from passes.base import Context
from passes.fusion import FoldScale, OrderColumns, PackProducts
from passes.origins import Origin, origins_of, scale_origins, set_origins, sort_origins
from passes.sites import NAME_SCOPES, linear_sites
from passes.surgery import copy_path

ROWS = 6


def product(path: str, columns: int, source: ir.Value, graph: ir.Graph, seed: int = 0) -> ir.Node:
    """A MatMul of a random weight in a module."""
    array = np.random.default_rng(seed).standard_normal((ROWS, columns)).astype(np.float32)
    weight = ir.val(f"{path}.weight", const_value=ir.tensor(array, name=f"{path}.weight"))
    graph.register_initializer(weight)
    output = ir.Value(name=f"{path}.out", type=ir.TensorType(ir.DataType.FLOAT))
    output.shape = ir.Shape(["batch", "sequence", columns])
    node = ir.node("MatMul", [source, weight], outputs=[output], name=path)
    node.metadata_props[NAME_SCOPES] = repr(["", path, "linear"])
    graph.append(node)
    return node


def empty() -> tuple[ir.Model, ir.Value]:
    source = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", "sequence", ROWS]))
    graph = ir.Graph([source], [], nodes=[], opset_imports={"": 21}, name="graph")
    return ir.Model(graph, ir_version=10), source


def a_node() -> ir.Node:
    model, source = empty()
    return product("layer.q", 4, source, model.graph)


def test_a_product_that_nobody_touched_makes_the_columns_of_its_module():
    assert origins_of(a_node(), 4) == (Origin("layer.q", 0, 4),)


def test_what_is_said_is_read_back_with_neighbours_joined():
    node = a_node()
    set_origins(node, [Origin("a", 0, 2), Origin("a", 2, 1), Origin("b", 0, 1, 0.5)])
    assert origins_of(node, 4) == (Origin("a", 0, 3), Origin("b", 0, 1, 0.5))


def test_columns_that_do_not_add_up_are_those_of_no_module():
    node = a_node()
    set_origins(node, [Origin("a", 0, 4)])
    assert origins_of(node, 3) == ()


def test_a_node_that_replaces_another_takes_it_along():
    old, new = a_node(), a_node()
    set_origins(old, [Origin("a", 0, 4)])
    copy_path(old, new)
    assert origins_of(new, 4) == (Origin("a", 0, 4),)


@pytest.mark.parametrize("factor", [0.25, np.array(0.25), np.array([0.25])])
def test_one_factor_is_remembered(factor: Any):
    node = a_node()
    scale_origins(node, 4, np.asarray(factor, np.float64))
    scale_origins(node, 4, np.asarray(2.0))
    assert origins_of(node, 4) == (Origin("layer.q", 0, 4, 0.5),)


def test_a_factor_for_each_column_is_not():
    node = a_node()
    scale_origins(node, 4, np.array([1.0, 2.0, 3.0, 4.0]))
    assert origins_of(node, 4) == ()
    sort_origins(node, np.arange(4))
    scale_origins(node, 4, np.asarray(2.0))
    assert origins_of(node, 4) == ()


def test_sorted_columns_become_runs():
    node = a_node()
    sort_origins(node, np.array([2, 3, 0, 1]))
    assert origins_of(node, 4) == (Origin("layer.q", 2, 2), Origin("layer.q", 0, 2))
    sort_origins(node, np.array([2, 3, 0, 1]))
    assert origins_of(node, 4) == (Origin("layer.q", 0, 4),)


def test_packed_products_keep_their_order():
    model, source = empty()
    nodes = [product(f"layer.{name}", columns, source, model.graph) for name, columns in (("q", 4), ("k", 2), ("v", 3))]
    model.graph.outputs.extend(node.outputs[0] for node in nodes)
    assert PackProducts().run(model, Context(CPU)).changed == 1
    (site,) = linear_sites(model)
    wanted = (Origin("layer.q", 0, 4), Origin("layer.k", 0, 2), Origin("layer.v", 0, 3))
    assert origins_of(site.node, 9) == wanted
    for origin, node in zip(wanted, nodes, strict=True):
        assert node.name == origin.module


def test_a_folded_factor_is_told():
    model, source = empty()
    node = product("layer.o", 4, source, model.graph)
    by = ir.val("by", const_value=ir.tensor(np.array(4.0, np.float32), name="by"))
    model.graph.register_initializer(by)
    scaled = ir.node("Div", [node.outputs[0], by], name="scale")
    scaled.outputs[0].name, scaled.outputs[0].dtype = "y", ir.DataType.FLOAT
    scaled.outputs[0].shape = node.outputs[0].shape
    model.graph.append(scaled)
    model.graph.outputs.append(scaled.outputs[0])
    assert FoldScale().run(model, Context(CPU)).changed == 1
    assert origins_of(node, 4) == (Origin("layer.o", 0, 4, 0.25),)


def test_sorted_columns_of_a_graph_are_told():
    """Heads of query and key side by side, as GPT-NeoX keeps them: [q0 k0 q1 k1] becomes [q0 q1 k0 k1]."""
    model, source = empty()
    node = product("layer.qk", 8, source, model.graph)
    graph = model.graph

    def made(kind: str, inputs: list[ir.Value], name: str, shape: list[Any], **attributes: Any) -> ir.Value:
        output = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
        graph.append(ir.node(kind, inputs, attributes, outputs=[output], name=f"{name}_{kind}"))
        return output

    def constant(name: str, *numbers: int) -> ir.Value:
        value = ir.val(name, const_value=ir.tensor(np.array(numbers, np.int64), name=name))
        graph.register_initializer(value)
        return value

    heads = made("Reshape", [node.outputs[0], constant("s", 0, 0, 2, 4)], "heads", ["batch", "sequence", 2, 4])
    ends = []
    for name, start in (("q", 0), ("k", 2)):
        bounds = [constant(f"{name}{part}", value) for part, value in (("a", start), ("b", start + 2), ("c", 3))]
        part = made("Slice", [heads, *bounds], f"{name}p", ["batch", "sequence", 2, 2])
        flat = made("Reshape", [part, constant(f"{name}f", 0, 0, 4)], f"{name}flat", ["batch", "sequence", 4])
        ends.append(made("Relu", [flat], name, ["batch", "sequence", 4]))
    graph.outputs.extend(ends)
    assert OrderColumns().run(model, Context(CPU)).changed == 1
    wanted = tuple(Origin("layer.qk", start, 2) for start in (0, 4, 2, 6))
    assert origins_of(node, 8) == wanted
