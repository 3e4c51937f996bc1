"""fuse-bias-gelu."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from passes.base import Context, Effect, Outcome, Purpose, Refusal
from passes.shapes import last_dim
from passes.sites import constant_of
from passes.surgery import (
    MICROSOFT,
    build,
    is_operator,
    is_vector,
    needed,
    only_user,
    producer,
    replace,
    require_microsoft,
)


@dataclass(frozen=True)
class FuseBiasGelu:
    """Turn ``Gelu(x + bias)`` with a constant bias vector into com.microsoft BiasGelu, of the tanh form into FastGelu.

    Refused: a sum that others read too, a bias that is no vector as long as the last axis, targets without
    com.microsoft.
    """

    name: ClassVar[str] = "fuse-bias-gelu"
    effect: ClassVar[Effect] = Effect.EXACT
    purpose: ClassVar[Purpose] = Purpose.SPEED

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Fuse; counts the pairs."""
        changed = 0
        refused: list[Refusal] = []
        for gelu in [node for node in model.graph if is_operator(node, "Gelu")]:
            add = producer(gelu.inputs[0], "Add")
            if add is None:
                continue
            operands = _operands(add)
            if MICROSOFT not in context.target.domains:
                refused.append(Refusal(str(gelu.name), f"target {context.target.name} has no com.microsoft operators"))
            elif operands is None:
                refused.append(Refusal(str(gelu.name), "neither operand is a constant vector as long as the last axis"))
            elif only_user(add.outputs[0]) is None:
                refused.append(Refusal(str(gelu.name), "the sum before it is used elsewhere too"))
            else:
                _fuse(gelu, *operands)
                changed += 1
        if changed:
            require_microsoft(model)
        return Outcome(changed, tuple(refused))


def _operands(add: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    left, right = needed(add.inputs[0]), needed(add.inputs[1])
    for source, bias in ((left, right), (right, left)):
        tensor = constant_of(bias)
        if tensor is not None and is_vector(bias) and tensor.size == last_dim(source):
            return source, bias
    return None


def _fuse(gelu: ir.Node, source: ir.Value, bias: ir.Value) -> None:
    form = gelu.attributes.get("approximate")
    op_type = "FastGelu" if form is not None and form.as_string() == "tanh" else "BiasGelu"
    name = str(gelu.outputs[0].name)
    fused = build(op_type, [source, bias], like=gelu, name=name, domain=MICROSOFT)
    replace(gelu, [fused], fused.outputs[0])
