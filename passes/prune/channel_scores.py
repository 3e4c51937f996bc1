"""Which channels products over them can do without. Plain arrays.

For a product ``W x`` of inputs with covariance H, taking out the inputs S of a channel costs
``tr(W_S ((H^-1)_SS)^-1 W_S^T)`` once all other weights have made up for it, which they do by
``-W_S ((H^-1)_SS)^-1 (H^-1)_S:``: the optimal brain surgeon (Hassibi & Stork, 1993) for blocks (as in ZipLM, Kurtic,
Frantar & Alistarh, 2023, arXiv:2302.04089).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from passes.factor.kernels import contract
from passes.factor.regression import Doubles, Regression, solve

Indices = NDArray[np.intp]


@dataclass(frozen=True)
class Reading:
    """A product over channels.

    Attributes:
        regression: Of its outputs, ``W [N, C * taps]``.
        taps: Inputs of each channel, side by side.
    """

    regression: Regression
    taps: int


def keep(readings: Sequence[Reading], width: int, count: int, *, compensated: bool) -> Indices:
    """The channels that stay, in their order.

    Args:
        readings: All products over the channels. Their errors, each in parts of the variance of the outputs, are added.
        width: Channels there are.
        count: That stay; at least 1.
        compensated: Take one after the other, the others making up for each; else each is judged by what it gives the
            outputs as they are, ``tr(W_S H_SS W_S^T)``.
    """
    if not compensated:
        scores = sum((_own(reading, width) for reading in readings), np.zeros(width))
        return np.sort(np.argsort(-scores, kind="stable")[:count])
    surgeons = [_Surgeon(reading, width) for reading in readings]
    left = np.ones(width, bool)
    while left.sum() > count:
        scores = sum((surgeon.scores() for surgeon in surgeons), np.zeros(width))
        worst = int(np.argmin(np.where(left, scores, np.inf)))
        left[worst] = False
        for surgeon in surgeons:
            surgeon.remove(worst)
    return np.flatnonzero(left)


def columns(kept: Indices, taps: int) -> Indices:
    """The inputs of a product that belong to these channels."""
    return np.asarray((kept[:, None] * taps + np.arange(taps)).ravel(), np.intp)


class _Surgeon:
    """One product, of which channels are taken out one by one."""

    def __init__(self, reading: Reading, width: int) -> None:
        self._shape = (width, reading.taps)
        self._spread = reading.regression.spread
        self._weight = reading.regression.best.copy()
        self._inverse = np.linalg.inv(reading.regression.moment)
        self._gone: list[int] = []

    def scores(self) -> Doubles:
        """What each channel costs now, float64 [C]; no meaning for those that are gone."""
        width, taps = self._shape
        blocks = self._blocks()
        weight = self._weight.reshape(-1, width, taps).transpose(1, 2, 0)
        return contract("ctn,ctn->c", weight, solve(blocks, weight)) / self._spread

    def remove(self, channel: int) -> None:
        """Take one out."""
        taps = self._shape[1]
        part = slice(channel * taps, (channel + 1) * taps)
        rows = solve(self._inverse[part, part], self._inverse[part])
        self._weight -= self._weight[:, part] @ rows
        self._inverse -= self._inverse[:, part] @ rows
        self._weight[:, part] = 0
        self._gone.append(channel)

    def _blocks(self) -> Doubles:
        width, taps = self._shape
        blocks = contract("ctcs->cts", self._inverse.reshape(width, taps, width, taps)).copy()
        blocks[self._gone] = np.eye(taps)
        return blocks


def _own(reading: Reading, width: int) -> Doubles:
    taps = reading.taps
    weight = reading.regression.best.reshape(-1, width, taps)
    blocks = contract("ctcs->cts", reading.regression.moment.reshape(width, taps, width, taps))
    return contract("nct,cts,ncs->c", weight, blocks, weight) / reading.regression.spread
