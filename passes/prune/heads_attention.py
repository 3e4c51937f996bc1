"""Attention operators with the lanes of their heads: queries, keys, values, and what they make."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from passes.base import Refusal
from passes.quantize.linear import Selection
from passes.second_order import Floats
from passes.shapes import dims_of
from passes.sites import constant_of, linear_sites, module_path
from passes.splice import Names, add_constant, label
from passes.surgery import MICROSOFT, build, is_operator, needed, producer

from .importance import Indices
from .structure import BlockedError, Lane, cut_constant, heads_of, resize, shrink, unfit_weights
from .structure_trace import PACKED, Tracer

_KINDS = ("MultiHeadAttention", "GroupQueryAttention")
_OTHERS = ("Attention", "PackedAttention", "PackedMultiHeadAttention", "QAttention", "DecoderMaskedMultiHeadAttention")
_PAST, _BIAS, _SINK = (3, 4), 10, 11
"""Inputs of GroupQueryAttention: past keys and values, what is added to the scores, learned scores of no key."""
_SCALES = (12, 13)
_MHA_BIASES, _MHA_BIAS = 3, 5


@dataclass(frozen=True, eq=False)
class Attention:
    """An attention whose heads can be removed.

    Attributes:
        node: MultiHeadAttention or GroupQueryAttention of com.microsoft.
        heads: Heads of the queries.
        kv_heads: Heads of keys and values; each belongs to as many neighbouring heads of the queries.
        query: ``[..., heads * width]``, from its products to the attention.
        key: ``[..., kv_heads * width]``.
        value: Likewise.
        output: ``[..., heads * width]``, from the attention to the product that reads it.
    """

    node: ir.Node
    heads: int
    kv_heads: int
    query: Lane
    key: Lane
    value: Lane
    output: Lane

    @property
    def path(self) -> str:
        """Module path of the product that reads what it makes."""
        return self.output.sinks[0].path

    @property
    def head_size(self) -> float:
        """Weights of queries and outputs of one head."""
        return (self.query.weights + self.output.weights) / self.heads

    @property
    def group_size(self) -> float:
        """Weights of one head of keys and values, and of its queries and outputs."""
        lanes = dict.fromkeys((self.query, self.key, self.value, self.output))
        return sum(lane.weights for lane in lanes) / self.kv_heads

    def keep_heads(self, graph: ir.Graph, names: Names, kept: Indices, matrix: Floats | None) -> None:
        """Keep some heads of the queries only, equally many of each head of keys and values."""
        shrink(graph, names, self.query, kept)
        shrink(graph, names, self.output, kept, matrix)
        self.node.attributes["num_heads"] = ir.AttrInt64("num_heads", len(kept))
        grouped = is_operator(self.node, "GroupQueryAttention", domain=MICROSOFT)
        _keep_scores(graph, names, self.node, _BIAS if grouped else _MHA_BIAS, kept, self.heads)
        if grouped and _input(self.node, _SINK) is not None:
            cut_constant(graph, names, (self.node, _SINK), -1, kept, self.heads)

    def keep_groups(self, graph: ir.Graph, names: Names, kept: Indices, matrix: Floats | None) -> None:
        """Keep some heads of keys and values only, with their queries; the KV cache shrinks with them."""
        each = self.heads // self.kv_heads
        heads: Indices = (kept[:, None] * each + np.arange(each)).reshape(-1)
        self.keep_heads(graph, names, heads, matrix)
        for lane in dict.fromkeys((self.key, self.value)):
            if lane is not self.query:
                shrink(graph, names, lane, kept)
        if is_operator(self.node, "GroupQueryAttention", domain=MICROSOFT):
            self.node.attributes["kv_num_heads"] = ir.AttrInt64("kv_num_heads", len(kept))
            for value in (*(_input(self.node, index) for index in _PAST), *self.node.outputs[1:3]):
                if value is not None:
                    resize(value, -3, len(kept), self.kv_heads)


def attentions(model: ir.Model, selection: Selection) -> tuple[list[Attention], list[Refusal]]:
    """The attentions of the main graph whose heads can be removed, in graph order, and why not the others."""
    sites = {site.node: site for site in linear_sites(model)}
    tracer = Tracer(sites)
    found: list[Attention] = []
    refused: list[Refusal] = []
    paths: list[str] = []
    for node in model.graph:
        if not is_operator(node, *_KINDS, domain=MICROSOFT):
            refused.extend(_unseen(node))
            continue
        path = module_path(node)
        try:
            attention = _attention(tracer, node)
            path = attention.path
            refusal = selection.refusal(node, path)
            if refusal is None and selection.candidate(path):
                found.append(attention)
        except BlockedError as error:
            refusal = Refusal(label(node), f"at {error.refusal.node}: {error.refusal.reason}", error.refusal.remedy)
        paths.append(path)
        if refusal is not None and selection.candidate(path):
            refused.append(refusal)
    if not paths and not refused:
        refused.append(Refusal("", "there is no attention", "Run fuse-attention before"))
    return found, [*refused, *selection.idle(paths, "attention")]


def _unseen(node: ir.Node) -> Iterator[Refusal]:
    """Attention in a form that is not seen through."""
    if is_operator(node, *_OTHERS, domain=MICROSOFT) or is_operator(node, "Attention"):
        yield Refusal(
            label(node), f"heads cannot be followed through {node.op_type}", "Run it before fuse-qkv-attention"
        )
    if not is_operator(node, "Softmax"):
        return
    products = [user for user in node.outputs[0].consumers() if is_operator(user, "MatMul", "Where", "IsNaN")]
    scores = producer(node.inputs[0], "Add", "Mul", "Div", "MatMul", "Where")
    if products and scores is not None:
        yield Refusal(label(node), "the attention is not one operator", "Run fuse-attention before")


def _attention(tracer: Tracer, node: ir.Node) -> Attention:
    heads, kv_heads = heads_of(node)
    if node.inputs[1] is None or node.inputs[2] is None:
        raise BlockedError(node, "queries, keys and values are packed", PACKED)
    rank = dims_of(node.inputs[0])
    if heads < 1 or kv_heads < 1 or heads % kv_heads or (rank is not None and len(rank) != 3):
        raise BlockedError(node, f"{heads} heads of queries and {kv_heads} of keys are no form that is known")
    _check_inputs(node, heads)
    query, key, value = (
        # A single head of keys and values never goes.
        tracer.trace(needed(value), count, (node,)) if count > 1 else Lane(count, ports={(node, port)})
        for port, (value, count) in enumerate(zip(node.inputs[:3], (heads, kv_heads, kv_heads), strict=True))
    )
    if heads == kv_heads and query.ports == {(node, port) for port in range(3)}:
        key = value = query
    output = tracer.trace(node.outputs[0], heads, (node,))
    for port, lane in enumerate((query, key, value)):
        if lane.ports != {(node, port)} and key is not query:
            raise BlockedError(node, "its heads meet those of another value")
        if lane.sinks or (lane.count > 1 and not (lane.sources or lane.packed)):
            raise BlockedError(node, "its queries, keys or values are read by products, or made by none")
    if output.ports != {(node, -1)} or output.axes.get(output.read) != -1:
        raise BlockedError(node, "its heads are not the last axis of what the product reads")
    unfit_weights(list(dict.fromkeys(site for lane in (query, key, value, output) for site in lane.sites)))
    return Attention(node, heads, kv_heads, query, key, value, output)


def _check_inputs(node: ir.Node, heads: int) -> None:
    """Refuse operands that are neither followed nor cut."""
    grouped = node.op_type == "GroupQueryAttention"
    unseen = _SCALES if grouped else (_MHA_BIASES, 6, 7)
    if any(_input(node, index) is not None for index in unseen):
        what = "its cache is quantized" if grouped else "it adds biases, or keeps a cache"
        raise BlockedError(node, what, "Prune before that")
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1 if not grouped else 3 :]):
        raise BlockedError(node, "more of it is read than what it makes of the values")
    bias = _input(node, _BIAS if grouped else _MHA_BIAS)
    if bias is not None and _score_heads(bias) not in (1, heads):
        raise BlockedError(node, "of what is added to its scores it is not known whether it differs between heads")
    sink = _input(node, _SINK) if grouped else None
    if sink is not None and constant_of(sink) is None:
        raise BlockedError(node, "its sinks are computed")


def check_cache(node: ir.Node) -> None:
    """Hold the KV cache of an attention to the form of a decoder's graph: inputs and outputs that nothing else reads.

    Raises:
        BlockedError: It has another.
    """
    if not is_operator(node, "GroupQueryAttention", domain=MICROSOFT):
        return
    for index in _PAST:
        past = _input(node, index)
        if past is None:
            continue
        others = [use.node for use in past.uses() if use.node is not node]
        reads_heads = any(not _reads_rows(user) for user in others)
        if not past.is_graph_input() or reads_heads:
            raise BlockedError(node, f"its cache {past.name} is used elsewhere too")
    for output in node.outputs[1:3]:
        if output.uses():
            raise BlockedError(node, f"its cache {output.name} is used elsewhere too")


def _reads_rows(node: ir.Node) -> bool:
    """Whether a node reads the number of rows of a cache only."""
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", 4)
    return is_operator(node, "Shape") and (start, end) == (0, 1)


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _score_heads(bias: ir.Value) -> int | None:
    """Heads that what is added to the scores ``[batch or 1, heads or 1, length, keys]`` is of; None if not known."""
    tensor = constant_of(bias)
    dims = dims_of(bias) if tensor is None else tuple(tensor.shape.numpy())
    if dims is None or len(dims) != 4 or not isinstance(dims[1], int):
        return None
    return dims[1]


def _keep_scores(graph: ir.Graph, names: Names, node: ir.Node, index: int, kept: Indices, heads: int) -> None:
    """Keep what is added to the scores of those heads only."""
    bias = _input(node, index)
    if bias is None or _score_heads(bias) == 1:
        return
    if constant_of(bias) is not None:
        cut_constant(graph, names, (node, index), 1 - 4, kept, heads)
        return
    indices = add_constant(graph, names.fresh(f"{bias.name}.kept"), np.asarray(kept, np.int64))
    name = names.fresh(f"{bias.name}.{node.outputs[0].name}")
    chosen = build("Gather", [bias, indices], like=node, name=name, attributes={"axis": 1}, dtype=bias.dtype)
    if bias.shape is not None:
        shape = bias.shape.copy()
        shape[1] = len(kept)
        chosen.outputs[0].shape = shape
    graph.insert_before(node, chosen)
    node.replace_input_with(index, chosen.outputs[0])
