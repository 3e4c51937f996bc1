"""fold-batch-norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from passes.affine import Floats, constant_floats
from passes.base import Context, Effect, Outcome, Purpose, Refusal
from passes.sites import constant_of, float_attribute, integer_attribute
from passes.splice import Names, add_constant, label, take_place
from passes.surgery import is_operator, needed, only_user, producer, remove_dead

_EPSILON = 1e-5
"""Of the operator, where it states none."""


@dataclass(frozen=True)
class FoldBatchNorm:
    """Fold a BatchNormalization behind a convolution into its kernel and bias.

    With ``s = scale / sqrt(variance + epsilon)`` the kernel of each output becomes ``W s`` and the bias
    ``(b - mean) s + shift``, computed in float64. Any number of axes, groups and dilations. Refused: outputs of the
    convolution that others read too, statistics of the batch at hand (training mode), kernels or statistics that are no
    float32 constants, results that are not finite.
    """

    name: ClassVar[str] = "fold-batch-norm"
    effect: ClassVar[Effect] = Effect.EXACT
    purpose: ClassVar[Purpose] = Purpose.FORM

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Fold; counts the normalizations."""
        names = Names(model.graph)
        changed = 0
        refused: list[Refusal] = []
        for node in [node for node in model.graph if is_operator(node, "BatchNormalization")]:
            maker = producer(node.inputs[0], "Conv")
            if maker is None:
                continue
            reason = _fold(model.graph, names, maker, node)
            if reason:
                refused.append(Refusal(label(node), reason))
            else:
                changed += 1
        return Outcome(changed, tuple(refused))


def _fold(graph: ir.Graph, names: Names, maker: ir.Node, norm: ir.Node) -> str:
    """Fold one, or tell why not."""
    tensor = constant_of(maker.inputs[1])
    if only_user(maker.outputs[0]) is not norm:
        return "what it normalizes is used elsewhere too"
    if integer_attribute(norm, "training_mode", 0) != 0 or any(value.uses() for value in norm.outputs[1:]):
        return "it takes the statistics of the batch at hand"
    if tensor is None or tensor.dtype != ir.DataType.FLOAT or maker.inputs[0] is None:
        return "the kernel is no constant of float32"
    kernel: Floats = tensor.numpy()
    vectors = [constant_floats(value, len(kernel)) for value in norm.inputs[1:5]]
    has_bias = len(maker.inputs) > 2 and maker.inputs[2] is not None
    before = constant_floats(maker.inputs[2], len(kernel)) if has_bias else np.zeros(len(kernel), np.float32)
    if before is None or any(vector is None for vector in vectors):
        return "the bias or the statistics are no constants of float32"
    scale, shift, mean, variance = (np.asarray(vector, np.float64) for vector in vectors)
    with np.errstate(all="ignore"):
        factor = scale / np.sqrt(variance + float_attribute(norm, "epsilon", _EPSILON))
        weight = (kernel * factor.reshape(-1, *[1] * (kernel.ndim - 1))).astype(np.float32)
        bias = ((before - mean) * factor + shift).astype(np.float32)
    if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        return "the folded numbers are not finite"
    _put(graph, names, maker, norm, (weight, bias))
    return ""


def _put(graph: ir.Graph, names: Names, maker: ir.Node, norm: ir.Node, arrays: tuple[Floats, Floats]) -> None:
    old = [value for value in (*maker.inputs[1:], *norm.inputs[1:]) if value is not None]
    base = needed(maker.inputs[1]).name or label(maker)
    weight, bias = (
        add_constant(graph, names.fresh(f"{base}.{part}"), array)
        for part, array in zip(("folded", "folded_bias"), arrays, strict=True)
    )
    maker.resize_inputs(3)
    maker.replace_input_with(1, weight)
    maker.replace_input_with(2, bias)
    take_place(maker.outputs[0], norm.outputs[0])
    graph.remove(norm, safe=True)
    remove_dead(dict.fromkeys(old))
