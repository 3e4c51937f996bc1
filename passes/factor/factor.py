"""factor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from passes.base import Context, Effect, ObserveMoments, Outcome, Purpose, Refusal
from passes.quantize.linear import Selection
from passes.splice import Names, label

from .allocation import Division, allocate, highest_rank, proportional
from .families import FamilyFactors
from .flow import Flow
from .importance import asked, importances, own_energy
from .products import Family, Product, survey

METHODS = ("svd", "whitened", "weighted")
ALLOCATIONS = ("uniform", "damage")
_RATIO = 0.8


@dataclass(frozen=True)
class Factor:
    """Make two thin products of linear operators: ``x W`` becomes ``(x A) B`` with ``A [K, r]`` and ``B [r, N]``.

    | before                | after |
    |-----------------------|-------|
    | MatMul(x, W)          | MatMul(MatMul(x, A), B) |
    | Gemm(x, W, b)         | Gemm(MatMul(x, A), B, b) |
    | MatMul(x, W1), MatMul(x, W2), … | the same of each, or MatMul(MatMul(x, A), B1), … with one A (``joint``) |

    Parameters and arithmetic become ``r (K + N)`` for ``K N``. Nodes keep their module paths, and the new one has that
    of its site; pack-products puts what reads the same value together afterwards.

    | method     | A B is |
    |------------|--------|
    | svd        | nearest to W: the singular value decomposition, cut |
    | whitened * | what leaves the least squared error of ``x A B``: SVD-LLM (Wang et al., 2024, arXiv:2403.07378) |
    | weighted * | the same, each output weighted by what an error of it does to the residual stream |

    | allocation | ranks are |
    |------------|-----------|
    | uniform    | such that each operator keeps ``ratio`` of its parameters |
    | damage     | those of least damage where all operators together keep ``ratio``; some stay whole |

    Methods with a * need calibration data. The damage of an operator is then the error that it adds to the residual
    stream, in parts of the stream's energy, as the second moments of the values between and the weights that follow
    foretell. Of svd it is the error of W in parts of its energy. Where there is a constant bias, what is lost of the
    mean goes into it.

    Refused: a method that needs calibration data without them; a weight that is read elsewhere too (an embedding that
    is tied to it); an operator that no rank makes smaller; what DynamicInt8 refuses of weights, sites and patterns.
    Told: fewer rows of calibration data than channels.

    A second run changes 0: two products with constants that are smaller than one are factors already, and count as
    such.

    Attributes:
        ratio: Share of the parameters that is kept, of all linear operators that ``only`` and ``skip`` leave in;
            between 0 and 1.
        rank: The rank of every operator, whatever the ratio; those that it does not make smaller stay. 0: by ratio.
        method: What is minimized; see above.
        allocation: How ranks are chosen; see above.
        joint: Let operators that read the same value (query, key and value; gate and up) have A together where that
            does less damage.
        multiple: Ranks chosen by ratio are multiples of this: kernels and blocks of quantized weights want them so.
        skip: Module paths to leave alone; ``*`` and ``?`` are wildcards, and ``*`` also spans dots.
        only: Module paths to act on, as in ``skip``; empty for all.
    """

    name: ClassVar[str] = "factor"
    effect: ClassVar[Effect] = Effect.LOSSY
    purpose: ClassVar[Purpose] = Purpose.SPEED

    ratio: float = _RATIO
    rank: int = 0
    method: str = "whitened"
    allocation: str = "damage"
    joint: bool = True
    multiple: int = 16
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio is {self.ratio}, not between 0 and 1")
        if self.rank < 0:
            raise ValueError(f"rank is {self.rank}, not 1 or more, or 0 for ranks by ratio")
        if self.rank and self.ratio != _RATIO:
            raise ValueError("rank sets the rank of every operator: give either rank or ratio")
        if self.multiple < 1:
            raise ValueError(f"multiple is {self.multiple}, not 1 or more")
        for name, value, known in (("method", self.method, METHODS), ("allocation", self.allocation, ALLOCATIONS)):
            if value not in known:
                raise ValueError(f"{name} is {value!r}, not one of {', '.join(known)}")

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Factor; counts the operators that became two."""
        found, refused = survey(model, Selection(self.skip, self.only))
        families, unfit = self._fitting(found.families)
        refused += unfit
        budget = int(self.ratio * (found.whole + found.size)) - found.present
        if not found.families and not found.whole and not refused:
            refused.append(Refusal("", "no linear operator to factor"))
        if not families or (self._shared and found.size <= budget):
            return Outcome(0, tuple(refused))
        if self.method != "svd" and context.moments is None:
            reason, remedy = f"{self.method} needs calibration data", "Compile with data, or choose svd"
            return Outcome(0, (*refused, Refusal("", reason, remedy)))
        work = self._work(model, families, context.moments)
        refused += [told for one in work if (told := one.few_rows()) is not None]
        divisions = self._divide(work, budget - found.size + sum(one.size for family in families for one in family))
        names = Names(model.graph)
        changed = sum(one.rewrite(model.graph, names, division) for one, division in zip(work, divisions, strict=True))
        return Outcome(changed, tuple(refused))

    def _work(self, model: ir.Model, families: Sequence[Family], moments: ObserveMoments | None) -> list[FamilyFactors]:
        """The families with what is known of their inputs and of how much their outputs matter."""
        sites = [site for family in families for product in family for site in product.sites]
        if self.method == "svd" or moments is None:
            return [FamilyFactors(family, None, {site.node: own_energy(site) for site in sites}) for family in families]
        closure = Flow(model).closure(sites)
        seen = moments(model, asked(closure))
        found = importances(closure, seen, each=self.method == "weighted")
        return [FamilyFactors(family, seen, found) for family in families]

    @property
    def _shared(self) -> bool:
        """Whether operators have parameters from a budget of all."""
        return not self.rank and self.allocation == "damage"

    def _divide(self, work: Sequence[FamilyFactors], budget: int) -> Sequence[Division]:
        if self.rank:
            return [Division(0, (self.rank,) * len(one.family)) for one in work]
        groups = [one.group(self.multiple, joint=self.joint) for one in work]
        if self._shared:
            return allocate(groups, budget)
        return [proportional(group, self.ratio) for group in groups]

    def _fitting(self, families: Sequence[Family]) -> tuple[list[Family], list[Refusal]]:
        """The products that some rank makes smaller, and why not the others."""
        fitting: list[Family] = []
        refused: list[Refusal] = []
        least = self.rank or self.multiple
        for family in families:
            together = highest_rank(family[0].shape[0], sum(product.shape[1] for product in family))
            if self.joint and not self.rank and len(family) > 1 and together >= least:
                fitting.append(family)
                continue
            fit = tuple(product for product in family if highest_rank(*product.shape) >= least)
            fitting += [fit] if fit else []
            refused += [self._too_small(product) for product in family if product not in fit]
        return fitting, refused

    def _too_small(self, product: Product) -> Refusal:
        rows, columns = product.shape
        rank = f"rank {self.rank}" if self.rank else f"no rank of a multiple of {self.multiple}"
        reason = f"{rank} makes {rows} x {columns} {'no ' if self.rank else ''}smaller"
        return Refusal(label(product.sites[0].node), f"{reason}: {highest_rank(rows, columns)} would")
