"""int8 sums of two activations: the residual connections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from passes.base import Context, Effect, Outcome, Purpose
from passes.shapes import dims_of, same_dims
from passes.surgery import is_operator

from .linear import Selection
from .operands import Operators, Step, of_activations, read_integers
from .range_options import RangeOptions
from .ranges import Range


@dataclass(frozen=True)
class Int8Additions(RangeOptions):
    """Let the sums of two activations read 8-bit integers: each operand quantized and back, ranges from calibration.

    | before    | after |
    |-----------|-------|
    | Add(x, y) | Add(x', y') with v' = DequantizeLinear(QuantizeLinear(v, scale, zero), scale, zero), integers uint8 |

    OpenVINO then moves a quarter of the bytes. Only operands of one shape count: residual connections, no masks. A
    value that static-int8 quantized for a product is read in that form, so this runs behind it. Whether it gains
    depends on the machine: recipes keep it where it is faster.

    Refused: no calibration data; targets other than OpenVINO; opset < 13; operands not known to be float32; operands
    that calibration saw only one number of; sums that ``skip`` names; patterns that fit no sum.

    Attributes:
        ranges: How a range is chosen: absmax, percentile, mse or entropy. See `passes.quantize.ranges`.
        percentile: Percent of the values that the percentile method keeps inside.
        skip: Module paths to leave alone; ``*`` and ``?`` are wildcards, and ``*`` also spans dots.
        only: Module paths to act on, as in ``skip``; empty for all.
    """

    name: ClassVar[str] = "int8-additions"
    effect: ClassVar[Effect] = Effect.LOSSY
    purpose: ClassVar[Purpose] = Purpose.SPEED

    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Rewrite the sums of ``model`` in place. Operands quantized once stay as they are: a rerun changes 0."""
        found = [node for node in model.graph if is_operator(node, "Add") and of_activations(node) and _residual(node)]
        operators = Operators("sum of two activations", found, _step, self.ranges, self.percentile, reuse=True)
        return read_integers(model, context, operators, Selection(self.skip, self.only))


def _step(clip: Range, _: int) -> Step:
    return clip.scale, clip.zero_point


def _residual(node: ir.Node) -> bool:
    """Whether the operands are of one shape, of at least two axes."""
    dims = dims_of(node.inputs[0])
    return dims is not None and len(dims) > 1 and same_dims(dims, dims_of(node.inputs[1]))
