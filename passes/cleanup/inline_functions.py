"""inline-functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes import common

from passes.base import Context, Effect, Outcome, Purpose


@dataclass(frozen=True)
class InlineFunctions:
    """Put the bodies of the model's own functions in the place of their calls: passes look at the main graph only.

    Counts the calls replaced and the functions dropped.
    """

    name: ClassVar[str] = "inline-functions"
    effect: ClassVar[Effect] = Effect.EXACT
    purpose: ClassVar[Purpose] = Purpose.FORM

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Inline them; refuses nothing."""
        if not model.functions:
            return Outcome(0)
        calls = sum(node.op_identifier() in model.functions for node in model.graph.all_nodes())
        functions = len(model.functions)
        common.InlinePass()(model)
        drop_unused_functions(model)
        return Outcome(calls + functions - len(model.functions))


def drop_unused_functions(model: ir.Model) -> None:
    """Drop the functions that no node calls."""
    common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]  # its __init__ lacks annotations
