"""repair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from passes.affine import constant_floats, matrix_of, revise
from passes.base import Context, Effect, ObserveMoments, Outcome, Purpose, Refusal
from passes.quantize.linear import Selection
from passes.second_order import DAMPING
from passes.splice import Names, label

from .merge import DifferentInputsError, Merged, beside, merge
from .regression import Change, Rest, affine_change, bias_change, product_square
from .targets import Target, find_targets, levels

GAIN = 0.01
"""Part of a map's squared error that a change must take away; what gains less is left."""
SPARSE = 0.25
"""Share of exact zeros from which they are taken to be meant, and stay."""
ROUNDING = 2.0**-16
"""Root mean square of what is wrong, in parts of that of what the map makes, below which nothing is."""
_DONE = "hasten.repaired"
_SEEN = "hasten.repair"


@dataclass(frozen=True)
class Repair:
    """Fit the last linear map of each block again, by least squares to what the graph computed before compression.

    A map is one that writes to a residual stream: the output projection of attention, the last of a feed-forward
    block. Its weight and bias are changed so that the stream behind it comes as near as they can bring it, on
    calibration data, to the stream of the graph before compression; so they make up for what was done to the block, and
    for what is left of the errors of the blocks before. The maps are fitted one block after the other, each with the
    blocks before it repaired: ``W <- W + (C + damping mean(diag C) I)^-1 E_c[x r^T]``, r what is wrong; see
    `regression`.

    | weight | what changes |
    |--------|--------------|
    | dense | the weight, and the bias where there is one |
    | a quarter or more exact zeros | the same; zeros stay zeros, by conjugate gradients on the rest of each column |
    | two factors | the second |
    | that other operators read too | the bias |

    Costs a pass over the data through both graphs for each group of maps of which none feeds another: two for each
    layer of a transformer, so in all about as many passes through the whole of both as there are layers, and for each
    map ``(K + N)²`` numbers and the solution of K equations. Run it when all else is done to weights but fewer bits:
    quantized operators are no linear sites any more.

    A map is left where less than a hundredth of its squared error would go, where the error is what a repair left
    before, which its node remembers, and where it is as small as rounding.

    Refused: no calibration data; no graph from before compression, or one that takes other inputs than KV caches of
    another shape; maps that it does not know by name of the output or by module path; weights that are not
    float32 or not finite.
    Fewer rows of data than K are told.

    Attributes:
        damping: The pull of a weight towards what it is, in parts of the mean of the diagonal of C.
        skip: Module paths to leave alone; ``*`` and ``?`` are wildcards, and ``*`` also spans dots.
        only: Module paths to fit, as in ``skip``, wherever their output goes; empty for what writes to a stream.
    """

    name: ClassVar[str] = "repair"
    effect: ClassVar[Effect] = Effect.LOSSY
    purpose: ClassVar[Purpose] = Purpose.FORM

    damping: float = DAMPING
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0.0 < self.damping <= 1.0:
            raise ValueError(f"damping is {self.damping}, not above 0 and at most 1")

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Fit; counts the maps that changed."""
        if context.moments is None:
            return Outcome(0, (Refusal("", "calibration data is needed", "Compile with data, or leave repair out"),))
        if context.original is None:
            remedy = "run repair in a compile, which keeps it"
            return Outcome(0, (Refusal("", "the graph before compression is not known", remedy),))
        targets, refused = find_targets(model, context.original, Selection(self.skip, self.only))
        if not targets and not refused:
            refused.append(Refusal("", "no linear operator writes to a residual stream", "name some with only"))
        changed = 0
        for group in levels(model, targets):
            try:
                merged = merge(model, context.original)
            except DifferentInputsError as error:
                return Outcome(changed, (*refused, Refusal("", str(error), "repair before the inputs change")))
            changed += self._fit(model, merged, group, context.moments, refused)
        return Outcome(changed, tuple(refused))

    def _fit(
        self, model: ir.Model, merged: Merged, group: Sequence[Target], observe: ObserveMoments, refused: list[Refusal]
    ) -> int:
        """Fit maps of which none feeds another; one pass over the data where memory allows."""
        values = [_watched(merged, target, index) for index, target in enumerate(group)]
        seen = observe(merged.model, values)
        changed = 0
        for target, value in zip(group, values, strict=True):
            moments = seen[str(value.name)]
            rows, columns = target.site.shape
            if moments.rows < rows:
                reason = f"only {moments.rows} rows of calibration data for {rows} channels: damping holds the rest"
                refused.append(Refusal(label(target.site.node), reason, "Compile with more --data"))
            rest = Rest.of(moments.second, moments.mean, len(moments.mean) - columns)
            del moments
            changed += self._apply(model, target, rest)
        return changed

    def _apply(self, model: ir.Model, target: Target, rest: Rest) -> int:
        node = target.site.node
        made = product_square(rest.second, matrix_of(target.site))
        if rest.error <= max((1.0 + GAIN) * float(node.metadata_props.get(_DONE, "0")), ROUNDING**2 * made):
            return 0
        change = self._change(target, rest)
        if not change.gain > GAIN * rest.error:
            return 0
        names = Names(model.graph)
        if change.weight is not None:
            matrix = (matrix_of(target.site) + change.weight).astype(np.float32)
            revise(model.graph, names, (node, 1), matrix.T if target.site.transposed else matrix)
        use, bias = target.affine.bias_use, constant_floats(target.affine.bias, target.site.shape[1])
        if change.bias is not None and use is not None and bias is not None:
            revise(model.graph, names, use, (bias + change.bias).astype(np.float32))
        node.metadata_props[_DONE] = f"{rest.error - change.gain:.6e}"
        return 1

    def _change(self, target: Target, rest: Rest) -> Change:
        if not target.weight:
            return bias_change(rest)
        support = matrix_of(target.site) != 0.0
        sparse = support.mean() <= 1.0 - SPARSE
        return affine_change(rest, self.damping, bias=target.bias, support=support if sparse else None)


def _watched(merged: Merged, target: Target, index: int) -> ir.Value:
    """The value of the merged graph that shows what a map reads and what it gets wrong."""
    wanted = [merged.theirs[target.wanted]]
    if target.less:
        wanted.append(merged.mine[target.less])
    source, made = merged.mine[str(target.site.input.name)], merged.mine[str(target.affine.output.name)]
    return beside(merged, f"{_SEEN}.{index}", source, tuple(wanted), made)
