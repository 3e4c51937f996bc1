"""fuse-layer-norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from passes.base import Context, Effect, Outcome, Purpose, Refusal
from passes.surgery import build, is_operator, needed, only_user, opset, replace

from .norms import centered_from, is_scale_of, mean_argument, other_input, plus_epsilon, squared

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
    variance, epsilon = plus_epsilon(root.inputs[0])
    centered = squared(mean_argument(variance))
    source = centered_from(centered)
    divide = only_user(root.outputs[0])
    if source is None or divide is None or not is_operator(divide, "Div") or divide.inputs[0] is not centered:
        return None
    scaled = only_user(divide.outputs[0])
    if scaled is None or not is_operator(scaled, "Mul"):
        return Refusal(str(divide.name), "it is not multiplied by a scale", "")
    scale = other_input(scaled, divide.outputs[0])
    if not is_scale_of(scale, source):
        return Refusal(str(scaled.name), "its scale is no constant vector as long as the last axis", "")
    shifted = only_user(scaled.outputs[0])
    if shifted is not None and is_operator(shifted, "Add"):
        bias = other_input(shifted, scaled.outputs[0])
        if is_scale_of(bias, source):
            return _Match(source, epsilon, needed(scale), bias, shifted)
    return _Match(source, epsilon, needed(scale), None, scaled)


def _fuse(match: _Match) -> None:
    last = match.last
    inputs = [match.source, match.scale, match.bias] if match.bias is not None else [match.source, match.scale]
    attributes = {"axis": -1, "epsilon": match.epsilon}
    node = build("LayerNormalization", inputs, like=last, name=str(last.outputs[0].name), attributes=attributes)
    replace(last, [node], node.outputs[0])
