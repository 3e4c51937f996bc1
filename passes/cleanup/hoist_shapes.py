"""hoist-shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from passes.base import Context, Effect, Outcome, Purpose
from passes.shapes import dims_of
from passes.sites import constant_of, integer_attribute
from passes.surgery import build, initializer, integers, is_operator, needed, producer, remove_dead, replace


@dataclass(frozen=True)
class HoistShapes:
    """Read lengths from the graph's inputs instead of from values computed on the way.

    ``Gather(Shape(x), i)`` becomes a constant where that length is a known number, and reads the shape of the first
    graph input that has an axis of the same name otherwise: nothing inside a graph is then kept for its shape only.
    """

    name: ClassVar[str] = "hoist-shapes"
    effect: ClassVar[Effect] = Effect.EXACT
    purpose: ClassVar[Purpose] = Purpose.FORM

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Hoist them; counts the lengths."""
        axes: dict[str, tuple[ir.Value, int]] = {}
        for value in model.graph.inputs:
            for axis, dim in enumerate(value.shape or ()):
                if isinstance(dim, ir.SymbolicDim) and dim.value is not None:
                    axes.setdefault(dim.value, (value, axis))
        gathers = [node for node in model.graph if is_operator(node, "Gather")]
        return Outcome(sum(_hoist(model.graph, node, axes) for node in gathers))


def _hoist(graph: ir.Graph, node: ir.Node, axes: dict[str, tuple[ir.Value, int]]) -> int:
    shape, index = producer(node.inputs[0], "Shape"), integers(node.inputs[1])
    if shape is None or index is None or len(index) != 1 or node.outputs[0].is_graph_output():
        return 0
    if "end" in shape.attributes or integer_attribute(shape, "start", 0) != 0 or shape.inputs[0] is None:
        return 0
    source, dims = shape.inputs[0], dims_of(shape.inputs[0])
    if dims is None or not -len(dims) <= index[0] < len(dims):
        return 0
    dim = dims[index[0]]
    if isinstance(dim, int):
        _make_constant(graph, node, dim)
        return 1
    if dim not in axes or axes[dim][0] is source or source.is_graph_input():
        return 0
    value, axis = axes[dim]
    kind, name = ir.DataType.INT64, str(node.outputs[0].name)
    rank = ir.Shape((len(value.shape or ()),))
    made = build("Shape", [value], like=node, name=f"{name}.sizes", dtype=kind, shape=rank)
    place = initializer(graph, f"axis.{axis}.{_rank(node)}", [axis] if _rank(node) else axis, kind)
    gather = build("Gather", [made.outputs[0], place], like=node, name=name, attributes={"axis": 0}, dtype=kind)
    replace(node, [made, gather], gather.outputs[0])
    return 1


def _rank(node: ir.Node) -> int:
    """Rank of the index: that of what it picks from a vector."""
    tensor = constant_of(node.inputs[1])
    return 0 if tensor is None else len(tensor.shape)


def _make_constant(graph: ir.Graph, node: ir.Node, length: int) -> None:
    data = [length] if _rank(node) else length
    constant = initializer(graph, f"length.{length}.{_rank(node)}", data, ir.DataType.INT64)
    upstream = [needed(node.inputs[0]), needed(node.inputs[1])]
    node.outputs[0].replace_all_uses_with(constant)
    graph.remove(node, safe=True)
    remove_dead(upstream)
