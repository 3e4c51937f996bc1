"""smooth: structure and numbers for every source, gain in 8 bits, what is refused, idempotence on observed data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import pytest
from builders import CONTEXT, Array, GraphBuilder, apply, apply_equal, evaluate, operators, random
from encoder_graphs import Encoder, feeds, relative

from artifacts.target import CPU
from passes.base import Context, Effect, Purpose
from passes.cleanup import InferShapes
from passes.fusion import AbsorbNorm
from passes.pipeline import parse
from passes.quantize import DynamicInt8, Smooth
from passes.sites import NAME_SCOPES, linear_sites
from passes.statistics import Activation, ActivationAccumulator

K, N, HEADS = 32, 24, 4
FLAT = ("b", "s", K)
X = {"x": random(0, 4, 25, K)}
LOUD = np.where(np.arange(K) % 16 == 3, 50.0, 1.0).astype(np.float32)
"""A scale with two outlying channels."""


def observing(data: Mapping[str, Array]) -> Context:
    """A context whose calibration data are these inputs, run in ONNX Runtime."""

    def observe(model: ir.Model, values: Sequence[ir.Value]) -> dict[str, Activation]:
        names = [str(value.name) for value in values]
        copy = model.clone()
        made = {value.name: value for node in copy.graph for value in node.outputs}
        copy.graph.outputs.clear()
        copy.graph.outputs.extend(made[name] for name in names)
        found: dict[str, Activation] = {}
        for name, array in evaluate(copy, data).items():
            accumulator = ActivationAccumulator(name)
            accumulator.update(array)
            found[name] = accumulator.result()
        return found

    return Context(CPU, observe)


HERE = observing(X)


class Graph(GraphBuilder):
    """Sites, normalizations and attentions of a few channels."""

    def __init__(self, opset: int = 21) -> None:
        super().__init__(opset)
        self.x = self.input("x", FLAT)

    def norm(self, gamma: Array = LOUD, op_type: str = "LayerNormalization") -> ir.Value:
        beta = [self.constant(random(5, K), "beta")] if op_type == "LayerNormalization" else []
        return self.add(op_type, self.x, self.constant(gamma, "gamma"), *beta, shape=FLAT, name="norm")

    def site(
        self, x: ir.Value, name: str, width: int = N, *, loud: bool = False, held: ir.Value | None = None
    ) -> ir.Value:
        seed = sum(map(ord, name))
        columns = LOUD if loud else np.ones(width, np.float32)
        weight = held or self.constant(random(seed, K, width) * columns, f"{name}.w")
        product = self.add("MatMul", x, weight, shape=("b", "s", width), name=f"{name}.product")
        node = product.producer()
        assert node is not None
        node.metadata_props[NAME_SCOPES] = repr(["", f"layer.{name}", "matmul"])
        bias = self.constant(random(seed + 1, width) * columns, f"{name}.b")
        return self.add("Add", product, bias, shape=("b", "s", width), name=name)

    def attention(self, *, fused: bool, bias: bool = False) -> ir.Value:
        """Heads of an attention whose value has outlying channels; the input is the query and the key."""
        value = self.site(self.x, "value", K, loud=True)
        if fused:
            extra = [self.constant(random(8, 3 * K))] if bias else []
            options = {"domain": "com.microsoft", "num_heads": HEADS, "shape": FLAT, "name": "mixed"}
            return self.add("MultiHeadAttention", self.x, self.x, value, *extra, **options)
        split, four = np.array([0, 0, HEADS, K // HEADS]), ("b", "s", HEADS, K // HEADS)

        def heads(x: ir.Value, perm: list[int], shape: Sequence[int | str]) -> ir.Value:
            return self.add(
                "Transpose", self.add("Reshape", x, self.constant(split), shape=four), perm=perm, shape=shape
            )

        apart = ("b", HEADS, "s", K // HEADS)
        query = heads(self.x, [0, 2, 1, 3], apart)
        key = heads(self.x, [0, 2, 3, 1], ("b", HEADS, K // HEADS, "s"))
        weights = self.add("Softmax", self.add("MatMul", query, key, shape=("b", HEADS, "s", "s")), axis=-1)
        mixed = self.add("MatMul", weights, heads(value, [0, 2, 1, 3], apart), shape=apart)
        back = self.add("Transpose", mixed, perm=[0, 2, 1, 3], shape=four)
        return self.add("Reshape", back, self.constant(np.array([0, 0, K])), shape=FLAT, name="mixed")


def numbers(model: ir.Model, name: str) -> Array:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def ratio(model: ir.Model, name: str, before: Array) -> Array:
    return numbers(model, name) / before


def test_it_is_exact_and_a_form() -> None:
    assert (Smooth.effect, Smooth.purpose) == (Effect.EXACT, Purpose.FORM)


@pytest.mark.parametrize("strengths", [(0.0,), (0.5, 1.0), (-0.1,), (float("nan"),)])
def test_strengths_lie_between_0_and_1(strengths: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        Smooth(strengths=strengths)


@pytest.mark.parametrize(("op_type", "opset"), [("LayerNormalization", 21), ("RMSNormalization", 23)])
def test_a_norm_takes_the_factors(op_type: str, opset: int) -> None:
    g = Graph(opset)
    y = g.norm(op_type=op_type)
    model = g.finish(g.site(y, "query"), g.site(y, "key", 16))
    before = {name: numbers(model, name) for name in model.graph.initializers}
    nodes = list(model.graph)
    assert apply_equal(Smooth(), model, X, HERE).changed == 1
    assert list(model.graph) == nodes
    factors = before["gamma"] / numbers(model, "gamma")
    assert np.exp(np.log(factors).mean()) == pytest.approx(1.0, rel=1e-5)
    assert set(np.argsort(factors)[-2:]) == {3, 19}
    for name in ("query.w", "key.w"):
        np.testing.assert_allclose(
            ratio(model, name, before[name]), np.broadcast_to(factors[:, None], before[name].shape), rtol=1e-6
        )
    if "beta" in before:
        np.testing.assert_allclose(ratio(model, "beta", before["beta"]), 1 / factors, rtol=1e-6)
    assert [site.path for site in linear_sites(model)] == ["layer.query", "layer.key"]
    np.testing.assert_array_equal(numbers(model, "query.b"), before["query.b"])


def test_other_readers_of_a_norm_read_it_restored() -> None:
    g = Graph()
    y = g.norm()
    model = g.finish(y, g.site(y, "query"), g.add("Add", g.x, y, shape=FLAT))
    assert apply_equal(Smooth(), model, X, HERE).changed == 1
    (site,) = linear_sites(model)
    mul = model.graph.outputs[0].producer()
    assert mul is not None
    assert (mul.op_type, mul.outputs[0].name) == ("Mul", "norm_out")
    assert mul.inputs[0] is site.input
    assert site.input.producer() is next(iter(model.graph))
    assert model.graph.outputs[2].producer().inputs[1] is mul.outputs[0]  # type: ignore[union-attr]


def test_a_scale_that_reads_the_norm_takes_the_factors_back() -> None:
    """What absorb-norm leaves: the sites read the plain norm, the residual its product with gamma."""
    g = Graph()
    y = g.norm()
    g.graph.initializers["beta"].const_value = ir.Tensor(np.zeros(K, np.float32), name="beta")
    model = g.finish(g.site(y, "query"), g.add("Add", g.x, y, shape=FLAT))
    assert AbsorbNorm().run(model, HERE).changed == 1
    before = operators(model)
    assert apply_equal(Smooth(), model, X, HERE).changed == 1
    assert operators(model) == before
    norm = next(iter(model.graph))
    np.testing.assert_allclose(numbers(model, str(norm.inputs[1].name)) * numbers(model, "gamma"), LOUD, rtol=1e-6)


@pytest.mark.parametrize("form", ["gamma", "gamma and beta"])
def test_a_scale_and_shift_take_the_factors(form: str) -> None:
    g = Graph()
    y = g.add("Mul", g.constant(LOUD, "gamma"), g.x, shape=FLAT)
    if form == "gamma and beta":
        y = g.add("Add", y, g.constant(random(5, K), "beta"), shape=FLAT)
    model = g.finish(g.site(y, "query"), g.site(y, "key"))
    before = operators(model)
    assert apply_equal(Smooth(), model, X, HERE).changed == 1
    assert operators(model) == before
    if form == "gamma and beta":
        np.testing.assert_allclose(ratio(model, "gamma", LOUD), ratio(model, "beta", random(5, K)), rtol=1e-6)


@pytest.mark.parametrize("fused", [False, True], ids=["apart", "MultiHeadAttention"])
def test_the_projection_of_the_value_takes_the_factors(fused: bool) -> None:
    g = Graph()
    model = g.finish(g.site(g.attention(fused=fused), "output"))
    before = {name: numbers(model, name) for name in ("value.w", "value.b", "output.w")}
    nodes = list(model.graph)
    assert apply_equal(Smooth(), model, X, HERE).changed == 1
    assert list(model.graph) == nodes
    factors = before["value.b"] / numbers(model, "value.b")
    assert set(np.argsort(factors)[-2:]) == {3, 19}
    np.testing.assert_allclose(ratio(model, "value.w", before["value.w"]) * factors, np.ones((K, K)), rtol=1e-6)
    np.testing.assert_allclose(
        ratio(model, "output.w", before["output.w"]) / factors[:, None], np.ones((K, N)), rtol=1e-6
    )


def test_gammas_that_norms_share_are_copied() -> None:
    g = Graph()
    y = g.norm()
    other = g.add("LayerNormalization", g.x, g.graph.initializers["gamma"], shape=FLAT)
    model = g.finish(g.site(y, "query"), other)
    assert apply_equal(Smooth(), model, X, HERE).changed == 1
    np.testing.assert_array_equal(numbers(model, "gamma"), LOUD)


def norm_model(*, gamma: Array = LOUD) -> ir.Model:
    g = Graph()
    y = g.norm(gamma)
    return g.finish(g.site(y, "query"), g.site(y, "key"))


def weight_elsewhere() -> ir.Model:
    g = Graph()
    y = g.norm()
    return g.finish(g.site(y, "query"), g.site(g.x, "key", held=g.graph.initializers["query.w"]))


def scale_elsewhere() -> ir.Model:
    g = Graph()
    y = g.add("Mul", g.x, g.constant(LOUD), shape=FLAT)
    return g.finish(g.site(y, "query"), g.add("Add", g.x, y, shape=FLAT))


def value_elsewhere() -> ir.Model:
    g = Graph()
    mixed = g.attention(fused=True)
    return g.finish(g.site(mixed, "output"), g.add("Neg", g.graph.initializers["value.w"], shape=(K, K)))


def gamma_input() -> ir.Model:
    g = Graph()
    y = g.add("LayerNormalization", g.x, g.input("gamma", (K,)), shape=FLAT)
    return g.finish(g.site(y, "query"))


@pytest.mark.parametrize(
    ("model", "item", "context", "reason"),
    [
        (norm_model(), Smooth(), CONTEXT, "calibration data is needed"),
        (norm_model(), Smooth(skip=("layer.key",)), HERE, "skipped by 'layer.key'"),
        (norm_model(gamma=np.ones(K, np.float32)), Smooth(strengths=(0.1,)), HERE, "no strength takes 10%"),
        (norm_model(), Smooth(strengths=()), HERE, "no strength takes 10%"),
        (norm_model(gamma=LOUD * np.inf), Smooth(), HERE, "not with finite constant vectors"),
        (gamma_input(), Smooth(), HERE, "not with finite constant vectors"),
        (weight_elsewhere(), Smooth(), HERE, "the weight of layer.query is read elsewhere"),
        (scale_elsewhere(), Smooth(), HERE, "read by others than linear operators"),
        (value_elsewhere(), Smooth(), HERE, "weight of layer.value, which its input is mixed from, is read elsewhere"),
    ],
)
def test_refused(model: ir.Model, item: Smooth, context: Context, reason: str) -> None:
    before = {name: numbers(model, name) for name in model.graph.initializers}
    outcome = apply(item, model, context)
    assert outcome.changed == 0
    (refusal,) = outcome.refused
    assert reason in refusal.reason
    for name, array in before.items():
        np.testing.assert_array_equal(numbers(model, name), array)


def test_only_and_patterns_that_fit_nothing() -> None:
    outcome = apply(Smooth(only=("layer.quer?",), skip=("decoder.*",)), norm_model(), HERE)
    assert outcome.changed == 0
    assert [refusal.node for refusal in outcome.refused] == ["decoder.*"]
    assert apply(Smooth(only=("layer.*",)), norm_model(), HERE).changed == 1
    assert parse("smooth(skip=[layer.key])").passes == (Smooth(skip=("layer.key",)),)


@pytest.mark.parametrize("form", ["activation", "input", "packed bias", "value read twice"])
def test_other_values_are_left(form: str) -> None:
    g = Graph()
    others: list[ir.Value] = []
    if form == "activation":
        y = g.add("Relu", g.add("Mul", g.x, g.constant(LOUD), shape=FLAT), shape=FLAT)
    elif form == "input":
        y = g.x
    else:
        y = g.attention(fused=True, bias=form == "packed bias")
    if form == "value read twice":
        value = next(node for node in g.graph if node.op_type == "Add").outputs[0]
        others.append(g.add("Neg", value, shape=FLAT))
    model = g.finish(g.site(y, "output"), *others)
    outcome = apply(Smooth(), model, HERE)
    assert (outcome.changed, outcome.refused) == (0, ())


def encoder() -> ir.Model:
    """Two layers whose norms and values have outlying channels, as trained ones do."""
    model = Encoder(layers=2).build()
    InferShapes().run(model, CONTEXT)
    generator = np.random.default_rng(1)
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None
        loud = np.where(generator.random(64) < 0.05, 20.0, 1.0).astype(np.float32)
        if name.endswith("gamma"):
            value.const_value = ir.Tensor(loud * generator.normal(1.0, 0.2, 64).astype(np.float32), name=name)
        if name.endswith(("value.weight", "value.bias")):
            value.const_value = ir.Tensor(tensor.numpy() * loud, name=name)
    return model


def test_a_whole_encoder_is_closer_in_8_bits() -> None:
    """One run observes once and smooths norms and attentions; a second one, on what is then seen, changes nothing."""
    context = observing(feeds(8, 16, seed=1))
    expected = evaluate(encoder(), feeds())["sentence_embedding"]
    plain, smoothed = encoder(), encoder()
    assert apply_equal(Smooth(), smoothed, feeds(), context).changed == 6
    for model in (plain, smoothed):
        assert DynamicInt8().run(model, context).changed == 12
    errors = [relative(evaluate(model, feeds())["sentence_embedding"], expected) for model in (plain, smoothed)]
    assert errors[1] < 0.8 * errors[0]


def test_nothing_is_observed_where_nothing_can_be_smoothed() -> None:
    def never(model: ir.Model, values: Sequence[ir.Value]) -> Mapping[str, Activation]:
        raise AssertionError("observed")

    g = Graph()
    model = g.finish(g.site(g.x, "query"))
    assert apply(Smooth(), model, Context(CPU, never)).changed == 0
