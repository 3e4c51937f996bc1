"""fuse-rms-norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from passes.base import Context, Effect, Outcome, Purpose, Refusal
from passes.shapes import last_dim
from passes.splice import label
from passes.surgery import build, initializer, is_operator, needed, only_user, opset, producer, replace, scalar

from .norms import centered_from, is_scale_of, mean_argument, other_input, plus_epsilon, squared

_OPSET = 23


@dataclass(frozen=True)
class _Match:
    """``x`` in its own type, the constant that its unit form is multiplied by (None: nothing), and the chain's end."""

    source: ir.Value
    epsilon: float
    scale: ir.Value | None
    last: ir.Node


@dataclass(frozen=True)
class FuseRmsNorm:
    """Turn ``x / sqrt(mean(x^2) + eps) * scale`` over the last axis into RMSNormalization of opset 23.

    | part        | forms                                                                                     |
    |-------------|-------------------------------------------------------------------------------------------|
    | the square  | Pow(x, 2), Mul(x, x)                                                                      |
    | eps         | a constant between 0 and 1; none: 0 (exporters drop one of 1e-8)                          |
    | the root    | Div(x, Sqrt(v)); Mul(x, Reciprocal(Sqrt(v))), (x, Div(1, Sqrt(v))), (x, Pow(v, -0.5))     |
    | the casts   | x to float32 before, the unit form back to the type of x before the scale; or neither     |
    | the scale   | a constant vector as long as the last axis (Gemma's ``1 + w`` once folded), either operand |

    Without a scale behind it the operator gets ones. The axis may be that of the model or, as for a norm of queries and
    keys, of a head. Where x is itself ``z - mean(z)``, as Cohere spells layer normalization, that becomes
    LayerNormalization of z. Refused: graphs of an opset below 23, chains whose last axis is of unknown length. Chains
    whose parts others read are none. (Zhang and Sennrich, Root Mean Square Layer Normalization, 2019.)
    """

    name: ClassVar[str] = "fuse-rms-norm"
    effect: ClassVar[Effect] = Effect.EXACT
    purpose: ClassVar[Purpose] = Purpose.SPEED

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Fuse; counts the chains."""
        changed = 0
        refused: list[Refusal] = []
        for node in [node for node in model.graph if is_operator(node, "Sqrt", "Pow")]:
            match = _match(node)
            if match is None:
                continue
            if opset(model) < _OPSET:
                reason = f"RMSNormalization needs opset {_OPSET}, the graph has {opset(model)}"
                refused.append(Refusal(label(match.last), reason, f"Run raise-opset(minimum={_OPSET}) before"))
            elif last_dim(match.source) is None:
                refused.append(Refusal(label(match.last), "the length of its last axis is not known"))
            else:
                _fuse(model.graph, match)
                changed += 1
        return Outcome(changed, tuple(refused))


def _match(root: ir.Node) -> _Match | None:
    """The chain around the root of a mean square."""
    if root.op_type == "Pow" and scalar(root.inputs[1]) != -0.5:
        return None
    mean, epsilon = plus_epsilon(root.inputs[0])
    source = squared(mean_argument(root.inputs[0] if mean is None else mean))
    unit = None if source is None else _unit(root, source)
    if source is None or unit is None:
        return None
    result = unit.outputs[0]
    scaled, scale = _scaled(result, source)
    before = producer(source, "Cast")
    back = only_user(result)
    if before is None or back is None or not is_operator(back, "Cast"):
        return _Match(source, epsilon, scale, scaled or unit)
    narrow = needed(before.inputs[0])
    if source.dtype != ir.DataType.FLOAT or int(narrow.dtype or 0) != back.attributes["to"].as_int():
        return _Match(source, epsilon, None, unit)
    scaled, scale = _scaled(back.outputs[0], narrow)
    return _Match(narrow, epsilon, scale, scaled or back)


def _unit(root: ir.Node, source: ir.Value) -> ir.Node | None:
    """The node that makes x over its root mean square, from the Sqrt or Pow of the mean square."""
    user = only_user(root.outputs[0])
    if user is None:
        return None
    if root.op_type == "Sqrt":
        if is_operator(user, "Div") and user.inputs[0] is source:
            return user
        inverse = is_operator(user, "Reciprocal") or (is_operator(user, "Div") and scalar(user.inputs[0]) == 1.0)
        root, above = user, only_user(user.outputs[0])
        if not inverse or above is None:
            return None
        user = above
    multiplies = is_operator(user, "Mul") and other_input(user, root.outputs[0]) is source
    return user if multiplies else None


def _scaled(unit: ir.Value, like: ir.Value) -> tuple[ir.Node | None, ir.Value | None]:
    """The Mul by a constant vector that alone reads the value, and the vector; None twice where there is none."""
    user = only_user(unit)
    if user is None or not is_operator(user, "Mul"):
        return None, None
    scale = other_input(user, unit)
    return (user, scale) if is_scale_of(scale, like) else (None, None)


def _fuse(graph: ir.Graph, match: _Match) -> None:
    last, source = match.last, match.source
    scale = match.scale
    if scale is None:
        width = last_dim(source) or 0
        scale = initializer(graph, f"norm.ones.{width}", np.ones(width), source.dtype or ir.DataType.FLOAT)
    attributes = {"axis": -1, "epsilon": match.epsilon, "stash_type": int(ir.DataType.FLOAT)}
    whole, name = centered_from(source), str(last.outputs[0].name)
    op_type = "RMSNormalization" if whole is None else "LayerNormalization"
    node = build(op_type, [source if whole is None else whole, scale], like=last, name=name, attributes=attributes)
    replace(last, [node], node.outputs[0])
