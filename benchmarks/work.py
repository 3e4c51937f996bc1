"""Arithmetic of a graph, counted from its operators."""

from __future__ import annotations

from pathlib import Path

import onnx

_PRODUCTS = ("MatMul", "Gemm")


def multiply_adds(path: Path, tokens: int) -> float:
    """Multiply-adds of a decoder for one token of a prompt: products with constants, and attention to what came before.

    Args:
        path: The graph; weights in files of their own are not read.
        tokens: Length of the prompt; a token attends to half of it on average.
    """
    graph = onnx.load(path, load_external_data=False).graph
    weights = {tensor.name: tensor.dims for tensor in graph.initializer}
    caches = {value.name: value.type.tensor_type.shape.dim for value in graph.input}
    total = 0.0
    for node in graph.node:
        if node.op_type in _PRODUCTS and len(weights.get(node.input[1], ())) == 2:
            rows, columns = weights[node.input[1]]
            total += rows * columns
        elif node.op_type == "GroupQueryAttention":
            heads = next(one.i for one in node.attribute if one.name == "num_heads")
            total += heads * caches[node.input[3]][3].dim_value * tokens
    return total
