"""Sites: which operators carry weights, and where they came from."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from builders import GraphBuilder, random

from passes.sites import NAME_SCOPES, constant_of, embedding_sites, linear_sites, module_path


def test_linear_sites() -> None:
    g = GraphBuilder()
    x = g.input("x", ("n", 4))
    weight, turned, bias = g.constant(random(0, 4, 6), "w"), g.constant(random(1, 8, 6), "t"), g.constant(random(2, 8))
    hidden = g.add("MatMul", x, weight, name="/encoder/layer.0/dense/MatMul")
    y = g.add("Gemm", hidden, turned, bias, transB=1, name="gemm")
    first, second = linear_sites(g.finish(y))
    assert (first.weight, first.input, first.output, first.bias) == (weight, x, hidden, None)
    assert (first.shape, first.transposed, first.path) == ((4, 6), False, "encoder.layer.0.dense")
    assert (second.weight, second.input, second.output, second.bias) == (turned, hidden, y, bias)
    assert (second.shape, second.transposed, second.path) == ((6, 8), True, "gemm")


def test_what_is_no_linear_site() -> None:
    g = GraphBuilder()
    x, default = g.input("x", (4, 4)), g.input("default", (4, 4))
    default.const_value = ir.tensor(random(0, 4, 4), name="default")
    g.graph.register_initializer(default)
    weight = g.constant(random(1, 4, 4))
    outputs = [
        g.add("MatMul", weight, x),  # constant on the left
        g.add("MatMul", x, default),  # the caller may override it
        g.add("MatMul", x, g.constant(random(2, 2, 4, 4))),  # a batch of matrices
        g.add("Gemm", x, weight, alpha=0.5),
        g.add("Gemm", x, weight, transA=1),
        g.add("MatMul", x, weight, domain="com.example"),
        g.add("MatMulInteger", x, g.constant(np.ones((4, 4), np.int8))),
    ]
    assert linear_sites(g.finish(*outputs)) == ()


def test_a_constant_node_is_a_weight_too() -> None:
    g = GraphBuilder()
    x = g.input("x", ("n", 4))
    made = g.add("Constant", value=ir.tensor(random(0, 4, 2)))
    (site,) = linear_sites(g.finish(g.add("MatMul", x, made)))
    assert site.shape == (4, 2)
    assert constant_of(made) is not None


def test_embedding_sites() -> None:
    g = GraphBuilder()
    ids = g.input("ids", ("b", "s"), ir.DataType.INT64)
    table = g.constant(random(0, 10, 4), "table")
    found = g.add("Gather", table, ids, axis=0, name="lookup")
    others = [
        g.add("Gather", table, ids, axis=1),
        g.add("Gather", g.constant(np.arange(5), "numbers"), ids, dtype=ir.DataType.INT64),
    ]
    (site,) = embedding_sites(g.finish(found, *others))
    assert (site.table, site.indices, site.output, site.shape, site.path) == (table, ids, found, (10, 4), "lookup")


@pytest.mark.parametrize(
    ("scopes", "name", "path"),
    [
        ("['', 'm', 'm.layer.0', 'linear_3']", "node", "m.layer.0"),
        ("['', 'linear_3']", "node", "node"),
        ("['broken", "/a/b/MatMul", "a.b"),
        ("3", "/MatMul", "/MatMul"),
        ("__import__('os')", "node", "node"),
        ("", "", "value"),
    ],
)
def test_module_path(scopes: str, name: str, path: str) -> None:
    node = ir.Node("", "MatMul", [], name=name)
    node.outputs[0].name = "value"
    if scopes:
        node.metadata_props[NAME_SCOPES] = scopes
    assert module_path(node) == path
