"""int8 weights for linear operators, in blocks of their own scale; activations stay floats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from passes.base import Context, Effect, Outcome, Purpose

from .blocks import Grid
from .weight_only import WeightOnly


@dataclass(frozen=True)
class WeightInt8:
    """Store the weights of linear operators as 8-bit integers in blocks along K, one scale for each.

    What ``weight-only(bits=8, method=rtn)`` does, by its older name: MatMulNBits of 8 bits and accuracy_level 4. The
    kernel rounds the input to int8 as well, with a range of its own for every block of every row, so that no
    calibration is needed and one outlier spoils its block only. Refused is what ``weight-only`` refuses.

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
        Grid(8, self.block_size, self.symmetric)

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Rewrite the linear sites of ``model`` in place. Quantized sites are no sites any more: a rerun changes 0."""
        general = WeightOnly(8, self.block_size, self.symmetric, method="rtn", skip=self.skip, only=self.only)
        return general.run(model, context)
