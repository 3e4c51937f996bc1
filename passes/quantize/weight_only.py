"""Weights of 2, 4 or 8 bits for linear operators, in blocks of their own scale; activations stay floats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from artifacts.target import CPU_PROVIDER
from passes.base import Context, Effect, ObserveMoments, Outcome, Purpose, Refusal
from passes.sites import LinearSite
from passes.splice import label

from .arithmetic import Doubles
from .block_products import INT8_PRODUCTS, BlockProducts
from .blocks import Grid
from .linear import Selection, choose_sites
from .methods import Method

_ACCURACY_LEVELS = (0, 1, INT8_PRODUCTS)
"""As given by the operator: unset, float32, int8. 2 and 3 are of types that the CPU provider does not compute in."""
_BLOCKS_OF_2_BITS = (32, 64, 128)
"""Those that have a kernel; weights in other blocks are turned into floats as a whole at every run."""


@dataclass(frozen=True)
class WeightOnly:
    """Store the weights of linear operators in blocks along K of 2, 4 or 8 bits, one scale for each.

    | before         | after |
    |----------------|-------|
    | MatMul(x, W)   | MatMulNBits(x, W_packed, W_scale (, W_zero_point)) of com.microsoft |
    | Add(MatMul, b) | the same with b as its bias |
    | Gemm(x, W, b)  | the same |

    A bias that is no constant [N] stays an Add. A weight that several sites share is rounded once. Sites are read,
    rounded and written one after the other. Mixed precision is several of these passes with ``only`` and ``skip``: what
    one has rounded is no site for the next.

    | method         | scales and codes are chosen for |
    |----------------|---------------------------------|
    | rtn            | the whole range of a block, rounded to nearest |
    | mse            | the least squared error of each block |
    | hqq            | the least l_0.7 norm of the errors of each block: half-quadratic (Badri & Shaji, 2023) |
    | weighted-mse * | as mse, each row weighted by the second moment of the channel that it meets |
    | gptq *         | the least squared error of the product; later rows make up for errors (Frantar et al., 2022) |

    Methods with a * need calibration data. gptq then fits scales and codes again with the same aim. Second moments are
    those of the graph before its sites are rounded.

    Refused: targets other than the CPU provider; a method that needs calibration data without them; a weight of fewer
    rows than a block; what DynamicInt8 refuses of weights, sites and patterns. Options for which ONNX Runtime has no
    kernel but one that turns the whole weight into floats at every run are errors: 2 or 8 bits at an accuracy_level
    other than 4, 2 bits in blocks of 16 or 256.

    Attributes:
        bits: Of a code: 2, 4 or 8.
        block_size: Rows of a block: 16, 32, 64, 128 or 256.
        symmetric: Without zero points; else each block has one.
        method: How scales and codes are chosen; see above.
        ordered: Let gptq round rows of large second moment first (act-order); scales are then chosen beforehand.
        accuracy_level: 4: the kernel may round its input to int8, with a range for each block of each row; 1 or 0: it
            computes in float32, 4 bits only.
        skip: Module paths to leave alone; ``*`` and ``?`` are wildcards, and ``*`` also spans dots.
        only: Module paths to act on, as in ``skip``; empty for all.
    """

    name: ClassVar[str] = "weight-only"
    effect: ClassVar[Effect] = Effect.LOSSY
    purpose: ClassVar[Purpose] = Purpose.SIZE

    bits: int = 4
    block_size: int = 32
    symmetric: bool = True
    method: str = "mse"
    ordered: bool = False
    accuracy_level: int = INT8_PRODUCTS
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        grid = Grid(self.bits, self.block_size, self.symmetric)
        methods = [str(method) for method in Method]
        if self.method not in methods:
            raise ValueError(f"method is {self.method!r}, not one of {', '.join(methods)}")
        if self.ordered and self.method != Method.GPTQ:
            raise ValueError(f"ordered is of gptq, not of {self.method}")
        if self.accuracy_level not in _ACCURACY_LEVELS:
            raise ValueError(f"accuracy_level is {self.accuracy_level}, not one of 0, 1, 4")
        if grid.bits != 4 and self.accuracy_level != INT8_PRODUCTS:
            raise ValueError(f"{self.bits} bits have a kernel at accuracy_level 4 only")
        if grid.bits == 2 and self.block_size not in _BLOCKS_OF_2_BITS:
            raise ValueError(f"2 bits have kernels for a block_size of 32, 64 and 128 only, not of {self.block_size}")

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Rewrite the linear sites of ``model`` in place. Quantized sites are no sites any more: a rerun changes 0."""
        grid, method = Grid(self.bits, self.block_size, self.symmetric), Method(self.method)
        if context.target.provider != CPU_PROVIDER:
            reason = f"no kernel for MatMulNBits of {self.bits} bits is known of {context.target.provider}"
            return Outcome(0, (Refusal("", reason, "compile for cpu"),))
        chosen, refused = choose_sites(model, Selection(self.skip, self.only))
        sites = []
        for site in chosen:
            refusal = _unfit(site, grid)
            if refusal is None:
                sites.append(site)
            else:
                refused.append(refusal)
        products = BlockProducts(model, grid, method, accuracy_level=self.accuracy_level, ordered=self.ordered)
        if not method.calibrated or not sites:
            for site in sites:
                products.rewrite(site, None)
        elif context.moments is None:
            refused.append(Refusal("", f"{method} needs calibration data", "Compile with data, or choose mse or hqq"))
            return Outcome(0, tuple(refused))
        else:
            for site, second in _with_moments(model, context.moments, sites):
                products.rewrite(site, second)
        return Outcome(len(sites), tuple(refused))


def _unfit(site: LinearSite, grid: Grid) -> Refusal | None:
    rows = site.shape[0]
    if rows < grid.block:
        reason = f"a weight of {rows} rows is smaller than a block of {grid.block}"
        return Refusal(label(site.node), reason, f"set block_size to {rows} or less")
    return None


def _with_moments(
    model: ir.Model, observe: ObserveMoments, sites: Sequence[LinearSite]
) -> Iterator[tuple[LinearSite, Doubles]]:
    """Each site with the second moment of its input, all of them of the graph as it is now."""
    inputs = [site.input for site in sites]
    names = [str(value.name) for value in inputs]
    seen = observe(model, list(dict.fromkeys(inputs)))
    for site, name in zip(sites, names, strict=True):
        yield site, seen[name].second
