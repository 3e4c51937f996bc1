"""share-initializers."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from passes.base import Context, Effect, Outcome, Purpose
from passes.deferred import DeferredTensor

_Key = tuple[ir.DataType, tuple[int, ...]]


@dataclass(frozen=True)
class ShareInitializers:
    """Keep one of several initializers with the same type, shape and bytes.

    Only tensors that share type and shape with another are read. Initializers that are graph inputs (the caller may
    override them) or outputs, and those of subgraphs, are left alone.
    """

    name: ClassVar[str] = "share-initializers"
    effect: ClassVar[Effect] = Effect.EXACT
    purpose: ClassVar[Purpose] = Purpose.SIZE

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Share them; counts those removed."""
        groups: defaultdict[_Key, list[ir.Value]] = defaultdict(list)
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.dtype.is_string() or value.is_graph_input() or value.is_graph_output():
                continue
            groups[tensor.dtype, tuple(tensor.shape.numpy())].append(value)
        return Outcome(sum(_share(model.graph, group) for group in groups.values() if len(group) > 1))


def _share(graph: ir.Graph, group: list[ir.Value]) -> int:
    kept: dict[Hashable, ir.Value] = {}
    for value in group:
        first = kept.setdefault(_content(value.const_value), value)
        if first is not value:
            value.replace_all_uses_with(first)
            graph.initializers.pop(str(value.name))
    return len(group) - len(kept)


def _content(tensor: ir.TensorProtocol | None) -> Hashable:
    """Equal for equal bytes. What is deferred is not read: it is the same where it is made of the same."""
    if isinstance(tensor, DeferredTensor):
        return tensor.key
    return hashlib.sha256(b"" if tensor is None else tensor.tobytes()).digest()
