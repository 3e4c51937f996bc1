"""Pruning a weight so that the products it makes stay what they were. Plain arrays, no graph.

SparseGPT (Frantar & Alistarh, 2023, arXiv:2301.00774): rows are pruned one after the other, each by the criterion of
OBS, ``w^2 D_k`` of `second_order.factors`, and what one loses is made up for in the rows to come. The elements to prune
are chosen for a block of rows when it is reached, for what its rows then are.

SparseGPT makes up forwards only, and chooses without looking back. So two steps follow that only lower the error
``e^T H e`` of each column: the elements that stay are put at their least squares (`refit`), and elements change places
where that lowers the error (`exchange`).
"""

from __future__ import annotations

import numpy as np

from passes.second_order import Doubles, damped_by_use, factors

from .amounts import Amount, Dropped, Floats, Pattern, lowest, lowest_of_groups
from .least_squares import exchange, refit

_BLOCK = 128
"""Rows of a block for which the elements to prune are chosen together, as in the paper."""
_ELEMENTS = 1 << 21
"""Elements of the weight whose least squares are solved together."""
_STEPS = 8
"""Steps towards the least squares between two sweeps of exchanges."""
_NEAR = 16
"""Rows among which elements change places where there is no pattern."""


def prune_by_sparsegpt(weight: Floats, second: Doubles, amount: Amount, *, sweeps: int = 2) -> Floats:
    """``W [K, N]`` of the least error of its products for inputs with the second moment H, as pruned.

    Args:
        weight: float32 [K, N], finite.
        second: H, float64 [K, K]. Damped here.
        amount: How much; K is a multiple of the group of a pattern.
        sweeps: How often elements may change places afterwards, each time followed by least squares; without any the
            result is that of the paper.

    Raises:
        numpy.linalg.LinAlgError: H is not positive semidefinite, or not finite.
    """
    matrix = damped_by_use(second)
    pruned, dropped = _swept(weight, *factors(matrix), amount)
    if not sweeps:
        return pruned
    moment = matrix.astype(np.float32)
    del matrix
    near = amount.group if isinstance(amount, Pattern) else _NEAR
    width = max(1, _ELEMENTS // len(weight))
    for start in range(0, weight.shape[1], width):
        part = (slice(None), slice(start, start + width))
        values, kept = pruned[part].copy(), ~dropped[part]
        dense = np.ascontiguousarray(weight[part])
        for _ in range(sweeps):
            refit(dense, values, kept, moment, _STEPS)
            exchange(dense, values, kept, moment, near)
        refit(dense, values, kept, moment)
        pruned[part] = values
    return pruned


def _swept(weight: Floats, upper: Floats, pivots: Floats, amount: Amount) -> tuple[Floats, Dropped]:
    """SparseGPT itself: the weight and which of its elements were pruned."""
    pruned, errors = np.empty(weight.shape, np.float32), np.empty(weight.shape, np.float32)
    dropped = np.zeros(weight.shape, np.bool_)
    size = amount.group if isinstance(amount, Pattern) else 1
    block = max(size, _BLOCK // size * size)
    for start in range(0, len(weight), block):
        stop = min(start + block, len(weight))
        target = weight[start:stop] + upper[:start, start:stop].T @ errors[:start]
        inside, each = upper[start:stop, start:stop], pivots[start:stop, None]
        gone = dropped[start:stop]
        if not isinstance(amount, Pattern):
            count = amount.count(pruned[:stop].size) - amount.count(pruned[:start].size)
            gone |= lowest(np.square(_compensated(weight[start:stop], target, inside)) * each, count)
        for k in range(stop - start):
            if isinstance(amount, Pattern) and k % size == 0:
                group = slice(k, k + size)
                left = _compensated(weight[start + k : start + k + size], target[group], inside[group, group])
                gone[group] = lowest_of_groups(np.square(left) * each[group], amount)
            pruned[start + k] = np.where(gone[k], np.float32(0), target[k])
            error = weight[start + k] - pruned[start + k]
            errors[start + k] = error
            target[k + 1 :] += inside[k, k + 1 :, None] * error
    return pruned, dropped


def _compensated(weight: Floats, target: Floats, inside: Floats) -> Floats:
    """What rows would be if none of them were pruned: the best for the errors before them.

    The targets of `second_order.factors` are those of one row after the other, each once those before it are known.

    Args:
        weight: The rows as they were, float32 [n, N].
        target: Of these rows, for the errors before them, float32 [n, N].
        inside: U of these rows, float32 [n, n].
    """
    return weight + np.linalg.solve(inside.T, target - weight)
