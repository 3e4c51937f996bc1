"""fold-constants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants_ir

from passes.base import Context, Effect, Outcome, Purpose

_ROUNDS = 8
"""Folding feeds folding; each round but the last must have changed something."""


@dataclass(frozen=True)
class FoldConstants:
    """Compute what does not depend on the graph's inputs, and turn Constant nodes into initializers.

    Built on onnxscript's folder, run until it changes nothing; the types and shapes that it infers on the way stay,
    save those of the graph's inputs and outputs, a promise to the caller. Counts nodes removed or replaced.

    Attributes:
        maximum_elements: Results larger than this are not stored, nor computed from inputs larger than this; transposed
            weights are, as they take the place of the original.
    """

    name: ClassVar[str] = "fold-constants"
    effect: ClassVar[Effect] = Effect.EXACT
    purpose: ClassVar[Purpose] = Purpose.FORM

    maximum_elements: int = 262144

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Fold; refuses nothing."""
        promised = [(value.name, value.type, value.shape) for value in (*model.graph.inputs, *model.graph.outputs)]
        changed = 0
        for _ in range(_ROUNDS):
            nodes = set(model.graph.all_nodes())
            fold_constants_ir(
                model,
                onnx_shape_inference=True,
                input_size_limit=self.maximum_elements,
                output_size_limit=self.maximum_elements,
            )
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
            removed = len(nodes - set(model.graph.all_nodes()))
            changed += removed
            if removed == 0:
                break
        for value, (name, kind, shape) in zip((*model.graph.inputs, *model.graph.outputs), promised, strict=True):
            value.name, value.type, value.shape = name, kind, shape
        return Outcome(changed)
