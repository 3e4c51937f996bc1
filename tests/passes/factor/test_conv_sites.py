"""Convolutions as sites."""

from __future__ import annotations

import numpy as np
import pytest
from builders import GraphBuilder, random

from passes.sites import convolution_sites


def test_convolution_sites() -> None:
    g = GraphBuilder()
    x = g.input("x", ("n", 4, 9, 9))
    kernel, bias, deep = g.constant(random(0, 6, 4, 3, 5), "k"), g.constant(random(1, 6), "b"), random(2, 6, 1, 3, 3)
    inner = g.add("Conv", x, kernel, bias, name="/features/conv/Conv", strides=[2, 1], pads=[1, 2, 3, 4])
    y = g.add("Conv", inner, g.constant(deep), name="deep", group=6, dilations=[1, 3])
    first, second = convolution_sites(g.finish(y))
    assert (first.weight, first.input, first.output, first.bias) == (kernel, x, inner, bias)
    assert (first.shape, first.group, first.path) == ((6, 4, 3, 5), 1, "features.conv")
    assert (first.strides, first.pads, first.dilations) == ((2, 1), (1, 2, 3, 4), (1, 1))
    assert (second.shape, second.group, second.bias, second.path) == ((6, 1, 3, 3), 6, None, "deep")
    assert (second.strides, second.pads, second.dilations) == ((1, 1), (0, 0, 0, 0), (1, 3))


def test_what_is_no_convolution_site() -> None:
    g = GraphBuilder()
    x, sound, kernel = g.input("x", (1, 2, 9, 9)), g.input("s", (1, 2, 9)), g.input("k", (2, 2, 3, 3))
    outputs = [
        g.add("Conv", x, kernel),
        g.add("Conv", sound, g.constant(random(0, 2, 2, 3))),
        g.add("ConvTranspose", x, g.constant(random(0, 2, 2, 3, 3))),
        g.add("Conv", x, g.constant(random(0, 2, 2, 3, 3)), domain="com.example"),
    ]
    assert convolution_sites(g.finish(*outputs)) == ()


@pytest.mark.parametrize("kind", ["SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [7, 8, 9, 10])
def test_automatic_pads_are_those_of_the_operator(kind: str, stride: int, size: int) -> None:
    g = GraphBuilder()
    x = g.input("x", (1, 1, size, size))
    y = g.add("Conv", x, g.constant(random(0, 1, 1, 4, 3)), auto_pad=kind, strides=[stride, stride])
    (site,) = convolution_sites(g.finish(y))
    for axis, side in enumerate((4, 3)):
        total = max((int(np.ceil(size / stride)) - 1) * stride + side - size, 0)
        less, more = total // 2, total - total // 2
        assert (site.pads[axis], site.pads[axis + 2]) == ((less, more) if kind == "SAME_UPPER" else (more, less))


def test_automatic_pads_of_unknown_planes() -> None:
    for stride, count in ((1, 1), (2, 0)):
        g = GraphBuilder()
        x = g.input("x", (1, 1, "h", "w"))
        y = g.add("Conv", x, g.constant(random(0, 1, 1, 3, 3)), auto_pad="SAME_UPPER", strides=[stride, stride])
        assert len(convolution_sites(g.finish(y))) == count
