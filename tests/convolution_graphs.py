"""Small convolutional networks as onnx_ir graphs, and second moments of their values from a real ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from builders import Array, GraphBuilder, evaluate, random

from artifacts.target import CPU
from passes.base import Context
from passes.statistics import Moments


def calibrated(feeds: Mapping[str, Array]) -> Context:
    """A context whose calibration data are these inputs."""

    def moments(model: ir.Model, values: Sequence[ir.Value]) -> dict[str, Moments]:
        return {str(value.name): moments_of(value_of(model, str(value.name), feeds)) for value in values}

    return Context(CPU, moments=moments)


def value_of(model: ir.Model, name: str, feeds: Mapping[str, Array]) -> Array:
    """What a value of the graph is."""
    if name in feeds:
        return feeds[name]
    copy = model.clone()
    found = next(value for node in copy.graph for value in node.outputs if value.name == name)
    copy.graph.outputs.clear()
    copy.graph.outputs.append(found)
    return evaluate(copy, feeds)[name]


def moments_of(array: Array) -> Moments:
    """In float64, of rows along the last axis."""
    rows = array.reshape(-1, array.shape[-1]).astype(np.float64)
    absmax = np.abs(rows).max(axis=0).astype(np.float32)
    return Moments(len(rows), rows.T @ rows / len(rows), absmax, rows.mean(axis=0))


def conv(
    g: GraphBuilder,
    x: ir.Value,
    weight: Array,
    *,
    size: int | None,
    bias: Array | None = None,
    name: str = "",
    **attributes: object,
) -> ir.Value:
    """A Conv whose output is ``[batch, N, size, size]``; 1 padded where nothing else is said of a 3 x 3 kernel."""
    g.count += 1
    name = name or f"conv{g.count}"
    inputs = [x, g.constant(weight, f"{name}.weight")]
    if bias is not None:
        inputs.append(g.constant(bias, f"{name}.bias"))
    if weight.shape[2] == 3 and not {"pads", "auto_pad"} & set(attributes):
        attributes["pads"] = [1, 1, 1, 1]
    shape = ["batch", len(weight), size or f"{name}.h", size or f"{name}.w"]
    return g.add("Conv", *inputs, name=name, shape=shape, **attributes)


def weights(seed: int, outputs: int, inputs: int, size: int = 3) -> Array:
    """A kernel that keeps the variance of what Relu leaves."""
    return random(seed, outputs, inputs, size, size) * np.float32(np.sqrt(2 / (inputs * size * size)))


def like(value: ir.Value) -> list[int | str]:
    """Its shape, for a node that keeps it."""
    return [dim if isinstance(dim, int) else str(dim) for dim in value.shape or ()]


def residual_network(*, width: int = 16, size: int = 8, seed: int = 0, classes: int = 5) -> ir.Model:
    """A stem, two residual blocks of which the second halves the plane and doubles the channels, and a classifier."""
    g = GraphBuilder()
    image = g.input("image", ["batch", 3, size, size])
    x = _relu(g, conv(g, image, weights(seed, width, 3), size=size, bias=random(seed + 1, width) / 8, name="stem"))
    x = _block(g, x, seed + 10, width, width, size, name="first")
    x = _block(g, x, seed + 20, width, 2 * width, size // 2, name="second", stride=2)
    pooled = g.add("GlobalAveragePool", x, shape=["batch", 2 * width, 1, 1])
    flat = g.add("Flatten", pooled, shape=["batch", 2 * width])
    head = random(seed + 30, classes, 2 * width) / np.float32(np.sqrt(width))
    y = g.add(
        "Gemm", flat, g.constant(head, "head.weight"), g.constant(random(seed + 31, classes), "head.bias"), transB=1
    )
    y.shape = ir.Shape(["batch", classes])
    return g.finish(y)


def images(seed: int, count: int, size: int = 8, channels: int = 3) -> dict[str, Array]:
    """Smooth noise: neighbours are alike, as in pictures."""
    noise = random(seed, count, channels, size + 2, size + 2)
    taps = [noise[:, :, i : i + size, j : j + size] for i in range(3) for j in range(3)]
    return {"image": np.ascontiguousarray(np.mean(taps, axis=0) * 2, dtype=np.float32)}


def _block(
    g: GraphBuilder, x: ir.Value, seed: int, inputs: int, outputs: int, size: int, *, name: str, stride: int = 1
) -> ir.Value:
    strides = [stride, stride]
    a = conv(
        g, x, weights(seed, outputs, inputs), size=size, bias=random(seed + 1, outputs) / 8,
        name=f"{name}.a", strides=strides,
    )  # fmt: skip
    b = conv(g, _relu(g, a), weights(seed + 2, outputs, outputs), size=size, name=f"{name}.b")
    if stride != 1:
        x = conv(g, x, weights(seed + 3, outputs, inputs, 1), size=size, name=f"{name}.short", strides=strides)
    return _relu(g, g.add("Add", b, x, shape=like(b)))


def _relu(g: GraphBuilder, x: ir.Value) -> ir.Value:
    return g.add("Relu", x, shape=like(x))
