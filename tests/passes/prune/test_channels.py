"""prune-channels: what goes together, shapes, numbers in a real ONNX Runtime, importance and repair against oracles."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from builders import Array, GraphBuilder, apply, evaluate, operators, random
from convolution_graphs import calibrated, conv, images, like, moments_of, residual_network, value_of, weights

from artifacts.target import CPU
from passes.base import Context, Effect, Pass, Purpose
from passes.factor.regression import DAMPING, of_itself
from passes.grammar import check
from passes.prune.channel_groups import channel_groups
from passes.prune.channel_scores import Reading, columns, keep
from passes.prune.prune_channels import PruneChannels
from passes.sites import convolution_sites

HERE = Context(CPU)


def kernels(model: ir.Model) -> dict[str, tuple[int, ...]]:
    return {str(site.node.name): site.shape for site in convolution_sites(model)}


def error(model: ir.Model, expected: Array, feeds: dict[str, Array]) -> float:
    found = next(iter(evaluate(model, feeds).values())).astype(np.float64)
    return float(np.sum((found - expected) ** 2) / np.sum((expected - expected.mean(0)) ** 2))


def rich_network() -> ir.Model:
    """Normalization, a depthwise convolution, gates and constants for each channel, a flattened plane, MatMul."""
    g = GraphBuilder()
    x = g.input("image", ["batch", 3, 8, 8])
    a = conv(g, x, weights(0, 16, 3), size=8, name="a")
    vectors = [g.constant(random(seed, 16)) for seed in (1, 2, 3)]
    norm = g.add("BatchNormalization", a, *vectors, g.constant(np.abs(random(4, 16)) + np.float32(0.2)), shape=like(a))
    scaled = g.add("Mul", norm, g.constant(random(5, 16, 1, 1)), shape=like(a))
    shifted = g.add("Add", g.constant(random(6, 1, 16, 1, 1)), scaled, shape=like(a))
    clipped = g.add("Clip", shifted, g.constant(np.float32(-2)), g.constant(np.float32(2)), shape=like(a))
    deep = conv(g, clipped, random(7, 16, 1, 3, 3), size=8, bias=random(8, 16), name="deep", group=16)
    mean = g.add("ReduceMean", deep, g.constant(np.array([2, 3])), shape=["batch", 16, 1, 1], keepdims=1)
    gate = g.add("Sigmoid", conv(g, mean, weights(9, 16, 16, 1), size=1, name="gate"), shape=["batch", 16, 1, 1])
    gated = g.add("Mul", deep, gate, shape=like(a))
    pooled = g.add("MaxPool", gated, shape=["batch", 16, 4, 4], kernel_shape=[2, 2], strides=[2, 2])
    flat = g.add("Reshape", pooled, g.constant(np.array([-1, 256])), shape=["batch", 256])
    product = g.add("MatMul", flat, g.constant(random(10, 256, 5) / 16), shape=["batch", 5], name="head")
    y = g.add("Add", product, g.constant(random(11, 5)), shape=["batch", 5])
    return g.finish(y)


def test_it_is_a_pass():
    assert isinstance(PruneChannels(), Pass)
    one = PruneChannels
    assert (one.name, one.effect, one.purpose) == ("prune-channels", Effect.LOSSY, Purpose.SPEED)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"ratio": 0.0}, "ratio is 0.0, not above 0 and below 1"),
        ({"ratio": 1.5}, "ratio is 1.5, not above 0 and below 1"),
        ({"multiple": 0}, "multiple is 0, not 1 or more"),
    ],
)
def test_options_out_of_range(options, told):
    with pytest.raises(ValueError, match=f"^{told}$"):
        PruneChannels(**options)


def test_convolutions_of_a_residual_stream_lose_the_same_channels():
    model = residual_network()
    before = {str(site.node.name): site.weight.const_value.numpy() for site in convolution_sites(model)}
    outcome = apply(PruneChannels(0.25, multiple=4), model)
    assert outcome.changed == 6
    assert kernels(model) == {
        "stem": (12, 3, 3, 3),
        "first.a": (12, 12, 3, 3),
        "first.b": (12, 12, 3, 3),
        "second.a": (24, 12, 3, 3),
        "second.b": (24, 24, 3, 3),
        "second.short": (24, 12, 1, 1),
    }
    sites = {str(site.node.name): site for site in convolution_sites(model)}
    # Stem and first.b are added: the same rows of both stay.
    stem, inner = (sites[name].weight.const_value.numpy() for name in ("stem", "first.b"))
    rows = [next(i for i, old in enumerate(before["stem"]) if np.array_equal(old, new)) for new in stem]
    assert all(np.isin(new, before["first.b"][row]).all() for new, row in zip(inner, rows, strict=True))
    assert not {16, 32} & {dim for node in model.graph for value in node.outputs for dim in value.shape or ()}


def test_removing_channels_that_are_zero_changes_nothing():
    """Channels that carry nothing go first, whatever they are joined to, and the outputs stay."""
    model = residual_network()
    dead = [1, 5, 6, 9]
    for name in ("stem", "first.b"):
        for part in ("weight", "bias"):
            value = model.graph.initializers.get(f"{name}.{part}")
            if value is not None:
                array = value.const_value.numpy().copy()
                array[dead] = 0
                value.const_value = ir.tensor(array, name=value.name)
    feeds = images(1, 20)
    (expected,) = evaluate(model, feeds).values()
    item = PruneChannels(0.25, multiple=4, only=("stem",))
    for context in (HERE, calibrated(images(2, 60))):
        copy = model.clone()
        assert item.run(copy, context).changed == 2
        (found,) = evaluate(copy, feeds).values()
        # The fit is damped towards the weights that are there, and they are the answer.
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("repair", [False, True])
def test_everything_with_channels_is_cut(data, repair):
    model = rich_network()
    context = calibrated(images(3, 64)) if data else HERE
    item = PruneChannels(0.25, repair=repair, multiple=4)
    before = operators(model)
    outcome = apply(item, model, context)
    assert (outcome.changed, operators(model)) == (2, before)
    assert kernels(model) == {"a": (12, 3, 3, 3), "deep": (12, 1, 3, 3), "gate": (12, 12, 1, 1)}
    nodes = {node.op_type: node for node in model.graph}
    assert nodes["Reshape"].inputs[1].const_value.numpy().tolist() == [-1, 192]
    assert tuple(nodes["MatMul"].inputs[1].const_value.shape) == (192, 5)
    assert [tuple(value.const_value.shape) for value in nodes["BatchNormalization"].inputs[1:]] == [(12,)] * 4
    constants = {tuple(value.const_value.shape) for value in model.graph.initializers.values()}
    assert {(12, 1, 1), (1, 12, 1, 1)} <= constants
    (found,) = evaluate(model, images(4, 6)).values()
    assert found.shape == (6, 5)
    assert np.isfinite(found).all()


def test_a_second_run_knows_how_wide_it_was():
    model, context = residual_network(), calibrated(images(5, 30))
    assert PruneChannels(0.25, multiple=4).run(model, context).changed == 6
    assert PruneChannels(0.25, multiple=4).run(model, context).changed == 0
    assert PruneChannels(0.5, multiple=4).run(model, context).changed == 6
    assert kernels(model)["stem"] == (8, 3, 3, 3)


def test_repair_lowers_the_error_on_other_data():
    held, errors = images(6, 60), []
    for repair in (False, True):
        model = residual_network()
        (expected,) = evaluate(model, held).values()
        PruneChannels(0.25, repair=repair, multiple=4).run(model, calibrated(images(7, 60)))
        check(model, CPU)
        errors.append(error(model, expected, held))
    assert errors[1] < 0.75 * errors[0]


def test_what_is_left_is_the_regression_on_the_channels_that_stay():
    g = GraphBuilder()
    x = g.input("image", ["batch", 3, 8, 8])
    inner = conv(g, x, weights(8, 12, 3), size=8, bias=random(9, 12), name="a")
    y = conv(g, g.add("Relu", inner, shape=like(inner)), weights(10, 6, 12), size=8, name="b")
    model, feeds = g.finish(y), images(11, 80)
    original = model.clone()
    (wanted,) = evaluate(model, feeds).values()
    assert PruneChannels(0.25, multiple=3).run(model, calibrated(feeds)).changed == 1
    (found,) = evaluate(model, feeds).values()
    relu = next(node for node in model.graph if node.op_type == "Relu").outputs[0].name
    kept = value_of(model, relu, feeds)
    padded = np.pad(kept, ((0, 0), (0, 0), (1, 1), (1, 1)))
    taps = [padded[:, :, i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
    rows = np.stack(taps, 2).reshape(80, 81, 8, 8).transpose(0, 2, 3, 1).reshape(-1, 81).astype(np.float64)
    rows = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
    targets = np.moveaxis(wanted, 1, -1).reshape(-1, 6)
    best = np.sum((targets - rows @ np.linalg.lstsq(rows, targets, rcond=None)[0]) ** 2)
    own = np.sum((found.astype(np.float64) - wanted) ** 2)
    # Damping pulls by a thousandth of the mean variance towards the weight that was there.
    assert best <= own < 1.05 * best
    assert len(original.graph.initializers) == len(model.graph.initializers) - 1  # b has a bias now


def test_importance_is_the_loss_of_the_best_fit_without_the_channel():
    rows = random(12, 500, 24).astype(np.float64) @ random(13, 24, 24)
    weight = random(14, 7, 24)
    regression = of_itself(weight, None, moments_of(rows))
    kept = keep([Reading(regression, 3)], 8, 7, compensated=True)

    def loss(channel: int) -> float:
        left = np.setdiff1d(np.arange(24), columns(np.array([channel]), 3))
        inner, crossed = regression.moment[np.ix_(left, left)], weight @ regression.moment[:, left]
        best = np.zeros_like(regression.best)
        best[:, left] = np.linalg.solve(inner, crossed.T).T
        return regression.error(best)

    losses = [loss(channel) for channel in range(8)]
    assert np.setdiff1d(np.arange(8), kept).tolist() == [int(np.argmin(losses))]
    assert DAMPING < 0.01


def test_channels_that_make_up_for_each_other_do_not_both_go():
    """Two equal channels: one of them is free, and then the other is worth two."""
    rows = random(15, 400, 4).astype(np.float64)
    rows[:, 1] = rows[:, 0]
    regression = of_itself(np.array([[1.0, 1.0, 1.2, 1.3]], np.float32), None, moments_of(rows))
    readings = [Reading(regression, 1)]
    kept = keep(readings, 4, 2, compensated=True).tolist()
    assert len({0, 1} & set(kept)) == 1
    assert keep(readings, 4, 2, compensated=False).tolist() == [2, 3]


def test_importance_counts_every_reader():
    rows = moments_of(random(16, 300, 3).astype(np.float64))
    one = of_itself(np.array([[1, 0.1, 0.5]], np.float32), None, rows)
    two = of_itself(np.array([[0.1, 1, 0.5]], np.float32), None, rows)
    assert keep([Reading(one, 1)], 3, 2, compensated=True).tolist() == [0, 2]
    assert keep([Reading(two, 1)], 3, 2, compensated=True).tolist() == [1, 2]
    assert keep([Reading(one, 1), Reading(two, 1)], 3, 2, compensated=True).tolist() == [0, 1]


def blocked(*, concat: bool = False, given: bool = False, fed: bool = False, split: bool = False) -> ir.Model:
    g = GraphBuilder()
    x = g.input("image", ["batch", 16, 8, 8])
    a = conv(g, x, weights(17, 16, 16), size=8, name="a")
    if concat:
        a = g.add("Concat", a, x, axis=1, shape=["batch", 32, 8, 8])
    if fed:
        a = g.add("Add", a, x, shape=like(a))
    if split:
        flat = g.add("Flatten", a, axis=2, shape=["m", 64])
        return g.finish(flat)
    y = conv(g, a, weights(18, 8, 32 if concat else 16), size=8, name="b")
    return g.finish(y, *([a] if given else []))


@pytest.mark.parametrize(
    ("kind", "node", "reason"),
    [
        ("concat", "Concat", "Concat reads these channels"),
        ("fed", "Add", "Add reads these channels"),
        ("split", "Flatten", "Flatten reads these channels"),
        ("given", "a", "the graph gives these channels to its caller"),
    ],
)
def test_refused_groups(kind, node, reason):
    model = blocked(**{kind: True})
    outcome = apply(PruneChannels(0.5, multiple=4), model)
    assert outcome.changed == 0
    told = {refusal.node.split("_")[0]: refusal.reason for refusal in outcome.refused}
    assert told[node] == reason
    if kind != "split":
        assert told["b"] == "the graph gives these channels to its caller"


def test_too_few_channels():
    outcome = apply(PruneChannels(0.25), blocked())
    assert outcome.changed == 0
    reasons = {refusal.node: (refusal.reason, refusal.remedy) for refusal in outcome.refused}
    assert reasons["a"] == ("of 16 channels no 16 can go", "set a multiple below 16, or a larger ratio")


def test_only_and_skip_are_of_groups():
    model = residual_network()
    item = PruneChannels(0.25, multiple=4, only=("second.*", "stem"), skip=("first.b", "nothing"))
    outcome = apply(item, model)
    assert outcome.changed == 3
    assert kernels(model)["first.b"] == (16, 16, 3, 3)
    told = {refusal.node: refusal.reason for refusal in outcome.refused}
    assert told["first.b"] == "first.b is skipped by 'first.b'"
    assert told["nothing"] == "the skip pattern fits no convolution"


def test_a_graph_without_convolutions_stays():
    g = GraphBuilder()
    x = g.input("x", ["batch", 8])
    model = g.finish(g.add("Relu", x, shape=["batch", 8]))
    assert apply(PruneChannels(), model).changed == 0
    assert channel_groups(model) == []


def test_branches_that_read_channels_block_them():
    g = GraphBuilder()
    x, choose = g.input("image", ["batch", 16, 8, 8]), g.input("choose", [], ir.DataType.BOOL)
    a = conv(g, x, weights(19, 16, 16), size=8, name="a")
    y = conv(g, a, weights(20, 8, 16), size=8, name="b")
    parts = []
    for op in ("Relu", "Neg"):
        inner = ir.Value(name=f"inner_{op}", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(like(a)))
        parts.append(ir.Graph([], [inner], nodes=[ir.Node("", op, [a], outputs=[inner], name=op)], name=op))
    z = g.add("If", choose, shape=like(a), name="if", then_branch=parts[0], else_branch=parts[1])
    outcome = apply(PruneChannels(0.5, multiple=4), g.finish(y, z))
    assert outcome.changed == 0
    assert "a branch or a loop reads these channels" in {refusal.reason for refusal in outcome.refused}
