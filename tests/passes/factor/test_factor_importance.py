"""What outputs of linear sites get to, and how much errors of them matter, against errors put in and measured."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from encoder_graphs import DISABLED, FLOAT, Array, Builder, Encoder, feeds, relative, run
from lent_moments import lent, shown

from artifacts.target import CPU
from passes.base import Context
from passes.factor import Factor
from passes.factor.flow import Arrival, Flow
from passes.factor.importance import asked, importances, own_energy
from passes.sites import LinearSite, linear_sites

RNG = np.random.default_rng(23)
WIDTH, HIDDEN = 24, 40
X = RNG.normal(size=(500, WIDTH)).astype(np.float32)


def sites_of(model: ir.Model) -> dict[str, LinearSite]:
    return {site.path: site for site in linear_sites(model)}


def only(arrivals: tuple[Arrival, ...]) -> Arrival:
    (one,) = arrivals
    return one


def block(gate: bool) -> Builder:
    """``x + down(act(up(x)))``, or with a gate ``x + down(sigmoid(gate(x)) * up(x))``."""
    graph, rng = Builder(), np.random.default_rng(4)
    x = graph.input("x", FLOAT, ["m", WIDTH])

    def linear(value: ir.Value, path: str, rows: int, columns: int) -> ir.Value:
        weight = (rng.normal(size=(rows, columns)) * np.geomspace(0.05, 1, rows)[:, None]).astype(np.float32)
        return graph.add("MatMul", value, graph.constant(f"{path}.w", weight), name=path, path=f"mlp/mlp.{path}")

    up = linear(x, "up", WIDTH, HIDDEN)
    if gate:
        open_ = graph.add("Sigmoid", linear(x, "gate", WIDTH, HIDDEN), name="open")
        inner = graph.add("Mul", open_, up, name="inner")
    else:
        biased = graph.add("Add", up, graph.constant("up.b", rng.normal(size=HIDDEN).astype(np.float32)), name="biased")
        inner = graph.add("Relu", biased, name="inner")
    down = linear(inner, "down", HIDDEN, WIDTH)
    down.shape = ir.Shape(["m", WIDTH])
    graph.add("Add", x, down, name="y")
    return graph


def block_model(gate: bool = False) -> ir.Model:
    graph = block(gate)
    (last,) = [node.outputs[0] for node in graph.graph if node.outputs[0].name == "y"]
    return graph.model(last, shape=["m", WIDTH])


def test_through_an_encoder():
    model = Encoder(layers=1).build()
    for value in (value for node in model.graph for value in node.outputs):
        # What infer-shapes would say of hidden states.
        if value.name and value.name.endswith(("dense", "output", "norm", "sum")):
            value.shape = ir.Shape(["batch", "sequence", 64])
    flow, sites = Flow(model), sites_of(model)
    at = {name.rsplit(".", 1)[1]: flow.arrivals(site) for name, site in sites.items()}
    for part in ("query", "key", "value"):
        # A mask is added to the scores on the way, and repeated for it.
        assert only(at[part]).site.node is sites["encoder.layer.0.dense"].node
        assert only(at[part]).channels is None
    assert only(at["dense"]).site is None
    assert only(at["dense"]).total.name == "encoder.layer.0.sum"
    inner = only(at["intermediate"])
    assert inner.site.node is sites["encoder.layer.0.output"].node
    np.testing.assert_array_equal(inner.channels, np.arange(128))
    assert only(at["output"]).total.name == "encoder.layer.0.output.sum"
    closure = flow.closure([sites["encoder.layer.0.query"]])
    assert [site.path.rsplit(".", 1)[1] for site in closure] == ["query", "dense"]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_values_of_attention_keep_their_channels(groups: int):
    graph, heads, width = Builder(), 4, 8
    x = graph.input("x", FLOAT, ["b", "l", 16])
    parts = [
        graph.add(
            "MatMul", x, graph.constant(f"w{part}", np.ones((16, size), np.float32)), name=part, path=f"a/a.{part}"
        )
        for part, size in (("q", heads * width), ("k", groups * width), ("v", groups * width))
    ]
    attended = graph.add(
        *("GroupQueryAttention", *parts), name="o", domain="com.microsoft", num_heads=heads, kv_num_heads=groups
    )
    last = graph.constant("wo", np.ones((heads * width, 16), np.float32))
    model = graph.model(graph.add("MatMul", attended, last, name="out", path="a/a.o"), shape=["b", "l", 16])
    flow, sites = Flow(model), sites_of(model)
    expected = [head // (heads // groups) * width + place for head in range(heads) for place in range(width)]
    assert only(flow.arrivals(sites["a.v"])).channels.tolist() == expected
    assert only(flow.arrivals(sites["a.q"])).channels is None
    assert only(flow.arrivals(sites["a.k"])).site.node is sites["a.o"].node
    out = only(flow.arrivals(sites["a.o"]))
    assert (out.site, out.total, out.part) == (None, None, model.graph.outputs[0])


def test_a_sum_of_what_one_value_became_is_no_stream():
    """As in rotary embeddings."""
    graph = Builder()
    x = graph.input("x", FLOAT, ["m", WIDTH])
    q = graph.add("MatMul", x, graph.constant("w", np.eye(WIDTH, dtype=np.float32)), name="q")
    turned = graph.add("Add", graph.add("Sin", q, name="sin"), graph.add("Cos", q, name="cos"), name="turned")
    for value in (node.outputs[0] for node in graph.graph):
        value.shape = ir.Shape(["m", WIDTH])
    model = graph.model(graph.add("Add", turned, x, name="y"), shape=["m", WIDTH])
    arrival = only(Flow(model).arrivals(*linear_sites(model)))
    assert (arrival.total.name, arrival.part.name, arrival.channels) == ("y", "turned", None)


def measured(model: ir.Model, name: str, channels: int, source: str) -> Array:
    """What an error of energy 1 of each channel of a value does to y, in parts of y's energy, to first order."""
    before = run(model, {"x": X}, DISABLED).astype(np.float64)
    found, size = np.zeros(channels), 1e-2
    for channel in range(channels):
        copy = model.clone()
        node = next(node for node in copy.graph if node.outputs[0].name == name)
        noise = np.zeros((len(X), channels), np.float32)
        noise[:, channel] = size * RNG.choice([-1.0, 1.0], len(X))
        added = ir.Value(name="noise", const_value=ir.tensor(noise, name="noise"), shape=ir.Shape(noise.shape))
        added.dtype = FLOAT
        copy.graph.register_initializer(added)
        noisy = ir.node("Add", [node.outputs[0], added], name="noisy")
        noisy.outputs[0].name = "noisy"
        node.outputs[0].replace_all_uses_with(noisy.outputs[0])
        noisy.replace_input_with(0, node.outputs[0])
        copy.graph.insert_after(node, noisy)
        found[channel] = np.square(run(copy, {"x": X}, DISABLED) - before).sum() / np.square(before).sum() / size**2
    return found


@pytest.mark.parametrize(
    ("gate", "name", "path", "tolerance"),
    # A product's error is foretold but for the sample; that of what a gate multiplies as far as both are independent;
    # that of a ReLU by the variance that goes through it, which is not how often it is open.
    [(False, "down", "mlp.down", 1e-3), (True, "up", "mlp.up", 0.35), (False, "up", "mlp.up", 2.0)],
)
def test_importances_are_those_of_errors_put_in(gate: bool, name: str, path: str, tolerance: float):
    model = block_model(gate)
    sites = list(linear_sites(model))
    closure = Flow(model).closure(sites)
    seen = lent({"x": X})(model, asked(closure))
    found = importances(closure, seen, each=True)[sites_of(model)[path].node]
    expected = measured(model, name, len(found), path)
    assert found.shape == expected.shape
    ratio = np.log(found / expected)
    assert np.abs(ratio).max() < tolerance
    assert np.log(expected).std() > 2 * ratio.std() or tolerance < 0.01
    mean = importances(closure, seen, each=False)[sites_of(model)[path].node]
    outputs = shown(model, [name], {"x": X})[name].astype(np.float64).var(axis=0)
    if name == "down":
        np.testing.assert_allclose(mean, (outputs @ found) / outputs.sum(), rtol=1e-5)


def test_only_what_is_read_is_asked_for():
    model = block_model(gate=True)
    sites = sites_of(model)
    closure = Flow(model).closure([sites["mlp.gate"]])
    assert [site.path for site in closure] == ["mlp.gate", "mlp.down"]
    assert [value.name for value in asked(closure)] == ["x", "inner", "y"]


def test_without_data_it_is_the_energy_of_the_weight():
    site, *_ = linear_sites(block_model())
    weight = site.weight.const_value.numpy().astype(np.float64)
    np.testing.assert_allclose(own_energy(site), np.full(HIDDEN, 1 / np.square(weight).sum()), rtol=1e-12)


def test_an_output_that_nobody_hears_may_go_first():
    """Rows of ``down`` are of very different size: ``up`` loses less where it keeps what they read."""
    model = block_model()
    before, errors = run(model, {"x": X}), {}
    for method in ("whitened", "weighted"):
        made = model.clone()
        outcome = Factor(rank=8, method=method, only=("*.up",)).run(made, Context(CPU, moments=lent({"x": X})))
        assert outcome.changed == 1
        errors[method] = relative(run(made, {"x": X}), before)
    assert errors["weighted"] < 0.75 * errors["whitened"]


def test_norms_that_add_are_sums_too():
    model = Encoder(layers=2, fused=True).build()
    flow, sites = Flow(model), sites_of(model)
    dense = only(flow.arrivals(sites["encoder.layer.0.dense"]))
    assert (dense.total.name, dense.part.name) == ("embeddings.norm", "encoder.layer.0.dense")
    assert [site.path for site in flow.closure([sites["encoder.layer.0.value"]])] == [
        "encoder.layer.0.value",
        "encoder.layer.0.dense",
    ]


def test_a_graph_without_shapes_is_no_harm():
    model = Encoder(layers=2).build()
    outcome = Factor(0.7, multiple=4).run(model, Context(CPU, moments=lent(feeds(8, 16))))
    assert outcome.changed > 0
