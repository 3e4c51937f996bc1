"""What the passes that quantize linear operators share: the sites they act on, their biases, their int8 weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import onnx_ir as ir

from passes.base import Refusal
from passes.sites import LinearSite, constant_of, linear_sites, module_path
from passes.splice import Names, add_constant, label, take_place
from passes.surgery import is_operator, only_user, producer, remove_dead

from .arithmetic import Floats, Quantized, quantize_columns

MINIMUM_SIDE = 16
"""Smallest K and N worth the cost of quantizing the input; below, the integer kernels win nothing."""


@dataclass(frozen=True)
class Selection:
    """Which sites a pass was asked to act on, by the patterns of its options.

    Attributes:
        skip: Module paths to leave alone; ``*`` and ``?`` are wildcards, and ``*`` also spans dots.
        only: Module paths to act on; empty for all. Others are no candidates, and no refusals.
    """

    skip: tuple[str, ...]
    only: tuple[str, ...]

    def candidate(self, path: str) -> bool:
        """Whether ``only`` leaves the path in."""
        return not self.only or any(fnmatchcase(path, glob) for glob in self.only)

    def refusal(self, node: ir.Node, path: str) -> Refusal | None:
        """The refusal of a node that ``skip`` names."""
        glob = next((glob for glob in self.skip if fnmatchcase(path, glob)), None)
        return None if glob is None else Refusal(label(node), f"{path} is skipped by {glob!r}", "take it out of skip")

    def idle(self, paths: Sequence[str], what: str) -> list[Refusal]:
        """Refusals of the patterns that fit none of the paths."""
        return [
            Refusal(glob, f"the {option} pattern fits no {what}", "compare it with the module paths of the model")
            for option, globs in (("skip", self.skip), ("only", self.only))
            for glob in globs
            if not any(fnmatchcase(path, glob) for path in paths)
        ]


def choose_sites(model: ir.Model, selection: Selection) -> tuple[list[LinearSite], list[Refusal]]:
    """The linear sites to quantize, in graph order, and why not the others.

    Refused: a MatMul or Gemm without a constant right operand, or with alpha, beta or transA; a weight that is not
    float32, not finite, or has a side shorter than `MINIMUM_SIDE`; sites that ``skip`` names; idle patterns.
    """
    sites = linear_sites(model)
    nodes = {site.node for site in sites}
    refused = [
        Refusal(label(node), "no product with a constant matrix", "fold-constants where the operand could be constant")
        for node in model.graph
        if is_operator(node, "MatMul", "Gemm") and node not in nodes
        if selection.candidate(module_path(node)) and producer(node.inputs[1], "DequantizeLinear") is None
    ]
    refused += selection.idle([site.path for site in sites], "linear operator")
    chosen: list[LinearSite] = []
    for site in sites:
        if not selection.candidate(site.path):
            continue
        refusal = selection.refusal(site.node, site.path) or _unfit_weight(site)
        if refusal is None:
            chosen.append(site)
        else:
            refused.append(refusal)
    return chosen, refused


def weight_of(site: LinearSite) -> Floats:
    """The weight of a site that was chosen, float32 ``[K, N]``.

    Raises:
        ValueError: It is no constant any more.
    """
    tensor = constant_of(site.weight)
    if tensor is None:
        raise ValueError(f"{site.weight.name} is no constant any more")
    floats = tensor.numpy()
    return floats.T if site.transposed else floats


@dataclass(frozen=True, eq=False)
class Ending:
    """How a linear site ends once its operator may add a bias of its own.

    Attributes:
        bias: The constant ``[N]`` that the operator can add: of the Gemm, or of an Add that alone reads the product.
        last: The node whose output that is: the site's own, or the Add.
        rest: The third operand of a Gemm that is no such constant; still to be added. Then ``bias`` is None.
    """

    bias: Floats | None
    last: ir.Node
    rest: ir.Value | None


def ending(site: LinearSite) -> Ending:
    """Where the bias of a site comes from."""
    columns = site.shape[1]
    if site.bias is not None:
        floats = _vector(site.node.inputs[2], columns)
        return Ending(floats, site.node, site.node.inputs[2] if floats is None else None)
    add = only_user(site.node.outputs[0])
    if is_operator(add, "Add") and add is not None:
        for operand in add.inputs:
            floats = _vector(operand, columns)
            if floats is not None:
                return Ending(floats, add, None)
    return Ending(None, site.node, None)


def put_in(site: LinearSite, end: Ending, nodes: Sequence[ir.Node]) -> None:
    """Put nodes in the place of a site and of the Add that ends it; the last one makes what they made."""
    graph = site.node.graph
    if graph is None:
        raise ValueError(f"node {label(site.node)} is in no graph")
    gone = [site.node] if end.last is site.node else [end.last, site.node]
    read = [value for node in gone for value in node.inputs if value is not None]
    graph.insert_before(site.node, nodes)
    take_place(nodes[-1].outputs[0], end.last.outputs[0])
    graph.remove(gone, safe=True)
    remove_dead(dict.fromkeys(read))


class Int8Weights:
    """int8 columns of the weights of one graph: each made once, however many sites share it."""

    def __init__(self, graph: ir.Graph, names: Names, *, reduce_range: bool) -> None:
        self._graph = graph
        self._names = names
        self._reduce_range = reduce_range
        self._quantized: dict[tuple[ir.Value, bool], Quantized] = {}
        self._initializers: dict[tuple[ir.Value, bool], tuple[ir.Value, ir.Value]] = {}

    def quantized(self, site: LinearSite) -> Quantized:
        """The weight of a site in plain arrays: int8 ``[K, N]`` and float32 ``[N]``."""
        key = (site.weight, site.transposed)
        if key not in self._quantized:
            self._quantized[key] = quantize_columns(weight_of(site), reduce_range=self._reduce_range)
        return self._quantized[key]

    def initializers(self, site: LinearSite) -> tuple[ir.Value, ir.Value]:
        """The same as initializers of the graph."""
        key = (site.weight, site.transposed)
        if key not in self._initializers:
            quantized = self.quantized(site)
            base = site.weight.name or f"{site.path}.weight"
            self._initializers[key] = (
                add_constant(self._graph, self._names.fresh(f"{base}_int8"), quantized.values),
                add_constant(self._graph, self._names.fresh(f"{base}_scale"), quantized.scale),
            )
        return self._initializers[key]


def _unfit_weight(site: LinearSite) -> Refusal | None:
    tensor = constant_of(site.weight)
    if tensor is None or tensor.dtype != ir.DataType.FLOAT:
        return Refusal(label(site.node), "the weight is not float32", "quantize before the precision is changed")
    if min(site.shape) < MINIMUM_SIDE:
        return Refusal(label(site.node), f"a weight of {site.shape[0]} x {site.shape[1]} is too small to gain")
    if not np.isfinite(tensor.numpy()).all():
        return Refusal(label(site.node), "the weight has values that are not finite", "repair the checkpoint")
    return None


def _vector(value: ir.Value | None, length: int) -> Floats | None:
    tensor = constant_of(value)
    if tensor is None or tensor.dtype != ir.DataType.FLOAT or tuple(tensor.shape.numpy()) != (length,):
        return None
    return tensor.numpy()
