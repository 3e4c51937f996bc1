"""static-reshapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from passes.base import Context, Effect, Outcome, Purpose
from passes.shapes import contents_of, dims_of
from passes.surgery import initializer, integers, is_operator, needed, remove_dead


@dataclass(frozen=True)
class StaticReshapes:
    """Write the target of a Reshape as constants: nothing is then computed, run by run, to say a shape.

    A length that the input has at the same place becomes 0 (copied), one other length that is unknown becomes -1, the
    rest are numbers: ``[B, S, 64] -> [B, S, 4, 16]`` gets the target ``[0, 0, 4, 16]``. Left alone: targets of which
    too little is known for that, or with a length of 0.
    """

    name: ClassVar[str] = "static-reshapes"
    effect: ClassVar[Effect] = Effect.EXACT
    purpose: ClassVar[Purpose] = Purpose.SPEED

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Write them; counts the Reshapes."""
        return Outcome(sum(_write(model.graph, node) for node in model.graph if is_operator(node, "Reshape")))


def _write(graph: ir.Graph, node: ir.Node) -> int:
    if integers(node.inputs[1]) is not None:
        return 0
    target = _target(node)
    if target is None:
        return 0
    old = needed(node.inputs[1])
    name = "shape." + ".".join("n" if dim < 0 else str(dim) for dim in target)
    node.replace_input_with(1, initializer(graph, name, target, ir.DataType.INT64))
    node.attributes.pop("allowzero", None)
    remove_dead([old])
    return 1


def _target(node: ir.Node) -> list[int] | None:
    """The target in constants, or None."""
    source, wanted = dims_of(node.inputs[0]), contents_of(node.inputs[1])
    if source is None or wanted is None or 0 in wanted:
        return None
    target: list[int] = []
    for index, dim in enumerate(wanted):
        same = index < len(source) and source[index] == dim
        target.append(dim if isinstance(dim, int) else 0 if same else -1)
    return target if target.count(-1) <= 1 else None
