"""Small graphs for the tests of passes, and real ONNX Runtime to run them with optimizations disabled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from artifacts.target import CPU
from passes.base import Context, Outcome, Pass
from passes.grammar import check, signature

CONTEXT = Context(CPU)
Array = NDArray[np.generic]


class GraphBuilder:
    """Writes a graph node by node; ``finish`` makes the model."""

    def __init__(self, opset: int = 21) -> None:
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": opset, "com.microsoft": 1}, name="test")
        self.count = 0

    def input(self, name: str, shape: Sequence[int | str], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.graph.inputs.append(value)
        return value

    def constant(self, array: Array | Sequence[int] | float, name: str = "") -> ir.Value:
        data = np.asarray(array, np.float32) if isinstance(array, float) else np.asarray(array)
        self.count += 1
        label = name or f"c{self.count}"
        tensor = ir.Tensor(data, name=label)
        value = ir.Value(name=label, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def add(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        domain: str = "",
        shape: Sequence[int | str] | None = None,
        dtype: ir.DataType | None = ir.DataType.FLOAT,
        outputs: int = 1,
        name: str = "",
        **attributes: object,
    ) -> ir.Value:
        self.count += 1
        label = name or f"{op_type}_{self.count}"
        values = [ir.Value(name=f"{label}_out{i or ''}") for i in range(outputs)]
        if dtype is not None:
            values[0].dtype = dtype
        if shape is not None:
            values[0].shape = ir.Shape(shape)
        converted = ir.convenience.convert_attributes(attributes)
        self.graph.append(ir.Node(domain, op_type, inputs, converted, outputs=values, name=label))
        return values[0]

    def finish(self, *outputs: ir.Value) -> ir.Model:
        self.graph.outputs.extend(outputs)
        return ir.Model(self.graph, ir_version=10)


def random(seed: int, *shape: int, dtype: type[np.generic] = np.float32) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def evaluate(model: ir.Model, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Outputs of the graph as ONNX Runtime computes it with every optimization off."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    proto = ir.serde.serialize_model(model).SerializeToString()
    session = ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def operators(model: ir.Model) -> dict[str, int]:
    """How often each operator occurs in the main graph."""
    found: dict[str, int] = {}
    for node in model.graph:
        found[node.op_type] = found.get(node.op_type, 0) + 1
    return dict(sorted(found.items()))


def depth(model: ir.Model) -> int:
    """Nodes on the longest path: how often a rounding error can be made one after the other."""
    levels: dict[ir.Value, int] = {}
    for node in model.graph:
        level = 1 + max((levels.get(value, 0) for value in node.inputs if value is not None), default=0)
        levels.update(dict.fromkeys(node.outputs, level))
    return max(levels.values(), default=0)


def tolerance(model: ir.Model, before: Array) -> float:
    """Largest absolute difference that rounding explains: unit roundoff of the type x longest path x largest value.

    Sums over n terms grow as sqrt(n) in practice; the graphs here sum over at most 64, hence the factor 8.
    """
    kind = before.dtype if before.dtype in (np.float16, np.float64) else np.dtype(np.float32)
    return float(np.finfo(kind).eps) * depth(model) * 8 * max(1.0, float(np.abs(before.astype(np.float64)).max()))


def apply(item: Pass, model: ir.Model, context: Context = CONTEXT) -> Outcome:
    """Run a pass and hold it to what every pass promises: grammar, inputs and outputs, idempotence."""
    before = signature(model)
    outcome = item.run(model, context)
    check(model, context.target)
    assert signature(model) == before
    assert item.run(model.clone(), context).changed == 0, f"{item.name} is not idempotent"
    return outcome


def apply_equal(
    item: Pass, model: ir.Model, feeds: Mapping[str, Array], context: Context = CONTEXT, *, exact: bool = False
) -> Outcome:
    """`apply`, and the outputs stay equal: bit for bit, or up to rounding."""
    expected = evaluate(model, feeds)
    reach = {name: tolerance(model, array) for name, array in expected.items()}
    outcome = apply(item, model, context)
    found = evaluate(model, feeds)
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        if exact or not np.issubdtype(array.dtype, np.floating):
            np.testing.assert_array_equal(found[name], array)
        else:
            assert np.isfinite(found[name]).all()
            np.testing.assert_allclose(found[name], array, rtol=0, atol=reach[name])
    return outcome
