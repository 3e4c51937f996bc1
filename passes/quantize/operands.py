"""What the passes share that let operators on two activations read 8-bit integers: operands quantized and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from artifacts.target import OPENVINO_PROVIDER
from passes.base import Context, Outcome, Refusal
from passes.sites import constant_of, module_path
from passes.splice import Names, add_constant, label, new_node, new_value
from passes.statistics import Activation
from passes.surgery import needed, opset, producer

from .linear import Selection
from .ranges import Range, clipping_range, is_constant

FIRST_OPSET = 13
"""The opset from which int8 and uint8 are quantized by the same operators as in `StaticInt8`."""

_PROBABILITIES = Range(0.0, 1.0)
"""What Softmax can make; no calibration knows better."""

Step = tuple[np.float32, np.int8 | np.uint8]
"""The scale of a quantizer and its zero point, whose type is that of the integers."""


@dataclass(frozen=True)
class Operators:
    """What a pass acts on, and how.

    Attributes:
        what: Its name in refusals: "product of two activations".
        nodes: In graph order.
        step: The quantizer of an operand, from its range and its index among the inputs.
        ranges: How the range is chosen: one of `passes.quantize.ranges.METHODS`.
        percentile: Percent of the values that the percentile method keeps inside.
        reuse: Read the uint8 form of a value that is there already, whatever its range.
    """

    what: str
    nodes: Sequence[ir.Node]
    step: Callable[[Range, int], Step]
    ranges: str
    percentile: float
    reuse: bool = False


def read_integers(model: ir.Model, context: Context, operators: Operators, selection: Selection) -> Outcome:
    """Let the operators read both operands quantized and back; a value is quantized once in each form.

    Refused: no calibration data; targets other than OpenVINO; opset < 13; operands not known to be float32; operands
    that calibration saw only one number of; operators that ``skip`` names; patterns that fit none.
    """
    unfit = _unfit(model, context, operators.what)
    if unfit is not None:
        return Outcome(0, (unfit,))
    nodes, refused = _selected(operators, selection)
    if not nodes:
        return Outcome(0, tuple(refused))
    if context.observe is None:
        return Outcome(0, (Refusal("", "calibration data is needed", "compile with data"),))
    operands = dict.fromkeys(needed(value) for node in nodes for value in node.inputs)
    wanted = tuple(value for value in operands if not _is_softmax(value))
    seen = context.observe(model, wanted) if wanted else {}
    changed = 0
    quantizers = _Quantizers(model.graph, operators, seen)
    for node in nodes:
        constant = [value.name for value in map(needed, node.inputs) if not _varies(value, seen)]
        if constant:
            reason = f"calibration saw no two different numbers in {constant[0]}"
            refused.append(Refusal(label(node), reason, "give more representative data"))
            continue
        for position in (0, 1):
            node.replace_input_with(position, quantizers.quantized(node, position))
        changed += 1
    return Outcome(changed, tuple(refused))


def of_activations(node: ir.Node) -> bool:
    """Whether a node reads two values of which neither is a constant, or quantized already."""
    return len(node.inputs) == 2 and not any(
        constant_of(value) is not None or producer(value, "DequantizeLinear") is not None for value in node.inputs
    )


class _Quantizers:
    """The operands of one graph, quantized and back: each value once in each form."""

    def __init__(self, graph: ir.Graph, operators: Operators, seen: Mapping[str, Activation]) -> None:
        self._graph = graph
        self._names = Names(graph)
        self._operators = operators
        self._seen = seen
        self._order = {node: index for index, node in enumerate(graph)}
        self._made: dict[tuple[ir.Value, np.dtype[np.generic]], ir.Value] = {}

    def quantized(self, node: ir.Node, position: int) -> ir.Value:
        """What an operator is to read in the place of an operand."""
        source = needed(node.inputs[position])
        scale, zero = self._operators.step(self._range(source), position)
        key = (source, zero.dtype)
        if key not in self._made:
            found = self._existing(node, source) if self._operators.reuse else None
            self._made[key] = found or self._quantize(node, source, scale, zero)
        return self._made[key]

    def _existing(self, node: ir.Node, source: ir.Value) -> ir.Value | None:
        """The value as another pass quantized it to uint8 before this node, and back."""
        for user in source.consumers():
            integers = user.outputs[0]
            if user.op_type != "QuantizeLinear" or integers.dtype != ir.DataType.UINT8:
                continue
            for reader in integers.consumers():
                before = reader in self._order and self._order[reader] < self._order[node]
                if reader.op_type == "DequantizeLinear" and before:
                    return reader.outputs[0]
        return None

    def _quantize(self, node: ir.Node, source: ir.Value, step: np.float32, point: np.int8 | np.uint8) -> ir.Value:
        kind = ir.DataType.from_numpy(point.dtype)
        base = f"{source.name or 'x'}_{kind.name.lower()}"
        scale = add_constant(self._graph, self._names.fresh(f"{base}_scale"), np.asarray(step))
        zero = add_constant(self._graph, self._names.fresh(f"{base}_zero_point"), np.asarray(point))
        integers = new_value(self._names.fresh(base), kind, source.shape)
        floats = new_value(self._names.fresh(f"{base}_float"), ir.DataType.FLOAT, source.shape)
        nodes = [
            new_node("QuantizeLinear", [source, scale, zero], [integers], node),
            new_node("DequantizeLinear", [integers, scale, zero], [floats], node),
        ]
        self._graph.insert_before(node, nodes)
        return floats

    def _range(self, source: ir.Value) -> Range:
        if _is_softmax(source):
            return _PROBABILITIES
        return clipping_range(self._seen[source.name or ""], self._operators.ranges, self._operators.percentile)


def _varies(value: ir.Value, seen: Mapping[str, Activation]) -> bool:
    return _is_softmax(value) or (value.name in seen and not is_constant(seen[value.name or ""]))


def _selected(operators: Operators, selection: Selection) -> tuple[list[ir.Node], list[Refusal]]:
    """The operators to rewrite, in graph order, and why not the others."""
    refused = selection.idle([module_path(node) for node in operators.nodes], operators.what)
    nodes: list[ir.Node] = []
    for node in operators.nodes:
        path = module_path(node)
        if not selection.candidate(path):
            continue
        refusal = selection.refusal(node, path)
        if refusal is None and any(needed(value).dtype != ir.DataType.FLOAT for value in node.inputs):
            refusal = Refusal(label(node), "an operand is not known to be float32", "run infer-shapes before")
        if refusal is None:
            nodes.append(node)
        else:
            refused.append(refusal)
    return nodes, refused


def _is_softmax(value: ir.Value) -> bool:
    return producer(value, "Softmax") is not None


def _unfit(model: ir.Model, context: Context, what: str) -> Refusal | None:
    provider = context.target.provider
    if provider != OPENVINO_PROVIDER:
        return Refusal("", f"{provider} has no fast int8 kernel for a {what}", "compile for openvino")
    if opset(model) < FIRST_OPSET:
        return Refusal("", f"opset {opset(model)} is too old", "convert the model to opset 17 or later")
    return None
