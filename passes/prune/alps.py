"""Pruning as one problem for all rows at once, solved by ADMM. Plain arrays, no graph.

ALPS (Meng, Behdin, Wang & Mazumder, 2024, arXiv:2406.07831): ``min trace((W - V)^T H (W - V))`` over V that has the
zeros is split into a V that minimizes and one that has the zeros, with a penalty rho on their difference that grows
while their elements settle. H is scaled to a diagonal of ones before, so that what is nearest among the sparse is found
by ``|v_kn| sqrt(H_kk)``.
"""

from __future__ import annotations

import numpy as np

from passes.second_order import Doubles, damped_by_use

from .amounts import Amount, Dropped, Floats, Pattern, lowest, lowest_of_groups
from .least_squares import refit

_PENALTY = 0.1
_EVERY = 3
_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""rho at first; every so many rounds it grows by the second number where more than the first of the part that stays has
changed since; as in the paper."""
_ROUNDS = 200
_ELEMENTS = 1 << 21


def prune_by_alps(weight: Floats, second: Doubles, amount: Amount) -> Floats:
    """``W [K, N]`` of the least error of its products for inputs with the second moment H, as pruned.

    Args:
        weight: float32 [K, N], finite.
        second: H, float64 [K, K]. Damped here.
        amount: How much; K is a multiple of the group of a pattern.

    Raises:
        numpy.linalg.LinAlgError: H is not finite.
    """
    matrix = damped_by_use(second)
    sizes = np.sqrt(np.diagonal(matrix))
    normal = (matrix / np.outer(sizes, sizes)).astype(np.float32)
    units = sizes.astype(np.float32)[:, None]
    dense = weight * units
    values = _split(dense, normal, amount)
    kept = values != 0
    width = max(1, _ELEMENTS // len(weight))
    for start in range(0, weight.shape[1], width):
        part = (slice(None), slice(start, start + width))
        found = values[part].copy()
        refit(np.ascontiguousarray(dense[part]), found, kept[part], normal)
        values[part] = found
    return values / units


def _split(dense: Floats, normal: Floats, amount: Amount) -> Floats:
    """The sparse half of the split once its zeros have settled; ``normal`` is H of a diagonal of ones."""
    eigenvalues, vectors = np.linalg.eigh(normal.astype(np.float64))
    spectrum, basis = np.maximum(eigenvalues, 0).astype(np.float32)[:, None], vectors.astype(np.float32)
    aim = spectrum * (basis.T @ dense)
    sparse, price = dense.copy(), np.zeros_like(dense)
    penalty = np.float32(_PENALTY)
    before = np.ones(dense.shape, np.bool_)
    for turn in range(1, _ROUNDS + 1):
        free = basis @ ((aim + basis.T @ (penalty * sparse - price)) / (spectrum + penalty))
        sparse = free + price / penalty
        dropped = _smallest(sparse, amount)
        sparse[dropped] = 0
        price += penalty * (free - sparse)
        if turn % _EVERY:
            continue
        moved = np.count_nonzero(before != ~dropped) / (np.count_nonzero(~dropped) or 1)
        if not moved:
            break
        before = ~dropped
        penalty *= np.float32(next(growth for least, growth in _GROWTH if moved > least))
    return sparse


def _smallest(values: Floats, amount: Amount) -> Dropped:
    scores = np.abs(values)
    return (
        lowest_of_groups(scores, amount) if isinstance(amount, Pattern) else lowest(scores, amount.count(values.size))
    )
