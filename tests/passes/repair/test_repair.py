"""repair: what changes, the numbers of a float64 oracle, what is left, refusals, a second run."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from encoder_graphs import FLOAT, Array, Builder, Encoder, feeds, relative, run
from lent_moments import lent, shown

from artifacts.target import CPU
from passes.affine import matrix_of, put_matrix
from passes.base import Context, Effect, Pass, Purpose
from passes.grammar import check, signature
from passes.pipeline import Pipeline
from passes.quantize.linear import Selection
from passes.repair import Repair
from passes.repair.targets import find_targets, levels
from passes.sites import linear_sites

DATA = feeds(batch=8, length=40)
LAST = ("encoder.layer.{}.dense", "encoder.layer.{}.output")


def context(original: ir.Model | None, data: dict[str, Array] | None = None) -> Context:
    return Context(CPU, moments=lent(DATA if data is None else data), original=original)


def halved(model: ir.Model, *, share: float = 0.5, zeros: bool = True) -> ir.Model:
    """The smaller half of every weight is gone; or noise as large is added."""
    rng = np.random.default_rng(1)
    for site in linear_sites(model):
        weight = matrix_of(site)
        small = np.abs(weight) < np.quantile(np.abs(weight), share)
        noise = rng.permutation(np.where(small, weight, 0.0).ravel()).reshape(weight.shape)
        put_matrix(site, np.where(small, 0.0, weight).astype(np.float32) if zeros else weight + noise)
    return model


def weights(model: ir.Model) -> dict[str, Array]:
    return {site.path: matrix_of(site).copy() for site in linear_sites(model)}


def bytes_of(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString(deterministic=True)


def test_it_is_a_pass() -> None:
    assert isinstance(Repair(), Pass)
    assert (Repair.name, Repair.effect, Repair.purpose) == ("repair", Effect.LOSSY, Purpose.FORM)


@pytest.mark.parametrize("zeros", [True, False])
def test_the_last_maps_of_blocks_change_and_nothing_else(zeros: bool) -> None:
    original, model = Encoder().build(), halved(Encoder().build(), zeros=zeros)
    before, form, kept = weights(model), signature(model), bytes_of(original)
    outcome = Repair().run(model, context(original))
    check(model, CPU)
    assert (outcome.changed, outcome.refused) == (4, ())
    assert signature(model) == form
    assert bytes_of(original) == kept
    changed = {path for path, weight in weights(model).items() if not np.array_equal(weight, before[path])}
    assert changed == {path.format(layer) for layer in range(2) for path in LAST}
    if zeros:
        assert all((weight[before[path] == 0.0] == 0.0).all() for path, weight in weights(model).items())


@pytest.mark.parametrize(("zeros", "most"), [(True, 0.75), (False, 0.6)])
def test_the_output_comes_nearer_to_the_original_on_other_data(zeros: bool, most: float) -> None:
    original, model = Encoder().build(), halved(Encoder().build(), zeros=zeros)
    other = feeds(batch=8, length=40, seed=9)
    expected = run(original, other)
    before = relative(run(model, other), expected)
    Repair().run(model, context(original, feeds(batch=32, length=40)))
    assert relative(run(model, other), expected) < most * before


def block(*, bias: bool = True, weight_seed: int = 0) -> ir.Model:
    """y = x + relu(x @ up) @ down (+ b)."""
    rng = np.random.default_rng(weight_seed)
    graph = Builder()
    x = graph.input("x", FLOAT, ["n", 32])
    up = graph.constant("up", np.random.default_rng(5).normal(size=(32, 48)).astype(np.float32))
    hidden = graph.add("Relu", graph.add("MatMul", x, up, name="wide"), name="hidden")
    down = graph.constant("down", rng.normal(size=(48, 32)).astype(np.float32))
    made = graph.add("MatMul", hidden, down, name="product", path="block/block.down")
    if bias:
        made = graph.add("Add", made, graph.constant("b", rng.normal(size=32).astype(np.float32)), name="made")
    return graph.model(graph.add("Add", made, x, name="y"), shape=["n", 32])


ROWS = {"x": np.random.default_rng(8).normal(size=(300, 32)).astype(np.float32)}


@pytest.mark.parametrize("bias", [True, False])
def test_the_numbers_are_those_of_ridge_regression(bias: bool) -> None:
    original, model = block(bias=bias), block(bias=bias, weight_seed=1)
    now = matrix_of(linear_sites(model)[1]).astype(np.float64)
    seen = {name: array.astype(np.float64) for name, array in shown(model, ("hidden", "y"), ROWS).items()}
    rest = shown(original, ("y",), ROWS)["y"].astype(np.float64) - seen["y"]
    assert Repair(damping=0.02).run(model, context(original, ROWS)).changed == 1
    h, r = (seen["hidden"] - seen["hidden"].mean(0), rest - rest.mean(0)) if bias else (seen["hidden"], rest)
    second = h.T @ h / len(h)
    change = np.linalg.solve(second + 0.02 * np.trace(second) / 48 * np.eye(48), h.T @ r / len(h))
    # Half a step of float32 in the weight, and what is wrong is seen with the rounding of 48 products of size 10.
    bound = 2.0**-23 * np.abs(now + change).max() + 48 * 2.0**-24 * 10 * np.linalg.norm(np.linalg.inv(second), 2) ** 0.5
    np.testing.assert_allclose(matrix_of(linear_sites(model)[1]), now + change, rtol=0, atol=bound)
    if bias:
        tensor = model.graph.initializers["b"].const_value
        old = block(bias=True, weight_seed=1).graph.initializers["b"].const_value
        assert tensor is not None
        assert old is not None
        expected = old.numpy() + rest.mean(0) - seen["hidden"].mean(0) @ change
        np.testing.assert_allclose(tensor.numpy(), expected, rtol=0, atol=48 * bound)


def test_maps_are_fitted_one_after_the_other() -> None:
    original, model = Encoder(layers=3).build(), halved(Encoder(layers=3).build())
    targets, refused = find_targets(model, original, Selection((), ()))
    assert refused == []
    order = [[target.site.path for target in group] for group in levels(model, targets)]
    assert order == [[path.format(layer)] for layer in range(3) for path in LAST]
    assert [(target.wanted, target.less) for target in targets][1] == (
        "encoder.layer.0.output.sum",
        "encoder.layer.0.norm",
    )


def beside() -> ir.Model:
    """y = x + x @ a + x @ c: two maps side by side, the sum of whose outputs is added last."""
    graph = Builder()
    x = graph.input("x", FLOAT, ["n", 32])
    rng = np.random.default_rng(0)
    first, second = (graph.constant(name, rng.normal(size=(32, 32)).astype(np.float32)) for name in "ac")
    one = graph.add("MatMul", x, first, name="one", path="attention/attention.out")
    other = graph.add("MatMul", x, second, name="other", path="mlp/mlp.down")
    return graph.model(graph.add("Add", graph.add("Add", one, other, name="both"), x, name="y"), shape=["n", 32])


def test_maps_side_by_side_are_each_fitted_to_their_own_output() -> None:
    targets, _ = find_targets(beside(), beside(), Selection((), ()))
    assert [(target.wanted, target.less) for target in targets] == [("one", ""), ("other", "")]
    (group,) = levels(beside_model := beside(), find_targets(beside_model, beside(), Selection((), ()))[0])
    assert len(group) == 2


def one_after_another() -> ir.Model:
    """y = (x + x @ a) + x @ c."""
    graph = Builder()
    x = graph.input("x", FLOAT, ["n", 32])
    rng = np.random.default_rng(0)
    first, second = (graph.constant(name, rng.normal(size=(32, 32)).astype(np.float32)) for name in "ac")
    other = graph.add("MatMul", x, second, name="other", path="mlp/mlp.down")
    stream = graph.add("Add", graph.add("MatMul", x, first, name="one", path="attention/attention.out"), x, name="s")
    return graph.model(graph.add("Add", stream, other, name="y"), shape=["n", 32])


def test_a_map_waits_for_those_that_write_to_its_stream() -> None:
    model = one_after_another()
    targets, _ = find_targets(model, one_after_another(), Selection((), ()))
    order = [[target.site.path for target in group] for group in levels(model, targets)]
    assert order == [["attention.out"], ["mlp.down"]]


def test_the_second_of_two_factors_changes() -> None:
    original, model = block(), block()
    site = linear_sites(model)[1]
    u, s, v = np.linalg.svd(matrix_of(site), full_matrices=False)
    graph = model.graph
    values = []
    for name, array in (("u", u[:, :20] * s[:20]), ("v", v[:20])):
        value = ir.Value(
            name=name, const_value=ir.tensor(array.astype(np.float32), name=name), shape=ir.Shape(array.shape)
        )
        value.dtype = FLOAT
        graph.register_initializer(value)
        values.append(value)
    inner = ir.Value(name="inner", type=ir.TensorType(FLOAT))
    node = ir.node("MatMul", [site.input, values[0]], outputs=[inner], name="first")
    node.metadata_props.update(site.node.metadata_props)
    graph.insert_before(site.node, node)
    site.node.replace_input_with(0, inner)
    site.node.replace_input_with(1, values[1])
    first = matrix_of(linear_sites(model)[1]).copy()
    before = relative(run(model, ROWS), run(original, ROWS))
    assert Repair().run(model, context(original, ROWS)).changed == 1
    np.testing.assert_array_equal(matrix_of(linear_sites(model)[1]), first)
    assert relative(run(model, ROWS), run(original, ROWS)) < before


def test_a_narrower_map_is_fitted_to_the_same_output() -> None:
    original, model = block(), block()
    for name, axis in (("up", 1), ("down", 0)):
        value = model.graph.initializers[name]
        assert value.const_value is not None
        array = np.take(value.const_value.numpy(), np.arange(36), axis)
        value.const_value, value.shape = ir.tensor(array, name=name), ir.Shape(array.shape)
    before = relative(run(model, ROWS), run(original, ROWS))
    assert Repair().run(model, context(original, ROWS)).changed == 1
    assert relative(run(model, ROWS), run(original, ROWS)) < 0.8 * before


def test_a_weight_that_others_read_stays_and_the_bias_changes() -> None:
    def twice(seed: int) -> ir.Model:
        model = block(weight_seed=seed)
        graph = model.graph
        hidden = linear_sites(model)[1].input
        also = ir.Value(name="also", type=ir.TensorType(FLOAT), shape=ir.Shape(["n", 32]))
        graph.append(ir.node("MatMul", [hidden, graph.initializers["down"]], outputs=[also], name="other"))
        graph.outputs.append(also)
        return model

    original, model = twice(0), twice(1)
    down = matrix_of(linear_sites(model)[1]).copy()
    assert Repair().run(model, context(original, ROWS)).changed == 1
    np.testing.assert_array_equal(matrix_of(linear_sites(model)[1]), down)
    rest = shown(original, ("y",), ROWS)["y"] - shown(model, ("y",), ROWS)["y"]
    np.testing.assert_allclose(rest.mean(0), 0.0, atol=48 * 2.0**-24 * 100)


def test_only_names_any_linear_operator() -> None:
    original, model = Encoder().build(), halved(Encoder().build())
    before = weights(model)
    assert Repair(only=("*.query",), skip=("*.1.query",)).run(model, context(original)).changed == 1
    changed = {path for path, weight in weights(model).items() if not np.array_equal(weight, before[path])}
    assert changed == {"encoder.layer.0.query"}


def test_a_second_run_changes_nothing() -> None:
    original, model = Encoder().build(), halved(Encoder().build())
    assert Repair().run(model, context(original)).changed == 4
    before = bytes_of(model)
    assert Repair().run(model, context(original)).changed == 0
    assert bytes_of(model) == before


def test_what_changes_after_a_repair_is_repaired_again() -> None:
    original, model = Encoder().build(), halved(Encoder().build())
    assert Repair().run(model, context(original)).changed == 4
    halved(model, share=0.8)
    assert Repair().run(model, context(original)).changed == 4


def test_a_graph_that_is_as_it_was_is_left() -> None:
    outcome = Repair().run(Encoder().build(), context(Encoder().build()))
    assert (outcome.changed, outcome.refused) == (0, ())


def test_without_data_or_original_it_is_refused() -> None:
    model = halved(Encoder().build())
    for given in (Context(CPU), Context(CPU, original=Encoder().build()), Context(CPU, moments=lent(DATA))):
        outcome = Repair().run(model, given)
        assert outcome.changed == 0
        assert len(outcome.refused) == 1
        assert outcome.refused[0].remedy


def test_maps_that_the_original_does_not_have_are_refused() -> None:
    model = halved(block(), share=0.5)
    node = linear_sites(model)[1].node
    node.outputs[0].name, node.name = "elsewhere", "elsewhere"
    node.metadata_props.clear()
    outcome = Repair().run(model, context(block(), ROWS))
    assert outcome.changed == 0
    assert [refusal.reason for refusal in outcome.refused] == ["the graph before compression has no such operator"]


def test_an_original_that_takes_other_inputs_is_refused() -> None:
    original = block()
    original.graph.inputs[0].name = "z"
    outcome = Repair().run(halved(block()), context(original, ROWS))
    assert [refusal.reason for refusal in outcome.refused] == ["the original takes another z"]


def test_few_rows_are_told() -> None:
    few = {"x": ROWS["x"][:20]}
    outcome = Repair().run(halved(block()), context(block(), few))
    assert outcome.changed == 1
    assert [refusal.reason for refusal in outcome.refused] == [
        "only 20 rows of calibration data for 48 channels: damping holds the rest"
    ]


def test_a_graph_without_blocks_says_so() -> None:
    graph = Builder()
    x = graph.input("x", FLOAT, ["n", 32])
    weight = graph.constant("w", np.ones((32, 32), np.float32))
    model = graph.model(graph.add("MatMul", x, weight, name="y"), shape=["n", 32])
    outcome = Repair().run(model, context(model.clone(), ROWS))
    assert [refusal.reason for refusal in outcome.refused] == ["no linear operator writes to a residual stream"]


def test_the_text_form_reads_back() -> None:
    pipeline = Pipeline((Repair(0.05, skip=("a",)),))
    assert str(pipeline) == "repair(damping=0.05, skip=[a])"


@pytest.mark.parametrize("damping", [0.0, -1.0, 1.5])
def test_impossible_options_are_errors(damping: float) -> None:
    with pytest.raises(ValueError, match=f"damping is {damping}"):
        Repair(damping)
