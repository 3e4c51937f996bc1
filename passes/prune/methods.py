"""The ways to prune a weight, by name. Plain arrays, no graph."""

from __future__ import annotations

from enum import StrEnum

from passes.second_order import Doubles

from .alps import prune_by_alps
from .amounts import Amount, Floats
from .scores import prune_by_magnitude, prune_by_wanda
from .sparsegpt import prune_by_sparsegpt


class Method(StrEnum):
    """How the elements to prune are chosen, and what becomes of the others."""

    MAGNITUDE = "magnitude"
    """The least ``|w|``; the others stay."""
    WANDA = "wanda"
    """The least ``|w|`` times the norm of the channel that it meets; the others stay."""
    SPARSEGPT = "sparsegpt"
    """Those that the error of the product misses least, row by row; the others make up for them."""
    ALPS = "alps"
    """The same for all rows at once, by ADMM."""

    @property
    def calibrated(self) -> bool:
        """Whether it needs the second moment of the input."""
        return self is not Method.MAGNITUDE


def prune_weight(weight: Floats, amount: Amount, method: Method, second: Doubles | None = None) -> Floats:
    """``W [K, N]`` with zeros, float32.

    Args:
        weight: float32 [K, N], finite; a view of transposed storage is as good.
        amount: How much; K is a multiple of the group of a pattern.
        method: How.
        second: ``H = E[x x^T]`` of the input, float64 [K, K]; for methods that are `Method.calibrated`.

    Raises:
        ValueError: The method needs the second moment and there is none.
        numpy.linalg.LinAlgError: The second moment is not positive semidefinite, or not finite.
    """
    if method is Method.MAGNITUDE:
        return prune_by_magnitude(weight, amount)
    if second is None:
        raise ValueError(f"{method} needs the second moment of the input")
    if method is Method.WANDA:
        return prune_by_wanda(weight, second, amount)
    if method is Method.ALPS:
        return prune_by_alps(weight, second, amount)
    return prune_by_sparsegpt(weight, second, amount)
