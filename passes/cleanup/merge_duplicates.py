"""merge-duplicates."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from passes.base import Context, Effect, Outcome, Purpose
from passes.surgery import is_operator

_DRAWS = ("RandomUniform", "RandomNormal", "RandomUniformLike", "RandomNormalLike", "Multinomial", "Bernoulli")
_RANDOM = (*_DRAWS, "Dropout")
_LARGEST = 64
"""Elements of a tensor attribute that are compared; nodes with larger ones are left alone."""


@dataclass(frozen=True)
class MergeDuplicates:
    """Keep one of several nodes that do the same to the same inputs (common subexpressions), in the main graph.

    Left alone: operators that draw random numbers, nodes with subgraphs, nodes that make a graph output.
    """

    name: ClassVar[str] = "merge-duplicates"
    effect: ClassVar[Effect] = Effect.EXACT
    purpose: ClassVar[Purpose] = Purpose.FORM

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Merge them; counts the nodes removed."""
        seen: dict[Hashable, ir.Node] = {}
        changed = 0
        for node in list(model.graph):
            key = _key(node)
            if key is None:
                continue
            first = seen.setdefault(key, node)
            if first is node or any(value.is_graph_output() for value in node.outputs):
                continue
            for old, new in zip(node.outputs, first.outputs, strict=True):
                old.replace_all_uses_with(new)
                new.shape = old.shape if new.shape is None else new.shape
            model.graph.remove(node, safe=True)
            changed += 1
        return Outcome(changed)


def _key(node: ir.Node) -> Hashable | None:
    if is_operator(node, *_RANDOM):
        return None
    attributes: list[Hashable] = []
    for name, attribute in sorted(node.attributes.items()):
        value = _attribute_key(attribute)
        if value is None:
            return None
        attributes.append((name, value))
    inputs = tuple(None if value is None else id(value) for value in node.inputs)
    return node.op_identifier(), tuple(bool(value.name) for value in node.outputs), inputs, tuple(attributes)


def _attribute_key(attribute: ir.Attr) -> Hashable | None:
    kinds = ir.AttributeType
    if attribute.is_ref() or attribute.type in (kinds.GRAPH, kinds.GRAPHS, kinds.TENSORS, kinds.SPARSE_TENSOR):
        return None
    if attribute.type == kinds.TENSOR:
        tensor = attribute.as_tensor()
        if tensor.size > _LARGEST or tensor.dtype.is_string():
            return None
        return tensor.dtype, tuple(tensor.shape.numpy()), tensor.tobytes()
    if attribute.type in (kinds.INTS, kinds.FLOATS, kinds.STRINGS):
        return attribute.type, tuple(attribute.value)
    return attribute.type, str(attribute.value)
