"""Writes a graph as ONNX Runtime loads it from a bundle: small tensors inline, large ones in shared weight files."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from artifacts.bundle import WeightStore
from passes.deferred import DeferredTensor

EXTERNAL_FROM = 16 * 1024
"""Tensors of at least this many bytes get a weight file of their own."""


class SavedGraph:
    """A graph on disk; or, while it is pending, one that will be there as soon as somebody asks where.

    Attributes:
        size: Bytes of graph and weights together; while it is pending, of its large weights.
    """

    def __init__(
        self,
        path: Path,
        weights: tuple[str, ...],
        size: int,
        write: Callable[[], tuple[tuple[str, ...], int]] | None = None,
    ) -> None:
        """``write`` writes what is pending and gives weights and size."""
        self._path = path
        self._weights = weights
        self._write = write
        self.size = size

    @property
    def pending(self) -> bool:
        """Whether weights that are deferred wait in the files of the source, and nothing is written yet."""
        return self._write is not None

    @property
    def path(self) -> Path:
        """The ``.onnx`` file; its weights lie beside it in ``weights/``."""
        self._settle()
        return self._path

    @property
    def weights(self) -> tuple[str, ...]:
        """Paths of the weight files it references, relative to its folder, sorted."""
        self._settle()
        return self._weights

    def _settle(self) -> None:
        if self._write is not None:
            self._weights, self.size = self._write()
            self._write = None


@dataclass
class GraphFolder:
    """A folder of graphs that share content-addressed weights. Saving a graph again costs only what changed in it.

    Attributes:
        path: The folder.
    """

    path: Path
    _saved: int = 0
    _known: dict[int, tuple[weakref.ref[ir.TensorProtocol], ir.ExternalTensor]] = field(default_factory=dict)

    def save(self, model: ir.Model) -> SavedGraph:
        """Write ``model`` under a new name. Its large tensors are replaced, in place, by maps of the written files.

        Tensors that are deferred stay so, and the graph is pending: a float32 graph of weights that wait in a
        checkpoint would take twice the checkpoint's size, and often nobody runs it.
        """
        self._saved += 1
        path = self.path / f"trial-{self._saved}.onnx"
        waiting = self._replace(model, lambda tensor: not isinstance(tensor, DeferredTensor))
        if not waiting:
            weights, size = self._write(model, path)
            return SavedGraph(path, weights, size)
        copy = model.clone()
        return SavedGraph(path, (), _large_bytes(model), lambda: self._write(copy, path))

    def _write(self, model: ir.Model, path: Path) -> tuple[tuple[str, ...], int]:
        self._replace(model, lambda _: True)
        sizes = {
            str(tensor.location): tensor.length or 0
            for value in _initializers(model)
            if isinstance(tensor := value.const_value, ir.ExternalTensor)
        }
        data = ir.to_proto(model).SerializeToString(deterministic=True)
        path.write_bytes(data)
        return tuple(sorted(sizes)), len(data) + sum(sizes.values())

    def _replace(self, model: ir.Model, chosen: Callable[[ir.TensorProtocol], bool]) -> int:
        """Let large tensors be maps of their files, written where need be; how many were not chosen."""
        store = WeightStore(self.path / "weights")
        left = 0
        for value in _initializers(model):
            tensor = value.const_value
            if tensor is None:
                continue
            if tensor.nbytes >= EXTERNAL_FROM:
                if chosen(tensor):
                    value.const_value = self._store(store, tensor)
                else:
                    left += 1
            elif isinstance(tensor, ir.ExternalTensor):  # in the data file of the source, which does not come along
                value.const_value = ir.tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=tensor.name)
        return left

    def _store(self, store: WeightStore, tensor: ir.TensorProtocol) -> ir.ExternalTensor:
        known = self._known.get(id(tensor))
        # Held weakly, or every weight that a rejected change made would stay in memory; an id may be another's by now.
        if known is None or known[0]() is not tensor:
            entry = store.put(_content(tensor))
            stored = ir.ExternalTensor(
                entry.path,
                0,
                entry.size,
                dtype=tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=tensor.name or "",
                base_dir=self.path,
            )
            known = (weakref.ref(tensor), stored)
            self._known |= {id(tensor): known, id(stored): (weakref.ref(stored), stored)}
        return known[1]


def _initializers(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        yield from graph.initializers.values()


def _large_bytes(model: ir.Model) -> int:
    tensors = {id(value.const_value): value.const_value for value in _initializers(model)}
    return sum(tensor.nbytes for tensor in tensors.values() if tensor is not None and tensor.nbytes >= EXTERNAL_FROM)


def _content(tensor: ir.TensorProtocol) -> memoryview | bytes:
    """The bytes, without a second copy of what is made to be read once."""
    return tensor.contiguous().data if isinstance(tensor, DeferredTensor) else tensor.tobytes()
