from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from builders import GraphBuilder, random
from encoder_graphs import DISABLED, Encoder, session

from artifacts.errors import DataError
from compiler.calibrate import Batches, Calibrator, tensor_batches
from compiler.calibrate import calibrator as module
from compiler.calibrate.plan import Group
from compiler.graphs import GraphFolder
from compiler.tolerance import rounding_tolerance
from passes.base import Observe
from passes.statistics import BINS, Activation

Array = np.ndarray
LENGTHS = (7, 3, 12, 3, 7, 7, 5)
SEEN = (
    "encoder.layer.0.norm",
    "encoder.layer.0.query.heads",
    "encoder.layer.1.weights",
    "encoder.layer.1.intermediate.gelu",
    "pool.mean",
)


@pytest.fixture
def encoder() -> ir.Model:
    return Encoder(fused=False, layers=2, hidden=32, heads=4).build()


def sentences() -> list[Array]:
    generator = np.random.default_rng(5)
    return [generator.integers(0, 600, length) for length in LENGTHS]


def unpadded(rows: list[Array] | None = None) -> Batches:
    """The sentences in batches of one length, shortest first."""
    rows = sentences() if rows is None else rows
    groups = [np.stack([row for row in rows if len(row) == length]) for length in sorted({len(row) for row in rows})]
    return tensor_batches([{"input_ids": ids, "attention_mask": np.ones_like(ids)} for ids in groups], rows_apart=True)


def values_of(model: ir.Model, names: tuple[str, ...] = SEEN) -> list[ir.Value]:
    known = {value.name: value for value in model.graph.inputs}
    known |= {output.name: output for node in model.graph for output in node.outputs}
    return [known[name] for name in names]


def calibrator(tmp_path: Path, batches: Batches, **options: Any) -> Calibrator:
    settings: dict[str, Any] = {"memory": 10**9, "cache": False, "threads": 1} | options
    return Calibrator(batches, GraphFolder(tmp_path), **settings)


def shown(model: ir.Model, names: tuple[str, ...], feeds: Mapping[str, Array]) -> list[Array]:
    """The values, as ONNX Runtime computes them for one example alone."""
    copy = model.clone()
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(values_of(copy, names))
    return session(copy, DISABLED).run(None, dict(feeds))


def assert_equal(one: Mapping[str, Activation], other: Mapping[str, Activation]) -> None:
    assert list(one) == list(other)
    for name, found in one.items():
        assert (found.rows, found.reach) == (other[name].rows, other[name].reach)
        for part in ("low", "high", "mean", "histogram", "sample"):
            np.testing.assert_array_equal(getattr(found, part), getattr(other[name], part), strict=True)


def test_it_is_what_numpy_says_of_every_sentence_alone(encoder: ir.Model, tmp_path: Path) -> None:
    observe: Observe = calibrator(tmp_path, unpadded()).observe
    found = observe(encoder, values_of(encoder))
    assert list(found) == list(SEEN)
    ordered = sorted(sentences(), key=len)
    alone = [
        shown(encoder, SEEN, {"input_ids": row[None], "attention_mask": np.ones((1, len(row)), np.int64)})
        for row in ordered
    ]
    # Every batch size sums in another order: rounding, relative to the size of the value.
    tolerance = rounding_tolerance(encoder)
    for index, name in enumerate(SEEN):
        channels = 1 if name.endswith("weights") else alone[0][index].shape[-1]
        data = np.concatenate([one[index].reshape(-1, channels) for one in alone]).astype(np.float64)
        seen, bound = found[name], tolerance * float(np.abs(data).max())
        assert seen.rows == len(data)
        np.testing.assert_allclose(seen.low, data.min(axis=0), rtol=0, atol=bound)
        np.testing.assert_allclose(seen.high, data.max(axis=0), rtol=0, atol=bound)
        np.testing.assert_allclose(seen.mean, data.mean(axis=0), rtol=0, atol=bound)
        assert len(seen.sample) == min(512, len(data))
        if len(data) <= 512:
            np.testing.assert_allclose(seen.sample, data, rtol=0, atol=bound)
        assert seen.histogram.sum() == data.size
        edges = np.linspace(-seen.reach, seen.reach, BINS + 1)
        counts = np.histogram(data, edges)[0]
        # What rounding moves goes to the bin beside: the cumulative counts differ by what lies at an edge.
        near = [np.count_nonzero(np.abs(data - edge) <= bound) for edge in edges[1:]]
        assert (np.abs(np.cumsum(seen.histogram) - np.cumsum(counts)) <= near).all()


def test_observing_leaves_the_model_and_the_folder_as_they_were(encoder: ir.Model, tmp_path: Path) -> None:
    before = ir.to_proto(encoder).SerializeToString(deterministic=True)
    folder = GraphFolder(tmp_path)
    kept = folder.save(encoder.clone())
    content = kept.path.read_bytes()
    Calibrator(unpadded(), folder, memory=10**9, cache=False).observe(encoder, values_of(encoder))
    assert ir.to_proto(encoder).SerializeToString(deterministic=True) == before
    assert [path.name for path in tmp_path.glob("*.onnx")] == [kept.path.name]
    assert kept.path.read_bytes() == content
    assert {f"weights/{path.name}" for path in (tmp_path / "weights").iterdir()} == set(kept.weights)


def test_the_model_is_observed_as_it_is_now(encoder: ir.Model, tmp_path: Path) -> None:
    """Halfway through a pass: a node without a name, a type or a shape, and a weight that was never saved."""
    lent = calibrator(tmp_path, unpadded())
    (value,) = values_of(encoder, ("encoder.layer.0.norm",))
    before = lent.observe(encoder, [value])["encoder.layer.0.norm"]
    scale = ir.Value(name="scale", const_value=ir.tensor(np.full((8192, 1), 3.0, np.float32)))
    encoder.graph.register_initializer(scale)
    node = ir.node("ReduceMax", [scale], {"keepdims": 0})
    scaled = ir.node("Mul", [value, node.outputs[0]])
    scaled.outputs[0].name = "scaled"
    encoder.graph.extend([node, scaled])
    after = lent.observe(encoder, [scaled.outputs[0], value])
    assert list(after) == ["scaled", "encoder.layer.0.norm"]
    np.testing.assert_array_equal(after["scaled"].high, np.float32(3.0) * before.high)
    np.testing.assert_array_equal(after["encoder.layer.0.norm"].sample, before.sample)
    assert encoder.graph.initializers["scale"].const_value is scale.const_value
    assert not isinstance(scale.const_value, ir.ExternalTensor)


def test_several_passes_give_what_one_gives(encoder: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lent = calibrator(tmp_path, unpadded())
    whole = lent.observe(encoder, values_of(encoder))
    monkeypatch.setattr(module, "plan", lambda *_: (Group((3, 0), 10**6), Group((2,), 10**6), Group((1, 4), 10**6)))
    assert_equal(lent.observe(encoder, values_of(encoder)), whole)


@pytest.mark.parametrize("elements", [1, 20, 30])
def test_smaller_batches_give_the_same_up_to_rounding(
    encoder: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elements: int
) -> None:
    lent = calibrator(tmp_path, unpadded())
    whole = lent.observe(encoder, values_of(encoder))
    monkeypatch.setattr(module, "plan", lambda *_: (Group((0, 1, 2, 3, 4), elements),))
    cut = lent.observe(encoder, values_of(encoder))
    for name, found in cut.items():
        bound = rounding_tolerance(encoder) * float(max(found.high.max(), -found.low.min()))
        assert found.rows == whole[name].rows
        for part in ("low", "high", "mean", "sample"):
            np.testing.assert_allclose(getattr(found, part), getattr(whole[name], part), rtol=0, atol=bound)


def test_the_seed_draws_the_sample(encoder: ir.Model, tmp_path: Path) -> None:
    rows = [np.random.default_rng(index).integers(0, 600, 20) for index in range(40)]
    name = ("encoder.layer.0.norm",)
    found = [calibrator(tmp_path, unpadded(rows), seed=seed) for seed in (0, 0, 1)]
    samples = [one.observe(encoder, values_of(encoder, name))[name[0]].sample for one in found]
    np.testing.assert_array_equal(samples[0], samples[1])
    assert samples[0].shape == samples[2].shape == (512, 32)
    assert not np.array_equal(samples[0], samples[2])


def test_nothing_to_observe(encoder: ir.Model, tmp_path: Path) -> None:
    assert calibrator(tmp_path, tensor_batches([])).observe(encoder, []) == {}


def linear(dtype: ir.DataType = ir.DataType.FLOAT) -> tuple[ir.Model, Array]:
    """y = relu(x @ w), x [n, 8], y [n, 5]."""
    builder = GraphBuilder()
    x = builder.input("x", ["n", 8], dtype)
    weight = random(1, 8, 5).astype(dtype.numpy())
    product = builder.add("MatMul", x, builder.constant(weight, "w"), name="product", dtype=dtype)
    return builder.finish(builder.add("Relu", product, name="y", dtype=dtype, shape=["n", 5])), weight


def test_a_model_of_plain_tensors(tmp_path: Path) -> None:
    model, weight = linear()
    feeds = [random(seed, size, 8) for seed, size in ((1, 3), (2, 1), (3, 4))]
    found = calibrator(tmp_path, tensor_batches([{"x": x} for x in feeds])).observe(
        model, values_of(model, ("x", "product_out", "y_out"))
    )
    x = np.concatenate(feeds)
    product = x.astype(np.float64) @ weight
    assert found["x"].rows == 8
    np.testing.assert_array_equal(found["x"].sample, x)
    # 8 rounded products of numbers below 8: 8 * 8 * 8 * 2^-24.
    np.testing.assert_allclose(found["product_out"].sample, product, rtol=0, atol=4e-5)
    np.testing.assert_allclose(found["y_out"].high, np.maximum(product, 0).max(axis=0), rtol=0, atol=4e-5)


def test_a_single_example(tmp_path: Path) -> None:
    model, _ = linear()
    found = calibrator(tmp_path, tensor_batches([{"x": random(1, 1, 8)}])).observe(model, values_of(model, ("y_out",)))
    assert found["y_out"].rows == 1
    assert found["y_out"].sample.shape == (1, 5)


@pytest.mark.parametrize("constant", [0.0, -2.0])
def test_constant_activations(tmp_path: Path, constant: float) -> None:
    model, _ = linear()
    batches = tensor_batches([{"x": np.full((4, 8), constant, np.float32)}] * 3)
    found = calibrator(tmp_path, batches).observe(model, values_of(model, ("x", "y_out")))
    assert (found["x"].low == constant).all()
    assert (found["x"].high == constant).all()
    assert np.count_nonzero(found["x"].histogram) == 1
    assert found["x"].reach > 0
    assert (found["y_out"].mean >= 0).all()


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT16, ir.DataType.DOUBLE])
def test_other_floats_are_cast(tmp_path: Path, dtype: ir.DataType) -> None:
    model, weight = linear(dtype)
    x = random(3, 6, 8).astype(dtype.numpy())
    found = calibrator(tmp_path, tensor_batches([{"x": x}])).observe(model, values_of(model, ("x", "product_out")))
    np.testing.assert_array_equal(found["x"].sample, x.astype(np.float32))
    product = x.astype(np.float64) @ weight.astype(np.float64)
    # The rounding of the result in float16, and of 8 products on the way.
    np.testing.assert_allclose(found["product_out"].sample, product, rtol=0, atol=9 * 16 * 2.0**-11)


def test_a_value_made_inside_a_function(tmp_path: Path) -> None:
    inner = GraphBuilder()
    x = inner.input("a", ["n", 8])
    inner.graph.outputs.append(inner.add("Neg", x, name="negated"))
    function = ir.Function("local", "Negate", graph=inner.graph, attributes=[])
    builder = GraphBuilder()
    called = builder.add("Negate", builder.input("x", ["n", 8]), domain="local", name="call")
    model = builder.finish(builder.add("Relu", called, name="y", shape=["n", 8]))
    model.functions[function.identifier()] = function
    model.graph.opset_imports["local"] = 1
    x = random(4, 5, 8)
    found = calibrator(tmp_path, tensor_batches([{"x": x}])).observe(model, values_of(model, ("call_out", "y_out")))
    np.testing.assert_array_equal(found["call_out"].sample, -x)
    np.testing.assert_array_equal(found["y_out"].sample, np.maximum(-x, 0))


def test_a_value_that_a_branch_reads(tmp_path: Path) -> None:
    builder = GraphBuilder()
    x, flag = builder.input("x", ["n", 4]), builder.input("flag", [], ir.DataType.BOOL)
    doubled = builder.add("Add", x, x, name="doubled")
    branches = []
    for operator in ("Neg", "Relu"):
        inner = GraphBuilder()
        inner.graph.outputs.append(inner.add(operator, doubled, name=operator, shape=["n", 4]))
        branches.append(inner.graph)
    chosen = builder.add("If", flag, name="chosen", then_branch=branches[0], else_branch=branches[1], shape=["n", 4])
    model = builder.finish(chosen)
    x = random(4, 5, 4)
    batches = tensor_batches([{"x": x, "flag": np.array(True)}, {"x": x, "flag": np.array(False)}])
    found = calibrator(tmp_path, batches).observe(model, values_of(model, ("doubled_out", "chosen_out")))
    np.testing.assert_array_equal(found["doubled_out"].sample, np.concatenate([2 * x, 2 * x]))
    np.testing.assert_array_equal(found["chosen_out"].sample, np.concatenate([-2 * x, np.maximum(2 * x, 0)]))


def test_an_activation_that_is_not_finite_is_named_with_its_example(tmp_path: Path) -> None:
    builder = GraphBuilder()
    model = builder.finish(builder.add("Log", builder.input("x", ["n", 3]), name="log", shape=["n", 3]))
    good, bad = np.ones((4, 3), np.float32), np.ones((4, 3), np.float32)
    bad[2, 1] = -1.0
    batches = tensor_batches([{"x": good}, {"x": bad}], rows_apart=True)
    with pytest.raises(DataError, match=r"^log_out is nan for example 6 of the calibration data"):
        calibrator(tmp_path, batches).observe(model, values_of(model, ("log_out",)))
    whole = tensor_batches([{"x": good}, {"x": bad}])
    with pytest.raises(DataError, match=r"^log_out is nan for example 1 of the calibration data"):
        calibrator(tmp_path, whole).observe(model, values_of(model, ("log_out",)))
    assert list(tmp_path.glob("*.onnx")) == []


def test_feeds_that_disagree_with_the_graph(tmp_path: Path) -> None:
    model, _ = linear()
    for feeds, text in (
        ({"z": random(1, 2, 8)}, "lacks x, which the model takes"),
        ({"x": random(1, 2, 9)}, r"x is \[2, 9\] in example 0 of the calibration data, and the model takes \[n, 8\]"),
        ({"x": random(1, 2, 8).astype(np.float64)}, "x is float64"),
    ):
        with pytest.raises(DataError, match=text):
            calibrator(tmp_path, tensor_batches([feeds])).observe(model, values_of(model, ("y_out",)))


def test_ids_beyond_the_table(encoder: ir.Model, tmp_path: Path) -> None:
    rows = [*sentences(), np.array([1, 2, 600, 4])]
    with pytest.raises(DataError, match=r"^the model cannot run examples? .* of the calibration data: .*600") as caught:
        calibrator(tmp_path, unpadded(rows)).observe(encoder, values_of(encoder))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.glob("*.onnx")) == []


def test_a_last_axis_that_varies_with_sizes_that_look_alike(tmp_path: Path) -> None:
    builder = GraphBuilder()
    model = builder.finish(builder.add("Relu", builder.input("x", ["n", "k"]), name="y", shape=["n", "k"]))
    feeds = [{"x": random(1, 2, 6)}, {"x": random(1, 3, 4)}, {"x": random(1, 2, 6)}]
    with pytest.raises(DataError, match=r"^y_out has 4 channels, and 6 before: example 1 of the calibration data"):
        calibrator(tmp_path, tensor_batches(feeds)).observe(model, values_of(model, ("y_out",)))


def test_what_cannot_be_observed(encoder: ir.Model, tmp_path: Path) -> None:
    lent = calibrator(tmp_path, unpadded())
    (ids,) = values_of(encoder, ("input_ids",))
    with pytest.raises(ValueError, match="'input_ids' holds INT64"):
        lent.observe(encoder, [ids])
    other = Encoder(layers=1).build()
    with pytest.raises(ValueError, match="is no named value of the main graph"):
        lent.observe(encoder, values_of(other, ("pool.mean",)))
    with pytest.raises(ValueError, match="is no named value of the main graph"):
        lent.observe(encoder, [encoder.graph.initializers["words.weight"]])


def test_progress_is_told(encoder: ir.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, float]] = []
    lent = calibrator(tmp_path, unpadded(), announce=lambda text, share: told.append((text, share)))
    monkeypatch.setattr(module, "plan", lambda *_: (Group((0,), 1), Group((1, 2, 3, 4), 1)))
    lent.observe(encoder, values_of(encoder))
    shares = [share for _, share in told]
    assert {text for text, _ in told} == {"calibrating"}
    assert shares == sorted(shares)
    assert shares[0] == 0.0
    assert 0.5 in shares
    assert max(shares) < 1.0
