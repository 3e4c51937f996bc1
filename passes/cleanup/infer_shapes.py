"""infer-shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes import common

from passes.base import Context, Effect, Outcome, Purpose

from .propagate import propagate


@dataclass(frozen=True)
class InferShapes:
    """Annotate values with the types and shapes that ONNX's inference finds; other passes prove things from them.

    Names of dimensions are carried from the inputs through the operators of a transformer, so that equal lengths are
    known to be equal. Types and shapes of the graph's inputs and outputs stay. Counts the values that got a new shape.
    """

    name: ClassVar[str] = "infer-shapes"
    effect: ClassVar[Effect] = Effect.EXACT
    purpose: ClassVar[Purpose] = Purpose.FORM

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Annotate; refuses nothing."""
        found = _infer(model) if any(value.shape is None for node in model.graph for value in node.outputs) else 0
        return Outcome(found + propagate(model))


def _infer(model: ir.Model) -> int:
    """ONNX's own inference for the values without a shape; what is annotated already stays."""
    promised = [(value, value.type, value.shape) for value in (*model.graph.inputs, *model.graph.outputs)]
    values = [value for node in model.graph for value in node.outputs]
    known = {value: value.shape for value in values if value.shape is not None}
    common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
    found = sum(value.shape is not None and value not in known for value in values)
    for annotated, old in known.items():
        annotated.shape = old
    for value, kind, shape in promised:
        value.type, value.shape = kind, shape
    return found
