"""int8 products of two activations: attention scores, and the mixing of values by attention weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from artifacts.target import OPENVINO_PROVIDER
from passes.base import Context, Effect, Outcome, Purpose, Refusal
from passes.sites import constant_of, module_path
from passes.splice import Names, add_constant, label, new_node, new_value
from passes.statistics import Activation
from passes.surgery import is_operator, needed, opset, producer

from .arithmetic import FULL_RANGE
from .linear import Selection
from .ranges import METHODS, Range, clipping_range, is_constant

_FIRST_OPSET = 13
"""The opset from which int8 and uint8 are quantized by the same operators as in `StaticInt8`."""

_PROBABILITIES = Range(0.0, 1.0)
"""What Softmax can make; no calibration knows better."""


@dataclass(frozen=True)
class Int8Products:
    """Let the products of two activations run in int8: each operand quantized and back, with a range from calibration.

    | before       | after |
    |--------------|-------|
    | MatMul(x, y) | MatMul(x', y') with v' = DequantizeLinear(QuantizeLinear(v, scale, 0), scale, 0) |

    OpenVINO turns that into integer kernels. It wants the right operand as int8; the left one is uint8 where it is
    never negative (the range of a Softmax is [0, 1], whatever was seen), else int8 as well; no zero points but 0. A
    value that several products read in the same form is quantized once.

    Refused: no calibration data; targets other than OpenVINO; opset < 13; operands not known to be float32; operands
    that calibration saw only one number of; products that ``skip`` names; patterns that fit no product.

    Attributes:
        ranges: How a range is chosen: absmax, percentile, mse or entropy. See `passes.quantize.ranges`.
        percentile: Percent of the values that the percentile method keeps inside.
        skip: Module paths to leave alone; ``*`` and ``?`` are wildcards, and ``*`` also spans dots.
        only: Module paths to act on, as in ``skip``; empty for all.
    """

    name: ClassVar[str] = "int8-products"
    effect: ClassVar[Effect] = Effect.LOSSY
    purpose: ClassVar[Purpose] = Purpose.SPEED

    ranges: str = "mse"
    percentile: float = 99.99
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.ranges not in METHODS:
            raise ValueError(f"ranges is {self.ranges!r}, not one of {', '.join(METHODS)}")
        if not 0.0 < self.percentile <= 100.0:
            raise ValueError(f"percentile is {self.percentile}, not in (0, 100]")

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Rewrite the products of ``model`` in place. Operands quantized once stay as they are: a rerun changes 0."""
        unfit = _unfit(model, context)
        if unfit is not None:
            return Outcome(0, (unfit,))
        nodes, refused = _products(model, Selection(self.skip, self.only))
        if not nodes:
            return Outcome(0, tuple(refused))
        if context.observe is None:
            return Outcome(0, (Refusal("", "calibration data is needed", "compile with data"),))
        operands = dict.fromkeys(needed(value) for node in nodes for value in node.inputs)
        wanted = tuple(value for value in operands if not _is_softmax(value))
        seen = context.observe(model, wanted) if wanted else {}
        changed = 0
        quantizers = _Quantizers(model.graph, self, seen)
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


class _Quantizers:
    """The operands of one graph, quantized and back: each value once in each form."""

    def __init__(self, graph: ir.Graph, options: Int8Products, seen: Mapping[str, Activation]) -> None:
        self._graph = graph
        self._names = Names(graph)
        self._options = options
        self._seen = seen
        self._made: dict[tuple[ir.Value, bool], ir.Value] = {}

    def quantized(self, node: ir.Node, position: int) -> ir.Value:
        """What a product is to read in the place of an operand."""
        source = needed(node.inputs[position])
        clip = self._range(source)
        signed = position == 1 or clip.low < 0.0
        if (source, signed) not in self._made:
            step = _symmetric(clip) if signed else clip.scale
            self._made[source, signed] = self._quantize(node, source, step, signed)
        return self._made[source, signed]

    def _quantize(self, node: ir.Node, source: ir.Value, step: np.float32, signed: bool) -> ir.Value:
        kind = ir.DataType.INT8 if signed else ir.DataType.UINT8
        base = f"{source.name or 'x'}_{kind.name.lower()}"
        scale = add_constant(self._graph, self._names.fresh(f"{base}_scale"), np.asarray(step))
        zero = add_constant(self._graph, self._names.fresh(f"{base}_zero_point"), np.zeros((), kind.numpy()))
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
        return clipping_range(self._seen[source.name or ""], self._options.ranges, self._options.percentile)


def _symmetric(clip: Range) -> np.float32:
    """The step of an int8 quantizer without zero point that reaches as far as the range."""
    return max(np.float32(max(-clip.low, clip.high) / FULL_RANGE), np.finfo(np.float32).tiny)


def _varies(value: ir.Value, seen: Mapping[str, Activation]) -> bool:
    return _is_softmax(value) or (value.name in seen and not is_constant(seen[value.name or ""]))


def _products(model: ir.Model, selection: Selection) -> tuple[list[ir.Node], list[Refusal]]:
    """The products to quantize, in graph order, and why not the others."""
    found = [node for node in model.graph if is_operator(node, "MatMul") and _of_activations(node)]
    refused = selection.idle([module_path(node) for node in found], "product of two activations")
    nodes: list[ir.Node] = []
    for node in found:
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


def _of_activations(node: ir.Node) -> bool:
    """Whether neither operand is a constant, or quantized already."""
    return not any(
        constant_of(value) is not None or producer(value, "DequantizeLinear") is not None for value in node.inputs
    )


def _is_softmax(value: ir.Value) -> bool:
    return producer(value, "Softmax") is not None


def _unfit(model: ir.Model, context: Context) -> Refusal | None:
    provider = context.target.provider
    if provider != OPENVINO_PROVIDER:
        return Refusal("", f"{provider} has no fast int8 kernel for products of activations", "compile for openvino")
    if opset(model) < _FIRST_OPSET:
        return Refusal("", f"opset {opset(model)} is too old", "convert the model to opset 17 or later")
    return None
