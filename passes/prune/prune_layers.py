"""prune-layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from passes.base import Context, Effect, ObserveMoments, Outcome, Purpose, Refusal
from passes.quantize.linear import Selection
from passes.splice import Names, add_constant
from passes.surgery import build, opset

from .layers_blocks import Block, blocks_of, take_out
from .structure import PRUNED, BlockedError

_KEY = f"{PRUNED}layers"
_OPSET = 13
_TINY = 1e-30


@dataclass(frozen=True)
class PruneLayers:
    """Remove whole blocks of a transformer: those that turn the hidden states least.

    What follows a block reads what the block read. The angle between a token's hidden states before and behind a block,
    ``arccos(cos) / pi``, averaged over the calibration data, says how much the block matters (Gromov et al., 2024,
    arXiv:2403.17887; Men et al., ShortGPT, 2024, arXiv:2403.03853). One block goes after the other, and the angles
    are measured anew each time. A decoder's KV cache of the block goes with it: two inputs and two outputs of the
    graph, and those of later blocks are renumbered.

    Refused: no calibration data; as many blocks as there are; graphs of fewer than two attention operators, or whose
    blocks are not told apart by values that all hidden states run through, as where skip connections are fused. How
    many went stands in the metadata of the model, so that a second run removes those only that are missing.

    Attributes:
        count: How many blocks go, of the model as it was; 0: ``ratio`` says it.
        ratio: Part of the blocks that goes, rounded to whole ones; between 0 and 1.
        skip: Module paths of attentions whose blocks stay; ``*`` and ``?`` are wildcards.
        only: Module paths of attentions whose blocks may go, as in ``skip``; empty for all.
    """

    name: ClassVar[str] = "prune-layers"
    effect: ClassVar[Effect] = Effect.LOSSY
    purpose: ClassVar[Purpose] = Purpose.SPEED
    alters_cache: ClassVar[bool] = True

    count: int = 0
    ratio: float = 0.25
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"count is {self.count}, less than 0")
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio is {self.ratio}, not between 0 and 1")
        if self.count and self.ratio != type(self).ratio:
            raise ValueError("count says how many blocks go: leave ratio out")

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Remove blocks of ``model`` in place; counts them. A second run changes 0."""
        try:
            blocks = blocks_of(model)
        except BlockedError as error:
            return Outcome(0, (error.refusal,))
        if opset(model) < _OPSET:
            return Outcome(0, (Refusal("", f"opset {opset(model)} is below {_OPSET}", "Run raise-opset before"),))
        gone = int(model.metadata_props.get(_KEY, "0"))
        missing = (self.count or round(self.ratio * (len(blocks) + gone))) - gone
        if missing <= 0:
            return Outcome(0)
        if missing >= len(blocks):
            return Outcome(0, (Refusal("", f"{missing} of {len(blocks)} blocks cannot go", "Leave one at least"),))
        if context.moments is None:
            return Outcome(0, (Refusal("", "pruning layers needs calibration data", "Compile with data"),))
        selection = Selection(self.skip, self.only)
        refused = selection.idle([block.path for block in blocks], "attention")
        changed = 0
        while changed < missing:
            refusal = self._remove_one(model, context.moments, selection)
            if refusal is not None:
                refused.append(refusal)
                break
            changed += 1
            model.metadata_props[_KEY] = str(gone + changed)
        return Outcome(changed, tuple(refused))

    def _remove_one(self, model: ir.Model, observe: ObserveMoments, selection: Selection) -> Refusal | None:
        """Remove the block that matters least, or say why none goes."""
        try:
            blocks = blocks_of(model)
        except BlockedError as error:
            return error.refusal
        chosen = [
            block
            for block in blocks
            if selection.candidate(block.path) and selection.refusal(block.attention, block.path) is None
        ]
        if not chosen:
            return Refusal("", "no block is left that may go", "Lower count, or ask for other paths")
        angles = measured_angles(model, observe, chosen)
        try:
            take_out(model, chosen[int(np.argmin(angles))])
        except BlockedError as error:
            return error.refusal
        return None


def measured_angles(model: ir.Model, observe: ObserveMoments, blocks: Sequence[Block]) -> list[float]:
    """Mean angle of hidden states before and behind each block over the calibration data, in parts of pi.

    Measured in a copy of the graph that computes them.
    """
    copy = model.clone()
    twins = {output.name: output for node in copy.graph for output in node.outputs}
    names = Names(copy.graph)
    last = add_constant(copy.graph, names.fresh("angle.axis"), np.array([-1], np.int64))
    bounds = [
        add_constant(copy.graph, names.fresh(name), np.array(number, np.float32))
        for name, number in (("angle.low", -1.0), ("angle.high", 1.0), ("angle.tiny", _TINY))
    ]
    values = [
        _angle(copy.graph, names, (twins[block.source.name], twins[block.result.name]), last, bounds)
        for block in blocks
    ]
    found = observe(copy, values)
    return [float(found[str(value.name)].mean[0]) / np.pi for value in values]


def _angle(
    graph: ir.Graph, names: Names, pair: tuple[ir.Value, ir.Value], last: ir.Value, bounds: Sequence[ir.Value]
) -> ir.Value:
    """``arccos`` of the cosine of two values over their last axis, ``[..., 1]``."""
    like = pair[1].producer()
    if like is None:
        raise ValueError(f"{pair[1].name} is made by no node")
    low, high, tiny = bounds

    def add(op_type: str, *inputs: ir.Value) -> ir.Value:
        node = build(op_type, inputs, like=like, name=names.fresh(f"{pair[1].name}.angle"), dtype=ir.DataType.FLOAT)
        graph.append(node)
        return node.outputs[0]

    dot, one, other = (
        add("ReduceSum", add("Mul", left, right), last)
        for left, right in ((pair[0], pair[1]), (pair[0], pair[0]), (pair[1], pair[1]))
    )
    sizes = add("Max", add("Sqrt", add("Mul", one, other)), tiny)
    return add("Acos", add("Clip", add("Div", dot, sizes), low, high))
