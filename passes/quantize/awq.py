"""awq."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from passes.affine import matrix_of, put_matrix
from passes.base import Context, Effect, Outcome, Purpose, Refusal
from passes.splice import Names, label

from .blocks import Grid
from .channels import divide, restore
from .scaling import GAIN, best_scaling
from .smooth import Smooth


@dataclass(frozen=True)
class Awq(Smooth):
    """Scale the rows of weights, and what makes their input by the inverse, for the blocks that they are rounded in.

    AWQ (Lin et al., 2023, arXiv:2306.00978): all linear sites that read a value ``x [..., K]`` get ``diag(s) W`` and
    what makes x makes ``x / s``; which values can be scaled, and how, is told at ``smooth``. Here
    ``s_k = rms(x_k)^a / max_n|W_kn|^(1 - a)``, and a is the one of ``strengths`` with which the weights, rounded to
    nearest in blocks, leave the least squared error of the products, by the second moment of x on calibration data. A
    value is left where that error does not shrink by a fiftieth, and so where it was scaled before.

    Run it before what rounds weights. gptq makes up for most of what this gains. Refused: what ``smooth`` refuses.

    Attributes:
        strengths: Exponents a to try, each between 0 and 1.
        skip: Module paths of sites to leave alone, with all that read the same value; ``*`` and ``?`` are wildcards.
        only: Module paths to act on, as in ``skip``; empty for all.
        bits: Of the codes that the weights will be rounded to: 2, 4 or 8.
        block_size: Rows of the blocks that they will be rounded in.
        symmetric: Whether without zero points.
    """

    name: ClassVar[str] = "awq"
    effect: ClassVar[Effect] = Effect.EXACT
    purpose: ClassVar[Purpose] = Purpose.FORM

    strengths: tuple[float, ...] = (0.2, 0.35, 0.5, 0.65, 0.8)
    bits: int = 4
    block_size: int = 32
    symmetric: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        Grid(self.bits, self.block_size, self.symmetric)

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Scale; counts the values."""
        groups, refused = self._groups(model)
        if not groups:
            return Outcome(0, tuple(refused))
        if context.moments is None:
            remedy = "Compile with data, or leave awq out"
            return Outcome(0, (*refused, Refusal("", "calibration data is needed", remedy)))
        seen = context.moments(model, [group.source.value for group in groups])
        labels = [str(group.source.value.name) for group in groups]
        changed = 0
        names = Names(model.graph)
        # From the end, so that the columns of a projection are scaled before its rows are looked at.
        for group, value in zip(reversed(groups), reversed(labels), strict=True):
            weights = [matrix_of(site) for site in group.sites]
            grid = Grid(self.bits, self.block_size, self.symmetric)
            choice = best_scaling(seen[value].second, weights, self.strengths, grid)
            if choice.strength == 0.0:
                reason = f"no strength takes {GAIN:.0%} of the error of its rounded products away"
                refused.append(Refusal(label(group.sites[0].node), reason))
                continue
            for site in {site.weight: site for site in group.sites}.values():
                put_matrix(site, matrix_of(site) * choice.factors[:, None])
            divide(model.graph, names, group.source, choice.factors)
            restore(model.graph, names, group.source.value, choice.factors, [(s.node, 0) for s in group.sites])
            changed += 1
        return Outcome(changed, tuple(refused))
