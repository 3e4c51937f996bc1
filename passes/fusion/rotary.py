"""What a piece of graph does to queries or keys, read by running it: the rotation by position, and its table.

A rotary embedding (Su et al., RoFormer, 2021) turns pairs of numbers of each head by an angle that grows with the
position: ``y1 = c x1 - s x2, y2 = s x1 + c x2``, with c and s the cosine and sine, times a factor that some models put
in. Exporters spell that in a dozen ways; all of them are, at each position, a matrix ``[D, D]``. So the piece is run on
unit vectors, and its matrix is held to the form of a rotation.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from passes.affine import Floats
from passes.shapes import Dim, Dims, dims_of
from passes.sites import constant_of
from passes.surgery import is_operator

from .excerpt import Excerpt, is_told, told

Integers = NDArray[np.int64]

_MOVES = ("Reshape", "Transpose", "Unsqueeze", "Squeeze", "Expand", "Concat", "Slice", "Split", "Gather", "Tile")
_ARITHMETIC = ("Cast", "Identity", "Mul", "Div", "Add", "Sub", "Neg", "Cos", "Sin", "Floor", "Log", "MatMul")
_ALLOWED = (*_MOVES, "GatherElements", *_ARITHMETIC)
_MOST = 120
"""Nodes of the largest piece looked at; the longest spelling known has about 30."""
_CHUNK = 2048
"""Positions whose table is computed at once."""
ROUNDING = 16 * float(np.finfo(np.float32).eps)
"""By how much of their size equal sums of two products may differ; numpy's cosine differs between lanes, too."""


class NoRotationError(ValueError):
    """The piece of graph is no rotation that the operators know; the message says why."""


@dataclass(frozen=True, eq=False)
class Piece:
    """The nodes between ``source`` and ``result``, which read nothing else but positions, lengths and constants.

    Attributes:
        source: ``[batch, sequence, heads * width]``, ``[batch, heads, sequence, width]`` or ``[batch, sequence, heads,
            width]``.
        result: ``[batch, sequence, heads * width]``.
        positions: The graph input ``[batch, sequence]``, int64.
        nodes: In the order of the graph.
        lengths: Outputs of the Shape nodes that it reads.
        heads: Number of heads.
    """

    source: ir.Value
    result: ir.Value
    positions: ir.Value
    nodes: tuple[ir.Node, ...]
    lengths: tuple[ir.Value, ...]
    heads: int

    @property
    def width(self) -> int:
        """Length of a head."""
        return int(_known(self.result)[-1]) // self.heads

    @property
    def angles(self) -> tuple[ir.Value, ...]:
        """What depends on the positions alone and meets the heads: two pieces that have it in common turn alike."""
        turned, angles = {self.source}, {self.positions}
        meeting: dict[ir.Value, None] = {}
        for node in self.nodes:
            if any(value in turned for value in node.inputs):
                turned.update(node.outputs)
                meeting |= {value: None for value in node.inputs if value in angles and value is not None}
            elif any(value in angles for value in node.inputs):
                angles.update(node.outputs)
        return tuple(meeting)

    @property
    def order(self) -> str:
        """Axes of the source: "bsn", "bhsd" or "bshd"."""
        dims = _known(self.source)
        if len(dims) == 3:
            return "bsn"
        return "bhsd" if dims[1] == self.heads else "bshd"


@dataclass(frozen=True)
class Rotation:
    """Pairs of numbers of a head that are turned.

    Attributes:
        width: How many numbers of each head are turned, the first ones: twice the pairs.
        interleaved: The pairs are neighbours; else the first half is paired with the second.
    """

    width: int
    interleaved: bool

    def pairs(self) -> tuple[slice, slice]:
        """Where the first and the second numbers of the pairs lie in a head."""
        half = self.width // 2
        if self.interleaved:
            return slice(0, self.width, 2), slice(1, self.width, 2)
        return slice(0, half), slice(half, self.width)


def piece_before(result: ir.Value, heads: int) -> Piece | None:
    """The largest piece of graph that makes ``result`` from one value and positions; None where there is none.

    Args:
        result: ``[batch, sequence, heads * width]``, the first two of unknown length.
        heads: Number of heads.
    """
    dims = dims_of(result)
    if dims is None or len(dims) != 3 or not isinstance(dims[2], int) or dims[2] % heads:
        return None
    if not (isinstance(dims[0], str) and isinstance(dims[1], str)):
        return None
    width = dims[2] // heads
    merged = (dims, (dims[0], heads, dims[1], width), (dims[0], dims[1], heads, width))
    found = [value for value in _upstream(result) if value is not result and dims_of(value) in merged]
    for value in sorted(found, key=lambda value: dims_of(value) != dims):  # merged heads first, else the nearest
        piece = _cut(result, value, heads, dims[:2])
        if piece is not None:
            return piece
    return None


class Runner:
    """Runs a piece of a graph of some opset on numbers of the caller's choice."""

    def __init__(self, piece: Piece, opset: int) -> None:
        self._piece = piece
        inputs = (piece.source, piece.positions, *piece.lengths)
        self._excerpt = Excerpt(piece.nodes, inputs, [piece.result], opset)

    def __call__(self, heads: Floats, positions: Integers) -> Floats:
        """The heads after the piece.

        Args:
            heads: ``[batch, sequence, heads, width]``, float32.
            positions: ``[batch, sequence]``, int64.

        Returns:
            ``[batch, sequence, heads, width]``.

        Raises:
            NoRotationError: It has no result for these, as where it looks up positions in a shorter table.
        """
        piece, shape = self._piece, heads.shape
        given = {"bsn": heads.reshape(*shape[:2], -1), "bhsd": heads.transpose(0, 2, 1, 3), "bshd": heads}[piece.order]
        lengths: dict[Dim, int] = dict(zip((dims_of(piece.result) or ())[:2], shape[:2], strict=True))
        feeds: dict[ir.Value, NDArray[np.generic]] = {piece.source: given, piece.positions: positions}
        feeds |= {value: told(value, lengths) for value in piece.lengths}
        try:
            (result,) = self._excerpt(feeds)
        except ValueError as error:
            raise NoRotationError("what stands before it cannot be run for all positions") from error
        output: Floats = np.asarray(result, np.float32).reshape(shape)
        return output


def rotation_of(runner: Runner, heads: int, width: int, positions: Integers) -> tuple[Rotation, Floats]:
    """The rotation that the piece is, and its cosines and sines at some positions.

    Args:
        runner: Runs the piece.
        heads: Number of heads.
        width: Length of a head.
        positions: ``[P]``, the positions to look at.

    Returns:
        The rotation and ``[2, P, pairs]``.

    Raises:
        NoRotationError: It does something else to the heads, or to those of one position what depends on another.
    """
    shape = (width, positions.size, heads, width)
    units = np.broadcast_to(np.eye(width, dtype=np.float32)[:, None, None, :], shape)
    columns = runner(np.ascontiguousarray(units), np.broadcast_to(positions, shape[:2]).copy())
    if not np.allclose(columns, columns[:, :, :1], rtol=ROUNDING, atol=ROUNDING):
        raise NoRotationError("it treats the heads differently")
    matrices: Floats = np.moveaxis(columns[:, :, 0], 0, -1)
    _check_linear(runner, matrices, heads, positions)
    for rotation in _candidates(matrices):
        table = _table_in(matrices, rotation)
        if table is not None:
            return rotation, table
    raise NoRotationError("what stands before it is no rotation of pairs")


def table_of(runner: Runner, rotation: Rotation, heads: int, width: int, length: int) -> Floats:
    """Cosines and sines of the positions 0 … length - 1, ``[2, length, pairs]``, as the piece has them."""
    table = np.empty((2, length, rotation.width // 2), np.float32)
    first, second = rotation.pairs()
    for start in range(0, length, _CHUNK):
        positions = np.arange(start, min(start + _CHUNK, length), dtype=np.int64)[None]
        ones = np.zeros((1, positions.size, heads, width), np.float32)
        ones[..., first] = 1
        turned = runner(ones, positions)[0, :, 0]
        table[:, start : start + positions.size] = turned[:, first], turned[:, second]
    return table


def _check_linear(runner: Runner, matrices: Floats, heads: int, positions: Integers) -> None:
    """That random heads are multiplied by the matrices, each position also when it is alone."""
    rng = np.random.default_rng(0)
    given = rng.standard_normal((1, positions.size, heads, matrices.shape[-1])).astype(np.float32)
    wanted = np.einsum("pij,bphj->bphi", matrices.astype(np.float64), given)
    reach = ROUNDING * np.einsum("pij,bphj->bphi", np.abs(matrices), np.abs(given))
    if not np.all(np.abs(runner(given, positions[None]) - wanted) <= reach):
        raise NoRotationError("what stands before it is not linear")
    for index, position in enumerate(positions):
        alone = runner(given[:, index : index + 1], np.array([[position]], np.int64))
        if not np.all(np.abs(alone[:, 0] - wanted[:, index]) <= reach[:, index]):
            raise NoRotationError("the angles of a position depend on the other positions")


def _candidates(matrices: Floats) -> list[Rotation]:
    """Rotations it may be: of as many numbers as change, or of all."""
    width = matrices.shape[-1]
    rest = (matrices != np.eye(width, dtype=np.float32)).any(axis=(0, 2))
    turned = int(np.flatnonzero(rest)[-1]) + 1 if rest.any() else 0
    widths = dict.fromkeys((turned + turned % 2, width - width % 2))
    return [Rotation(size, interleaved) for size in widths for interleaved in (False, True) if size]


def _table_in(matrices: Floats, rotation: Rotation) -> Floats | None:
    """Cosines and sines ``[2, P, pairs]`` of matrices ``[P, D, D]``; None if they are no such rotations."""
    index = np.arange(matrices.shape[-1])
    first, second = (index[place] for place in rotation.pairs())
    cosines, sines = matrices[:, first, first], matrices[:, second, first]
    wanted = np.broadcast_to(np.eye(index.size, dtype=np.float32), matrices.shape).copy()
    wanted[:, first, first], wanted[:, second, second] = cosines, cosines
    wanted[:, first, second], wanted[:, second, first] = -sines, sines
    reach = ROUNDING * max(1.0, float(np.abs(matrices).max()))
    return np.stack([cosines, sines]) if np.allclose(wanted, matrices, rtol=0, atol=reach) else None


def _allowed(node: ir.Node) -> bool:
    """Whether the node may be part of a piece: no weights are."""
    weights = node.op_type == "MatMul" and any(value is not None and _is_weight(value) for value in node.inputs)
    return is_operator(node, *_ALLOWED) and not weights


def _is_weight(value: ir.Value) -> bool:
    tensor = constant_of(value)
    return tensor is not None and sum(dim > 1 for dim in tensor.shape.numpy()) > 1


def _upstream(result: ir.Value) -> list[ir.Value]:
    """Values that the result is made of by the operators allowed, nearest first."""
    seen, queue = {result: None}, deque([result])
    while queue and len(seen) < 4 * _MOST:
        node = queue.popleft().producer()
        if node is None or not _allowed(node):
            continue
        for value in node.inputs:
            if value is not None and value not in seen and constant_of(value) is None:
                seen[value] = None
                queue.append(value)
    return list(seen)


def _cut(result: ir.Value, source: ir.Value, heads: int, lengths: Dims) -> Piece | None:
    """The piece from ``source`` to ``result``; None if it reads more than it may, or no positions."""
    nodes: dict[ir.Node, None] = {}
    shapes: dict[ir.Value, None] = {}
    positions: dict[ir.Value, None] = {}
    reached = False
    pending = [result]
    while pending:
        value = pending.pop()
        node = value.producer()
        if value is source:
            reached = True
        elif is_operator(node, "Shape"):
            shapes[value] = None
        elif node is not None and _allowed(node) and len(nodes) < _MOST:
            if node not in nodes:
                nodes[node] = None
                pending += [item for item in node.inputs if item is not None and constant_of(item) is None]
        elif value.is_graph_input() and value.dtype == ir.DataType.INT64 and dims_of(value) == lengths:
            positions[value] = None
        else:
            return None
    known = all(is_told(value, lengths) for value in shapes)
    maker = result.producer()
    if not reached or len(positions) != 1 or not known or maker is None or maker.graph is None:
        return None
    ordered = tuple(node for node in maker.graph if node in nodes)
    return Piece(source, result, next(iter(positions)), ordered, tuple(shapes), heads)


def _known(value: ir.Value) -> tuple[int, ...]:
    """The dimensions, -1 for those of unknown length."""
    return tuple(dim if isinstance(dim, int) else -1 for dim in dims_of(value) or ())
