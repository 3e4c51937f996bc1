"""Embedding tables of 2, 4 or 8 bits, in blocks along their rows; only the rows looked up are turned into floats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from artifacts.target import CPU_PROVIDER
from passes.base import Context, Effect, Outcome, Purpose, Refusal
from passes.sites import EmbeddingSite, constant_of
from passes.splice import Names, add_constant, label, take_place
from passes.surgery import MICROSOFT, build, remove_dead, require_microsoft

from .blocks import Grid
from .methods import Method, round_weight
from .tables import choose_tables

_METHODS = tuple(str(method) for method in Method if not method.calibrated)


@dataclass(frozen=True)
class BlockEmbeddings:
    """Store the tables of embedding look-ups in blocks along their rows, of 2, 4 or 8 bits with a scale each.

    | before             | after |
    |--------------------|-------|
    | Gather(table, ids) | GatherBlockQuantized(table_packed, ids, table_scale (, table_zero_point)) of com.microsoft |

    A table that several look-ups share is rounded once. A head tied to the table, with a copy of its own as the
    exporter folds it or reading the table itself, is for ``weight-only`` to round before. At the same bits, block_size,
    symmetric and method the bytes of codes, scales and zero points are the same as here, so that a store addressed by
    content keeps them once.

    Refused: targets other than the CPU provider; tables with fewer rows than ``minimum_rows``, rows shorter than 16 or
    no multiple of ``block_size``, not float32 or not finite; those that other nodes or the outputs still need.

    Attributes:
        bits: Of a code: 2, 4 or 8.
        block_size: Elements of a row that share a scale: 16, 32, 64, 128 or 256.
        symmetric: Without zero points; else each block has one.
        method: How scales and codes are chosen: rtn, mse or hqq, as in ``weight-only``.
        minimum_rows: Tables with fewer rows are left alone; they are too small to matter.
    """

    name: ClassVar[str] = "block-embeddings"
    effect: ClassVar[Effect] = Effect.LOSSY
    purpose: ClassVar[Purpose] = Purpose.SIZE

    bits: int = 4
    block_size: int = 32
    symmetric: bool = True
    method: str = "mse"
    minimum_rows: int = 512

    def __post_init__(self) -> None:
        Grid(self.bits, self.block_size, self.symmetric)
        if self.method not in _METHODS:
            raise ValueError(f"method is {self.method!r}, not one of {', '.join(_METHODS)}")

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Rewrite the embedding sites of ``model`` in place. A packed table is no site any more: a rerun changes 0."""
        if context.target.provider != CPU_PROVIDER:
            reason = f"no kernel for GatherBlockQuantized is known of {context.target.provider}"
            return Outcome(0, (Refusal("", reason, "compile for cpu"),))
        tables, refused = choose_tables(model, self.minimum_rows, "weight-only")
        names = Names(model.graph)
        changed = 0
        for table, sites in tables.items():
            width = sites[0].shape[1]
            if width % self.block_size:
                reason = f"rows of {width} are no multiple of a block of {self.block_size}"
                refused.extend(Refusal(label(site.node), reason, "set a smaller block_size") for site in sites)
                continue
            require_microsoft(model)
            self._rewrite(model.graph, names, table, sites)
            changed += len(sites)
        return Outcome(changed, tuple(refused))

    def _rewrite(self, graph: ir.Graph, names: Names, table: ir.Value, sites: list[EmbeddingSite]) -> None:
        tensor = constant_of(table)
        if tensor is None:
            raise ValueError(f"{table.name} is no constant any more")
        # A row of the table is a column of the head that would be tied to it.
        made = round_weight(tensor.numpy().T, Grid(self.bits, self.block_size, self.symmetric), Method(self.method))
        base = table.name or f"{sites[0].path}.weight"
        codes = made.packed().reshape(len(made.values), -1)
        parts: dict[str, NDArray[np.generic] | None] = {
            "uint8" if self.bits == 8 else f"int{self.bits}": codes,
            "scale": made.scale,
            "zero_point": made.packed_zero_point(),
        }
        held = [
            None if array is None else add_constant(graph, names.fresh(f"{base}_{part}"), array)
            for part, array in parts.items()
        ]
        for site in sites:
            self._look_up(graph, names, site, held)
        remove_dead([table])

    def _look_up(self, graph: ir.Graph, names: Names, site: EmbeddingSite, held: list[ir.Value | None]) -> None:
        codes, *others = held
        name = site.output.name or label(site.node)
        node = build(
            "GatherBlockQuantized",
            [codes, site.indices, *(value for value in others if value is not None)],
            like=site.node,
            name=names.fresh(f"{name}_bits"),
            domain=MICROSOFT,
            attributes={"bits": self.bits, "block_size": self.block_size, "gather_axis": 0, "quantize_axis": 1},
            dtype=ir.DataType.FLOAT,
        )
        graph.insert_before(site.node, [node])
        take_place(node.outputs[0], site.output)
        graph.remove(site.node, safe=True)
