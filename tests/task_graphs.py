"""Small real graphs and bundles for the tests of tasks, loading and benchmarking."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from task_builders import VOCABULARY, processor, wordpiece

from artifacts.bundle import Bundle, BundleWriter
from artifacts.manifest import Manifest, SessionOptions, Source, TensorSpec, TextProcessor, Variant
from artifacts.proof import Proof, VariantProof

WIDTH = 8
CLASSES = 3
TYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
RNG_SEED = 7
Array = NDArray[np.generic]


@dataclass(frozen=True)
class Graph:
    """A model with what a manifest says of it, and the same computation in numpy."""

    model: onnx.ModelProto
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    oracle: Callable[[Mapping[str, Array]], dict[str, Array]]


def _weights() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    rng = np.random.default_rng(RNG_SEED)
    table = rng.normal(size=(len(VOCABULARY), WIDTH)).astype(np.float32)
    return table, rng.normal(size=(WIDTH, CLASSES)).astype(np.float32)


def _graph(
    nodes: Sequence[onnx.NodeProto],
    outputs: Sequence[TensorSpec],
    weights: Mapping[str, Array],
    oracle: Callable[[Mapping[str, Array]], dict[str, Array]],
    inputs: Sequence[str] = ("input_ids", "attention_mask"),
) -> Graph:
    specs = tuple(TensorSpec(name, "int64", ("batch", "length")) for name in inputs)

    def value(spec: TensorSpec) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(spec.name, TYPES[spec.dtype], list(spec.shape))

    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(list(nodes), "g", [value(s) for s in specs], [value(s) for s in outputs], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return Graph(model, specs, tuple(outputs), oracle)


_POOL = (
    helper.make_node("Gather", ["table", "input_ids"], ["states"]),
    helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
    helper.make_node("Unsqueeze", ["mask", "last"], ["weights"]),
    helper.make_node("Mul", ["states", "weights"], ["kept"]),
    helper.make_node("ReduceSum", ["kept", "middle"], ["total"], keepdims=0),
    helper.make_node("ReduceSum", ["weights", "middle"], ["count"], keepdims=0),
    helper.make_node("Div", ["total", "count"], ["pooled"]),
)
_AXES = {"last": np.array([2], np.int64), "middle": np.array([1], np.int64)}


def _pooled(feeds: Mapping[str, Array], table: Array) -> Array:
    weights = feeds["attention_mask"][..., None].astype(np.float32)
    return (table[feeds["input_ids"]] * weights).sum(1) / weights.sum(1)


def embedder(name: str = "sentence_embedding", width: int | str = WIDTH) -> Graph:
    """Mean of the token vectors [n, 8], or the token vectors themselves if ``name`` is last_hidden_state."""
    table, _ = _weights()
    if name == "last_hidden_state":
        nodes = [
            helper.make_node("Gather", ["table", "input_ids"], [name]),
            helper.make_node("Identity", ["attention_mask"], ["unused"]),
        ]
        spec = TensorSpec(name, "float32", ("batch", "length", width))
        return _graph(nodes, [spec], {"table": table}, lambda feeds: {name: table[feeds["input_ids"]]})
    nodes = [*_POOL, helper.make_node("Identity", ["pooled"], [name])]
    spec = TensorSpec(name, "float32", ("batch", width))
    return _graph(nodes, [spec], {"table": table, **_AXES}, lambda feeds: {name: _pooled(feeds, table)})


def classifier() -> Graph:
    """Logits [n, 3] of the mean of the token vectors."""
    table, head = _weights()
    nodes = [*_POOL, helper.make_node("MatMul", ["pooled", "head"], ["logits"])]
    spec = TensorSpec("logits", "float32", ("batch", CLASSES))
    weights = {"table": table, "head": head, **_AXES}
    return _graph(nodes, [spec], weights, lambda feeds: {"logits": _pooled(feeds, table) @ head})


def token_head(width: int = CLASSES) -> Graph:
    """Logits [n, s, width] of each token on its own."""
    table, _ = _weights()
    head = np.random.default_rng(1).normal(size=(WIDTH, width)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["states"]),
        helper.make_node("MatMul", ["states", "head"], ["logits"]),
    ]
    spec = TensorSpec("logits", "float32", ("batch", "length", width))
    weights = {"table": table, "head": head}
    return _graph(
        nodes, [spec], weights, lambda feeds: {"logits": table[feeds["input_ids"]] @ head}, inputs=("input_ids",)
    )


def spans() -> Graph:
    """Start and end logits [n, s] of each token on its own: "paris" starts and "city" ends whatever is asked."""
    start = np.zeros(len(VOCABULARY), np.float32)
    end = np.zeros(len(VOCABULARY), np.float32)
    start[VOCABULARY.index("paris")] = 9.0
    end[VOCABULARY.index("city")] = 9.0
    weights = {"start": start, "end": end}
    nodes = [helper.make_node("Gather", [name, "input_ids"], [f"{name}_logits"]) for name in weights]
    specs = [TensorSpec(f"{name}_logits", "float32", ("batch", "length")) for name in weights]
    return _graph(
        nodes,
        specs,
        weights,
        lambda feeds: {f"{name}_logits": array[feeds["input_ids"]] for name, array in weights.items()},
        inputs=("input_ids",),
    )


LABELS = {
    "text-classification": ("bad", "so so", "good"),
    "token-classification": ("O", "B-LOC", "I-LOC"),
}


def write_bundle(
    out: Path,
    task: str,
    graph: Graph,
    *,
    variants: Sequence[str] = ("cpu-fp32",),
    providers: tuple[str, ...] = ("CPUExecutionProvider",),
    text: TextProcessor | None = None,
    golden_error: float = 0.0,
    proofs: Sequence[VariantProof] = (),
) -> Bundle:
    """A bundle of that graph as BundleWriter makes it; ``golden_error`` is added to the golden outputs."""
    chosen = text or processor(labels=LABELS.get(task, ()), mask_token="[MASK]" if task == "fill-mask" else "")
    rng = np.random.default_rng(3)
    feeds: dict[str, Array] = {
        spec.name: np.ones((2, 6), np.int64) if "mask" in spec.name else rng.integers(5, 40, (2, 6))
        for spec in graph.inputs
    }
    outputs = {name: array.astype(np.float32) for name, array in graph.oracle(feeds).items()}
    arrays = {f"input.{name}": array for name, array in feeds.items()}
    arrays |= {f"output.{name}": array + np.float32(golden_error) for name, array in outputs.items()}
    golden = io.BytesIO()
    np.savez(golden, **arrays)
    with BundleWriter(out) as writer:
        for name in variants:
            writer.add_bytes(f"{name}.onnx", graph.model.SerializeToString())
        writer.add_bytes("golden.npz", golden.getvalue())
        writer.add_bytes("plan.toml", b"schema = 1\n")
        if task != "tensors":
            wordpiece(writer.staging.parent / f"{out.name}-tokenizer.json")
            writer.add_file("processor/tokenizer.json", writer.staging.parent / f"{out.name}-tokenizer.json")
        manifest = Manifest(
            name="tiny",
            task=task,
            source=Source("tiny", "onnx", "sha256:" + "0" * 64, ""),
            toolchain=(),
            inputs=graph.inputs,
            outputs=graph.outputs,
            processor=None if task == "tensors" else chosen,
            variants=tuple(
                Variant(name, "cpu", providers, f"{name}.onnx", "fp32", "", SessionOptions(), 1e-4, ())
                for name in variants
            ),
            files=(),
        )
        return writer.commit(manifest, Proof("sha256:" + "0" * 64, tuple(proofs), ()))
