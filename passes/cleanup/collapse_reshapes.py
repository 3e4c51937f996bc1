"""collapse-reshapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from passes.base import Context, Effect, Outcome, Purpose, Refusal
from passes.shapes import contents_of, dims_of, reshaped, same_dims
from passes.surgery import bypass, needed, producer, remove_dead


@dataclass(frozen=True)
class CollapseReshapes:
    """Remove Reshape nodes that lead nowhere.

    A Reshape of a Reshape reads the first one's input, if its shape copies no dimension (0) from it; a Reshape to the
    shape that its input has already is removed. Proven from shape annotations and shape computations: exporters leave
    ``[B, S, H*D] -> [B, S, H, D] -> [B, S, H*D]`` around fused attention. Refused: Reshapes that make a graph output.
    """

    name: ClassVar[str] = "collapse-reshapes"
    effect: ClassVar[Effect] = Effect.EXACT
    purpose: ClassVar[Purpose] = Purpose.FORM

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Remove them; counts the Reshapes removed or made to read another input."""
        changed = 0
        refused: list[Refusal] = []
        for node in [node for node in model.graph if node.op_type == "Reshape"]:
            if node.graph is None or producer(node.outputs[0], "Reshape") is None:
                continue
            changed += _skip_inner(node)
            source = needed(node.inputs[0])
            if not same_dims(dims_of(source), reshaped(node)):
                continue
            if bypass(node, source):
                changed += 1
            else:
                refused.append(Refusal(str(node.name), "it does nothing, but makes a graph output"))
        return Outcome(changed, tuple(refused))


def _skip_inner(node: ir.Node) -> int:
    """Let a Reshape of a Reshape read what the inner one reads; 1 if it was changed."""
    inner = producer(node.inputs[0], "Reshape")
    if inner is None:
        return 0
    wanted = contents_of(node.inputs[1])
    if wanted is None or 0 in wanted:
        return 0
    old = needed(node.inputs[0])
    node.replace_input_with(0, inner.inputs[0])
    remove_dead([old])
    return 1
