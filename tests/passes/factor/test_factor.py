"""factor: structure, numbers against float64, the common budget, what composes with it, refusals, idempotence."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import pytest
from encoder_graphs import DISABLED, FLOAT, SCOPES, Array, Builder, Encoder, feeds, operators, relative, run
from lent_moments import lent

from artifacts.target import CPU
from passes.affine import matrix_of
from passes.base import Context, Effect, Pass, Purpose
from passes.factor import Factor
from passes.factor.lowrank import DAMPING, energies
from passes.fusion import PackProducts
from passes.grammar import check, signature
from passes.pipeline import Pipeline, parse
from passes.quantize import DynamicInt8, WeightOnly
from passes.second_order import damped
from passes.sites import linear_sites

HERE = Context(CPU)
RNG = np.random.default_rng(17)
ROWS, K, N = 300, 96, 64
# Twenty directions are loud: what a low rank is for.
LOUD = np.where(np.arange(K) < 20, 3.0, 0.1)
X = ((RNG.normal(size=(ROWS, K)) * LOUD) @ np.linalg.qr(RNG.normal(size=(K, K)))[0] + 0.2).astype(np.float32)
WEIGHT = RNG.normal(size=(K, N)).astype(np.float32)
BIAS = RNG.normal(size=N).astype(np.float32)
EPS = float(np.finfo(np.float32).eps)


def calibrated(data: Mapping[str, Array]) -> Context:
    """Of these calibration data."""
    return Context(CPU, moments=lent(data))


def model_of(kind: str = "matmul") -> ir.Model:
    graph = Builder()
    x = graph.input("x", FLOAT, ["m", K])
    path = "decoder/decoder.dense"
    if kind == "gemm":
        held = graph.constant("w", np.ascontiguousarray(WEIGHT.T))
        return graph.model(
            graph.add("Gemm", x, held, graph.constant("b", BIAS), name="y", path=path, transB=1), shape=["m", N]
        )
    product = graph.add("MatMul", x, graph.constant("w", WEIGHT), name="product", path=path)
    if kind == "biased":
        product = graph.add("Add", product, graph.constant("b", BIAS), name="y", path=path)
    return graph.model(product, shape=["m", N])


def moment(*, centred: bool) -> np.ndarray:
    """Of X, float64."""
    rows = X.astype(np.float64) - (X.astype(np.float64).mean(axis=0) if centred else 0.0)
    return rows.T @ rows / ROWS


def parameters(model: ir.Model) -> int:
    return sum(site.shape[0] * site.shape[1] for site in linear_sites(model))


def test_it_is_a_pass():
    assert isinstance(Factor(), Pass)
    assert (Factor.name, Factor.effect, Factor.purpose) == ("factor", Effect.LOSSY, Purpose.SPEED)


def test_structure_of_a_matmul():
    model = model_of()
    before, (old,) = signature(model), model.graph
    outcome = Factor(rank=20).run(model, calibrated({"x": X}))
    check(model, CPU)
    assert (outcome.changed, outcome.refused) == (1, ())
    assert signature(model) == before
    first, second = model.graph
    assert (first.op_type, second.op_type) == ("MatMul", "MatMul")
    assert second is old
    initializers = model.graph.initializers
    assert list(initializers) == ["w.first", "w.second"]
    assert first.inputs == (model.graph.inputs[0], initializers["w.first"])
    assert second.inputs == (first.outputs[0], initializers["w.second"])
    assert second.outputs[0] is model.graph.outputs[0]
    assert [tuple(value.shape) for value in initializers.values()] == [(K, 20), (20, N)]
    assert first.metadata_props[SCOPES] == second.metadata_props[SCOPES]


def test_structure_of_a_gemm():
    model = model_of("gemm")
    (old,) = model.graph
    bias = old.inputs[2]
    assert Factor(rank=20).run(model, calibrated({"x": X})).changed == 1
    check(model, CPU)
    first, second = model.graph
    assert (first.op_type, second.op_type) == ("MatMul", "Gemm")
    assert second is old
    assert second.inputs[2] is bias
    assert second.attributes["transB"].as_int() == 1
    assert [tuple(site.weight.shape) for site in linear_sites(model)] == [(K, 20), (N, 20)]
    assert [site.path for site in linear_sites(model)] == ["decoder.dense"] * 2


@pytest.mark.parametrize("kind", ["matmul", "biased", "gemm"])
@pytest.mark.parametrize("rank", [8, 20, 36])
def test_the_error_is_the_sum_of_what_was_cut(kind: str, rank: int):
    model = model_of(kind)
    before = run(model, {"x": X}, DISABLED).astype(np.float64)
    assert Factor(rank=rank, method="whitened").run(model, calibrated({"x": X})).changed == 1
    check(model, CPU)
    error = run(model, {"x": X}, DISABLED) - before
    second = moment(centred=kind != "matmul")
    # Damping adds to the damage what it says of E = W - A B, and |E| <= |W| max|x| / min|x| is no bound worth having:
    # so the truth lies between the damage that damping allows for and the least there is without.
    most, least = (float(energies(WEIGHT, one)[rank:].sum()) for one in (damped(second, DAMPING), second))
    assert most <= least + DAMPING * np.trace(second) / K * np.square(WEIGHT, dtype=np.float64).sum()
    # Sums of K and of r products of float32, and the factors rounded to it.
    rounding = 2 * (K + rank) * EPS * np.linalg.norm(X, axis=1).max() * np.linalg.norm(WEIGHT)
    found = float(np.square(error).sum() / ROWS)
    slack = 2 * rounding * np.sqrt(most) + rounding**2
    assert least - slack <= found <= most + slack
    assert slack < 0.05 * least
    if kind != "matmul":
        # All of the mean that is lost goes into the bias.
        np.testing.assert_allclose(error.mean(axis=0), 0.0, rtol=0, atol=rounding)


def test_the_plain_decomposition_needs_no_data():
    model = model_of()
    assert Factor(rank=20, method="svd").run(model, HERE).changed == 1
    u, sigma, vt = np.linalg.svd(WEIGHT.astype(np.float64), full_matrices=False)
    expected = (u[:, :20] * sigma[:20]) @ vt[:20]
    first, second = (matrix_of(site).astype(np.float64) for site in linear_sites(model))
    np.testing.assert_allclose(first @ second, expected, rtol=0, atol=2 * EPS * sigma[0] * np.sqrt(20))


def test_whitened_loses_less_of_the_product():
    expected = X.astype(np.float64) @ WEIGHT
    errors = {}
    for method in ("svd", "whitened"):
        model = model_of()
        assert Factor(rank=20, method=method).run(model, calibrated({"x": X})).changed == 1
        errors[method] = relative(run(model, {"x": X}), expected)
    assert errors["whitened"] < 0.3 * errors["svd"]


@pytest.mark.parametrize("allocation", ["uniform", "damage"])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("ratio", [0.5, 0.8])
def test_a_whole_encoder_keeps_the_share_and_a_second_run_changes_nothing(
    ratio: float,
    joint: bool,
    allocation: str,
):
    layers = 3
    model, context = Encoder(layers=layers).build(), calibrated(feeds(8, 16))
    whole, before = parameters(model), signature(model)
    item = Factor(ratio, allocation=allocation, joint=joint, multiple=4)
    outcome = item.run(model, context)
    check(model, CPU)
    assert signature(model) == before
    # Short of the share by less than a rank of the widest operator; of each of them where each keeps the share.
    short = 4 * (64 + 128) * (6 * layers if allocation == "uniform" else 1)
    assert ratio * whole - short < parameters(model) <= ratio * whole
    assert outcome.changed == 6 * layers if allocation == "uniform" else outcome.changed > 0
    after = ir.to_proto(model).SerializeToString()
    assert item.run(model, context).changed == 0
    assert ir.to_proto(model).SerializeToString() == after


def uneven() -> tuple[ir.Model, Array]:
    """A chain of operators of which every other one has few directions, a gate between them."""
    graph, rng = Builder(), np.random.default_rng(5)
    value = graph.input("x", FLOAT, ["m", 48])
    for index in range(6):
        weight = rng.normal(size=(48, 48)) / 7
        if index % 2:
            u, sigma, vt = np.linalg.svd(weight)
            weight = (u * sigma * np.exp(-np.arange(48) / 4)) @ vt * 4
        product = graph.add("MatMul", value, graph.constant(f"w{index}", weight.astype(np.float32)), name=f"p{index}")
        value = graph.add("Tanh", product, name=f"t{index}")
    return graph.model(value, shape=["m", 48]), rng.normal(size=(400, 48)).astype(np.float32)


def test_ranks_by_damage_lose_less_than_equal_ones():
    model, x = uneven()
    expected, errors = run(model, {"x": x}), {}
    for allocation in ("uniform", "damage"):
        made = model.clone()
        assert Factor(0.7, allocation=allocation, multiple=2).run(made, calibrated({"x": x})).changed > 0
        errors[allocation] = relative(run(made, {"x": x}), expected)
    assert errors["damage"] < 0.5 * errors["uniform"]


def attention_inputs(parts: int) -> tuple[ir.Model, Array]:
    """Products of one value whose weights share their columns' space of 12 directions."""
    graph, rng = Builder(), np.random.default_rng(2)
    x = graph.input("x", FLOAT, ["m", 64])
    common = rng.normal(size=(64, 12))
    outputs = []
    for part in range(parts):
        weight = (common @ rng.normal(size=(12, 32))).astype(np.float32)
        bias = graph.constant(f"b{part}", rng.normal(size=32).astype(np.float32))
        product = graph.add("MatMul", x, graph.constant(f"w{part}", weight), name=f"p{part}", path=f"a/a.{part}")
        outputs.append(graph.add("Add", product, bias, name=f"y{part}"))
    return graph.model(*outputs, shape=["m", 32]), rng.normal(size=(200, 64)).astype(np.float32)


@pytest.mark.parametrize("allocation", ["uniform", "damage"])
def test_products_of_one_value_share_the_first_factor_where_that_loses_less(allocation: str):
    model, x = attention_inputs(3)
    expected = run(model, {"x": x})
    # Apart, 4 directions of the 12 for each: 4 * 96 * 3 of 6144 parameters; together 12 * 160.
    item = Factor(0.32, allocation=allocation, multiple=4)
    apart = model.clone()
    Factor(0.32, allocation=allocation, multiple=4, joint=False).run(apart, calibrated({"x": x}))
    assert item.run(model, calibrated({"x": x})).changed == 3
    check(model, CPU)
    assert operators(model) == {"MatMul": 4, "Add": 3}
    first = next(iter(model.graph))
    assert first.inputs[0] is model.graph.inputs[0]
    seconds = [node for node in model.graph if node.op_type == "MatMul"][1:]
    assert all(node.inputs[0] is first.outputs[0] for node in seconds)
    assert [site.path for site in linear_sites(model)] == ["a.0", "a.0", "a.1", "a.2"]
    # The twelve are kept: what is left is rounding.
    assert relative(run(model, {"x": x}), expected) < 1e-5 < relative(run(apart, {"x": x}), expected)
    assert item.run(model, calibrated({"x": x})).changed == 0
    assert PackProducts().run(model, HERE).changed == 1


def test_a_weight_that_several_operators_read_stays_one():
    graph = Builder()
    x = graph.input("x", FLOAT, ["m", K])
    held = graph.constant("w", RNG.normal(size=(K, K)).astype(np.float32))
    hidden = graph.add("Tanh", graph.add("MatMul", x, held, name="p0"), name="t")
    model = graph.model(graph.add("MatMul", hidden, held, name="p1"), shape=["m", K])
    assert Factor(rank=24).run(model, calibrated({"x": X})).changed == 2
    check(model, CPU)
    assert sorted(model.graph.initializers) == ["w.first", "w.second"]
    assert operators(model) == {"MatMul": 4, "Tanh": 1}
    assert Factor(rank=24).run(model, calibrated({"x": X})).changed == 0


@pytest.mark.parametrize(("after", "bits"), [(DynamicInt8(), 8), (WeightOnly(4, 32), 4), (WeightOnly(8), 8)], ids=str)
def test_factors_are_quantized_as_any_product(after: Pass, bits: int):
    model, context = Encoder(layers=2).build(), calibrated(feeds(8, 16))
    # Rank 32 is too much for 64 x 64, but not for query, key and value together.
    assert Factor(0.7, multiple=32, allocation="uniform").run(model, context).changed == 2 * 5
    exact, sites = run(model, feeds()), len(linear_sites(model))
    assert sites == 2 * (4 + 1 + 4)
    assert after.run(model, context).changed == sites
    check(model, CPU)
    assert not linear_sites(model)
    # 32 values of a normal distribution reach 2.1 deviations: errors of a step of 2.1 / 2^(bits - 1), uniform.
    tolerance = 2 * np.sqrt((2.1 / 2 ** (bits - 1)) ** 2 / 12 * sites)
    assert tolerance / 20 < relative(run(model, feeds()), exact) < tolerance


def test_only_and_skip_choose_what_the_share_is_of():
    model, context = Encoder(layers=2).build(), calibrated(feeds(8, 16))
    item = Factor(0.5, only=("*.intermediate", "*.output"), skip=("*.1.output",), multiple=4)
    outcome = item.run(model, context)
    assert [refusal.reason for refusal in outcome.refused] == ["encoder.layer.1.output is skipped by '*.1.output'"]
    sizes: dict[str, int] = {}
    for site in linear_sites(model):
        sizes[site.path] = sizes.get(site.path, 0) + site.shape[0] * site.shape[1]
    chosen = ("encoder.layer.0.intermediate", "encoder.layer.0.output", "encoder.layer.1.intermediate")
    assert sum(sizes.pop(path) for path in chosen) <= 0.5 * 3 * 64 * 128
    assert sorted(set(sizes.values())) == [64 * 64, 64 * 128]
    assert item.run(model, context).changed == 0


def test_refusals():
    model = model_of()
    outcome = Factor().run(model, HERE)
    assert [refusal.reason for refusal in outcome.refused] == ["whitened needs calibration data"]
    outcome = Factor(rank=60).run(model, calibrated({"x": X}))
    assert [refusal.reason for refusal in outcome.refused] == ["rank 60 makes 96 x 64 no smaller: 38 would"]
    outcome = Factor(multiple=64).run(model, calibrated({"x": X}))
    assert [refusal.reason for refusal in outcome.refused] == [
        "no rank of a multiple of 64 makes 96 x 64 smaller: 38 would"
    ]
    assert operators(model) == {"MatMul": 1}


def test_a_tied_weight_is_refused():
    graph = Builder()
    x = graph.input("x", FLOAT, ["m", K])
    held = graph.constant("w", WEIGHT)
    row = graph.add("Gather", held, graph.ints(0), name="row", axis=0)
    model = graph.model(graph.add("Add", graph.add("MatMul", x, held, name="p"), row, name="y"), shape=["m", N])
    outcome = Factor(rank=8).run(model, calibrated({"x": X}))
    assert outcome.changed == 0
    reason = "w is read elsewhere too: it would stay, and the factors would be added"
    assert [refusal.reason for refusal in outcome.refused] == [reason]


def test_few_rows_are_told_and_do_no_harm():
    model, few = model_of(), X[:10]
    before = run(model, {"x": few})
    outcome = Factor(rank=10).run(model, calibrated({"x": few}))
    assert outcome.changed == 1
    reason = "10 rows of calibration data for 96 channels: what they do not show is kept by chance"
    assert [refusal.reason for refusal in outcome.refused] == [reason]
    # A rank for each row: what they showed is there but for damping.
    assert relative(run(model, {"x": few}), before) < 0.05


def test_a_graph_without_products_is_said():
    graph = Builder()
    x = graph.input("x", FLOAT, ["m", K])
    model = graph.model(graph.add("Tanh", x, name="y"), shape=["m", K])
    outcome = Factor().run(model, calibrated({"x": X}))
    assert outcome.changed == 0
    assert [refusal.reason for refusal in outcome.refused] == ["no linear operator to factor"]


@pytest.mark.parametrize("item", [Factor(), Factor(0.6, 0, "svd", "uniform", False, 32, ("a",), ("*.b",))], ids=str)
def test_the_text_form_reads_back(item: Factor):
    pipeline = Pipeline((item,))
    assert parse(str(pipeline), (Factor,)) == pipeline


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.0}, "ratio is 0.0, not between 0 and 1"),
        ({"ratio": 1.0}, "ratio is 1.0, not between 0 and 1"),
        ({"rank": -1}, "rank is -1, not 1 or more, or 0 for ranks by ratio"),
        ({"rank": 8, "ratio": 0.5}, "rank sets the rank of every operator: give either rank or ratio"),
        ({"multiple": 0}, "multiple is 0, not 1 or more"),
        ({"method": "best"}, "method is 'best', not one of svd, whitened, weighted"),
        ({"allocation": "best"}, "allocation is 'best', not one of uniform, damage"),
    ],
    ids=str,
)
def test_impossible_options_are_refused(options: dict[str, object], message: str):
    with pytest.raises(ValueError, match=rf"^{message}$"):
        Factor(**options)
