"""fuse-silu."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from passes.base import Context, Effect, Outcome, Purpose, Refusal
from passes.splice import label
from passes.surgery import MICROSOFT, build, is_operator, needed, only_user, replace, require_microsoft

from .norms import other_input


@dataclass(frozen=True)
class FuseSilu:
    """Turn ``x * Sigmoid(x)``, in either order, into com.microsoft QuickGelu of alpha 1, which is SiLU.

    Likewise Swish of opset 24 with an alpha of 1 or another. Refused: targets without com.microsoft. A Sigmoid that
    others read too, or that multiplies something else (a gate), is none.
    """

    name: ClassVar[str] = "fuse-silu"
    effect: ClassVar[Effect] = Effect.EXACT
    purpose: ClassVar[Purpose] = Purpose.SPEED

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Fuse; counts the activations."""
        changed = 0
        refused: list[Refusal] = []
        for node in [node for node in model.graph if is_operator(node, "Sigmoid", "Swish")]:
            last = _product(node)
            if last is None:
                continue
            if MICROSOFT not in context.target.domains:
                refused.append(Refusal(label(last), f"target {context.target.name} has no com.microsoft operators"))
                continue
            alpha = node.attributes.get("alpha")
            attributes = {"alpha": 1.0 if alpha is None else alpha.as_float()}
            source, name = needed(node.inputs[0]), str(last.outputs[0].name)
            fused = build("QuickGelu", [source], like=last, name=name, domain=MICROSOFT, attributes=attributes)
            replace(last, [fused], fused.outputs[0])
            changed += 1
        if changed:
            require_microsoft(model)
        return Outcome(changed, tuple(refused))


def _product(node: ir.Node) -> ir.Node | None:
    """The last node of the activation: the Mul of a Sigmoid with what it reads, or the Swish itself."""
    if node.op_type == "Swish":
        return node
    product = only_user(node.outputs[0])
    if product is None or not is_operator(product, "Mul"):
        return None
    return product if other_input(product, node.outputs[0]) is node.inputs[0] else None
