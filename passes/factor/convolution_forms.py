"""Chains of convolutions that take the place of one: what they cost, what they lose, how they are made. No graphs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from passes.affine import Floats

from .kernels import filters, fit_projected, fit_separable, leading, project, separate
from .regression import Doubles, Regression

Ranks = tuple[int, ...]
Pads = tuple[int, int, int, int]
MEMORY = 12
"""Multiply-adds in the time of which one element of a map is read or written: ONNX Runtime, AVX-512, maps in the cache.

Measured on depthwise, pointwise, 3 x 3 and flat convolutions of 64 and 128 channels; without it, chains of many cheap
steps look faster than they are.
"""
_ONE = (1, 1)
_NO_PADS = (0, 0, 0, 0)


@dataclass(frozen=True)
class Geometry:
    """How a convolution walks over its input.

    Attributes:
        shape: Of its kernel, ``(N, C, height, width)``; it has one group.
        strides: Along height and width.
        pads: Before height and width, then behind them.
        dilations: Along height and width.
        before: Height and width of its input; of any unit, as long as `after` has the same.
        after: Height and width of its output.
        memory: What one element that is read or written counts, in multiply-adds; see `MEMORY`.
    """

    shape: tuple[int, int, int, int]
    strides: tuple[int, int]
    pads: Pads
    dilations: tuple[int, int]
    before: tuple[int, int]
    after: tuple[int, int]
    memory: int = 0

    @property
    def taps(self) -> int:
        """Height times width of the kernel."""
        return self.shape[2] * self.shape[3]

    @property
    def areas(self) -> tuple[int, int]:
        """Places of the input and of the output."""
        return self.before[0] * self.before[1], self.after[0] * self.after[1]

    @property
    def dense(self) -> int:
        """Work of the convolution itself, for one example: multiply-adds, and `memory` for each element."""
        outputs, inputs = self.shape[:2]
        before, after = self.areas
        return outputs * inputs * self.taps * after + self.memory * (inputs * before + outputs * after)


@dataclass(frozen=True)
class Step:
    """One convolution of a chain.

    Attributes:
        weight: float32 [N, C / group, height, width].
        strides: Along height and width.
        pads: Before height and width, then behind them.
        dilations: Along height and width.
        group: 1, or C where it is depthwise.
    """

    weight: Floats
    strides: tuple[int, int] = _ONE
    pads: Pads = _NO_PADS
    dilations: tuple[int, int] = _ONE
    group: int = 1


@dataclass(frozen=True)
class Chain:
    """What takes the place of a convolution.

    Attributes:
        branches: Convolutions one after the other, all from the same input; what the branches give is added.
        weight: The kernel that they are together, float64 [N, C * taps].
    """

    branches: tuple[tuple[Step, ...], ...]
    weight: Doubles


class Form(Protocol):
    """A kind of chain."""

    def unfit(self, geometry: Geometry) -> str:
        """Why a convolution cannot be one; empty if it can."""
        ...

    def ranks(self, geometry: Geometry) -> list[Ranks]:
        """The ranks to choose from; some may cost more than the convolution."""
        ...

    def cost(self, geometry: Geometry, ranks: Ranks) -> int:
        """Work for one example, in the unit of `Geometry.dense`."""
        ...

    def damages(self, regression: Regression, geometry: Geometry, choices: Iterable[Ranks]) -> list[float]:
        """Error at each of the ranks, in parts of the variance of the outputs, before alternating least squares."""
        ...

    def chain(self, regression: Regression, geometry: Geometry, ranks: Ranks, sweeps: int) -> Chain:
        """The best chain of these ranks."""
        ...


@dataclass(frozen=True)
class Spatial:
    """height x 1 and then 1 x width, rank R between them (Jaderberg, Vedaldi & Zisserman, 2014, arXiv:1405.3866).

    Attributes:
        multiple: R is one of it.
    """

    multiple: int

    def unfit(self, geometry: Geometry) -> str:
        """A kernel that is flat already."""
        height, width = geometry.shape[2:]
        return f"a kernel of {height} x {width} has no two sides to part" if min(height, width) == 1 else ""

    def ranks(self, geometry: Geometry) -> list[Ranks]:
        """Multiples below the full rank."""
        outputs, inputs, height, width = geometry.shape
        return [(rank,) for rank in range(self.multiple, min(inputs * height, outputs * width), self.multiple)]

    def cost(self, geometry: Geometry, ranks: Ranks) -> int:
        """The first part is computed at the height of the output and the width of the input."""
        outputs, inputs, height, width = geometry.shape
        before, after = geometry.areas
        between = ranks[0] * geometry.after[0] * geometry.before[1]
        sums = between * inputs * height + ranks[0] * after * outputs * width
        return sums + geometry.memory * (inputs * before + 2 * between + outputs * after)

    def damages(self, regression: Regression, geometry: Geometry, choices: Iterable[Ranks]) -> list[float]:
        """One decomposition for all of them."""
        width = geometry.shape[3]
        first = leading(regression, width)
        return [regression.error(project(regression, first[:rank], width).weight) for (rank,) in choices]

    def chain(self, regression: Regression, geometry: Geometry, ranks: Ranks, sweeps: int) -> Chain:
        """Along height first, so that a stride there saves work on both."""
        outputs, inputs, height, width = geometry.shape
        found = fit_projected(regression, width, (ranks[0], None), sweeps)
        top, left, bottom, right = geometry.pads
        (down, across), (tall, wide) = geometry.strides, geometry.dilations
        first = _floats(found.first).reshape(-1, inputs, height, 1)
        second = _floats(found.core).reshape(outputs, -1, 1, width)
        steps = (
            Step(first, (down, 1), (top, 0, bottom, 0), (tall, 1)),
            Step(second, (1, across), (0, left, 0, right), (1, wide)),
        )
        return Chain((steps,), found.weight)


@dataclass(frozen=True)
class Tucker:
    """1 x 1 to R channels, the kernel's size to M, 1 x 1 to N (Kim et al., 2016, arXiv:1511.06530).

    R and M are in the proportion of C and N.

    Attributes:
        multiple: Both are multiples of it.
    """

    multiple: int

    def unfit(self, geometry: Geometry) -> str:
        """A kernel of one tap is a product: see the low rank of those."""
        return "a kernel of 1 x 1 is a product already" if geometry.taps == 1 else ""

    def ranks(self, geometry: Geometry) -> list[Ranks]:
        """Multiples below C, each with the nearest multiple for N."""
        outputs, inputs = geometry.shape[:2]
        found: list[Ranks] = []
        for rank in range(self.multiple, inputs, self.multiple):
            behind = max(1, round(rank * outputs / inputs / self.multiple)) * self.multiple
            if behind < outputs and behind <= rank * geometry.taps:
                found.append((rank, behind))
        return found

    def cost(self, geometry: Geometry, ranks: Ranks) -> int:
        """The first 1 x 1 is computed at the size of the input."""
        outputs, inputs = geometry.shape[:2]
        rank, behind = ranks
        before, after = geometry.areas
        sums = rank * inputs * before + behind * (rank * geometry.taps + outputs) * after
        return sums + geometry.memory * (inputs * before + 2 * rank * before + 2 * behind * after + outputs * after)

    def damages(self, regression: Regression, geometry: Geometry, choices: Iterable[Ranks]) -> list[float]:
        """One decomposition for all of them."""
        taps = geometry.taps
        first = leading(regression, taps)
        return [regression.error(project(regression, first[:one], taps, two).weight) for one, two in choices]

    def chain(self, regression: Regression, geometry: Geometry, ranks: Ranks, sweeps: int) -> Chain:
        """Pads, strides and dilations are the core's."""
        found = fit_projected(regression, geometry.taps, (ranks[0], ranks[1]), sweeps)
        core = _floats(found.core).reshape(len(found.core), -1, *geometry.shape[2:])
        steps = (
            Step(_floats(found.first)[:, :, None, None]),
            Step(core, geometry.strides, geometry.pads, geometry.dilations),
            Step(_floats(found.last)[:, :, None, None]),
        )
        return Chain((steps,), found.weight)


@dataclass(frozen=True)
class DepthwiseSeparable:
    """A depthwise convolution with M filters for each channel, then 1 x 1: ``W[n,c,:] ~ sum_m P[n,c,m] D[c,m,:]``.

    The form of MobileNet (Howard et al., 2017, arXiv:1704.04861), with a multiplier and nothing between the two. A sum
    of M separable convolutions is any kernel once M is the number of taps (Guo et al., 2018, arXiv:1808.04376).
    """

    def unfit(self, geometry: Geometry) -> str:
        """A kernel of one tap is a product."""
        return "a kernel of 1 x 1 is pointwise already" if geometry.taps == 1 else ""

    def ranks(self, geometry: Geometry) -> list[Ranks]:
        """Fewer filters than taps and outputs."""
        return [(count,) for count in range(1, min(geometry.taps, geometry.shape[0]))]

    def cost(self, geometry: Geometry, ranks: Ranks) -> int:
        """Each branch is computed at the size of the output, and all but one are added."""
        outputs, inputs = geometry.shape[:2]
        before, after = geometry.areas
        sums = inputs * (geometry.taps + outputs) * after
        touched = inputs * before + 2 * inputs * after + outputs * after
        return ranks[0] * (sums + geometry.memory * touched) + geometry.memory * (ranks[0] - 1) * outputs * after

    def damages(self, regression: Regression, geometry: Geometry, choices: Iterable[Ranks]) -> list[float]:
        """One decomposition for all of them."""
        found = filters(regression, geometry.taps)
        return [regression.error(separate(regression, found[:, :count]).weight) for (count,) in choices]

    def chain(self, regression: Regression, geometry: Geometry, ranks: Ranks, sweeps: int) -> Chain:
        """A branch for each filter: ONNX Runtime is fast where a depthwise convolution has one filter a channel only.

        Pads, strides and dilations are the depthwise convolutions'.
        """
        outputs, inputs, height, width = geometry.shape
        found = fit_separable(regression, geometry.taps, ranks[0], sweeps)
        branches = []
        for place in range(ranks[0]):
            depthwise = _floats(found.depthwise[:, place]).reshape(inputs, 1, height, width)
            pointwise = _floats(found.pointwise[:, :, place]).reshape(outputs, inputs, 1, 1)
            first = Step(depthwise, geometry.strides, geometry.pads, geometry.dilations, inputs)
            branches.append((first, Step(pointwise)))
        return Chain(tuple(branches), found.weight)


def form_of(method: str, multiple: int) -> Form:
    """The form that an option names.

    Raises:
        KeyError: It names none.
    """
    forms: dict[str, Form] = {
        "spatial": Spatial(multiple),
        "tucker": Tucker(multiple),
        "separable": DepthwiseSeparable(),
    }
    return forms[method]


METHODS = ("spatial", "tucker", "separable")
"""What options may name."""


def _floats(array: Doubles) -> Floats:
    return np.ascontiguousarray(array, dtype=np.float32)
