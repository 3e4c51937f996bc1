"""fold-batch-norm: structure, numbers, what is left alone."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from builders import CONTEXT, GraphBuilder, apply, apply_equal, operators, random

from passes.fusion.fold_batch_norm import FoldBatchNorm

FEEDS = {"x": random(0, 2, 4, 7, 7)}


def normalized(g: GraphBuilder, x: ir.Value, channels: int, **attributes: object) -> ir.Value:
    vectors = [g.constant(random(seed, channels)) for seed in (1, 2, 3)]
    variance = g.constant(np.abs(random(4, channels)) + np.float32(0.1))
    return g.add("BatchNormalization", x, *vectors, variance, epsilon=1e-3, name="norm", **attributes)


def model_of(*, bias: bool = True, group: int = 1, shared: bool = False, training: bool = False) -> ir.Model:
    g = GraphBuilder()
    x = g.input("x", (2, 4, 7, 7))
    kernel = g.constant(random(5, 6, 4 // group, 3, 3), "kernel")
    inner = g.add("Conv", x, kernel, *([g.constant(random(6, 6), "bias")] if bias else []), name="conv", group=group)
    y = normalized(g, inner, 6, training_mode=int(training), outputs=3 if training else 1)
    y.shape = ir.Shape((2, 6, 5, 5))
    return g.finish(y, *([g.add("Relu", inner, shape=(2, 6, 5, 5))] if shared else []))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("group", [1, 2])
def test_it_folds(bias: bool, group: int) -> None:
    model = model_of(bias=bias, group=group)
    output = model.graph.outputs[0].name
    assert apply_equal(FoldBatchNorm(), model, FEEDS).changed == 1
    (conv,) = model.graph
    assert (conv.op_type, conv.outputs[0], len(conv.inputs)) == ("Conv", model.graph.outputs[0], 3)
    assert conv.outputs[0].name == output
    assert len(model.graph.initializers) == 2


def test_a_kernel_that_others_read_stays_theirs() -> None:
    g = GraphBuilder()
    x = g.input("x", (2, 4, 7, 7))
    kernel = g.constant(random(7, 6, 4, 3, 3), "kernel")
    one = normalized(g, g.add("Conv", x, kernel, name="a"), 6)
    one.shape = ir.Shape((2, 6, 5, 5))
    two = g.add("Conv", x, kernel, name="b", shape=(2, 6, 5, 5))
    model = g.finish(one, two)
    assert apply_equal(FoldBatchNorm(), model, FEEDS).changed == 1
    assert two.producer().inputs[1] is kernel


def test_what_it_refuses() -> None:
    for model, reason in (
        (model_of(shared=True), "what it normalizes is used elsewhere too"),
        (model_of(training=True), "it takes the statistics of the batch at hand"),
    ):
        before = operators(model)
        outcome = apply(FoldBatchNorm(), model)
        assert (outcome.changed, [refusal.reason for refusal in outcome.refused]) == (0, [reason])
        assert operators(model) == before


def test_constants_that_cannot_be_folded() -> None:
    model = model_of()
    kernel = model.graph.initializers["kernel"]
    kernel.const_value = ir.tensor(np.full((6, 4, 3, 3), 3e38, np.float32), name="kernel")
    outcome = FoldBatchNorm().run(model, CONTEXT)
    assert [refusal.reason for refusal in outcome.refused] == ["the folded numbers are not finite"]


def test_a_normalization_of_something_else_is_no_candidate() -> None:
    g = GraphBuilder()
    x = g.input("x", (2, 4, 7, 7))
    y = normalized(g, g.add("Relu", x, shape=(2, 4, 7, 7)), 4)
    y.shape = ir.Shape((2, 4, 7, 7))
    assert apply(FoldBatchNorm(), g.finish(y)).refused == ()
