"""int8 products of two activations: attention scores, and the mixing of values by attention weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from passes.base import Context, Effect, Outcome, Purpose
from passes.surgery import is_operator

from .arithmetic import FULL_RANGE
from .linear import Selection
from .operands import Operators, Step, of_activations, read_integers
from .range_options import RangeOptions
from .ranges import Range


@dataclass(frozen=True)
class Int8Products(RangeOptions):
    """Let the products of two activations run in int8: each operand quantized and back, with a range from calibration.

    | before       | after |
    |--------------|-------|
    | MatMul(x, y) | MatMul(x', y') with v' = DequantizeLinear(QuantizeLinear(v, scale, 0), scale, 0) |

    OpenVINO turns that into integer kernels. It wants the right operand as int8; the left one is uint8 where it is
    never negative (the range of a Softmax is [0, 1], whatever was seen), else int8 as well; no zero points but 0. A
    value that several products read in the same form is quantized once.

    Refused: no calibration data; targets other than OpenVINO; opset < 13; operands not known to be float32; operands
    that calibration saw only one number of; products that ``skip`` names; patterns that fit no product.

    Attributes:
        ranges: How a range is chosen: absmax, percentile, mse or entropy. See `passes.quantize.ranges`.
        percentile: Percent of the values that the percentile method keeps inside.
        skip: Module paths to leave alone; ``*`` and ``?`` are wildcards, and ``*`` also spans dots.
        only: Module paths to act on, as in ``skip``; empty for all.
    """

    name: ClassVar[str] = "int8-products"
    effect: ClassVar[Effect] = Effect.LOSSY
    purpose: ClassVar[Purpose] = Purpose.SPEED

    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Rewrite the products of ``model`` in place. Operands quantized once stay as they are: a rerun changes 0."""
        found = [node for node in model.graph if is_operator(node, "MatMul") and of_activations(node)]
        what = "product of two activations"
        operators = Operators(what, found, _step, self.ranges, self.percentile)
        return read_integers(model, context, operators, Selection(self.skip, self.only))


def _step(clip: Range, position: int) -> Step:
    signed = position == 1 or clip.low < 0.0
    return (_symmetric(clip), np.int8(0)) if signed else (clip.scale, np.uint8(0))


def _symmetric(clip: Range) -> np.float32:
    """The step of an int8 quantizer without zero point that reaches as far as the range."""
    return max(np.float32(max(-clip.low, clip.high) / FULL_RANGE), np.finfo(np.float32).tiny)
