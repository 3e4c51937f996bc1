"""Models to take structure out of, second moments as a compile lends them, and the same model with rows of zeros."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from builders import Array, GraphBuilder, evaluate, random
from decoder_graphs import llama_graph, tiny_llama
from observing import run_outputs

from artifacts.manifest import TensorSpec
from artifacts.target import CPU
from compiler.export import Exported, export_model
from compiler.export.exported import tensor_specs
from compiler.generation import prefill
from compiler.source import read_source
from passes.affine import matrix_of, put_matrix
from passes.base import Context
from passes.pipeline import Pipeline, parse
from passes.registry import CLEAN
from passes.sites import linear_sites
from passes.statistics import Moments

HIDDEN, WIDE = 32, 64
FORM = "raise-opset(minimum=23); unflatten-products; fuse-rms-norm; fuse-layer-norm; fuse-gelu"
"""What stands before compression in the recipe of a decoder, behind `CLEAN`."""
ENCODER = "fuse-layer-norm; fuse-gelu; fuse-attention"
"""The same of an encoder."""


def calibrated(feeds: Mapping[str, Array]) -> Context:
    """A context whose calibration data are these feeds."""

    def moments(model: ir.Model, values: Sequence[ir.Value]) -> dict[str, Moments]:
        names = [str(value.name) for value in values]
        return {
            name: moments_of(array) for name, array in run_outputs(model, without_cache(model, feeds), names).items()
        }

    return Context(CPU, moments=moments)


def moments_of(array: Array) -> Moments:
    rows = array.reshape(-1, array.shape[-1]).astype(np.float64)
    absmax = np.abs(rows).max(axis=0).astype(np.float32)
    return Moments(len(rows), rows.T @ rows / len(rows), absmax, rows.mean(axis=0))


def block(*, gated: bool = False, biased: bool = True, wide: int = WIDE, repeats: int = 1) -> ir.Model:
    """``x + W2 act(W1 x)``, so often one behind the other; the neurons of a block come in groups of ``repeats``."""
    graph = GraphBuilder()
    x = graph.input("x", ("batch", "sequence", HIDDEN))
    for layer in range(2):
        path, seed = f"layers.{layer}", 10 * layer
        first = np.repeat(random(seed, HIDDEN, wide // repeats) / 5, repeats, axis=1)
        inner = linear(graph, x, first, f"{path}.gate" if gated else f"{path}.up", biased, repeats)
        if gated:
            act = graph.add("Mul", inner, graph.add("Sigmoid", inner))
            other = np.repeat(random(seed + 1, HIDDEN, wide // repeats) / 5, repeats, axis=1)
            act = graph.add("Mul", act, linear(graph, x, other, f"{path}.up", biased, repeats))
        else:
            act = graph.add("Gelu", inner)
        down = linear(graph, act, random(seed + 2, wide, HIDDEN) / 8, f"{path}.down", biased)
        x = graph.add("Add", x, down, name=f"{path}.sum")
    x.shape = ir.Shape(("batch", "sequence", HIDDEN))
    return graph.finish(x)


def linear(graph: GraphBuilder, x: ir.Value, weight: Array, path: str, biased: bool, repeats: int = 1) -> ir.Value:
    name = f"/{path.replace('.', '/')}/MatMul"
    product = graph.add("MatMul", x, graph.constant(weight.astype(np.float32), f"{path}.weight"), name=name)
    if not biased:
        return product
    bias = np.repeat(random(weight.shape[0], weight.shape[1] // repeats), repeats).astype(np.float32)
    return graph.add("Add", product, graph.constant(bias, f"{path}.bias"))


def block_feeds(rows: int = 40, seed: int = 7) -> dict[str, Array]:
    mixing = random(seed, HIDDEN, HIDDEN) * np.linspace(0.2, 1.5, HIDDEN, dtype=np.float32) / 4
    return {"x": random(seed + 1, rows, 5, HIDDEN) @ mixing}


def decoder(layers: int = 2, seed: int = 0) -> tuple[ir.Model, dict[str, Array]]:
    """A Llama graph of 4 heads and 2 KV heads, written by hand, and feeds of a ragged prompt."""
    return llama(tiny_llama(seed, layers=layers))


def llama(model: Any) -> tuple[ir.Model, dict[str, Array]]:
    """The same of a torch model."""
    graph = ir.from_proto(llama_graph(model))
    graph.graph.opset_imports[""] = 23
    for node in graph.graph:
        if node.op_type == "SimplifiedLayerNormalization":
            node.op_type = "RMSNormalization"
        elif node.op_type in ("Add", "Gather"):
            node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
            node.outputs[0].shape = ir.Shape(("batch", "sequence", model.config.hidden_size))
    parse("infer-shapes").run(graph, Context(CPU))
    rng = np.random.default_rng(seed=4)
    rows = [rng.integers(5, model.config.vocab_size, length) for length in (12, 12, 9, 11, 5, 12)]
    last = np.array([[len(row) - 1] for row in rows])
    return graph, dict(prefill(rows, specs(graph)[0], last))


def exported(folder: Path, pipeline: str = FORM) -> Exported:
    """The graph of a model folder in the form that compression sees."""
    made = export_model(read_source(str(folder)))
    Pipeline(CLEAN).run(made.model, Context(CPU))
    parse(pipeline).run(made.model, Context(CPU))
    return made


def prompts(made: Exported, rows: int = 6, length: int = 12, seed: int = 3) -> dict[str, Array]:
    """Feeds of prompts without padding that ask for the logits of every position."""
    size = made.outputs[0].shape[-1]
    assert isinstance(size, int)
    ids = np.random.default_rng(seed).integers(3, size, (rows, length))
    return dict(prefill(list(ids), made.inputs, np.tile(np.arange(length), (rows, 1))))


def without_cache(model: ir.Model, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Feeds for a model that keeps less: the caches of its own inputs, empty."""
    result: dict[str, Array] = {}
    for value in model.graph.inputs:
        name = str(value.name)
        if name.startswith("past_key_values"):
            like = next(array for key, array in feeds.items() if key.startswith("past_key_values"))
            dims = list(value.shape or ())
            result[name] = np.zeros((like.shape[0], int(dims[1]), like.shape[2], int(dims[3])), like.dtype)
        else:
            result[name] = feeds[name]
    return result


def specs(model: ir.Model) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """What the manifest would say of inputs and outputs."""
    return tensor_specs(tuple(model.graph.inputs)), tensor_specs(tuple(model.graph.outputs))


def outputs(model: ir.Model, feeds: Mapping[str, Array]) -> Array:
    """The first output."""
    name = str(model.graph.outputs[0].name)
    return evaluate(model, without_cache(model, feeds))[name]


def masked(before: ir.Model, after: ir.Model) -> tuple[ir.Model, dict[str, list[int]]]:
    """``before`` with zeros in the rows that products of ``after`` lack, and which rows those have by module path.

    The rows of ``after`` must be those of ``before``, unrepaired.
    """
    copy = before.clone()
    found: dict[str, list[int]] = {}
    kept = {site.path: matrix_of(site) for site in linear_sites(after)}
    for site in linear_sites(copy):
        weight, rest = matrix_of(site), kept.get(site.path)
        if rest is None or len(rest) == len(weight) or rest.shape[1] != weight.shape[1]:
            continue
        places = [int(np.flatnonzero((weight == row).all(axis=1))[0]) for row in rest]
        found[site.path] = places
        new = np.zeros_like(weight)
        new[places] = weight[places]
        put_matrix(site, new)
    return copy, found
