"""MatMulNBits in the place of linear sites: what `WeightOnly` does to a graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from passes.sites import LinearSite
from passes.splice import Names, add_constant, label, new_node, new_value
from passes.surgery import MICROSOFT, build, needed, require_microsoft

from .arithmetic import Doubles
from .blocks import Grid
from .linear import ending, put_in, weight_of
from .methods import Method, round_weight

INT8_PRODUCTS = 4
"""The accuracy_level at which the kernel may round its input to int8, block by block, as it goes."""


class BlockProducts:
    """One run over one graph: a weight that several sites share is rounded once."""

    def __init__(
        self, model: ir.Model, grid: Grid, method: Method, *, accuracy_level: int = INT8_PRODUCTS, ordered: bool = False
    ) -> None:
        self._model = model
        self._grid = grid
        self._method = method
        self._accuracy_level = accuracy_level
        self._ordered = ordered
        self._names = Names(model.graph)
        self._weights: dict[tuple[ir.Value, bool], tuple[ir.Value | None, ...]] = {}

    def rewrite(self, site: LinearSite, second: Doubles | None = None) -> None:
        """Put the product in the place of the site and of the Add that ends it.

        Args:
            site: As `linear.choose_sites` gives it.
            second: ``E[x x^T]`` of its input, float64 [K, K], where the method needs it.
        """
        require_microsoft(self._model)
        graph, end = self._model.graph, ending(site)
        blocks = self._blocks(site, second)
        base = end.last.outputs[0].name or label(site.node)
        name = self._names.fresh(f"{base}_bits")
        bias = None if end.bias is None else add_constant(graph, self._names.fresh(f"{base}_bias"), end.bias)
        rows, columns = site.shape
        product = build(
            "MatMulNBits",
            [needed(site.node.inputs[0]), *blocks, None, bias],
            like=site.node,
            name=name,
            domain=MICROSOFT,
            attributes={
                "K": rows,
                "N": columns,
                "bits": self._grid.bits,
                "block_size": self._grid.block,
                "accuracy_level": self._accuracy_level,
            },
            dtype=ir.DataType.FLOAT,
        )
        nodes = [product]
        if end.rest is not None:
            biased = new_value(self._names.fresh(f"{base}_biased"), ir.DataType.FLOAT, site.output.shape)
            nodes.append(new_node("Add", [product.outputs[0], end.rest], [biased], site.node))
        put_in(site, end, nodes)

    def _blocks(self, site: LinearSite, second: Doubles | None) -> tuple[ir.Value | None, ...]:
        """Codes, scales and zero points (or None)."""
        key = (site.weight, site.transposed)
        if key not in self._weights:
            made = round_weight(weight_of(site), self._grid, self._method, second, ordered=self._ordered)
            base = site.weight.name or f"{site.path}.weight"
            parts: dict[str, NDArray[np.generic] | None] = {
                "uint8" if self._grid.bits == 8 else f"int{self._grid.bits}": made.packed(),
                "scale": made.scale,
                "zero_point": made.packed_zero_point(),
            }
            self._weights[key] = tuple(
                None if array is None else add_constant(self._model.graph, self._names.fresh(f"{base}_{part}"), array)
                for part, array in parts.items()
            )
        return self._weights[key]
