"""Small ONNX files for the tests of sessions and of the choice among them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

WIDTH = 64
_BALLAST_WIDTH = 512


def save_graph(graph: onnx.GraphProto, path: Path) -> Path:
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def weight(seed: int = 0, width: int = WIDTH) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal((width, width)) / np.sqrt(width)).astype(np.float32)


def linear(path: Path, *, ballast: int = 0, scale: float = 1.0) -> Path:
    """y = x @ weight() * scale for x, y [n, 64] float32; with ballast, + 0 * (so many large products of x)."""
    initializers = [
        numpy_helper.from_array(weight() * np.float32(scale), "w"),
        numpy_helper.from_array(np.array(0.0, np.float32), "zero"),
        numpy_helper.from_array(weight(1, _BALLAST_WIDTH), "big"),
        numpy_helper.from_array(np.eye(WIDTH, _BALLAST_WIDTH, dtype=np.float32), "widen"),
        numpy_helper.from_array(np.eye(_BALLAST_WIDTH, WIDTH, dtype=np.float32), "narrow"),
    ]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["xw" if ballast else "y"], "product")]
    if ballast:
        nodes.append(helper.make_node("MatMul", ["x", "widen"], ["h0"], "widen"))
        nodes += [helper.make_node("MatMul", [f"h{i}", "big"], [f"h{i + 1}"], f"big{i}") for i in range(ballast)]
        nodes.append(helper.make_node("MatMul", [f"h{ballast}", "narrow"], ["back"], "narrow"))
        nodes.append(helper.make_node("Mul", ["back", "zero"], ["nothing"], "nothing"))
        nodes.append(helper.make_node("Add", ["xw", "nothing"], ["y"], "sum"))
    used = {name for node in nodes for name in node.input}
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", WIDTH])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", WIDTH])
    graph = helper.make_graph(nodes, "linear", [x], [y], [i for i in initializers if i.name in used])
    return save_graph(graph, path)


def endless(path: Path) -> Path:
    """A loop of as many turns as its one input says: a model that hangs when asked to."""
    value, boolean, number = helper.make_tensor_value_info, TensorProto.BOOL, TensorProto.INT64
    body = helper.make_graph(
        [helper.make_node("Identity", ["on"], ["on_out"]), helper.make_node("Add", ["v", "i"], ["v_out"])],
        "body",
        [value("i", number, []), value("on", boolean, []), value("v", number, [])],
        [value("on_out", boolean, []), value("v_out", number, [])],
    )
    graph = helper.make_graph(
        [helper.make_node("Loop", ["turns", "true", "start"], ["sum"], body=body)],
        "endless",
        [value("turns", number, [])],
        [value("sum", number, [])],
        [
            numpy_helper.from_array(np.array(True), "true"),
            numpy_helper.from_array(np.array(0, np.int64), "start"),
        ],
    )
    return save_graph(graph, path)


def skip_layer_norm(path: Path) -> Path:
    """LayerNormalization(a + b), which ONNX Runtime fuses at load."""
    shape = ["n", "s", 8]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("Add", ["a", "b"], ["sum"]),
            helper.make_node("LayerNormalization", ["sum", "scale", "shift"], ["y"], axis=-1),
        ],
        "skip",
        [value("a", TensorProto.FLOAT, shape), value("b", TensorProto.FLOAT, shape)],
        [value("y", TensorProto.FLOAT, shape)],
        [
            numpy_helper.from_array(np.ones(8, np.float32), "scale"),
            numpy_helper.from_array(np.zeros(8, np.float32), "shift"),
        ],
    )
    return save_graph(graph, path)


def determinant(path: Path) -> Path:
    """det(x @ x): a product that every provider runs, and an operator that few do."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "x"], ["xx"], "product"),
            helper.make_node("Det", ["xx"], ["y"], "determinant"),
        ],
        "mixed",
        [value("x", TensorProto.FLOAT, [3, 3])],
        [value("y", TensorProto.FLOAT, [])],
    )
    return save_graph(graph, path)
