"""Products of two forms, one for prompts and one for steps: what `PromptInt8` does to a graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from passes.sites import constant_of, integer_attribute
from passes.splice import Names, add_constant, label, new_node, new_value, take_place
from passes.surgery import MICROSOFT, build, needed

from .arithmetic import FULL_RANGE, Floats, quantize_columns
from .blocks import QuantizedBlocks, unpack

ZERO = 128
"""The uint8 that stands for 0.0: rows reach as far down as up."""
SMALLEST = np.float32(1e-30)
"""A row of zeros would be divided by zero, and one of subnormal numbers lose them."""
CODES, SCALES, ZEROS, ORDER, BIAS = 1, 2, 3, 4, 5
"""Inputs of MatMulNBits behind the first."""
_FLOAT = ir.DataType.FLOAT


class PromptBranches:
    """One run over one graph: a weight that several products share is rounded once."""

    def __init__(self, graph: ir.Graph, names: Names, *, reduce_range: bool) -> None:
        self._graph = graph
        self._names = names
        self._reduce_range = reduce_range
        self._weights: dict[tuple[ir.Value | None, ...], tuple[ir.Value, ir.TensorProtocol]] = {}

    def rewrite(self, node: ir.Node, condition: ir.Value) -> None:
        """Put a product into the else-branch of an If, and the same in int8 into its then-branch."""
        output = node.outputs[0]
        then = self._prompt(node)
        result = new_value("", _FLOAT, output.shape)
        take_place(result, output)
        output.name, output.dtype = self._names.fresh(f"{result.name}.step"), _FLOAT
        chosen = ir.node("If", [condition], outputs=[result], name=self._names.fresh(f"{result.name}.If"))
        chosen.metadata_props.update(node.metadata_props)
        self._graph.insert_before(node, chosen)
        self._graph.remove(node)
        step = ir.Graph([], [output], nodes=[node], initializers=self._moved(node), name=f"{chosen.name}.step")
        for key, graph in (("then_branch", then), ("else_branch", step)):
            chosen.attributes[key] = ir.AttrGraph(key, graph)

    def _moved(self, node: ir.Node) -> list[ir.Value]:
        """The constants of a node as values that belong to its branch; those that nobody else reads leave the graph."""
        moved = []
        for index, value in enumerate(node.inputs):
            if index == 0 or value is None:
                continue
            tensor = constant_of(value)
            if tensor is None:
                raise ValueError(f"{value.name} is no constant any more")
            own = self._constant(f"{value.name}.step", tensor)
            node.replace_input_with(index, own)
            moved.append(own)
            if not value.uses() and value.is_initializer():
                self._graph.initializers.pop(str(value.name))
        return moved

    def _prompt(self, node: ir.Node) -> ir.Graph:
        """``Mul(MatMulIntegerToFloat(...), s) (+ bias)`` of what the node reads."""
        base = node.outputs[0].name or label(node)
        source, shape = needed(node.inputs[0]), node.outputs[0].shape
        graph = ir.Graph([], [], nodes=[], name=f"{base}.prompt")

        def held(name: str, array: np.ndarray) -> ir.Value:
            return add_constant(graph, self._names.fresh(f"{base}.{name}"), array)

        def then(op_type: str, *inputs: ir.Value, dtype: ir.DataType = _FLOAT, **attributes: int) -> ir.Value:
            made = new_value(self._names.fresh(f"{base}.{op_type}"), dtype)
            graph.append(new_node(op_type, inputs, [made], node, attributes))
            return made

        one, zero = held("one", np.array(1, np.float32)), held("zero", np.array(ZERO, np.uint8))
        largest = then("ReduceMax", then("Abs", source), held("axis", np.array([-1], np.int64)), keepdims=1)
        peak = then("Max", largest, held("smallest", np.array(SMALLEST)))
        scale = then("Mul", peak, held("step", np.array(1 / FULL_RANGE, np.float32)))
        # A row is a block: one operator divides and rounds it, and wants as many zeros as scales.
        zeros = then("Expand", zero, then("Shape", scale, dtype=ir.DataType.INT64), dtype=ir.DataType.UINT8)
        row = {"axis": -1, "block_size": integer_attribute(node, "K", 0)}
        rounded = then("QuantizeLinear", source, scale, zeros, dtype=ir.DataType.UINT8, **row)
        weight, scales = self._rounded(node)
        columns = self._constant(f"{base}.scale", scales)
        product = build(
            "MatMulIntegerToFloat",
            [rounded, weight, one, columns, zero],
            like=node,
            name=self._names.fresh(f"{base}.int8"),
            domain=MICROSOFT,
            dtype=_FLOAT,
            shape=shape,
        )
        graph.append(product)
        result = then("Mul", product.outputs[0], scale)
        bias = constant_of(node.inputs[BIAS]) if len(node.inputs) > BIAS else None
        constants = [columns]
        if bias is not None:
            constants.append(self._constant(f"{base}.bias", bias))
            result = then("Add", result, constants[-1])
        for value in constants:
            graph.register_initializer(value)
        result.shape = None if shape is None else shape.copy()
        graph.outputs.append(result)
        return graph

    def _constant(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """A value that holds the tensor, of no graph yet."""
        value = new_value(self._names.fresh(name), tensor.dtype, ir.Shape(tensor.shape.numpy()))
        value.const_value = tensor
        return value

    def _rounded(self, node: ir.Node) -> tuple[ir.Value, ir.TensorProtocol]:
        """int8 [K, N] and float32 [N]: the weight of a product, rounded once more.

        The former belongs to the outer graph: of that ONNX Runtime lets go of what it has packed, of a branch it keeps
        both. MatMulNBits cannot have its constants there: older versions crash at load (microsoft/onnxruntime#31137).
        """
        stored = tuple(node.inputs[CODES : ZEROS + 1])
        if stored not in self._weights:
            made = quantize_columns(stored_weight(node), reduce_range=self._reduce_range)
            weight = add_constant(self._graph, self._names.fresh(f"{needed(stored[0]).name}.prompt"), made.values)
            self._weights[stored] = (weight, ir.Tensor(made.scale))
        return self._weights[stored]


def stored_weight(node: ir.Node) -> Floats:
    """The floats that the codes of a MatMulNBits stand for, float32 [K, N].

    Raises:
        ValueError: They are no constants.
    """
    held = [constant_of(value) if value is not None else None for value in node.inputs[: ZEROS + 1]]
    codes, scales = held[CODES], held[SCALES]
    zeros = held[ZEROS] if len(held) > ZEROS else None
    if codes is None or scales is None:
        raise ValueError(f"the weight of {label(node)} is no constant")
    rows, columns, bits, block = (integer_attribute(node, name, 0) for name in ("K", "N", "bits", "block_size"))
    count = -(-rows // block)
    values = unpack(codes.numpy().reshape(columns, count, -1), bits, block)
    zero = None if zeros is None else unpack(zeros.numpy().reshape(columns, -1), bits, count)
    return QuantizedBlocks(values, scales.numpy().reshape(columns, count), zero, bits).dequantize(rows)
