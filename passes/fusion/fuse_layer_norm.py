"""fuse-layer-norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from passes.base import Context, Effect, Outcome, Purpose, Refusal
from passes.shapes import last_dim
from passes.sites import constant_of, integer_attribute
from passes.surgery import build, integers, is_operator, is_vector, needed, only_user, opset, producer, replace, scalar

_OPSET = 17


@dataclass(frozen=True)
class _Match:
    source: ir.Value
    epsilon: float
    scale: ir.Value
    bias: ir.Value | None
    last: ir.Node


@dataclass(frozen=True)
class FuseLayerNorm:
    """Turn ``d / sqrt(mean(d^2) + eps) * scale + bias``, d = x - mean(x) over the last axis, into LayerNormalization.

    The square is Pow(d, 2) or Mul(d, d); without the last Add there is no bias. Refused: graphs of an opset below 17,
    chains whose scale is no constant vector as long as the last axis (LayerNormalization needs one).
    """

    name: ClassVar[str] = "fuse-layer-norm"
    effect: ClassVar[Effect] = Effect.EXACT
    purpose: ClassVar[Purpose] = Purpose.SPEED

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Fuse; counts the chains."""
        changed = 0
        refused: list[Refusal] = []
        for node in [node for node in model.graph if is_operator(node, "Sqrt")]:
            match = _match(node)
            if isinstance(match, Refusal):
                refused.append(match)
            elif match is not None and opset(model) < _OPSET:
                reason = f"LayerNormalization needs opset {_OPSET}, the graph has {opset(model)}"
                refused.append(Refusal(str(node.name), reason, "Run raise-opset before"))
            elif match is not None:
                _fuse(match)
                changed += 1
        return Outcome(changed, tuple(refused))


def _match(root: ir.Node) -> _Match | Refusal | None:
    """The chain around the Sqrt of a variance."""
    variance, epsilon = _plus_epsilon(root.inputs[0])
    centered = _squared(_mean_argument(variance))
    source = _centered_from(centered)
    divide = only_user(root.outputs[0])
    if source is None or divide is None or not is_operator(divide, "Div") or divide.inputs[0] is not centered:
        return None
    scaled = only_user(divide.outputs[0])
    if scaled is None or not is_operator(scaled, "Mul"):
        return Refusal(str(divide.name), "it is not multiplied by a scale", "")
    scale = _other(scaled, divide.outputs[0])
    if not _fits(scale, source):
        return Refusal(str(scaled.name), "its scale is no constant vector as long as the last axis", "")
    shifted = only_user(scaled.outputs[0])
    if shifted is not None and is_operator(shifted, "Add"):
        bias = _other(shifted, scaled.outputs[0])
        if _fits(bias, source):
            return _Match(source, epsilon, needed(scale), bias, shifted)
    return _Match(source, epsilon, needed(scale), None, scaled)


def _fuse(match: _Match) -> None:
    last = match.last
    inputs = [match.source, match.scale, match.bias] if match.bias is not None else [match.source, match.scale]
    attributes = {"axis": -1, "epsilon": match.epsilon}
    node = build("LayerNormalization", inputs, like=last, name=str(last.outputs[0].name), attributes=attributes)
    replace(last, [node], node.outputs[0])


def _plus_epsilon(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    node = producer(value, "Add")
    if node is None:
        return None, 0.0
    left, right = node.inputs
    for mean, number in ((left, scalar(right)), (right, scalar(left))):
        if number is not None and 0.0 < number < 1.0:
            return mean, number
    return None, 0.0


def _mean_argument(value: ir.Value | None) -> ir.Value | None:
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


def _squared(value: ir.Value | None) -> ir.Value | None:
    """``x`` where the value is its square."""
    power, product = producer(value, "Pow"), producer(value, "Mul")
    if power is not None:
        return power.inputs[0] if scalar(power.inputs[1]) == 2.0 else None
    return product.inputs[0] if product is not None and product.inputs[0] is product.inputs[1] else None


def _centered_from(value: ir.Value | None) -> ir.Value | None:
    """``x`` where the value is x minus its mean."""
    node = producer(value, "Sub")
    source = node.inputs[0] if node is not None else None
    return source if node is not None and _mean_argument(node.inputs[1]) is source else None


def _other(node: ir.Node, value: ir.Value) -> ir.Value | None:
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]


def _fits(vector: ir.Value | None, source: ir.Value) -> bool:
    tensor = constant_of(vector)
    if tensor is None or not is_vector(vector) or tensor.dtype != source.dtype:
        return False
    return last_dim(source) is not None and tensor.size == last_dim(source)
