"""Small encoders as onnx_ir graphs, fused and unfused, and real sessions to run them in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

Array = NDArray[np.generic]
FLOAT, INT64, INT32, BOOL = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL
SCOPES = "pkg.torch.onnx.name_scopes"
DISABLED = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
ALL = ort.GraphOptimizationLevel.ORT_ENABLE_ALL


class Builder:
    """Puts nodes into a graph one after the other; names and types as an exporter leaves them."""

    def __init__(self, opset: int = 21) -> None:
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": opset, "com.microsoft": 1}, name="test")

    def input(self, name: str, dtype: ir.DataType, shape: list[int | str]) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.graph.inputs.append(value)
        return value

    def constant(self, name: str, array: Array) -> ir.Value:
        if name not in self.graph.initializers:
            value = ir.Value(name=name, const_value=ir.tensor(array, name=name), shape=ir.Shape(array.shape))
            value.dtype = ir.DataType.from_numpy(array.dtype)
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def floats(self, name: str, *numbers: float) -> ir.Value:
        return self.constant(name, np.array(numbers[0] if len(numbers) == 1 else numbers, np.float32))

    def ints(self, *numbers: int) -> ir.Value:
        return self.constant("ints_" + "_".join(map(str, numbers)), np.array(numbers, np.int64))

    def add(
        self,
        op: str,
        *inputs: ir.Value | None,
        name: str,
        dtype: ir.DataType | None = FLOAT,
        domain: str = "",
        path: str = "",
        **attributes: object,
    ) -> ir.Value:
        output = ir.Value(name=name)
        if dtype is not None:
            output.dtype = dtype
        node = ir.node(op, list(inputs), attributes, domain=domain, outputs=[output], name=f"node_{name}")
        if path:
            node.metadata_props[SCOPES] = repr(["", *path.split("/"), name])
        self.graph.append(node)
        return output

    def model(self, *outputs: ir.Value, shape: list[int | str] | None = None) -> ir.Model:
        for output in outputs:
            if output.shape is None and shape is not None:
                output.shape = ir.Shape(shape)
            self.graph.outputs.append(output)
        return ir.Model(self.graph, ir_version=10)


class Encoder(Builder):
    """A BERT-shaped sentence encoder with random weights."""

    def __init__(self, *, fused: bool = False, layers: int = 2, hidden: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.fused, self.layers, self.hidden, self.heads = fused, layers, hidden, heads
        self._rng = np.random.default_rng(0)

    def build(self) -> ir.Model:
        ids = self.input("input_ids", INT64, ["batch", "sequence"])
        mask = self.input("attention_mask", INT64, ["batch", "sequence"])
        table = self.constant("words.weight", self._rng.normal(size=(600, self.hidden)).astype(np.float32))
        x = self._norm(self.add("Gather", table, ids, name="words", path="embeddings/embeddings.words"), "embeddings")
        for layer in range(self.layers):
            x = self._layer(x, mask, f"encoder.layer.{layer}")
        return self.model(self._pool(x, mask), shape=["batch", self.hidden])

    def _weight(self, name: str, *shape: int) -> ir.Value:
        return self.constant(name, (self._rng.normal(size=shape) / np.sqrt(shape[0])).astype(np.float32))

    def _linear(self, x: ir.Value, path: str, width: int, size: int) -> ir.Value:
        product = self.add("MatMul", x, self._weight(f"{path}.weight", width, size), name=f"{path}.product", path=path)
        return self.add("Add", product, self._weight(f"{path}.bias", size), name=path, path=path)

    def _norm(self, x: ir.Value, path: str, skip: ir.Value | None = None) -> ir.Value:
        gamma = self.constant(f"{path}.gamma", np.ones(self.hidden, np.float32))
        beta = self.constant(f"{path}.beta", np.zeros(self.hidden, np.float32))
        name = f"{path}.norm"
        if skip is not None and self.fused:
            inputs = (x, skip, gamma, beta)
            return self.add("SkipLayerNormalization", *inputs, name=name, domain="com.microsoft", epsilon=1e-12)
        total = x if skip is None else self.add("Add", x, skip, name=f"{path}.sum")
        return self.add("LayerNormalization", total, gamma, beta, name=name, axis=-1, epsilon=1e-12)

    def _layer(self, x: ir.Value, mask: ir.Value, path: str) -> ir.Value:
        q, k, v = (self._linear(x, f"{path}.{part}", self.hidden, self.hidden) for part in ("query", "key", "value"))
        attend = self._attend_fused if self.fused else self._attend
        x = self._norm(self._linear(attend(q, k, v, mask, path), f"{path}.dense", self.hidden, self.hidden), path, x)
        inner = f"{path}.intermediate"
        width = 2 * self.hidden
        if self.fused:
            weight = self._weight(f"{inner}.weight", self.hidden, width)
            product = self.add("MatMul", x, weight, name=f"{inner}.product", path=inner)
            bias = self._weight(f"{inner}.bias", width)
            act = self.add("BiasGelu", product, bias, name=f"{inner}.gelu", domain="com.microsoft")
        else:
            act = self.add("Gelu", self._linear(x, inner, self.hidden, width), name=f"{inner}.gelu")
        return self._norm(self._linear(act, f"{path}.output", width, self.hidden), f"{path}.output", x)

    def _attend_fused(self, q: ir.Value, k: ir.Value, v: ir.Value, mask: ir.Value, path: str) -> ir.Value:
        keys = self.add("Cast", mask, name=f"{path}.keys", dtype=INT32, to=INT32)
        inputs = (q, k, v, None, keys)
        options = {"num_heads": self.heads, "name": f"{path}.attention", "domain": "com.microsoft"}
        return self.add("MultiHeadAttention", *inputs, **options)

    def _attend(self, q: ir.Value, k: ir.Value, v: ir.Value, mask: ir.Value, path: str) -> ir.Value:
        split = self.ints(0, 0, self.heads, self.hidden // self.heads)

        def heads(x: ir.Value, perm: list[int]) -> ir.Value:
            apart = self.add("Reshape", x, split, name=f"{x.name}.split")
            return self.add("Transpose", apart, name=f"{x.name}.heads", perm=perm)

        raw = self.add("MatMul", heads(q, [0, 2, 1, 3]), heads(k, [0, 2, 3, 1]), name=f"{path}.raw")
        factor = self.floats("factor", (self.hidden // self.heads) ** -0.5)
        scores = self.add("Mul", raw, factor, name=f"{path}.scores")
        keys = self.add("Cast", mask, name=f"{path}.keys", dtype=BOOL, to=BOOL)
        keys = self.add("Unsqueeze", keys, self.ints(1, 2), name=f"{path}.wide", dtype=BOOL)
        lowest = self.floats("lowest", float(np.finfo(np.float32).min))
        bias = self.add("Where", keys, self.floats("zero", 0.0), lowest, name=f"{path}.bias")
        masked = self.add("Add", scores, bias, name=f"{path}.masked")
        weights = self.add("Softmax", masked, name=f"{path}.weights", axis=-1)
        mixed = self.add("MatMul", weights, heads(v, [0, 2, 1, 3]), name=f"{path}.mixed")
        together = self.add("Transpose", mixed, name=f"{path}.together", perm=[0, 2, 1, 3])
        return self.add("Reshape", together, self.ints(0, 0, self.hidden), name=f"{path}.attention")

    def _pool(self, x: ir.Value, mask: ir.Value) -> ir.Value:
        wide = self.add("Unsqueeze", mask, self.ints(-1), name="pool.wide", dtype=INT64)
        weight = self.add("Cast", wide, name="pool.mask", to=FLOAT)
        total = self.add(
            "ReduceSum", self.add("Mul", x, weight, name="pool.kept"), self.ints(1), name="pool.sum", keepdims=0
        )
        count = self.add("ReduceSum", weight, self.ints(1), name="pool.count", keepdims=0)
        safe = self.add("Clip", count, self.floats("pool.epsilon", 1e-9), name="pool.clip")
        mean = self.add("Div", total, safe, name="pool.mean")
        norm = self.add("ReduceL2", mean, self.ints(-1), name="pool.norm", keepdims=1)
        bound = self.add("Clip", norm, self.floats("norm.epsilon", 1e-12), name="norm.clip")
        return self.add("Div", mean, bound, name="sentence_embedding")


def feeds(batch: int = 3, length: int = 12, seed: int = 0) -> dict[str, Array]:
    """Token ids with a ragged mask."""
    mask = np.ones((batch, length), np.int64)
    mask[1:, length // 2 :] = 0
    return {"input_ids": np.random.default_rng(seed).integers(0, 600, (batch, length)), "attention_mask": mask}


def session(model: ir.Model, level: ort.GraphOptimizationLevel = ALL, dump: Path | None = None) -> ort.InferenceSession:
    """A CPU session at that optimization level; ``dump`` gets the graph that ONNX Runtime made of it."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.graph_optimization_level = level
    if dump is not None:
        options.optimized_model_filepath = str(dump)
    data = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def run(model: ir.Model, inputs: Mapping[str, Array], level: ort.GraphOptimizationLevel = ALL) -> Array:
    """First output of the graph."""
    return session(model, level).run(None, dict(inputs))[0]


def operators(model: ir.Model) -> Counter[str]:
    """How often each operator occurs in the main graph."""
    return Counter(node.op_type for node in model.graph)


def node_named(model: ir.Model, name: str) -> ir.Node:
    """The node that makes the value ``name``."""
    return next(node for node in model.graph if any(output.name == name for output in node.outputs))


def relative(value: Array, reference: Array) -> float:
    """Relative L2 difference."""
    difference = value.astype(np.float64) - reference.astype(np.float64)
    return float(np.linalg.norm(difference) / np.linalg.norm(reference.astype(np.float64)))
