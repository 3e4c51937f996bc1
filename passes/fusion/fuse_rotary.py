"""fuse-rotary."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from passes.affine import Floats
from passes.base import Context, Effect, Outcome, Purpose, Refusal
from passes.shapes import permuted_from
from passes.sites import integer_attribute
from passes.splice import Names, label
from passes.surgery import MICROSOFT, build, initializer, is_operator, needed, opset, remove_dead

from .rotary import ROUNDING, Integers, NoRotationError, Piece, Rotation, Runner, piece_before, rotation_of, table_of

CONTEXT_LENGTH = "hasten.context_length"
"""Metadata of a model: how many positions it was made for, in decimal."""
_CACHES, _POSITIONS = (7, 8), 9
"""Indices of the inputs of GroupQueryAttention that hold the cosines, the sines, and the positions."""
_GRAIN = 16
"""Its kernel turns a multiple of this many numbers, of heads whose width is one."""
_SWAP = (0, 2, 1, 3)
_NORMS = ("RMSNormalization", "LayerNormalization", "SimplifiedLayerNormalization")


@dataclass(frozen=True)
class FuseRotary:
    """Let GroupQueryAttention turn queries and keys by their positions, from tables of cosines and sines.

    | before the attention                         | after                                                           |
    |----------------------------------------------|-----------------------------------------------------------------|
    | Reshape, Transpose, any spelling of rotary    | do_rotary = 1, rotary_interleaved, cos_cache and sin_cache       |
    | position embedding, Transpose, Reshape        | ``[max_positions, pairs]``, position_ids; it reads the products |
    | the same, not for its kernel                  | com.microsoft RotaryEmbedding before it, of queries and of keys  |

    The spelling does not matter: what stands between the two is run on unit vectors and must be, at each position, a
    rotation of pairs (halves or neighbours, all of a head or its first numbers); the tables are what it gives, any
    scaling of frequencies or attention in them. The kernel takes heads of a multiple of 16 numbers of which a multiple
    of 16 is turned, queries and keys alike. Of a first prompt it reads the first position only and counts up from it.

    Refused: graphs whose number of positions is not told, angles that depend on other positions (dynamic scaling),
    types other than float32. Attentions whose queries and keys are not turned, or not both, are left.

    Attributes:
        max_positions: Rows of the tables; 0: the model's metadata says it. The attention fails beyond them.
    """

    name: ClassVar[str] = "fuse-rotary"
    effect: ClassVar[Effect] = Effect.EXACT
    purpose: ClassVar[Purpose] = Purpose.SPEED

    max_positions: int = 0

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Fuse; counts the attentions."""
        changed = 0
        refused: list[Refusal] = []
        length = self.max_positions or _context_length(model)
        tables = _Tables(opset(model), length)
        for node in [node for node in model.graph if is_operator(node, "GroupQueryAttention", domain=MICROSOFT)]:
            pieces = _pieces(node)
            if pieces is None:
                continue
            if length < 1:
                remedy = f"Pass max_positions, or say it in the model's metadata as {CONTEXT_LENGTH}"
                refused.append(Refusal(label(node), "the number of positions is not told", remedy))
                continue
            try:
                _fuse(model.graph, node, pieces, tables)
            except NoRotationError as error:
                refused.append(Refusal(label(node), str(error)))
            else:
                changed += 1
        return Outcome(changed, tuple(refused))


@dataclass(eq=False)
class _Tables:
    """The tables made so far, by what reads positions in the piece that they are of."""

    opset: int
    length: int
    made: dict[tuple[ir.Value, ...], tuple[Rotation, Floats]] = field(default_factory=dict)

    def of(self, piece: Piece) -> tuple[Rotation, Floats]:
        """The rotation that the piece is, and its table ``[2, length, pairs]``.

        Raises:
            NoRotationError: It is none.
        """
        runner, key = Runner(piece, self.opset), piece.angles
        some = _some(self.length)
        rotation, seen = rotation_of(runner, piece.heads, piece.width, some)
        known = self.made.get(key)
        if known is not None and known[0] == rotation and _alike(known[1][:, some], seen):
            return rotation, known[1]
        table = table_of(runner, rotation, piece.heads, piece.width, self.length)
        self.made[key] = rotation, table
        return rotation, table


def _context_length(model: ir.Model) -> int:
    text = model.metadata_props.get(CONTEXT_LENGTH, "")
    return int(text) if text.isdecimal() else 0


def _some(length: int) -> Integers:
    """Positions to look at: the first ones, one in the middle, the last."""
    return np.unique(np.array([0, 1, 2, 7, length // 2, length - 1], np.int64).clip(0, length - 1))


def _pieces(node: ir.Node) -> tuple[Piece, Piece] | None:
    """What stands before the queries and before the keys; None where one of them is not turned."""
    if integer_attribute(node, "do_rotary", 0) or len(node.inputs) < 7 or node.inputs[1] is None:
        return None
    query = piece_before(needed(node.inputs[0]), integer_attribute(node, "num_heads", 0))
    key = piece_before(needed(node.inputs[1]), integer_attribute(node, "kv_num_heads", 0))
    return None if query is None or key is None else (query, key)


def _alike(one: Floats, other: Floats) -> bool:
    """Whether two tables are the same up to the rounding of cosines."""
    size = max(1.0, float(np.abs(one).max()))
    return one.shape == other.shape and np.allclose(one, other, rtol=0, atol=ROUNDING * size)


def _fuse(graph: ir.Graph, node: ir.Node, pieces: tuple[Piece, Piece], tables: _Tables) -> None:
    if any(piece.source.dtype != ir.DataType.FLOAT for piece in pieces):
        raise NoRotationError("its queries and keys are not of float32")
    query, key = pieces
    read = [tables.of(piece) for piece in pieces]
    (turned, table), (other, same) = read
    alike = turned == other and query.positions is key.positions and _alike(table, same)
    names, old = Names(graph), [needed(value) for value in node.inputs[:2]]
    sources = [_merged(graph, names, piece, node) for piece in pieces]
    if alike and query.width % _GRAIN == 0 and turned.width % _GRAIN == 0:
        node.resize_inputs(max(len(node.inputs), _POSITIONS + 1))
        added = (*_caches(graph, turned, table), query.positions)
        for index, value in zip((*_CACHES, _POSITIONS), added, strict=True):
            node.replace_input_with(index, value)
        node.attributes["do_rotary"] = ir.AttrInt64("do_rotary", 1)
        node.attributes["rotary_interleaved"] = ir.AttrInt64("rotary_interleaved", int(turned.interleaved))
    else:
        read[1] = read[0] if alike else read[1]
        sources = [
            _embedding(names, piece, source, rotation, _caches(graph, rotation, held), node)
            for piece, source, (rotation, held) in zip(pieces, sources, read, strict=True)
        ]
    for index, source in enumerate(sources):
        node.replace_input_with(index, source)
    remove_dead(old)


def _caches(graph: ir.Graph, turned: Rotation, table: Floats) -> tuple[ir.Value, ir.Value]:
    """The initializers of cosines and sines, ``[max_positions, pairs]``; those there are already if they are equal."""
    suffix = f"{table.shape[1]}.{turned.width}"
    cosines, sines = (
        initializer(graph, f"rotary.{name}.{suffix}", table[index], ir.DataType.FLOAT)
        for index, name in enumerate(("cos", "sin"))
    )
    return cosines, sines


def _embedding(
    names: Names, piece: Piece, source: ir.Value, turned: Rotation, caches: tuple[ir.Value, ir.Value], node: ir.Node
) -> ir.Value:
    """The heads turned by an operator of their own."""
    attributes = {"interleaved": int(turned.interleaved), "num_heads": piece.heads}
    if turned.width < piece.width:
        attributes["rotary_embedding_dim"] = turned.width
    result, name = piece.result, names.fresh(f"{piece.result.name}.rotary")
    inputs = [source, piece.positions, *caches]
    made = build("RotaryEmbedding", inputs, like=node, name=name, domain=MICROSOFT, attributes=attributes)
    return _before(node, made, result)


def _merged(graph: ir.Graph, names: Names, piece: Piece, node: ir.Node) -> ir.Value:
    """The source of a piece as ``[batch, sequence, heads * width]``."""
    source, order = piece.source, piece.order
    if order == "bsn":
        return source
    if order == "bhsd":
        source = _unswapped(source, node) or _before(node, _swap(source, names, node), None)
    target = [0, 0, piece.heads * piece.width]
    shape = initializer(graph, f"shape.0.0.{target[2]}", target, ir.DataType.INT64)
    name = names.fresh(f"{piece.result.name}.merged")
    return _before(node, build("Reshape", [source, shape], like=node, name=name), piece.result)


def _unswapped(value: ir.Value, node: ir.Node) -> ir.Value | None:
    """``[batch, sequence, heads, width]`` of which the value is made by a Transpose, with or without a norm behind it.

    A norm over the last axis does not care: it is made anew before the Transpose.
    """
    source, norm = permuted_from(value, _SWAP), value.producer()
    if source is not None or norm is None or not is_operator(norm, *_NORMS):
        return source
    before = permuted_from(norm.inputs[0], _SWAP)
    if before is None or integer_attribute(norm, "axis", -1) not in (-1, 3):
        return None
    attributes = {name: attribute.value for name, attribute in norm.attributes.items()} | {"axis": -1}
    inputs, name = [before, *norm.inputs[1:]], f"{value.name}.unswapped"
    return _before(node, build(norm.op_type, inputs, like=norm, name=name, attributes=attributes), before)


def _swap(source: ir.Value, names: Names, node: ir.Node) -> ir.Node:
    name, dims = names.fresh(f"{source.name}.swapped"), list(source.shape or ())
    shape, dtype = ir.Shape([dims[axis] for axis in _SWAP]), source.dtype
    return build("Transpose", [source], like=node, name=name, attributes={"perm": _SWAP}, dtype=dtype, shape=shape)


def _before(node: ir.Node, made: ir.Node, like: ir.Value | None) -> ir.Value:
    """Put a new node before another; what it makes has the type and shape of ``like``."""
    value = made.outputs[0]
    if like is not None:
        value.type, value.shape = like.type, None if like.shape is None else like.shape.copy()
    if node.graph is None:
        raise ValueError(f"{node.name} is in no graph")
    node.graph.insert_before(node, made)
    return value
