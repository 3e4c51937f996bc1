"""Element types of all values, and which inputs and outputs of an operator may be float16 at all."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import onnx_ir as ir

from passes.grammar import schema_of
from passes.sites import STANDARD_DOMAINS, constant_of, integer_attribute
from passes.surgery import MICROSOFT, opset

_HALF = "tensor(float16)"

_FLOAT32_OUTPUTS: Mapping[str, frozenset[int]] = {
    "SkipLayerNormalization": frozenset({1, 2}),  # mean and inverse deviation
    "SkipSimplifiedLayerNormalization": frozenset({1, 2}),
}
"""Outputs of com.microsoft operators that are float32 whatever the input is."""

FLOAT32_OPERATORS = frozenset(
    {"DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "QAttention", "QEmbedLayerNormalization"}
)
"""Operators of com.microsoft that have no float16 form."""


class Signatures:
    """The schemas of one model's operators.

    Operators of com.microsoft have no schema here: all their float inputs and outputs are of one type, except for those
    named above.
    """

    def __init__(self, model: ir.Model) -> None:
        self._opset = opset(model)
        self._schemas: dict[str, onnx.defs.OpSchema | None] = {}

    def known(self, node: ir.Node) -> bool:
        """Whether hasten knows the types of the operator."""
        return node.domain == MICROSOFT or self._schema(node) is not None

    def input_may_be_half(self, node: ir.Node, index: int) -> bool:
        """Whether that float input has a float16 form (the scales of Resize have none)."""
        if node.domain == MICROSOFT:
            return node.op_type not in FLOAT32_OPERATORS
        schema = self._schema(node)
        return schema is not None and _HALF in schema.inputs[min(index, len(schema.inputs) - 1)].types

    def output_may_be_half(self, node: ir.Node, index: int) -> bool:
        """Whether that float output has a float16 form (the mean of LayerNormalization has none)."""
        if node.domain == MICROSOFT:
            return node.op_type not in FLOAT32_OPERATORS and index not in _FLOAT32_OUTPUTS.get(node.op_type, ())
        schema = self._schema(node)
        return schema is not None and _HALF in schema.outputs[min(index, len(schema.outputs) - 1)].types

    def infer(self, graph: ir.Graph) -> None:
        """Give every value of the main graph its element type where the exporter left it out and it can be told."""
        for node in graph:
            for index, output in enumerate(node.outputs):
                inferred = self._output_type(node, index) if output.dtype is None else None
                if inferred is not None:
                    output.type = ir.TensorType(inferred)

    def _output_type(self, node: ir.Node, index: int) -> ir.DataType | None:
        if node.domain == MICROSOFT:
            return _microsoft_type(node, index)
        schema = self._schema(node)
        if schema is None:
            return None
        if node.op_type in ("Cast", "Constant", "ConstantOfShape"):
            return _attribute_type(node)
        output = schema.outputs[min(index, len(schema.outputs) - 1)]
        if len(output.types) == 1:
            return _CONCRETE.get(next(iter(output.types)))
        last = len(schema.inputs) - 1
        same = (value for i, value in enumerate(node.inputs) if schema.inputs[min(i, last)].type_str == output.type_str)
        return next((value.dtype for value in same if value is not None), None)

    def _schema(self, node: ir.Node) -> onnx.defs.OpSchema | None:
        if node.domain not in STANDARD_DOMAINS:
            return None
        if node.op_type not in self._schemas:
            self._schemas[node.op_type] = schema_of(node.op_type, self._opset)
        return self._schemas[node.op_type]


_CONCRETE: Mapping[str, ir.DataType] = {
    "tensor(float)": ir.DataType.FLOAT,
    "tensor(int32)": ir.DataType.INT32,
    "tensor(int64)": ir.DataType.INT64,
    "tensor(uint8)": ir.DataType.UINT8,
    "tensor(bool)": ir.DataType.BOOL,
}


def _microsoft_type(node: ir.Node, index: int) -> ir.DataType | None:
    if index in _FLOAT32_OUTPUTS.get(node.op_type, ()):
        return ir.DataType.FLOAT
    types = (value.dtype for value in node.inputs if value is not None and value.dtype is not None)
    return next((dtype for dtype in types if dtype.is_floating_point()), None) if index == 0 else None


def _attribute_type(node: ir.Node) -> ir.DataType | None:
    if node.op_type == "Cast":
        return ir.DataType(integer_attribute(node, "to", ir.DataType.FLOAT))
    if node.op_type == "Constant":
        tensor = constant_of(node.outputs[0])
        return None if tensor is None else tensor.dtype
    value = node.attributes.get("value")
    return ir.DataType.FLOAT if value is None else value.as_tensor().dtype
