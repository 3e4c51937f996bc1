"""absorb-norm: structure, numbers, what is refused, what is none of its business, idempotence."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from builders import CONTEXT, Array, GraphBuilder, apply, apply_equal, evaluate, operators, random, tolerance
from encoder_graphs import Encoder, feeds, relative, run

from passes.base import Effect, Purpose
from passes.cleanup import InferShapes
from passes.fusion import AbsorbNorm
from passes.sites import NAME_SCOPES, linear_sites

K, N = 16, 12
FLAT = ("b", "s", K)
X = {"x": random(0, 2, 5, K)}
GAMMA, BETA = 1 + random(1, K) / 4, random(2, K)
ONES, ZEROS = np.ones(K, np.float32), np.zeros(K, np.float32)


class Normed(GraphBuilder):
    """``y = LayerNormalization(x, gamma, beta)`` and what is to read it."""

    def __init__(
        self,
        gamma: Array = GAMMA,
        beta: Array | None = BETA,
        *,
        op_type: str = "LayerNormalization",
        opset: int = 21,
        axis: int = -1,
        outputs: int = 1,
    ) -> None:
        super().__init__(opset)
        self.x = self.input("x", FLAT)
        constants = [self.constant(gamma, "gamma")] + ([] if beta is None else [self.constant(beta, "beta")])
        self.y = self.add(op_type, self.x, *constants, axis=axis, shape=FLAT, name="norm", outputs=outputs)

    def site(
        self, name: str, *, bias: bool = True, weight: ir.Value | None = None, read: ir.Value | None = None
    ) -> ir.Value:
        seed = sum(map(ord, name))
        weight = weight or self.constant(random(seed, K, N), f"{name}.w")
        product = self.add("MatMul", read or self.y, weight, shape=("b", "s", N), name=f"{name}.product")
        node = product.producer()
        assert node is not None
        node.metadata_props[NAME_SCOPES] = repr(["", f"layer.{name}", "matmul"])
        if not bias:
            return product
        constant = self.constant(random(seed + 1, N), f"{name}.b")
        return self.add("Add", product, constant, shape=("b", "s", N), name=name)

    def residual(self) -> ir.Value:
        return self.add("Add", self.x, self.y, shape=FLAT, name="residual")


def numbers(model: ir.Model, name: str) -> Array:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def maker(model: ir.Model, op_type: str) -> ir.Node:
    return next(node for node in model.graph if node.op_type == op_type)


def test_it_is_exact_and_for_speed() -> None:
    assert (AbsorbNorm.effect, AbsorbNorm.purpose) == (Effect.EXACT, Purpose.SPEED)


@pytest.mark.parametrize("beta", [BETA, ZEROS, None], ids=["beta", "zero beta", "no beta"])
def test_structure_and_numbers(beta: Array | None) -> None:
    g = Normed(beta=beta)
    query, key = g.site("query"), g.site("key")
    model = g.finish(query, key, g.residual())
    norm = maker(model, "LayerNormalization")
    residual = model.graph.outputs[2].producer()
    assert residual is not None
    assert apply_equal(AbsorbNorm(), model, X).changed == 1
    assert maker(model, "LayerNormalization") is norm
    assert len(norm.inputs) == 2
    np.testing.assert_array_equal(numbers(model, str(norm.inputs[1].name)), ONES)
    sites = linear_sites(model)
    assert [site.path for site in sites] == ["layer.query", "layer.key"]
    assert all(site.input is norm.outputs[0] for site in sites)
    np.testing.assert_array_equal(numbers(model, "query.w"), random(sum(map(ord, "query")), K, N) * GAMMA[:, None])
    restored = residual.inputs[1]
    assert restored.name == "norm_out"
    mul = maker(model, "Mul")
    assert mul.inputs[0] is norm.outputs[0]
    assert mul.inputs[1] is model.graph.initializers["gamma"]
    shifted = beta is BETA
    assert operators(model) == {"Add": 3 + shifted, "LayerNormalization": 1, "MatMul": 2, "Mul": 1}
    assert (restored.producer() is mul) is not shifted
    assert ("beta" in model.graph.initializers) is shifted


def test_a_shift_alone() -> None:
    g = Normed(gamma=ONES)
    model = g.finish(g.site("query"), g.residual())
    before = numbers(model, "query.w")
    assert apply_equal(AbsorbNorm(), model, X).changed == 1
    assert operators(model) == {"Add": 3, "LayerNormalization": 1, "MatMul": 1}
    np.testing.assert_array_equal(numbers(model, "query.w"), before)


def test_a_norm_that_only_sites_read_keeps_its_name() -> None:
    g = Normed()
    model = g.finish(g.site("query"))
    assert apply_equal(AbsorbNorm(), model, X).changed == 1
    assert operators(model) == {"Add": 1, "LayerNormalization": 1, "MatMul": 1}
    assert maker(model, "LayerNormalization").outputs[0].name == "norm_out"
    assert "gamma" not in model.graph.initializers


def test_a_site_without_bias_gets_one() -> None:
    g = Normed()
    product = g.site("up", bias=False)
    model = g.finish(g.add("Relu", product, shape=("b", "s", N)), product)
    assert apply_equal(AbsorbNorm(), model, X).changed == 1
    (site,) = linear_sites(model)
    add = maker(model, "Add")
    assert add.inputs[0] is site.output
    assert add.outputs[0] is model.graph.outputs[1]
    assert maker(model, "Relu").inputs[0] is add.outputs[0]
    assert add.outputs[0].name == "up.product_out"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_gemm(bias: bool, transposed: bool) -> None:
    g = GraphBuilder()
    x = g.input("x", ("m", K))
    y = g.add("LayerNormalization", x, g.constant(GAMMA), g.constant(BETA), shape=("m", K), axis=1)
    weight = random(3, K, N)
    w = g.constant(np.ascontiguousarray(weight.T) if transposed else weight)
    extra = [g.constant(random(4, N))] if bias else []
    model = g.finish(g.add("Gemm", y, w, *extra, transB=int(transposed), shape=("m", N)))
    assert apply_equal(AbsorbNorm(), model, {"x": random(0, 5, K)}).changed == 1
    assert operators(model) == {"Gemm": 1, "LayerNormalization": 1}


def test_readers_in_subgraphs_and_outputs_of_the_graph_keep_the_name() -> None:
    g = Normed()
    inner = ir.Value(name="inner", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(FLAT))
    branches = [
        ir.Graph([], [value], nodes=[ir.node(op, [g.y], outputs=[value], name=f"in_{op}")], name=op)
        for op, value in (("Neg", inner), ("Abs", ir.Value(name="other", type=inner.type, shape=inner.shape)))
    ]
    choice = g.input("choice", (), ir.DataType.BOOL)
    attributes = [ir.AttrGraph("then_branch", branches[0]), ir.AttrGraph("else_branch", branches[1])]
    chosen = ir.node("If", [choice], outputs=[ir.Value(name="chosen", type=inner.type, shape=inner.shape)], name="if")
    for attribute in attributes:
        chosen.attributes.add(attribute)
    g.graph.append(chosen)
    model = g.finish(g.y, chosen.outputs[0], g.site("query"))
    assert apply_equal(AbsorbNorm(), model, {**X, "choice": np.array(True)}).changed == 1
    add = model.graph.outputs[0].producer()
    assert add is not None
    assert (add.op_type, add.outputs[0].name) == ("Add", "norm_out")
    assert all(node.inputs[0] is add.outputs[0] for branch in branches for node in branch)


@pytest.mark.parametrize(("op_type", "opset"), [("RMSNormalization", 23), ("SimplifiedLayerNormalization", 21)])
def test_norms_without_a_shift(op_type: str, opset: int) -> None:
    g = Normed(beta=None, op_type=op_type, opset=opset)
    model = g.finish(g.site("gate", bias=False), g.site("up", bias=False), g.residual())
    expected = evaluate(model, X)
    assert AbsorbNorm().run(model, CONTEXT).changed == 1
    assert AbsorbNorm().run(model, CONTEXT).changed == 0
    assert operators(model) == {"Add": 1, "MatMul": 2, "Mul": 1, op_type: 1}
    for name, found in evaluate(model, X).items():
        np.testing.assert_allclose(found, expected[name], rtol=0, atol=tolerance(model, expected[name]))


def test_a_weight_that_sites_of_one_norm_share_is_rewritten_once() -> None:
    g = Normed()
    weight = g.constant(random(3, K, N), "tied")
    model = g.finish(g.site("left", weight=weight), g.site("right", weight=weight))
    assert apply_equal(AbsorbNorm(), model, X).changed == 1
    np.testing.assert_array_equal(numbers(model, "tied"), random(3, K, N) * GAMMA[:, None])


def reads_weight_elsewhere() -> ir.Model:
    g = Normed()
    query = g.site("query")
    return g.finish(query, g.site("key", read=g.x, weight=g.graph.initializers["query.w"]))


def reads_bias_elsewhere() -> ir.Model:
    g = Normed()
    query = g.site("query")
    return g.finish(query, g.add("Neg", g.graph.initializers["query.b"], shape=(N,)))


def odd_bias() -> ir.Model:
    g = GraphBuilder()
    x, bias = g.input("x", ("m", K)), g.input("bias", (N,))
    y = g.add("LayerNormalization", x, g.constant(GAMMA), g.constant(BETA), shape=("m", K))
    return g.finish(g.add("Gemm", y, g.constant(random(3, K, N), "query.w"), bias, shape=("m", N)))


def with_norm(*extra: str, **options: object) -> ir.Model:
    g = Normed(**options)  # type: ignore[arg-type]
    query = g.site("query")
    if "mean" in extra:
        mean = next(iter(g.graph)).outputs[1]
        mean.dtype, mean.shape = ir.DataType.FLOAT, ir.Shape(("b", "s", 1))
        return g.finish(query, mean)
    return g.finish(query)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (reads_weight_elsewhere(), "weight is read elsewhere"),
        (reads_bias_elsewhere(), "bias is read elsewhere"),
        (odd_bias(), "bias is no constant vector"),
        (with_norm("mean", outputs=3), "mean or deviation is used"),
        (with_norm(gamma=random(1, 5, K), beta=random(2, 5, K), axis=1), "last axis alone"),
        (with_norm(gamma=random(1, 1)), "no finite constant vector"),
        (with_norm(gamma=np.full(K, np.inf, np.float32)), "no finite constant vector"),
        (with_norm(beta=np.full(K, np.nan, np.float32)), "no finite constant vector"),
        (with_norm(gamma=np.full(K, 3e38, np.float32)), "its weight would leave the range"),
        (with_norm(beta=np.full(K, 3e38, np.float32)), "its bias would leave the range"),
    ],
)
def test_refused(model: ir.Model, reason: str) -> None:
    before, held = operators(model), numbers(model, "query.w")
    outcome = apply(AbsorbNorm(), model)
    assert outcome.changed == 0
    (refusal,) = outcome.refused
    assert reason in refusal.reason
    assert operators(model) == before
    np.testing.assert_array_equal(numbers(model, "query.w"), held)


def test_a_site_that_cannot_take_it_reads_what_the_residual_reads() -> None:
    g = Normed()
    query, key = g.site("query"), g.site("key")
    model = g.finish(query, key, g.add("Neg", g.graph.initializers["key.w"], shape=(K, N)))
    outcome = apply_equal(AbsorbNorm(), model, X)
    assert (outcome.changed, len(outcome.refused)) == (1, 1)
    first, second = linear_sites(model)
    assert first.input is maker(model, "LayerNormalization").outputs[0]
    assert second.input.name == "norm_out"
    np.testing.assert_array_equal(numbers(model, "key.w"), random(sum(map(ord, "key")), K, N))


def test_a_weight_shared_with_a_site_that_is_left_stays() -> None:
    g = Normed()
    weight = g.constant(random(3, K, N), "tied")
    left, right = g.site("left", weight=weight), g.site("right", weight=weight)
    model = g.finish(left, right, g.add("Neg", g.graph.initializers["right.b"], shape=(N,)))
    outcome = apply_equal(AbsorbNorm(), model, X)
    assert outcome.changed == 0
    assert [refusal.reason for refusal in outcome.refused] == [
        "it shares its weight with a site that is left as it is", "its bias is read elsewhere too"
    ]  # fmt: skip


@pytest.mark.parametrize("form", ["no site", "plain"])
def test_other_norms_are_left(form: str) -> None:
    g = Normed() if form == "no site" else Normed(ONES, ZEROS)
    model = g.finish(g.residual() if form == "no site" else g.site("query"))
    before = operators(model)
    outcome = apply(AbsorbNorm(), model)
    assert (outcome.changed, outcome.refused) == (0, ())
    assert operators(model) == before


def test_a_whole_encoder() -> None:
    """Every norm but the last is absorbed; the numbers stay within the rounding of some 40 operators in sequence."""
    model = Encoder(layers=2).build()
    InferShapes().run(model, CONTEXT)
    generator = np.random.default_rng(0)
    for name, value in model.graph.initializers.items():
        if name.endswith(("gamma", "beta")):
            array = generator.normal(1.0, 0.3, 64).astype(np.float32)
            value.const_value = ir.Tensor(array, name=name)
    expected = run(model, feeds())
    paths = [site.path for site in linear_sites(model)]
    assert apply(AbsorbNorm(), model).changed == 4
    assert [site.path for site in linear_sites(model)] == paths
    assert relative(run(model, feeds()), expected) < 40 * np.finfo(np.float32).eps
