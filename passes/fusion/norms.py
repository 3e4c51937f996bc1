"""The parts that the chains of layer and RMS normalization are spelled with."""

from __future__ import annotations

import onnx_ir as ir

from passes.shapes import last_dim
from passes.sites import constant_of, integer_attribute
from passes.surgery import integers, is_vector, producer, scalar


def plus_epsilon(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """``(v, epsilon)`` where the value is ``v + epsilon``, 0 < epsilon < 1; ``(None, 0)`` where it is not."""
    node = producer(value, "Add")
    if node is None:
        return None, 0.0
    left, right = node.inputs
    for other, number in ((left, scalar(right)), (right, scalar(left))):
        if number is not None and 0.0 < number < 1.0:
            return other, number
    return None, 0.0


def mean_argument(value: ir.Value | None) -> ir.Value | None:
    """``x`` where the value is the mean of x over its last axis, kept."""
    node = producer(value, "ReduceMean")
    if node is None or integer_attribute(node, "keepdims", 1) != 1:
        return None
    axes = integers(node.inputs[1]) if len(node.inputs) > 1 else None
    if "axes" in node.attributes:
        axes = tuple(node.attributes["axes"].as_ints())
    source = node.inputs[0]
    rank = len(source.shape) if source is not None and source.shape is not None else 0
    return source if axes is not None and len(axes) == 1 and axes[0] in (-1, rank - 1) else None


def centered_from(value: ir.Value | None) -> ir.Value | None:
    """``x`` where the value is x minus the mean of its last axis."""
    node = producer(value, "Sub")
    source = node.inputs[0] if node is not None else None
    return source if node is not None and mean_argument(node.inputs[1]) is source else None


def squared(value: ir.Value | None) -> ir.Value | None:
    """``x`` where the value is its square, as Pow(x, 2) or Mul(x, x)."""
    power, product = producer(value, "Pow"), producer(value, "Mul")
    if power is not None:
        return power.inputs[0] if scalar(power.inputs[1]) == 2.0 else None
    return product.inputs[0] if product is not None and product.inputs[0] is product.inputs[1] else None


def other_input(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """Of the two inputs of a node the one that is not ``value``."""
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]


def is_scale_of(vector: ir.Value | None, source: ir.Value) -> bool:
    """Whether it is a constant vector of the type of ``source`` and as long as its last axis."""
    tensor = constant_of(vector)
    if tensor is None or not is_vector(vector) or tensor.dtype != source.dtype:
        return False
    return last_dim(source) is not None and tensor.size == last_dim(source)
