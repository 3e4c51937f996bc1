"""A graph run in segments, one after the other, where its weights are more than may be in memory at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from artifacts.errors import DataError

from ..graphs import GraphFolder
from .batches import Batch, Feeds, place
from .instrument import weight_bytes
from .session import KERNEL, CalibrationSession, Event

WEIGHT_SHARE = 0.2
"""Part of a cap on memory that weights may take."""
_LEAST = 10**7


def weights_at_once(memory: int) -> int:
    """Bytes of weights that may be in memory at once, but for a single operator's, under a cap on all memory."""
    return max(_LEAST, int(memory * WEIGHT_SHARE))


def heaviest(model: ir.Model) -> int:
    """Bytes of the weights of the operator that has most; tables count nothing, of which only some rows are read."""
    return max((sum(_bytes(value) for value in set(_weights(node, 0))) for node in model.graph), default=0)


def is_table(node: ir.Node, at_once: int) -> bool:
    """Whether the operator looks up rows of a constant that is larger than that many bytes."""
    table = node.inputs[0] if node.op_type == "Gather" and node.attributes.get_int("axis", 0) == 0 else None
    indices = node.inputs[1] if table is not None else None
    if table is None or not table.is_initializer() or table.const_value is None:
        return False
    if indices is None or indices.is_initializer():
        return False
    return table.const_value.dtype.bitwidth % 8 == 0 and _bytes(table) > at_once


@dataclass
class _Segment:
    """Some operators of the graph.

    Attributes:
        graph: They and their weights.
        inputs: Names of what they read that is made before.
        outputs: Names of what they make that is read later, or observed.
        done: Names of what nobody reads any more after them.
        table: The only operator, where that is a look-up in a large table.
    """

    graph: ir.Graph
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    done: tuple[str, ...]
    table: ir.Node | None = None
    path: Path | None = None


class SegmentedSession:
    """One graph on the CPU, see `CalibrationSession`, its weights in memory only as long as their segment runs.

    A graph whose weights fit is one segment, and stays loaded; others are loaded for every batch: their weights are
    mapped and not copied, so that this takes no longer than reading them. Of a table only the rows are read that are
    looked up: a map would bring large pieces of the file around each. A context manager.
    """

    def __init__(
        self,
        model: ir.Model,
        folder: GraphFolder,
        *,
        at_once: int,
        threads: int = 0,
        profile: Path | None = None,
        roomy: bool = False,
    ) -> None:
        """Nothing is loaded yet.

        Args:
            model: From `instrument`; its weights go to the folder.
            folder: Where graphs are written, and deleted.
            at_once: Bytes of weights of a segment, at most; a single operator may have more.
            threads: See `CalibrationSession`.
            profile: See `CalibrationSession`.
            roomy: See `CalibrationSession`.
        """
        self._model, self._folder, self._threads, self._profile = model, folder, threads, profile
        self._roomy = roomy
        self._outputs = [str(value.name) for value in model.graph.outputs]
        self._segments = list(_split(model, at_once))
        self._open: CalibrationSession | None = None
        self._runs: list[list[Event]] = []

    def __enter__(self) -> SegmentedSession:
        return self

    def __exit__(self, *raised: object) -> None:
        self._open = None
        for segment in self._segments:
            if segment.path is not None:
                segment.path.unlink(missing_ok=True)

    def run(self, batch: Batch) -> list[NDArray[Any]]:
        """Outputs in the order of the graph.

        Raises:
            DataError: As `CalibrationSession.run`.
            ProviderError: As `CalibrationSession`.
            OutputError: A graph cannot be written.
        """
        known: dict[str, NDArray[Any]] = dict(batch.feeds)
        events: list[Event] = []
        for segment in self._segments:
            feeds = Batch({name: known[name] for name in segment.inputs}, batch.examples)
            run = self._run if segment.table is None else self._look_up
            outputs = run(segment, feeds, events)
            known |= dict(zip(segment.outputs, outputs, strict=True))
            del feeds, outputs
            for name in segment.done:
                del known[name]
        if events and self._profile is not None:
            self._runs.append(events)
        return [known[name] for name in self._outputs]

    def profiled(self) -> list[list[Event]]:
        """The events of each run so far, in order. Needs ``profile``, and can be called once."""
        return self._runs if self._open is None else self._open.profiled()

    def _run(self, segment: _Segment, batch: Batch, events: list[Event]) -> list[NDArray[Any]]:
        session = self._open
        if session is None:
            path = self._saved(segment, batch.feeds)
            session = CalibrationSession(path, threads=self._threads, profile=self._profile, roomy=self._roomy)
        outputs = session.run(batch)
        if len(self._segments) == 1:
            self._open = session
        elif self._profile is not None:
            events += session.profiled()[0]
        return outputs

    def _look_up(self, segment: _Segment, batch: Batch, events: list[Event]) -> list[NDArray[Any]]:
        """What the operator makes, by reading single rows of the file; and an event as ONNX Runtime would give."""
        graph = ir.load(self._saved(segment, batch.feeds)).graph
        (indices,) = batch.feeds.values()
        (table,) = (value.const_value for value in graph.initializers.values())
        if not isinstance(table, ir.ExternalTensor):
            raise TypeError("a large table lies in no file")
        rows = table.shape.numpy()[0]
        beyond = indices[(indices < -rows) | (indices >= rows)]
        if beyond.size:
            reason = f"index {beyond.flat[0]} lies outside the {rows} rows of {table.name}"
            raise DataError(f"the model cannot run {place(batch.examples)}: {reason}", "Correct them")
        found = _rows(table, indices % rows)
        (node,) = graph
        sizes = {"output_size": found.nbytes, "activation_size": indices.nbytes, "input_type_shape": []}
        events.append({"cat": "Node", "name": f"{node.name}{KERNEL}", "args": sizes})
        return [found]

    def _saved(self, segment: _Segment, feeds: Feeds) -> Path:
        if segment.path is None:
            for value in segment.graph.inputs:
                value.type = ir.TensorType(ir.DataType.from_numpy(feeds[str(value.name)].dtype))
            part = ir.Model(segment.graph, ir_version=self._model.ir_version)
            segment.path = self._folder.save(part).path
        return segment.path


def _split(model: ir.Model, at_once: int) -> Iterator[_Segment]:
    graph = model.graph
    if weight_bytes(model) <= at_once:
        names = tuple(str(value.name) for value in graph.inputs)
        yield _Segment(graph, names, tuple(str(value.name) for value in graph.outputs), ())
        return
    graph.sort()
    parts = list(_parts(graph, at_once))
    places = {output: turn for turn, part in enumerate(parts) for node in part for output in node.outputs}
    reads = [dict.fromkeys(value for node in part for value in _read(node, graph)) for part in parts]
    last = {value: turn for turn, values in enumerate(reads) for value in values}
    last |= dict.fromkeys(graph.outputs, len(parts))
    for turn, values in enumerate(reads):
        before = [value for value in values if not value.is_initializer() and places.get(value, -1) < turn]
        after = [value for value, made in places.items() if made == turn and last.get(value, turn) > turn]
        if not after:  # read by nobody
            continue
        yield _Segment(
            ir.convenience.extract(graph, before, after),
            tuple(str(value.name) for value in before),
            tuple(str(value.name) for value in after),
            tuple(str(value.name) for value in before if last[value] == turn),
            parts[turn][0] if is_table(parts[turn][0], at_once) else None,
        )


def _parts(graph: ir.Graph, at_once: int) -> Iterator[list[ir.Node]]:
    """The operators in order, cut where the weights would become more than that; a look-up in a table is by itself."""
    part: list[ir.Node] = []
    held: set[ir.Value] = set()
    for node in graph:
        more = set(_weights(node, at_once))
        alone = is_table(node, at_once)
        if part and (alone or sum(map(_bytes, held | more)) > at_once):
            yield part
            part, held = [], set()
        if alone:
            yield [node]
            continue
        part.append(node)
        held |= more
    if part:
        yield part


def _weights(node: ir.Node, at_once: int) -> Iterator[ir.Value]:
    """Initializers of the graph that the operator reads, or of its branches and bodies; no table larger than that."""
    table = node.inputs[0] if is_table(node, at_once) else None
    for value in _read(node, None):
        if value.is_initializer() and value is not table:
            yield value


def _read(node: ir.Node, graph: ir.Graph | None) -> Iterator[ir.Value]:
    """What the operator reads, also within its branches and bodies: of that graph only, where one is given."""
    nodes: Sequence[ir.Node] = [node]
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            nodes = [*nodes, *attribute.as_graph().all_nodes()]
        elif attribute.type == ir.AttributeType.GRAPHS:
            nodes = [*nodes, *(inner for body in attribute.as_graphs() for inner in body.all_nodes())]
    for inner in nodes:
        for value in inner.inputs:
            if value is not None and (graph is None or value.graph is graph):
                yield value


def _rows(table: ir.ExternalTensor, indices: NDArray[Any]) -> NDArray[Any]:
    """``table[indices]``, each row read once."""
    shape, kind = table.shape.numpy()[1:], table.dtype.numpy()
    size = math.prod(shape) * kind.itemsize
    wanted, places = np.unique(indices, return_inverse=True)
    rows = np.empty((len(wanted), *shape), kind)
    with Path(table.path).open("rb", buffering=0) as file:
        for row, number in zip(rows, wanted.tolist(), strict=True):
            file.seek((table.offset or 0) + number * size)
            row[...] = np.frombuffer(file.read(size), kind).reshape(shape)
    found: NDArray[Any] = rows[places.reshape(indices.shape)]
    return found


def _bytes(value: ir.Value) -> int:
    return 0 if value.const_value is None else value.const_value.nbytes
