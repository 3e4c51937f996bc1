"""The embedding tables of a graph that a pass may round, and why not the others."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from passes.base import Refusal
from passes.sites import EmbeddingSite, constant_of, embedding_sites
from passes.splice import label

MINIMUM_WIDTH = 16
"""Narrowest row worth a scale of its own."""

Tables = dict[ir.Value, list[EmbeddingSite]]
"""The look-ups in each table, in graph order."""


def choose_tables(model: ir.Model, minimum_rows: int, before: str) -> tuple[Tables, list[Refusal]]:
    """The tables that only look-ups read, and refusals of the others.

    Refused: a table with fewer rows than ``minimum_rows`` or rows shorter than `MINIMUM_WIDTH`, one that is not float32
    or not finite, and one that other nodes or the outputs of the graph still need: a copy would add to the size.

    Args:
        model: The graph.
        minimum_rows: Smaller tables are left alone.
        before: The pass that should have run before, where a product still reads the table.
    """
    tables: Tables = {}
    for site in embedding_sites(model):
        tables.setdefault(site.table, []).append(site)
    refused: list[Refusal] = []
    for table, sites in list(tables.items()):
        found = _refusal(table, sites, minimum_rows, before)
        if found is not None:
            refused.extend(Refusal(label(site.node), *found) for site in sites)
            del tables[table]
    return tables, refused


def _refusal(table: ir.Value, sites: list[EmbeddingSite], minimum_rows: int, before: str) -> tuple[str, str] | None:
    tensor = constant_of(table)
    rows, width = sites[0].shape
    if tensor is None or tensor.dtype != ir.DataType.FLOAT:
        return "the table is not float32", "quantize before the precision is changed"
    if rows < minimum_rows:
        return f"a table of {rows} rows is too small to matter", f"set minimum_rows to {rows} or less"
    if width < MINIMUM_WIDTH:
        return f"rows of {width} are too short for a scale each", ""
    others = set(table.consumers()) - {site.node for site in sites}
    if others or table.is_graph_output():
        reader = min(label(node) for node in others) if others else "the outputs of the graph"
        return f"{reader} reads the table too, so a copy of it would add to the size", f"run {before} before"
    if not np.isfinite(tensor.numpy()).all():
        return "the table has values that are not finite", "repair the checkpoint"
    return None
