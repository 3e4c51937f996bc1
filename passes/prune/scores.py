"""Pruning by a score of each element, the others left as they are. Plain arrays, no graph."""

from __future__ import annotations

import numpy as np

from passes.second_order import Doubles

from .amounts import Amount, Floats, Pattern, lowest, lowest_of_columns, lowest_of_groups


def prune_by_magnitude(weight: Floats, amount: Amount) -> Floats:
    """``W [K, N]`` without its elements of the least ``|w|``: of the whole matrix, or of each group of a pattern."""
    return _without(weight, np.abs(weight), amount, columns=False)


def prune_by_wanda(weight: Floats, second: Doubles, amount: Amount) -> Floats:
    """``W [K, N]`` without its elements of the least ``|w_kn| sqrt(H_kk)``: of each column, or each group of a pattern.

    Sun, Liu, Bair & Kolter, 2023, arXiv:2306.11695: the weight times the norm of the input that it meets, compared
    within an output.

    Args:
        weight: float32 [K, N], finite.
        second: ``H = E[x x^T]``, float64 [K, K]; its diagonal is read.
        amount: How much.
    """
    norms = np.sqrt(np.diagonal(second)).astype(np.float32)
    return _without(weight, np.abs(weight) * norms[:, None], amount, columns=True)


def prune_rows(table: Floats, amount: Amount) -> Floats:
    """A table ``[rows, width]`` without the elements of the least magnitude of each row, or of each group along it."""
    return _without(table.T, np.abs(table.T), amount, columns=True).T


def _without(weight: Floats, scores: Floats, amount: Amount, *, columns: bool) -> Floats:
    if isinstance(amount, Pattern):
        dropped = lowest_of_groups(scores, amount)
    elif columns:
        dropped = lowest_of_columns(scores, amount.count(len(weight)))
    else:
        dropped = lowest(scores, amount.count(weight.size))
    return np.where(dropped, np.float32(0), weight)
