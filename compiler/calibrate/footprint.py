"""How much memory a run of a graph takes, for any size of batch, learnt from runs of one and two examples."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ..graphs import GraphFolder
from .batches import Survey
from .instrument import instrument, weight_bytes
from .segments import SegmentedSession, heaviest
from .session import KERNEL, Event

_ATTENTION = {"MultiHeadAttention", "Attention", "GroupQueryAttention"}
_FLOAT_BYTES = 4


@dataclass(frozen=True)
class Footprint:
    """What a graph holds in memory while it runs.

    Sizes are bytes at one of the smallest examples, two of them, and one of the largest. Between the two the chord is
    taken: sizes grow as sums of powers of the length, which are convex, so it lies above. Sizes that two examples
    leave as they are belong to the graph, the others to each example.

    Attributes:
        weights: Bytes of its weights.
        heaviest: Bytes of the weights of the operator that has most.
        elements: Elements of the feeds of the smallest and the largest example.
        made: What each node makes, float64 [nodes, 3], in the order of execution.
        extra: What it holds besides while it runs, float64 [nodes, 3].
        last: Where what it makes is read last, int64 [nodes].
        values: What each observed value takes, float64 [values, 3].
        places: Where each observed value is made, int64 [values]; 0 for inputs.
        channels: Extent of the last axis of each observed value; 0 where it is not the same for all examples.
    """

    weights: int
    heaviest: int
    elements: tuple[int, int]
    made: NDArray[np.float64]
    extra: NDArray[np.float64]
    last: NDArray[np.int64]
    values: NDArray[np.float64]
    places: NDArray[np.int64]
    channels: tuple[int, ...]

    def peak(self, examples: int, elements: int, kept: Sequence[int]) -> float:
        """Bytes that a run takes at its height, weights aside.

        Args:
            examples: In the batch.
            elements: Of the feeds of one of them.
            kept: Indices of the observed values that are held until the end of the run.
        """
        nodes = len(self.made)
        made = self._sizes(self.made, examples, elements)
        change = np.zeros(nodes + 2)
        change[:nodes] += made
        np.subtract.at(change, self.last + 1, made)
        held = self._sizes(self.values[list(kept)], examples, elements)
        np.add.at(change, self.places[list(kept)], held)
        live = np.cumsum(change)[: nodes + 1]
        live[:nodes] += self._sizes(self.extra, examples, elements)
        return float(live.max())

    def _sizes(self, table: NDArray[np.float64], examples: int, elements: int) -> NDArray[np.float64]:
        one, two, large = table.T
        low, high = self.elements
        share = (elements - low) / (high - low) if high > low else 0.0
        size: NDArray[np.float64] = one + share * np.maximum(large - one, 0.0)
        size[two > one] *= examples
        return size


def measure(
    model: ir.Model,
    values: Sequence[ir.Value],
    found: Survey,
    folder: GraphFolder,
    *,
    rows_apart: bool,
    threads: int,
    at_once: int,
) -> Footprint:
    """Run the graph on its smallest and its largest example without keeping anything.

    Raises:
        ProviderError: ONNX Runtime cannot run it.
    """
    graph = instrument(model, values, shapes=True)
    small, large = found.smallest, found.largest
    probes = [small, small.twice() if rows_apart else small, large]
    with (
        tempfile.TemporaryDirectory(prefix="hasten-") as profiles,
        SegmentedSession(graph, folder, at_once=at_once, threads=threads, profile=Path(profiles)) as session,
    ):
        shapes = [session.run(one) for one in probes]
        runs = session.profiled()
    nodes = {node.name or "": node for node in graph.graph}
    order = [name for name in (_name(event) for event in runs[0]) if name in nodes]
    places = {name: index for index, name in enumerate(order)}
    made, extra = zip(*(_sizes_of(events, nodes, places) for events in runs), strict=True)
    sizes = np.array([[math.prod(shape.tolist()) * _FLOAT_BYTES for shape in run] for run in shapes], np.float64)
    makers = [output.producer().inputs[0].producer() for output in graph.graph.outputs]  # type: ignore[union-attr]
    return Footprint(
        weights=weight_bytes(graph),
        heaviest=heaviest(graph),
        elements=(small.elements, large.elements),
        made=np.stack(made, axis=1),
        extra=np.stack(extra, axis=1),
        last=np.array([_last_use(nodes[name], places) for name in order], np.int64),
        values=sizes.T,
        places=np.array([places.get(maker.name or "", 0) if maker is not None else 0 for maker in makers], np.int64),
        channels=tuple(_channels([run[index] for run in shapes]) for index in range(len(values))),
    )


def _name(event: Event) -> str:
    """Of the node whose kernel ran; empty for other events."""
    name = str(event["name"])
    return name.removesuffix(KERNEL) if event.get("cat") == "Node" and name.endswith(KERNEL) else ""


def _sizes_of(
    events: list[Event], nodes: dict[str, ir.Node], places: dict[str, int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What each node made and held besides in one run, float64 [nodes] each.

    A kernel is taken to copy what it reads and makes once. Nodes that are not of the main graph, those inside branches
    and casts that ONNX Runtime adds, count for the node after them.
    """
    made, extra = np.zeros(len(places)), np.zeros(len(places))
    inner: dict[str, float] = {}
    for event in events:
        name = _name(event)
        if not name:
            continue
        size = float(event["args"]["output_size"])
        if name not in places:
            inner[name] = max(size, inner.get(name, 0.0))
            continue
        made[places[name]] = size
        read = float(event["args"]["activation_size"])
        extra[places[name]] = size + read + _scores(nodes[name], event) + sum(inner.values())
        inner = {}
    return made, extra


def _scores(node: ir.Node, event: Event) -> float:
    """Bytes of the scores that a fused attention makes within: [batch, heads, length, keys] float32, and once more."""
    if node.op_type not in _ATTENTION:
        return 0.0
    shapes: list[list[int]] = [next(iter(kind.values())) for kind in event["args"]["input_type_shape"] if kind]
    heads = node.attributes.get_int("num_heads", node.attributes.get_int("q_num_heads", 1))
    query = shapes[0]
    keys = shapes[1] if node.op_type == "MultiHeadAttention" and len(shapes) > 1 and len(shapes[1]) > 2 else query
    return 2.0 * _FLOAT_BYTES * heads * math.prod((query[0], query[-2], keys[-2]))


def _last_use(node: ir.Node, places: dict[str, int]) -> int:
    """Where what the node makes is read last; the end, where that is inside a branch."""
    readers = [user for output in node.outputs for user, _ in output.uses()]
    return max((places.get(user.name or "", len(places)) for user in readers), default=places[node.name or ""])


def _channels(shapes: list[NDArray[np.int64]]) -> int:
    extents = {int(shape[-1]) if len(shape) else 1 for shape in shapes}
    return extents.pop() if len(extents) == 1 else 0
