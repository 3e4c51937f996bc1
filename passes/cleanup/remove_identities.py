"""remove-identities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from passes.base import Context, Effect, Outcome, Purpose, Refusal
from passes.sites import constant_of
from passes.surgery import bypass, is_operator, needed


@dataclass(frozen=True)
class RemoveIdentities:
    """Remove nodes that hand their input on unchanged.

    Identity; Cast to the type that the input has already; Dropout outside training; Transpose that permutes nothing.
    One that makes a graph output from a computed value goes too: the value's maker then makes the output. Refused:
    nodes that make a graph output from a graph input, an initializer or another graph output, which ONNX needs.
    """

    name: ClassVar[str] = "remove-identities"
    effect: ClassVar[Effect] = Effect.EXACT
    purpose: ClassVar[Purpose] = Purpose.FORM

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Remove them."""
        changed = 0
        refused: list[Refusal] = []
        for node in list(model.graph.all_nodes()):
            if not _is_identity(node):
                continue
            source = needed(node.inputs[0])
            if bypass(node, source) or _becomes_output(node, source):
                changed += 1
            else:
                name = node.name or str(node.outputs[0].name)
                refused.append(Refusal(name, "it makes a graph output from something that has to keep its own name"))
        return Outcome(changed, tuple(refused))


def _is_identity(node: ir.Node) -> bool:
    if not node.inputs or node.inputs[0] is None:
        return False
    source = node.inputs[0]
    if is_operator(node, "Identity"):
        return True
    if is_operator(node, "Cast"):
        return source.dtype is not None and int(source.dtype) == node.attributes["to"].as_int()
    if is_operator(node, "Transpose") and "perm" in node.attributes:
        order = tuple(node.attributes["perm"].as_ints())
        return order == tuple(range(len(order)))
    return is_operator(node, "Dropout") and not _drops(node)


def _drops(node: ir.Node) -> bool:
    """Whether a Dropout may drop something, or its mask is read."""
    if len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output()):
        return True
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return False
    training = constant_of(node.inputs[2])
    return training is None or bool(training.numpy().any())


def _becomes_output(node: ir.Node, source: ir.Value) -> bool:
    """Let the maker of ``source`` make the graph output in the place of ``node``, if nothing else needs its name."""
    output, maker, graph = node.outputs[0], source.producer(), node.graph
    if graph is None or maker is None or maker.graph is not graph or source.is_graph_output():
        return False
    if sum(value is output for value in graph.outputs) != 1:
        return False
    name, kind, shape = output.name, output.type, output.shape
    output.replace_all_uses_with(source, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    source.name, source.type, source.shape = name, kind or source.type, shape or source.shape
    return True
