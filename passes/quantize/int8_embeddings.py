"""Embedding tables in int8, one scale for each row; only the rows that a text looks up are turned back into floats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from passes.base import Context, Effect, Outcome, Purpose
from passes.sites import EmbeddingSite, constant_of
from passes.splice import Names, add_constant, label, new_node, new_value, take_place
from passes.surgery import remove_dead

from .arithmetic import quantize_rows
from .tables import choose_tables


@dataclass(frozen=True)
class Int8Embeddings:
    """Store the tables of embedding look-ups as int8 rows with one float32 scale each.

    | before             | after |
    |--------------------|-------|
    | Gather(table, ids) | Mul(Cast(Gather(table_int8, ids)), Gather(table_scale, ids)) |

    A table that several look-ups share is quantized once. A table that anything but look-ups reads as well (a language
    model head tied to it) stays in the graph for that reader; then an int8 copy would make the model larger, and the
    table is refused. A head that has its own transposed copy, as folded by the exporter, does not stand in the way.

    Refused: a table with fewer rows than ``minimum_rows`` or rows shorter than 16, one that is not float32 or not
    finite, and one that other nodes or the outputs of the graph still need.

    Attributes:
        minimum_rows: Tables with fewer rows are left alone; they are too small to matter.
    """

    name: ClassVar[str] = "int8-embeddings"
    effect: ClassVar[Effect] = Effect.LOSSY
    purpose: ClassVar[Purpose] = Purpose.SIZE

    minimum_rows: int = 512

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Rewrite the embedding sites of ``model`` in place. An int8 table is no site any more: a rerun changes 0."""
        tables, refused = choose_tables(model, self.minimum_rows, "dynamic-int8")
        names = Names(model.graph)
        for table, sites in tables.items():
            _rewrite(model.graph, names, table, sites)
        return Outcome(sum(map(len, tables.values())), tuple(refused))


def _rewrite(graph: ir.Graph, names: Names, table: ir.Value, sites: list[EmbeddingSite]) -> None:
    tensor = constant_of(table)
    if tensor is None:
        return
    quantized = quantize_rows(tensor.numpy())
    base = table.name or f"{sites[0].path}.weight"
    rows = add_constant(graph, names.fresh(f"{base}_int8"), quantized.values)
    scales = add_constant(graph, names.fresh(f"{base}_scale"), quantized.scale)
    for site in sites:
        _look_up(graph, names, site, rows, scales)
    remove_dead([table])


def _look_up(graph: ir.Graph, names: Names, site: EmbeddingSite, rows: ir.Value, scales: ir.Value) -> None:
    base = site.output.name or label(site.node)
    shape = site.output.shape
    column = None if site.indices.shape is None else ir.Shape([*site.indices.shape, 1])
    integers = new_value(names.fresh(f"{base}_int8"), ir.DataType.INT8, shape)
    unscaled = new_value(names.fresh(f"{base}_unscaled"), ir.DataType.FLOAT, shape)
    scale = new_value(names.fresh(f"{base}_scale"), ir.DataType.FLOAT, column)
    product = new_value(names.fresh(f"{base}_scaled"), ir.DataType.FLOAT, shape)
    nodes = [
        new_node("Gather", [rows, site.indices], [integers], site.node),
        new_node("Cast", [integers], [unscaled], site.node, {"to": ir.DataType.FLOAT}),
        new_node("Gather", [scales, site.indices], [scale], site.node),
        new_node("Mul", [unscaled, scale], [product], site.node),
    ]
    graph.insert_before(site.node, nodes)
    take_place(product, site.output)
    graph.remove(site.node, safe=True)
