"""strip-metadata."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from passes.base import Context, Effect, Outcome, Purpose
from passes.sites import NAME_SCOPES

_OWN = "hasten."


@dataclass(frozen=True)
class StripMetadata:
    """Drop doc strings and metadata: stack traces carry file paths, make graphs large, and differ between machines.

    The module path that torch's exporter leaves on each node stays: sites and reports name weights by it; so does what
    hasten's own export says of the model, under keys that begin with ``hasten.``. Counts the entries dropped.
    """

    name: ClassVar[str] = "strip-metadata"
    effect: ClassVar[Effect] = Effect.EXACT
    purpose: ClassVar[Purpose] = Purpose.SIZE

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Drop them; refuses nothing."""
        changed = sum(_strip(item) for item in _documented(model))
        for value in _values(model):
            changed += len(value.metadata_props) + bool(value.doc_string)
            value.metadata_props.clear()
            value.doc_string = None
        return Outcome(changed)


def _documented(model: ir.Model) -> Iterator[ir.Model | ir.Graph | ir.Node]:
    yield model
    yield from model.graphs()
    yield from model.graph.all_nodes()


def _values(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        yield from graph.inputs
        yield from graph.initializers.values()
    for node in model.graph.all_nodes():
        yield from node.outputs


def _strip(item: ir.Model | ir.Graph | ir.Node) -> int:
    dropped = [key for key in item.metadata_props if key != NAME_SCOPES and not key.startswith(_OWN)]
    for key in dropped:
        del item.metadata_props[key]
    documented = bool(item.doc_string)
    item.doc_string = None
    return len(dropped) + documented
