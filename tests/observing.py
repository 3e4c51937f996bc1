"""A small observer of activations for the tests of passes: it runs a graph on given feeds in a real ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from passes.base import Observe
from passes.statistics import BINS, SAMPLE_ROWS, Activation

Array = NDArray[np.generic]


def activation(x: NDArray[np.float32]) -> Activation:
    """The statistics of one array ``[..., K]``, all at once."""
    rows = x.reshape(-1, x.shape[-1])
    reach = float(np.abs(rows).max()) or 1.0
    histogram = np.histogram(rows, BINS, (-reach, reach))[0].astype(np.int64)
    picked = np.linspace(0, len(rows) - 1, min(len(rows), SAMPLE_ROWS)).astype(int)
    mean = rows.mean(0, dtype=np.float64)
    return Activation(len(rows), rows.min(0), rows.max(0), mean, histogram, reach, rows[picked])


def run_outputs(model: ir.Model, feeds: Mapping[str, Array], names: Sequence[str]) -> dict[str, Array]:
    """Any values of the main graph, its inputs included, as ONNX Runtime computes them with optimizations off."""
    copy = model.clone()
    values = {value.name: value for node in copy.graph for value in node.outputs}
    wanted = [name for name in names if name not in feeds]
    copy.graph.outputs[:] = [values[name] for name in wanted]
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    found: dict[str, Array] = {name: array for name, array in feeds.items() if name in names}
    if wanted:
        data = ir.to_proto(copy).SerializeToString()
        session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        found.update(zip(wanted, session.run(wanted, dict(feeds)), strict=True))
    return found


class Observer:
    """Observes a model on the same feeds each time, and counts how often it was asked."""

    def __init__(self, feeds: Mapping[str, Array]) -> None:
        self.feeds = feeds
        self.calls: list[tuple[str, ...]] = []

    def __call__(self, model: ir.Model, values: Sequence[ir.Value]) -> dict[str, Activation]:
        names = tuple(str(value.name) for value in values)
        self.calls.append(names)
        return {name: activation(array) for name, array in run_outputs(model, self.feeds, names).items()}


def observing(feeds: Mapping[str, Array]) -> Observe:
    """An observer as a pass is lent one."""
    return Observer(feeds)
