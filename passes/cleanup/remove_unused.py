"""remove-unused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes import common

from passes.base import Context, Effect, Outcome, Purpose

from .inline_functions import drop_unused_functions


@dataclass(frozen=True)
class RemoveUnused:
    """Remove nodes, initializers, functions and opset imports that no output depends on.

    Graph inputs and outputs stay, used or not. Counts the things removed, unused optional outputs among them.
    """

    name: ClassVar[str] = "remove-unused"
    effect: ClassVar[Effect] = Effect.EXACT
    purpose: ClassVar[Purpose] = Purpose.FORM

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Remove them; refuses nothing."""
        before = _size(model)
        common.RemoveUnusedNodesPass()(model)
        drop_unused_functions(model)
        common.RemoveUnusedOpsetsPass()(model)
        return Outcome(before - _size(model))


def _size(model: ir.Model) -> int:
    size = len(model.functions) + len(model.graph.opset_imports)
    for graph in model.graphs():
        size += len(graph.initializers)
    for node in model.graph.all_nodes():
        size += 1 + sum(1 for value in node.outputs if value.name)
    return size
