"""awq: exact before rounding, closer after it, refused without data, nothing left to do on a second run."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir
import pytest
from builders import CONTEXT, Array, GraphBuilder, apply_equal, evaluate, operators, random
from encoder_graphs import relative

from passes.base import Context, Effect, Purpose
from passes.pipeline import Pipeline, parse
from passes.quantize import Awq, WeightOnly
from passes.quantize.blocks import Grid
from passes.quantize.scaling import best_scaling, rounding_error
from passes.sites import NAME_SCOPES

K = 64
FLAT = ("b", "s", K)
X = {"x": random(0, 8, 50, K)}
Calibrated = Callable[[Mapping[str, Array]], Context]
LOUD = np.where(np.arange(K) % 16 == 3, 30.0, 1.0).astype(np.float32)


def norm_model(op_type: str = "RMSNormalization", opset: int = 23) -> ir.Model:
    """Two products that read one normalization with loud channels."""
    g = GraphBuilder(opset)
    x = g.input("x", FLAT)
    y = g.add(op_type, x, g.constant(LOUD, "gamma"), shape=FLAT, name="norm", axis=-1)
    outputs = []
    for seed, name in enumerate(("query", "key")):
        product = g.add("MatMul", y, g.constant(random(seed + 1, K, 48), f"{name}.w"), shape=("b", "s", 48), name=name)
        node = product.producer()
        assert node is not None
        node.metadata_props[NAME_SCOPES] = repr(["", f"layer.{name}", "matmul"])
        outputs.append(product)
    return g.finish(*outputs)


def errors(item: Pipeline, context: Context, expected: Mapping[str, Array]) -> list[float]:
    model = norm_model()
    item.run(model, context)
    found = evaluate(model, X)
    return [relative(found[name], array) for name, array in expected.items()]


def test_it_is_exact_and_a_form() -> None:
    assert (Awq.name, Awq.effect, Awq.purpose) == ("awq", Effect.EXACT, Purpose.FORM)
    assert parse(str(Pipeline((Awq(skip=("a",), bits=2),)))).passes == (Awq(skip=("a",), bits=2),)


@pytest.mark.parametrize(("op_type", "opset"), [("RMSNormalization", 23), ("LayerNormalization", 21)])
def test_the_norm_takes_the_factors(op_type: str, opset: int, calibrated: Calibrated) -> None:
    model = norm_model(op_type, opset)
    before = operators(model)
    assert apply_equal(Awq(), model, X, calibrated(X)).changed == 1
    assert operators(model) == before
    gamma = model.graph.initializers["gamma"].const_value
    assert gamma is not None
    factors = LOUD / gamma.numpy()
    assert (factors[LOUD > 1].min() > 2 * factors[LOUD == 1]).all()


def test_rounded_weights_lose_less(calibrated: Calibrated) -> None:
    expected = evaluate(norm_model(), X)
    rounding = WeightOnly(4, 32, method="rtn", accuracy_level=1)
    plain = errors(Pipeline((rounding,)), CONTEXT, expected)
    scaled = errors(Pipeline((Awq(), rounding)), calibrated(X), expected)
    assert all(after < 0.75 * before for after, before in zip(scaled, plain, strict=True))


def test_the_error_is_that_of_the_products() -> None:
    x = X["x"].reshape(-1, K).astype(np.float64) * LOUD
    weight, factors = random(1, K, 48), np.sqrt(LOUD)
    grid = Grid(4, 16)
    block = (weight * factors[:, None]).reshape(4, 16, 48)
    largest = np.take_along_axis(block, np.abs(block).argmax(1, keepdims=True), 1)
    scale = -largest / 8
    rounded = (np.clip(np.rint(block / scale), -8, 7) * scale).reshape(K, 48)
    expected = np.square(x @ (rounded / factors[:, None] - weight)).mean(0).sum()
    assert rounding_error(x.T @ x / len(x), [weight], factors, grid) == pytest.approx(expected, rel=1e-3)


def test_quiet_inputs_are_left() -> None:
    weight = np.sign(random(1, K, 48)).astype(np.float32)
    choice = best_scaling(np.eye(K), [weight], (0.25, 0.5), Grid(4, 16))
    assert (choice.strength, choice.factors.tolist()) == (0.0, [1.0] * K)


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (Awq(), "calibration data is needed"),
        (Awq(skip=("layer.key",)), "layer.key is skipped by 'layer.key'"),
        (Awq(strengths=()), "no strength takes 2%"),
    ],
    ids=str,
)
def test_refused(item: Awq, reason: str, calibrated: Calibrated) -> None:
    model = norm_model()
    outcome = item.run(model, CONTEXT if item == Awq() else calibrated(X))
    assert outcome.changed == 0
    assert [reason in refusal.reason for refusal in outcome.refused] == [True]
    np.testing.assert_array_equal(model.graph.initializers["gamma"].const_value.numpy(), LOUD)  # type: ignore[union-attr]
