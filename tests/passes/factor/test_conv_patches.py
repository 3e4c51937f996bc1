"""Graphs that show what convolutions see: patches against an oracle, two graphs in one, and a real calibration."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from builders import GraphBuilder, evaluate, random
from convolution_graphs import conv, images, moments_of, residual_network, value_of

from artifacts.target import CPU
from compiler.calibrate import Calibrator, tensor_batches
from compiler.graphs import GraphFolder
from passes.base import Context
from passes.factor.factor_convolutions import FactorConvolutions
from passes.factor.patches import seen_and_wanted, seen_by
from passes.grammar import check
from passes.sites import convolution_sites, linear_sites

WALKS = [
    {},
    {"strides": [2, 1], "pads": [2, 0, 1, 3], "dilations": [1, 2]},
    {"auto_pad": "SAME_LOWER", "strides": [1, 1]},
]


@pytest.mark.parametrize("walk", WALKS)
def test_patches_times_the_kernel_are_the_convolution(walk):
    g = GraphBuilder()
    x = g.input("image", ["batch", 4, 9, 8])
    kernel = random(1, 5, 4, 3, 3)
    model = g.finish(conv(g, x, kernel, size=None, name="c", **walk))
    copy, (patches,) = seen_by(model, convolution_sites(model))
    feeds = {"image": random(2, 3, 4, 9, 8)}
    seen = value_of(copy, patches.name, feeds)
    (expected,) = evaluate(model, feeds).values()
    found = np.moveaxis(seen @ kernel.reshape(5, -1).T, -1, 1)
    np.testing.assert_allclose(found, expected, atol=36 * 2**-23 * np.abs(expected).max())
    assert seen.shape[-1] == 36


def test_what_a_linear_site_sees_is_its_input():
    model = residual_network()
    copy, (value,) = seen_by(model, linear_sites(model))
    (site,) = linear_sites(copy)
    assert value is site.input


def test_two_graphs_in_one():
    original, feeds = residual_network(), images(3, 4)
    changed = original.clone()
    FactorConvolutions("separable", 0.4, memory=0).run(changed, Context(CPU))
    named = [value.name for node in original.graph for value in node.outputs]
    site = next(site for site in convolution_sites(changed) if site.output.name == "second.short_out")
    merged, value = seen_and_wanted(original, changed, site, "second.short_out")
    assert [value.name for node in original.graph for value in node.outputs] == named
    merged.graph.outputs.append(value)
    check(merged, CPU)
    seen = value_of(merged, str(value.name), feeds)
    wanted = np.moveaxis(value_of(original, "second.short_out", feeds), 1, -1)
    np.testing.assert_array_equal(seen[..., -wanted.shape[-1] :], wanted)
    copy, (patches,) = seen_by(changed, [site])
    np.testing.assert_array_equal(seen[..., : -wanted.shape[-1]], value_of(copy, str(patches.name), feeds))
    # Tensors that both hold are there once: the classifier and the convolutions that stayed.
    shared = {id(value.const_value) for value in original.graph.initializers.values()}
    held = [id(value.const_value) for value in merged.graph.initializers.values()]
    assert all(held.count(one) <= 1 for one in shared)


def test_the_other_graph_lacks_the_value():
    model = residual_network()
    with pytest.raises(ValueError, match="no node of the original graph makes 'nothing'"):
        seen_and_wanted(model, model, convolution_sites(model)[0], "nothing")


def test_a_real_calibration_under_a_cap(tmp_path: Path):
    model = residual_network()
    data = images(4, 48)
    feeds = [{"image": data["image"][start : start + 8]} for start in range(0, 48, 8)]
    calibrator = Calibrator(tensor_batches(feeds, rows_apart=True), GraphFolder(tmp_path), 200 * 10**6, cache=False)
    copy, values = seen_by(model, convolution_sites(model))
    found = calibrator.moments(copy, values)
    for value in values:
        expected = moments_of(value_of(copy, str(value.name), data))
        moments = found[str(value.name)]
        assert moments.rows == expected.rows
        scale = np.sqrt(np.outer(np.diag(expected.second), np.diag(expected.second)))
        assert (np.abs(moments.second - expected.second) <= 512 * 2**-24 * scale + 1e-30).all()
    context = Context(CPU, calibrator.observe, calibrator.moments)
    names = [value.name for value in model.graph.inputs]
    assert FactorConvolutions("tucker", 0.6, multiple=4, memory=0).run(model, context).changed
    assert [value.name for value in model.graph.inputs] == names
    check(model, CPU)
    assert isinstance(model, ir.Model)
