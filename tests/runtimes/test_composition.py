"""What an embedding owes to the texts it is batched with: nothing but rounding, except for dynamic int8."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from task_builders import VOCABULARY
from task_graphs import Graph, write_bundle

from artifacts.manifest import TensorSpec
from runtimes.load import load

WIDTH, HIDDEN = 16, 32
LONGEST = 128
RANGE = 4.0
"""Largest magnitude of an activation that the static scales expect."""
U = 2.0**-24

Array = NDArray[np.generic]
WORDS = [word for word in VOCABULARY if word.isalpha()]


def weights() -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(7)
    return {
        "table": rng.normal(size=(len(VOCABULARY), WIDTH)).astype(np.float32),
        "w1": (rng.normal(size=(WIDTH, HIDDEN)) / np.sqrt(WIDTH)).astype(np.float32),
        "w2": (rng.normal(size=(HIDDEN, WIDTH)) / np.sqrt(HIDDEN)).astype(np.float32),
    }


@dataclass
class Nodes:
    """A graph in the making."""

    nodes: list[onnx.NodeProto]
    constants: dict[str, Array]

    def add(self, op: str, *inputs: str, out: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(op, list(inputs), [out], **attributes))
        return out

    def constant(self, name: str, value: object) -> str:
        self.constants[name] = np.asarray(value)
        return name


def int8(graph: Nodes, weight: str) -> tuple[str, str]:
    """Names of the weight in int8 and of its scale."""
    array = weights()[weight]
    scale = np.float32(np.abs(array).max() / 127)
    quantized = np.rint(array / scale).astype(np.int8)
    return graph.constant(f"{weight}_q", quantized), graph.constant(f"{weight}_s", scale)


def fp32(graph: Nodes, x: str, weight: str) -> str:
    return graph.add("MatMul", x, graph.constant(weight, weights()[weight]), out=f"{weight}_out")


def static_int8(graph: Nodes, x: str, weight: str) -> str:
    w, w_scale = int8(graph, weight)
    scale, zero = graph.constant("x_s", np.float32(RANGE / 127)), graph.constant("x_z", np.int8(0))
    graph.add("QuantizeLinear", x, scale, zero, out=f"{weight}_xq")
    graph.add("DequantizeLinear", f"{weight}_xq", scale, zero, out=f"{weight}_xd")
    graph.add("DequantizeLinear", w, w_scale, out=f"{weight}_d")
    return graph.add("MatMul", f"{weight}_xd", f"{weight}_d", out=f"{weight}_out")


def dynamic_int8(graph: Nodes, x: str, weight: str) -> str:
    w, w_scale = int8(graph, weight)
    names = [f"{weight}_x{part}" for part in "qsz"]
    graph.nodes.append(helper.make_node("DynamicQuantizeLinear", [x], names))
    graph.add("MatMulInteger", names[0], w, names[2], out=f"{weight}_i")
    graph.add("Cast", f"{weight}_i", out=f"{weight}_f", to=TensorProto.FLOAT)
    graph.add("Mul", names[1], w_scale, out=f"{weight}_t")
    return graph.add("Mul", f"{weight}_f", f"{weight}_t", out=f"{weight}_out")


Product = Callable[[Nodes, str, str], str]


def encoder(product: Product) -> Graph:
    """One attention over the attended tokens, two products, the mean: sentence_embedding [n, 16]."""
    graph = Nodes([], {"table": weights()["table"]})
    add = graph.add
    add("Gather", "table", "input_ids", out="x")
    add("Cast", "attention_mask", out="mask", to=TensorProto.FLOAT)
    add("Transpose", "x", out="xt", perm=[0, 2, 1])
    add("MatMul", "x", "xt", out="raw")
    add("Mul", "raw", graph.constant("quarter", np.float32(0.25)), out="scores")
    add("Sub", "mask", graph.constant("one", np.float32(1)), out="negative")
    add("Mul", "negative", graph.constant("large", np.float32(1e4)), out="bias")
    add("Unsqueeze", "bias", graph.constant("axis1", np.array([1])), out="bias3")
    add("Add", "scores", "bias3", out="masked")
    add("Softmax", "masked", out="attention", axis=-1)
    add("MatMul", "attention", "x", out="context")
    hidden = add("Tanh", product(graph, "context", "w1"), out="hidden")
    out = product(graph, hidden, "w2")
    add("Unsqueeze", "mask", graph.constant("axis2", np.array([2])), out="weights")
    add("Mul", out, "weights", out="kept")
    add("ReduceSum", "kept", "axis1", out="total", keepdims=0)
    add("ReduceSum", "weights", "axis1", out="count", keepdims=0)
    add("Div", "total", "count", out="sentence_embedding")
    names = ("input_ids", "attention_mask")
    inputs = tuple(TensorSpec(name, "int64", ("batch", "length")) for name in names)
    outputs = (TensorSpec("sentence_embedding", "float32", ("batch", WIDTH)),)
    proto = helper.make_graph(
        graph.nodes,
        "encoder",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"]) for name in names],
        [helper.make_tensor_value_info("sentence_embedding", TensorProto.FLOAT, ["batch", WIDTH])],
        [numpy_helper.from_array(array, name) for name, array in graph.constants.items()],
    )
    model = helper.make_model(proto, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    def oracle(feeds: Mapping[str, Array]) -> dict[str, Array]:
        return dict(zip(["sentence_embedding"], session.run(None, dict(feeds)), strict=True))

    return Graph(model, inputs, outputs, oracle)


def texts() -> list[str]:
    rng = np.random.default_rng(11)
    lengths = [*rng.integers(1, 30, 60), *rng.integers(30, LONGEST, 12), 1, LONGEST]
    return [" ".join(rng.choice(WORDS, size)) for size in lengths]


def compositions(folder: Path) -> dict[str, NDArray[np.float32]]:
    """Vectors of the texts, each batched in another company; [texts, 16] each."""
    given = texts()
    order = np.random.default_rng(13).permutation(len(given))
    found: dict[str, NDArray[np.float32]] = {}
    with load(folder, lanes=1, threads=1, cache=False) as model:
        found["alone"] = np.concatenate([model.embed([text]) for text in given])
        for tokens in (64, 512, 4096):
            found[f"{tokens} tokens"] = model.embed(given, max_tokens=tokens)
        shuffled = np.empty_like(found["alone"])
        shuffled[order] = np.stack(list(model.embed_iter([given[i] for i in order], max_tokens=256)))
        found["shuffled"] = shuffled
    with load(folder, lanes=2, threads=2, cache=False) as model:
        others = [f"{text} {number}" for number in range(3) for text in given]
        found["in lanes"] = model.embed([*given, *others], max_tokens=64)[: len(given)]
        assert "2 lanes are open" in model.explain()
    return found


def largest_difference(found: Mapping[str, NDArray[np.float32]]) -> float:
    return max(float(np.abs(one - found["alone"]).max()) for one in found.values())


def rounding() -> float:
    """What another order of float32 sums changes: errors of a sum of n terms add up as the root of n; four times that.

    Scores are sums of 16 products and reach the softmax as its relative error; it sums up to 128 terms, the mean too.
    """
    table = weights()["table"]
    largest_score = 0.25 * (table**2).sum(axis=1).max()
    error = np.sqrt(WIDTH) * largest_score + 2 * np.sqrt(LONGEST) + np.sqrt(WIDTH) + np.sqrt(HIDDEN)
    return float(4 * error * U * np.abs(table).max())


def test_float32_changes_by_rounding(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", "feature-extraction", encoder(fp32))
    found = compositions(tmp_path / "b")
    assert largest_difference(found) <= rounding()
    assert rounding() < 1e-4 * np.abs(found["alone"]).max()


def test_static_int8_changes_by_a_step_at_most(tmp_path: Path) -> None:
    """Scales are constants: a value is rounded the same way in any company, unless it lies on the edge of a step."""
    write_bundle(tmp_path / "b", "feature-extraction", encoder(static_int8))
    found = compositions(tmp_path / "b")
    w1, w2 = weights()["w1"], weights()["w2"]
    step = RANGE / 127
    # One activation before each product falls to the other side of its edge, in a third of the tokens of a text: the
    # shortest has [CLS], a word and [SEP].
    flip = step * (np.abs(w1) @ np.abs(w2)).max() + step * np.abs(w2).max()
    assert largest_difference(found) <= flip / 3 + rounding()
    differences = [np.abs(one - found["alone"]).max(axis=1) for one in found.values()]
    assert np.quantile(differences, 0.95) <= rounding()  # and such an edge is rarely met


def test_dynamic_int8_depends_on_its_company_within_its_steps(tmp_path: Path) -> None:
    """The scale is that of the whole batch: each activation is rounded to a step of its batch's range."""
    write_bundle(tmp_path / "b", "feature-extraction", encoder(dynamic_int8))
    found = compositions(tmp_path / "b")
    w1, w2 = weights()["w1"], weights()["w2"]
    # Rounding errors are uniform in a step, independent: variances add over a product. Two compositions differ by two.
    first, second = 2 * np.abs(weights()["table"]).max() / 255, 2 * 1.0 / 255
    inner = np.sqrt(2 / 12) * first * np.linalg.norm(w1, axis=0)
    outer = np.sqrt((inner**2) @ (w2**2) + 2 / 12 * second**2 * (w2**2).sum(axis=0))
    assert largest_difference(found) <= 5 * outer.max()
    # And it does depend: what the documentation says of it is no caution too many.
    assert largest_difference(found) > 10 * rounding()
    cosines = [
        (one * found["alone"]).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(found["alone"], axis=1)
        for one in found.values()
    ]
    assert np.min(cosines) > 0.99


@pytest.mark.parametrize("product", [fp32, static_int8, dynamic_int8])
def test_the_same_company_gives_the_same_numbers(tmp_path: Path, product: Product) -> None:
    write_bundle(tmp_path / "b", "feature-extraction", encoder(product))
    with load(tmp_path / "b", threads=1, cache=False) as model:
        np.testing.assert_array_equal(model.embed(texts()), model.embed(texts()))
