"""Static scales for a KV cache of few bits: how large the keys and values get that an attention keeps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from passes.base import Observe
from passes.shapes import dims_of
from passes.sites import integer_attribute
from passes.splice import Names, add_constant
from passes.statistics import Activation
from passes.surgery import MICROSOFT, build, is_operator

Floats = NDArray[np.float32]
_KEY, _VALUE = 1, 2
"""Outputs of GroupQueryAttention: present keys and values, ``[batch, kv_heads, capacity, width]``."""
_COSINES = 7
_BEHIND_EACH_OTHER = (0, 2, 1, 3)
_DIAGONAL = np.float32(np.sqrt(2.0))


def cache_scales(
    model: ir.Model, attentions: Sequence[ir.Node], observe: Observe, largest: int
) -> Iterator[tuple[Floats, Floats]]:
    """Scales of keys and values for each attention, so that what calibration saw fits into ``[-largest, largest]``.

    A key that was turned by its position holds ``r cos(p)`` and ``r sin(p)`` in two channels: which of them is large
    depends on how far the calibration's texts reach, so both get the scale of r.

    Args:
        model: As it is; a copy of it is observed.
        attentions: GroupQueryAttention nodes of its main graph, whose caches are floats.
        observe: As a pass is lent it.
        largest: Code of the largest magnitude.

    Yields:
        (scales of keys, scales of values), each float32 [kv_heads, 1, width]; 1 for channels that are always 0.
    """
    copy = model.clone()
    twins = dict(zip(model.graph, copy.graph, strict=True))
    names = Names(copy.graph)
    partners = [_partners(node) for node in attentions]
    views = [
        (
            _channels(copy.graph, names, twins[node], _KEY, found),
            _channels(copy.graph, names, twins[node], _VALUE, None),
        )
        for node, found in zip(attentions, partners, strict=True)
    ]
    seen = observe(copy, [view for pair in views for view in pair])
    for node, (key, value), found in zip(attentions, views, partners, strict=True):
        heads = integer_attribute(node, "kv_num_heads", 1)
        keys, values = (_reach(seen[str(view.name)], heads) for view in (key, value))
        yield _scales(_turned(keys, found), largest), _scales(values, largest)


def _partners(node: ir.Node) -> NDArray[np.int64] | None:
    """The channel that each channel of a key is turned with, itself where it is not; None where that is not known."""
    maker = node.inputs[1].producer() if node.inputs[1] is not None else None
    cache = dims_of(node.outputs[_KEY])
    if integer_attribute(node, "do_rotary", 0):
        table, interleaved = node.inputs[_COSINES], integer_attribute(node, "rotary_interleaved", 0)
    elif maker is not None and is_operator(maker, "RotaryEmbedding", domain=MICROSOFT):
        table, interleaved = maker.inputs[2], integer_attribute(maker, "interleaved", 0)
    else:
        return None
    dims = dims_of(table)
    if dims is None or cache is None or not isinstance(dims[-1], int) or not isinstance(cache[3], int):
        return None
    index, pairs = np.arange(cache[3]), dims[-1]
    partner = index ^ 1 if interleaved else (index + pairs) % (2 * pairs)
    return np.where(index < 2 * pairs, partner, index).astype(np.int64)


def _channels(
    graph: ir.Graph, names: Names, node: ir.Node, output: int, partners: NDArray[np.int64] | None
) -> ir.Value:
    """What a cache holds as ``[batch, capacity, kv_heads * width]``; the radius of each pair where it has partners."""
    value = node.outputs[output]
    base = str(value.name)

    def then(op_type: str, *inputs: ir.Value, **attributes: int | Sequence[int]) -> ir.Value:
        name = names.fresh(f"{base}.{op_type}")
        made = build(op_type, inputs, like=node, name=name, attributes=attributes, dtype=value.dtype)
        graph.append(made)
        return made.outputs[0]

    if partners is not None:
        other = then("Gather", value, add_constant(graph, names.fresh(f"{base}.partners"), partners), axis=3)
        value = then("Sqrt", then("Add", then("Mul", value, value), then("Mul", other, other)))
    rows = then("Transpose", value, perm=_BEHIND_EACH_OTHER)
    return then("Reshape", rows, add_constant(graph, names.fresh(f"{base}.rows"), np.array([0, 0, -1])))


def _reach(seen: Activation, heads: int) -> Floats:
    """Largest magnitude of each channel, ``[heads, width]``."""
    reach: Floats = np.maximum(-seen.low, seen.high).reshape(heads, -1)
    return reach


def _turned(reach: Floats, partners: NDArray[np.int64] | None) -> Floats:
    """The same at any position. Of keys that are turned in a way that is not known: what any two channels can make."""
    if partners is None:
        return np.broadcast_to(reach.max(axis=1, keepdims=True) * _DIAGONAL, reach.shape)
    return np.where(partners == np.arange(len(partners)), reach / _DIAGONAL, reach)


def _scales(reach: Floats, largest: int) -> Floats:
    scales = np.where(reach > 0, reach / np.float32(largest), np.float32(1.0))
    return scales.astype(np.float32)[:, None, :]
