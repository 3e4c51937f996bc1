"""factor-convolutions: structure, numbers in a real ONNX Runtime, budgets, repair, refusals, idempotence."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from builders import Array, GraphBuilder, apply, evaluate, operators, random
from convolution_graphs import calibrated, conv, images, like, residual_network, value_of, weights

from artifacts.target import CPU
from passes.base import Context, Effect, Pass, Purpose
from passes.factor.convolution_forms import METHODS, Geometry, form_of
from passes.factor.convolution_sites import FACTORED, cost
from passes.factor.factor_convolutions import FactorConvolutions
from passes.factor.regression import of_itself
from passes.grammar import check, signature
from passes.sites import NAME_SCOPES, convolution_sites

HERE = Context(CPU)
CHANNELS, OUTPUTS = 8, 12
LOW = {"spatial": (4,), "tucker": (4, 4), "separable": (4,)}
"""Ranks of kernels that are made of them; the passes here come to as much or more."""
SMALL = {"flops": 0.9, "allocate": False, "multiple": 4, "memory": 0}
EPS = float(np.finfo(np.float32).eps)


def low_rank(method: str) -> Array:
    """A kernel that a chain of these ranks is exactly, but for its own rounding."""
    kernel = random(1, OUTPUTS, CHANNELS * 9)
    geometry = Geometry((OUTPUTS, CHANNELS, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), (9, 9), (9, 9))
    chain = form_of(method, 1).chain(of_itself(kernel, None, None), geometry, LOW[method], 0)
    return (chain.weight.reshape(OUTPUTS, CHANNELS, 3, 3) / 9).astype(np.float32)


def single(kernel: Array, *, sizes: tuple[int, int] = (9, 9), known: bool = True, **attributes: object) -> ir.Model:
    """One convolution of 9 x 9 to any plane, its path and bias."""
    g = GraphBuilder()
    x = g.input("image", ["batch", kernel.shape[1] * int(attributes.get("group", 1)), 9, 9])
    y = conv(g, x, kernel, size=None, bias=random(2, len(kernel)), name="only", **attributes)
    y.shape = ir.Shape(["batch", len(kernel), *sizes] if known else ["batch", len(kernel), "h", "w"])
    next(iter(g.graph)).metadata_props[NAME_SCOPES] = repr(["", "features.conv", "only"])
    return g.finish(y)


def total(model: ir.Model) -> int:
    return sum(cost(site, 0) for site in convolution_sites(model))


def error(model: ir.Model, expected: Array, feeds: dict[str, Array]) -> float:
    """Of the first output, in parts of the variance of the expected one."""
    found = next(iter(evaluate(model, feeds).values())).astype(np.float64)
    return float(np.sum((found - expected) ** 2) / np.sum((expected - expected.mean(0)) ** 2))


def test_it_is_a_pass():
    assert isinstance(FactorConvolutions(), Pass)
    one = FactorConvolutions
    assert (one.name, one.effect, one.purpose) == ("factor-convolutions", Effect.LOSSY, Purpose.SPEED)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"method": "cp"}, "method is 'cp', not one of spatial, tucker, separable"),
        ({"flops": 0.0}, "flops is 0.0, not above 0 and below 1"),
        ({"flops": 1.0}, "flops is 1.0, not above 0 and below 1"),
        ({"sweeps": -1}, "sweeps is -1, not 0 or more"),
        ({"multiple": 0}, "multiple is 0, not 1 or more"),
        ({"memory": -1}, "memory is -1, not 0 or more"),
    ],
)
def test_options_out_of_range(options, told):
    with pytest.raises(ValueError, match=f"^{told}$"):
        FactorConvolutions(**options)


def test_structure_spatial():
    model = single(low_rank("spatial"), strides=[2, 1], pads=[2, 1, 0, 3], dilations=[1, 2], sizes=(5, 9))
    before = signature(model)
    assert apply(FactorConvolutions("spatial", 0.6, allocate=False, memory=0, multiple=4), model).changed == 1
    first, second = model.graph
    x = model.graph.inputs[0]
    assert (first.inputs[0], second.inputs[0], len(first.inputs)) == (x, first.outputs[0], 2)
    assert second.outputs[0] is model.graph.outputs[0]
    shapes = [tuple(node.inputs[1].const_value.shape) for node in (first, second)]
    assert shapes == [(8, CHANNELS, 3, 1), (OUTPUTS, 8, 1, 3)]
    walks = [
        [tuple(node.attributes[key].as_ints()) for key in ("strides", "pads", "dilations")] for node in (first, second)
    ]
    assert walks == [[(2, 1), (2, 0, 0, 0), (1, 1)], [(1, 1), (0, 1, 0, 3), (1, 2)]]
    assert list(first.outputs[0].shape)[1:] == [8, 5, 9]
    assert {node.metadata_props[NAME_SCOPES] for node in (first, second)} == {repr(["", "features.conv", "only"])}
    assert signature(model) == before


def test_structure_tucker_and_separable():
    walk = {"strides": [2, 2], "pads": [1, 1, 1, 1], "dilations": [1, 1]}
    model = single(low_rank("tucker"), sizes=(5, 5), **walk)
    assert apply(FactorConvolutions("tucker", **SMALL), model).changed == 1
    nodes = list(model.graph)
    shapes = [tuple(node.inputs[1].const_value.shape) for node in nodes]
    assert shapes == [(4, CHANNELS, 1, 1), (8, 4, 3, 3), (OUTPUTS, 8, 1, 1)]
    assert [tuple(node.attributes["strides"].as_ints()) for node in nodes] == [(1, 1), (2, 2), (1, 1)]
    assert [len(node.inputs) for node in nodes] == [2, 2, 3]
    model = single(low_rank("separable"), sizes=(5, 5), **walk)
    assert apply(FactorConvolutions("separable", **SMALL), model).changed == 1
    # Four filters of nine cost less than nine tenths, five do not: four branches, added one after the other.
    assert operators(model) == {"Add": 3, "Conv": 8}
    deep, flat = ([node for node in model.graph if node.op_type == "Conv"][place::2] for place in (0, 1))
    x = model.graph.inputs[0]
    for first, second in zip(deep, flat, strict=True):
        assert (first.inputs[0], second.inputs[0], len(first.inputs)) == (x, first.outputs[0], 2)
        assert tuple(first.inputs[1].const_value.shape) == (CHANNELS, 1, 3, 3)
        assert tuple(second.inputs[1].const_value.shape) == (OUTPUTS, CHANNELS, 1, 1)
        assert (first.attributes["group"].as_int(), second.attributes["group"].as_int()) == (CHANNELS, 1)
        assert [tuple(node.attributes["strides"].as_ints()) for node in (first, second)] == [(2, 2), (1, 1)]
    assert [len(node.inputs) for node in flat] == [2] * 3 + [3]
    sums = [node for node in model.graph if node.op_type == "Add"]
    assert sums[0].inputs == (flat[0].outputs[0], flat[1].outputs[0])
    assert [node.inputs for node in sums[1:]] == [
        (before.outputs[0], one.outputs[0]) for before, one in zip(sums, flat[2:], strict=False)
    ]
    assert sums[-1].outputs[0] is model.graph.outputs[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize(
    ("walk", "sizes"),
    [
        ({}, (9, 9)),
        ({"pads": [0, 0, 0, 0]}, (7, 7)),
        ({"strides": [2, 2]}, (5, 5)),
        ({"strides": [1, 3], "pads": [2, 0, 1, 2]}, (10, 3)),
        ({"dilations": [2, 3], "pads": [2, 3, 2, 3]}, (9, 9)),
        ({"auto_pad": "SAME_UPPER", "strides": [2, 2]}, (5, 5)),
        ({"auto_pad": "SAME_LOWER"}, (9, 9)),
        ({"auto_pad": "VALID", "strides": [2, 1]}, (4, 7)),
    ],
)
def test_kernels_of_low_rank_give_what_they_gave(method, data, walk, sizes):
    model = single(low_rank(method), sizes=sizes, **walk)
    feeds = {"image": random(3, 6, CHANNELS, 9, 9)}
    (expected,) = evaluate(model, feeds).values()
    assert expected.shape[2:] == sizes
    context = calibrated(feeds) if data else HERE
    assert FactorConvolutions(method, **SMALL).run(model, context).changed == 1
    check(model, CPU)
    (found,) = evaluate(model, feeds).values()
    # The kernel is of low rank up to its own rounding; sums over 72 products, and as many again between the steps.
    reach = (
        2 * 72 * EPS * float(np.abs(low_rank(method)).sum(axis=(1, 2, 3)).max()) * float(np.abs(feeds["image"]).max())
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=reach)
    assert np.abs(expected).max() > 50 * reach


def test_the_error_is_the_one_foretold():
    """Without data the squared error of outputs on white noise is that of the kernel: Eckart & Young's."""
    kernel = random(4, 16, 8, 3, 3)
    model = single(kernel, pads=[0, 0, 0, 0], sizes=(7, 7))
    feeds = {"image": random(5, 200, 8, 9, 9)}
    (expected,) = evaluate(model, feeds).values()
    FactorConvolutions("spatial", 0.5, allocate=False, memory=0, multiple=1).run(model, HERE)
    rank = len(next(iter(model.graph)).inputs[1].const_value.numpy())
    values = np.linalg.svd(kernel.transpose(1, 2, 0, 3).reshape(24, 48), compute_uv=False) ** 2
    foretold = values[rank:].sum() / values.sum()
    # 200 x 49 places, neighbours share inputs: about 200 x 9 that are independent, for each of 16 outputs.
    assert error(model, expected, feeds) == pytest.approx(foretold, rel=5 / np.sqrt(200 * 9))


@pytest.mark.parametrize("method", METHODS)
def test_calibration_data_lower_the_error(method):
    feeds, held = images(6, 60, 9, CHANNELS), images(7, 20, 9, CHANNELS)
    kernel = weights(8, 16, CHANNELS)
    errors = []
    for context in (HERE, calibrated(feeds)):
        model = single(kernel)
        (expected,) = evaluate(model, held).values()
        assert FactorConvolutions(method, 0.4, allocate=False, memory=0, multiple=1).run(model, context).changed == 1
        errors.append(error(model, expected, held))
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("flops", [0.5, 0.8])
def test_all_convolutions_together_come_to_the_wanted_multiply_adds(method, flops):
    model = residual_network()
    dense = total(model)
    outcome = apply(
        FactorConvolutions(method, flops, repair=False, memory=0, multiple=4), model, calibrated(images(9, 40))
    )
    assert outcome.changed
    assert 0.8 * flops * dense < total(model) <= flops * dense
    assert not any("cannot be brought" in refusal.reason for refusal in outcome.refused)


def test_allocation_does_less_harm_than_a_ratio_for_each():
    feeds, held = images(10, 80), images(11, 40)
    errors = []
    for allocate in (False, True):
        model = residual_network()
        (expected,) = evaluate(model, held).values()
        item = FactorConvolutions("tucker", 0.6, allocate=allocate, memory=0, repair=False, multiple=4)
        assert item.run(model, calibrated(feeds)).changed
        errors.append(error(model, expected, held))
    assert errors[1] < errors[0]


@pytest.mark.parametrize("method", METHODS)
def test_repair_lowers_the_error_on_other_data(method):
    feeds, held = images(12, 80), images(13, 40)
    errors = []
    for repair in (False, True):
        model = residual_network()
        (expected,) = evaluate(model, held).values()
        assert (
            FactorConvolutions(method, 0.4, repair=repair, memory=0, multiple=4).run(model, calibrated(feeds)).changed
            >= 3
        )
        check(model, CPU)
        errors.append(error(model, expected, held))
    assert errors[1] < 0.9 * errors[0]


def test_repair_is_a_regression_on_what_is_seen_now():
    """Of two convolutions the second is fitted to the original's outputs: a textbook regression finds no better one."""
    g = GraphBuilder()
    x = g.input("image", ["batch", 8, 8, 8])
    inner = conv(g, x, weights(14, 12, 8), size=8, name="a")
    y = conv(g, g.add("Relu", inner, shape=like(inner)), weights(15, 6, 12), size=8, bias=random(16, 6), name="b")
    model = g.finish(y)
    feeds = images(17, 60, 8, 8)
    (wanted,) = evaluate(model, feeds).values()
    assert FactorConvolutions("separable", 0.6, allocate=False, memory=0).run(model, calibrated(feeds)).changed == 2
    (found,) = evaluate(model, feeds).values()
    flat = [site.input.name for site in convolution_sites(model) if site.shape == (6, 12, 1, 1)]
    seen = np.concatenate([value_of(model, str(name), feeds) for name in flat], axis=1)
    rows = np.moveaxis(seen, 1, -1).reshape(-1, seen.shape[1]).astype(np.float64)
    targets = np.moveaxis(wanted, 1, -1).reshape(-1, 6).astype(np.float64)
    augmented = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
    best = targets - augmented @ np.linalg.lstsq(augmented, targets, rcond=None)[0]
    own = np.sum((found - wanted) ** 2)
    # Damping pulls by a thousandth of the mean variance towards the weight that was there.
    assert np.sum(best**2) <= own < 1.05 * np.sum(best**2)


def test_a_second_run_changes_nothing_even_where_the_goal_is_out_of_reach():
    model = residual_network()
    context = calibrated(images(18, 30))
    outcome = apply(FactorConvolutions("separable", 0.02), model, context)
    assert outcome.changed
    assert any("cannot be brought to 2% of" in refusal.reason for refusal in outcome.refused)
    again = residual_network()
    FactorConvolutions("tucker", 0.5, multiple=4, memory=0).run(again, context)
    assert FactorConvolutions("tucker", 0.5, multiple=4, memory=0).run(again, context).changed == 0
    assert any(FACTORED in node.metadata_props for node in again.graph)


def test_only_and_skip():
    model = residual_network()
    item = FactorConvolutions(
        "separable", 0.5, allocate=False, memory=0, only=("first.*",), skip=("first.a", "nothing")
    )
    outcome = apply(item, model, calibrated(images(19, 30)))
    assert outcome.changed == 1
    assert "first.b" not in {node.name for node in model.graph}
    told = {refusal.node: refusal.reason for refusal in outcome.refused}
    assert told["first.a"] == "first.a is skipped by 'first.a'"
    assert told["nothing"] == "the skip pattern fits no convolution"


def refusal_of(model: ir.Model, item: FactorConvolutions) -> str:
    before = operators(model)
    outcome = apply(item, model)
    assert (outcome.changed, operators(model)) == (0, before)
    (refusal,) = outcome.refused
    assert refusal.node == "only"
    return refusal.reason


def test_refusals():
    kernel = random(20, OUTPUTS, CHANNELS, 3, 3)
    each = {"allocate": False, "memory": 0}
    assert refusal_of(single(kernel, group=2), FactorConvolutions(**each)) == "it has 2 groups"
    flat = random(21, 16, 16, 1, 1)
    assert refusal_of(single(flat), FactorConvolutions("tucker", **each)) == "a kernel of 1 x 1 is a product already"
    assert refusal_of(single(flat), FactorConvolutions(**each)) == "a kernel of 1 x 1 is pointwise already"
    tall = random(22, 16, 16, 3, 1)
    found = refusal_of(single(tall, pads=[1, 0, 1, 0]), FactorConvolutions("spatial", **each))
    assert found == "a kernel of 3 x 1 has no two sides to part"
    found = refusal_of(single(kernel, known=False), FactorConvolutions())
    assert found == "height and width are not known, nor what it costs"
    found = refusal_of(single(kernel), FactorConvolutions("tucker", **each))
    assert found == "no chain of these ranks is cheap enough"
    broken = kernel.copy()
    broken[0, 0, 0, 0] = np.nan
    assert refusal_of(single(broken), FactorConvolutions()) == "the kernel or the bias has values that are not finite"
    assert refusal_of(single(kernel.astype(np.float16)), FactorConvolutions()) == "the kernel is not float32"


def test_a_kernel_that_is_no_constant_and_one_of_one_axis_are_refused():
    g = GraphBuilder()
    x, kernel = g.input("image", ["batch", 8, 9, 9]), g.input("kernel", [8, 8, 3, 3])
    y = g.add("Conv", x, kernel, name="only", shape=["batch", 8, 7, 7])
    assert refusal_of(g.finish(y), FactorConvolutions()).startswith("no convolution with a constant kernel")
    g = GraphBuilder()
    x = g.input("sound", ["batch", 8, 9])
    y = g.add("Conv", x, g.constant(random(23, 8, 8, 3)), name="only", shape=["batch", 8, 7])
    assert refusal_of(g.finish(y), FactorConvolutions()).startswith("no convolution with a constant kernel")


def test_too_little_data_is_told():
    model = single(random(24, OUTPUTS, CHANNELS, 3, 3), pads=[0, 0, 0, 0], strides=[4, 4], sizes=(2, 2))
    item = FactorConvolutions(allocate=False, memory=0)
    outcome = item.run(model, calibrated({"image": random(25, 3, CHANNELS, 9, 9)}))
    assert outcome.changed == 1
    assert [refusal.reason for refusal in outcome.refused] == ["its 72 inputs were seen 12 times only"]
    assert all(np.isfinite(value).all() for value in evaluate(model, {"image": random(26, 2, CHANNELS, 9, 9)}).values())


def test_without_data_it_says_so():
    outcome = FactorConvolutions(allocate=False, memory=0).run(single(random(27, OUTPUTS, CHANNELS, 3, 3)), HERE)
    assert outcome.changed == 1
    assert [refusal.remedy for refusal in outcome.refused] == ["compile with data"]


def test_a_graph_without_convolutions_stays():
    g = GraphBuilder()
    x = g.input("x", ["batch", 8])
    model = g.finish(g.add("Relu", x, shape=["batch", 8]))
    assert apply(FactorConvolutions(), model) == FactorConvolutions().run(model, HERE)
    assert operators(model) == {"Relu": 1}
