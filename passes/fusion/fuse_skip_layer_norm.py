"""fuse-skip-layer-norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from passes.base import Context, Effect, Outcome, Purpose, Refusal
from passes.shapes import dims_of, last_dim, same_dims
from passes.sites import constant_of, float_attribute, integer_attribute
from passes.surgery import (
    MICROSOFT,
    build,
    is_operator,
    is_vector,
    needed,
    only_user,
    producer,
    remove_dead,
    replace,
    require_microsoft,
)

_SUM_OUTPUT = 3
"""Index of the output of the fused operators that is the sum before the normalization."""
_FUSED = {
    "LayerNormalization": "SkipLayerNormalization",
    "RMSNormalization": "SkipSimplifiedLayerNormalization",
    "SimplifiedLayerNormalization": "SkipSimplifiedLayerNormalization",
}


@dataclass(frozen=True)
class FuseSkipLayerNorm:
    """Turn ``LayerNormalization(x + skip)`` over the last of three axes into com.microsoft SkipLayerNormalization.

    Likewise RMSNormalization and SimplifiedLayerNormalization into SkipSimplifiedLayerNormalization. A constant bias
    vector added to x or skip before goes in as its bias; a sum that others read too is taken from the fused operator's
    own output. Refused: operands not provably of one shape, other axes, more outputs than the first, targets without
    com.microsoft.
    """

    name: ClassVar[str] = "fuse-skip-layer-norm"
    effect: ClassVar[Effect] = Effect.EXACT
    purpose: ClassVar[Purpose] = Purpose.SPEED

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Fuse; counts the normalizations."""
        changed = 0
        refused: list[Refusal] = []
        for norm in [node for node in model.graph if is_operator(node, *_FUSED)]:
            add = producer(norm.inputs[0], "Add")
            if add is None:
                continue
            reason = _reason_against(norm, add, context)
            if reason:
                refused.append(Refusal(str(norm.name), reason))
            else:
                _fuse(norm, add)
                changed += 1
        if changed:
            require_microsoft(model)
        return Outcome(changed, tuple(refused))


def _reason_against(norm: ir.Node, add: ir.Node, context: Context) -> str:
    left, right = dims_of(add.inputs[0]), dims_of(add.inputs[1])
    unequal = f"the operands of the sum are not provably of one shape of rank 3: {left} and {right}"
    moments_read = any(value.uses() or value.is_graph_output() for value in norm.outputs[1:])
    plain = all(value is None or is_vector(value) for value in norm.inputs[1:])
    reasons = (
        (MICROSOFT not in context.target.domains, f"target {context.target.name} has no com.microsoft operators"),
        (not same_dims(left, right) or len(left or ()) != 3, unequal),
        (integer_attribute(norm, "axis", -1) not in (-1, 2), "it does not normalize the last axis"),
        (moments_read, "its mean or deviation is used"),
        (not plain, "its scale or bias is no constant vector"),
        (add.outputs[0].is_graph_output(), "the sum before it is an output of the graph"),
    )
    return next((reason for applies, reason in reasons if applies), "")


def _fuse(norm: ir.Node, add: ir.Node) -> None:
    source, skip, bias = _without_bias(needed(add.inputs[0]), needed(add.inputs[1]))
    total = add.outputs[0]
    shared = len(total.uses()) > 1
    inputs: list[ir.Value | None] = [source, skip, norm.inputs[1], bias]
    if norm.op_type == "LayerNormalization":
        inputs.insert(3, norm.inputs[2] if len(norm.inputs) > 2 else None)
    while inputs[-1] is None:
        inputs.pop()
    fused = build(
        _FUSED[norm.op_type],
        inputs,
        like=norm,
        name=str(norm.outputs[0].name),
        domain=MICROSOFT,
        attributes={"epsilon": float_attribute(norm, "epsilon", 1e-5)},
        outputs=_SUM_OUTPUT + 1 if shared else 1,
    )
    for unused in fused.outputs[1:_SUM_OUTPUT]:
        unused.name = ""
    replace(norm, [fused], fused.outputs[0], at=add)
    if shared:
        new = fused.outputs[_SUM_OUTPUT]
        name, new.type, new.shape = total.name, total.type, total.shape
        total.replace_all_uses_with(new)
        remove_dead([total])
        new.name = name


def _without_bias(source: ir.Value, skip: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """``(x, skip, bias)`` where an operand is ``x + bias`` for nobody else and bias a constant vector."""
    for value, other in ((source, skip), (skip, source)):
        add = producer(value, "Add")
        if add is None or only_user(value) is None:
            continue
        for bias, plain in ((add.inputs[1], add.inputs[0]), (add.inputs[0], add.inputs[1])):
            tensor = constant_of(bias)
            fits = tensor is not None and is_vector(bias) and tensor.size == last_dim(value)
            if fits and same_dims(dims_of(plain), dims_of(value)):
                return needed(plain), other, bias
    return source, skip, None
