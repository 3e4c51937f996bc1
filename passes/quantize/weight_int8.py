"""int8 weights for linear operators, in blocks of their own scale; activations stay floats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from artifacts.target import CPU_PROVIDER
from passes.base import Context, Effect, Outcome, Purpose, Refusal
from passes.sites import LinearSite
from passes.splice import Names, add_constant, label, new_node, new_value
from passes.surgery import MICROSOFT, build, needed, require_microsoft

from .blocks import quantize_blocks
from .linear import Ending, Selection, choose_sites, ending, put_in, weight_of

_BLOCK_SIZES = (16, 32, 64, 128, 256)
"""Those that ONNX Runtime's CPU provider has int8 kernels for."""

_INT8_PRODUCTS = 4
"""The accuracy_level at which the kernel may round its input to int8, block by block, as it goes."""


@dataclass(frozen=True)
class WeightInt8:
    """Store the weights of linear operators as 8-bit integers in blocks along K, one scale for each.

    | before         | after |
    |----------------|-------|
    | MatMul(x, W)   | MatMulNBits(x, W_uint8, W_scale), bits = 8, accuracy_level = 4 |
    | Add(MatMul, b) | the same with b as its bias |
    | Gemm(x, W, b)  | the same |

    The operator is one of com.microsoft. Its kernel rounds the input to int8 as well, with a range of its own for every
    block of every row, so that no calibration is needed and one outlier spoils its block only. A bias that is no
    constant [N] stays an Add. A weight that several sites share is quantized once.

    Refused: targets other than the CPU provider; a weight of fewer rows than a block; what DynamicInt8 refuses of
    weights, sites and patterns.

    Attributes:
        block_size: Rows of a block: 16, 32, 64, 128 or 256.
        symmetric: Without zero points; else each block has one.
        skip: Module paths to leave alone; ``*`` and ``?`` are wildcards, and ``*`` also spans dots.
        only: Module paths to act on, as in ``skip``; empty for all.
    """

    name: ClassVar[str] = "weight-int8"
    effect: ClassVar[Effect] = Effect.LOSSY
    purpose: ClassVar[Purpose] = Purpose.SIZE

    block_size: int = 32
    symmetric: bool = True
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.block_size not in _BLOCK_SIZES:
            raise ValueError(f"block_size is {self.block_size}, not one of {', '.join(map(str, _BLOCK_SIZES))}")

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Rewrite the linear sites of ``model`` in place. Quantized sites are no sites any more: a rerun changes 0."""
        if context.target.provider != CPU_PROVIDER:
            reason = f"no kernel for MatMulNBits of 8 bits is known of {context.target.provider}"
            return Outcome(0, (Refusal("", reason, "compile for cpu"),))
        sites, refused = choose_sites(model, Selection(self.skip, self.only))
        rewriting = _Rewriting(model, self)
        changed = 0
        for site in sites:
            if site.shape[0] < self.block_size:
                reason = f"a weight of {site.shape[0]} rows is smaller than a block of {self.block_size}"
                refused.append(Refusal(label(site.node), reason, f"set block_size to {site.shape[0]} or less"))
                continue
            rewriting.rewrite(site, ending(site))
            changed += 1
        return Outcome(changed, tuple(refused))


class _Rewriting:
    """One run over one graph: what is shared between sites."""

    def __init__(self, model: ir.Model, options: WeightInt8) -> None:
        self._model = model
        self._graph = model.graph
        self._options = options
        self._names = Names(model.graph)
        self._weights: dict[tuple[ir.Value, bool], tuple[ir.Value | None, ...]] = {}

    def rewrite(self, site: LinearSite, end: Ending) -> None:
        """Put the product in the place of the site and of the Add that ends it."""
        require_microsoft(self._model)
        blocks = self._blocks(site)
        base = end.last.outputs[0].name or label(site.node)
        name = self._names.fresh(f"{base}_bits")
        bias = None if end.bias is None else add_constant(self._graph, self._names.fresh(f"{base}_bias"), end.bias)
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
                "bits": 8,
                "block_size": self._options.block_size,
                "accuracy_level": _INT8_PRODUCTS,
            },
            dtype=ir.DataType.FLOAT,
        )
        nodes = [product]
        if end.rest is not None:
            biased = new_value(self._names.fresh(f"{base}_biased"), ir.DataType.FLOAT, site.output.shape)
            nodes.append(new_node("Add", [product.outputs[0], end.rest], [biased], site.node))
        put_in(site, end, nodes)

    def _blocks(self, site: LinearSite) -> tuple[ir.Value | None, ...]:
        """Integers, scales and zero points (or None)."""
        key = (site.weight, site.transposed)
        if key not in self._weights:
            made = quantize_blocks(weight_of(site), self._options.block_size, symmetric=self._options.symmetric)
            base = site.weight.name or f"{site.path}.weight"
            parts: dict[str, NDArray[np.generic] | None] = {
                "uint8": made.values,
                "scale": made.scale,
                "zero_point": made.zero_point,
            }
            self._weights[key] = tuple(
                None if array is None else add_constant(self._graph, self._names.fresh(f"{base}_{part}"), array)
                for part, array in parts.items()
            )
        return self._weights[key]
