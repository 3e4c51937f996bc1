"""hoist-gather."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from passes.base import Context, Effect, Outcome, Purpose
from passes.shapes import Dim, Dims, dims_of
from passes.sites import constant_of, integer_attribute
from passes.splice import Names, add_constant, take_place
from passes.surgery import MICROSOFT, build, is_operator, needed, remove_dead

_POINTWISE = (
    *("Abs", "Add", "Cast", "Clip", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Log"),
    *("Max", "Min", "Mish", "Mul", "Neg", "Pow", "Reciprocal", "Relu", "Sigmoid", "Softplus", "Sqrt", "Sub", "Swish"),
    "Tanh",
)
_POINTWISE_MICROSOFT = ("BiasGelu", "FastGelu", "Gelu", "QuickGelu")
_NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
_SKIP_NORMS = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
_LAST = (-1, 2)
"""The last of three axes."""
_MOMENTS = (1, 2)
"""Outputs of a normalization: mean and inverse deviation."""
_PADDING, _ADDED, _FIRST_PAST = 4, 5, 6
"""Inputs of MultiHeadAttention behind query, key, value and bias."""


@dataclass(frozen=True)
class HoistGather:
    """Choose rows before they are computed: move a Gather of rows in front of what works on each row by itself.

    | before                                | after |
    |---------------------------------------|-------|
    | Gather(f(a, b), i), axis 1 of 3       | f(Gather(a, i), Gather(b, i)) |
    | GatherND(f(a, b), i), a batch at once | f(GatherND(a, i), GatherND(b, i)) |

    f is whatever nothing but the Gather reads: products with constants, normalizations over the last axis, sums,
    activations, and MultiHeadAttention, whose rows are its query's. A classifier that reads one token then computes its
    last layer for that row alone, but for keys and values; a decoder that is asked for the logits of the last, what
    follows its last attention. Databases know it as the pushdown of a selection. A Gather by a scalar keeps its axis up
    to where it stood, and is squeezed there.

    Run it before products are quantized and query, key and value are made one. Left alone: gathers with no product in
    front of them; values that are read elsewhere too, mix rows, or are not known to be ``[batch, rows, columns]``;
    attentions that are causal, keep past keys, or have a mask of their own for each row that GatherND chooses.
    """

    name: ClassVar[str] = "hoist-gather"
    effect: ClassVar[Effect] = Effect.EXACT
    purpose: ClassVar[Purpose] = Purpose.SPEED

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Move them; counts the gathers."""
        names = Names(model.graph)
        changed = sum(_hoist(model.graph, names, node) for node in list(model.graph) if _chooses_rows(node))
        if changed:
            model.graph.sort()
        return Outcome(changed)


def _chooses_rows(node: ir.Node) -> bool:
    """Whether it takes whole rows of ``[batch, rows, columns]``."""
    if not is_operator(node, "Gather", "GatherND"):
        return False
    data, indices = dims_of(node.inputs[0]), dims_of(node.inputs[1])
    if data is None or indices is None or len(data) != 3:
        return False
    if node.op_type == "Gather":
        return integer_attribute(node, "axis", 0) in (1, -2) and len(indices) < 2
    return integer_attribute(node, "batch_dims", 0) == 1 and len(indices) == 3 and indices[-1] == 1


def _hoist(graph: ir.Graph, names: Names, gather: ir.Node) -> int:
    data, place, result = needed(gather.inputs[0]), needed(gather.inputs[1]), gather.outputs[0]
    rows = (dims_of(data) or ())[:2]
    region = _region(gather, rows)
    products = [node for node in region if node.op_type in ("MatMul", "MatMulNBits")]
    if not products or any(node in region for node in _upstream(place)):
        return 0
    chosen = dims_of(place) or ()
    indices = place if chosen else _as_list(graph, names, gather)
    count: Dim = 1 if not chosen else chosen[0] if gather.op_type == "Gather" else chosen[1]
    moved: dict[ir.Value, ir.Value] = {}
    for node, read in reversed(region.items()):
        for index, axis in read.items():
            value = needed(node.inputs[index])
            if value.producer() not in region:
                if value not in moved:
                    moved[value] = _choose(names, gather, value, indices, axis, count)
                node.replace_input_with(index, moved[value])
        for output in node.outputs:
            if output.shape is not None:
                output.shape = ir.Shape([rows[0], count, *(dims_of(output) or ())[2:]])
    if chosen:
        take_place(data, result)
    else:
        axes = add_constant(graph, names.fresh(f"{result.name}.axis"), np.array([1], np.int64))
        squeeze = build("Squeeze", [data, axes], like=gather, name=str(result.name), dtype=data.dtype)
        graph.insert_before(gather, squeeze)
        take_place(squeeze.outputs[0], result)
    graph.remove(gather, safe=True)
    remove_dead([place])
    return 1


def _region(gather: ir.Node, rows: Dims) -> dict[ir.Node, dict[int, int]]:
    """What makes the rows and nothing else: nodes that work on each by itself, read by each other and the Gather alone.

    The last come first, each with what `_rows_read` says.
    """
    region: dict[ir.Node, dict[int, int]] = {gather: {0: 1}}
    pending = [gather.inputs[0]]
    while pending:
        value = pending.pop()
        node = None if value is None else value.producer()
        read = {} if node is None or node in region else _rows_read(node, rows, gather)
        if node is None or not read or any(output.is_graph_output() for output in node.outputs):
            continue
        # Whoever else reads it may join later, and asks again then.
        if all(use.idx in region.get(use.node, {}) for output in node.outputs for use in output.uses()):
            region[node] = read
            pending.extend(node.inputs[index] for index in read)
    del region[gather]
    return region


def _rows_read(node: ir.Node, rows: Dims, gather: ir.Node) -> dict[int, int]:
    """Input -> its axis of rows, where each row that the node makes is computed from those rows and constants alone.

    Empty: it is not so.
    """
    read = [index for index, value in enumerate(node.inputs) if value is not None and _has_rows(value, rows)]
    used = [index for index, output in enumerate(node.outputs) if output.uses()]
    if not read or not all(_has_rows(node.outputs[index], rows) for index in used):
        return {}
    if is_operator(node, "MultiHeadAttention", domain=MICROSOFT):
        return _rows_of_attention(node, rows, gather)
    others = [value for index, value in enumerate(node.inputs) if value is not None and index not in read]
    axis = integer_attribute(node, "axis", -1 if node.op_type in _NORMS else 0)
    if is_operator(node, *_POINTWISE) or is_operator(node, *_POINTWISE_MICROSOFT, domain=MICROSOFT):
        fits = all(map(_is_vector, others))
    elif is_operator(node, *_NORMS) or is_operator(node, *_SKIP_NORMS, domain=MICROSOFT):
        fits = axis in _LAST if node.op_type in _NORMS else read == [0, 1]
        fits = fits and all(map(_is_vector, others)) and not set(used) & set(_MOMENTS)
    elif is_operator(node, "Split"):
        fits = axis in _LAST
    elif is_operator(node, "MatMul"):
        fits = read == [0] and _is_matrix(node.inputs[1])
    else:
        fits = is_operator(node, "MatMulNBits", domain=MICROSOFT)
    return dict.fromkeys(read, 1) if fits else {}


def _rows_of_attention(node: ir.Node, rows: Dims, gather: ir.Node) -> dict[int, int]:
    """The query, and a bias of the scores ``[batch, heads, rows, keys]`` that has a row for each of the query's."""
    inputs = dict(enumerate(node.inputs))
    if any(inputs.get(index) is not None for index in range(_FIRST_PAST, len(inputs))) or len(node.outputs) > 1:
        return {}
    query, padding, added = (inputs.get(index) for index in (0, _PADDING, _ADDED))
    if query is None or not _has_rows(query, rows) or integer_attribute(node, "unidirectional", 0):
        return {}
    if padding is not None and len(dims_of(padding) or ()) != 2:
        return {}
    if added is None:
        return {0: 1}
    dims = dims_of(added) or ()
    return {0: 1, _ADDED: 2} if len(dims) == 4 and dims[2] == rows[1] and gather.op_type == "Gather" else {}


def _has_rows(value: ir.Value, rows: Dims) -> bool:
    dims = dims_of(value)
    return dims is not None and len(dims) == 3 and dims[:2] == rows and constant_of(value) is None


def _is_vector(value: ir.Value) -> bool:
    """Whether it is a constant that is the same for every row."""
    tensor = constant_of(value)
    return tensor is not None and len(tensor.shape) <= 3 and all(dim == 1 for dim in tensor.shape.numpy()[:-1])


def _is_matrix(value: ir.Value | None) -> bool:
    tensor = constant_of(value)
    return tensor is not None and len(tensor.shape) == 2


def _upstream(value: ir.Value) -> Iterator[ir.Node]:
    """The nodes that a value is computed by."""
    seen: set[ir.Value] = set()
    pending = [value]
    while pending:
        node = pending.pop().producer()
        if node is not None:
            yield node
            new = [one for one in node.inputs if one is not None and one not in seen]
            seen.update(new)
            pending.extend(new)


def _as_list(graph: ir.Graph, names: Names, gather: ir.Node) -> ir.Value:
    """The scalar index of a Gather as a vector of one number."""
    index = needed(gather.inputs[1])
    tensor = constant_of(index)
    name = names.fresh(f"{gather.outputs[0].name}.row")
    if tensor is not None:
        return add_constant(graph, name, tensor.numpy().reshape(1))
    axes = add_constant(graph, names.fresh(f"{name}.axis"), np.array([0], np.int64))
    node = build("Unsqueeze", [index, axes], like=gather, name=name, dtype=index.dtype, shape=ir.Shape([1]))
    graph.insert_before(gather, node)
    return node.outputs[0]


def _choose(names: Names, gather: ir.Node, value: ir.Value, indices: ir.Value, axis: int, count: Dim) -> ir.Value:
    """The chosen rows of another value."""
    dims = dims_of(value) or ()
    name, shape = names.fresh(f"{value.name}.chosen"), ir.Shape([*dims[:axis], count, *dims[axis + 1 :]])
    attributes = {"axis": axis} if gather.op_type == "Gather" else {"batch_dims": 1}
    node = build(
        gather.op_type, [value, indices], like=gather, name=name, attributes=attributes, dtype=value.dtype, shape=shape
    )
    if gather.graph is None:
        raise ValueError(f"{gather.name} is in no graph")
    gather.graph.insert_before(gather, node)
    return node.outputs[0]
