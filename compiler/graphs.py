"""Writes a graph as ONNX Runtime loads it from a bundle: small tensors inline, large ones in shared weight files."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from artifacts.bundle import WeightStore

EXTERNAL_FROM = 16 * 1024
"""Tensors of at least this many bytes get a weight file of their own."""


@dataclass(frozen=True)
class SavedGraph:
    """A graph on disk.

    Attributes:
        path: The ``.onnx`` file; its weights lie beside it in ``weights/``.
        weights: Paths of the weight files it references, relative to its folder, sorted.
        size: Bytes of graph and weights together.
    """

    path: Path
    weights: tuple[str, ...]
    size: int


@dataclass
class GraphFolder:
    """A folder of graphs that share content-addressed weights. Saving a graph again costs only what changed in it.

    Attributes:
        path: The folder.
    """

    path: Path
    _saved: int = 0
    _known: dict[int, tuple[weakref.ref[ir.TensorProtocol], ir.ExternalTensor, int]] = field(default_factory=dict)

    def save(self, model: ir.Model) -> SavedGraph:
        """Write ``model`` under a new name. Its large tensors are replaced, in place, by maps of the written files."""
        store = WeightStore(self.path / "weights")
        sizes: dict[str, int] = {}
        for value in (value for graph in model.graphs() for value in graph.initializers.values()):
            tensor = value.const_value
            if tensor is None:
                continue
            if tensor.nbytes >= EXTERNAL_FROM:
                stored, size = self._store(store, tensor)
                value.const_value = stored
                sizes[str(stored.location)] = size
            elif isinstance(tensor, ir.ExternalTensor):  # in the data file of the source, which does not come along
                value.const_value = ir.tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=tensor.name)
        data = ir.to_proto(model).SerializeToString(deterministic=True)
        self._saved += 1
        path = self.path / f"trial-{self._saved}.onnx"
        path.write_bytes(data)
        return SavedGraph(path, tuple(sorted(sizes)), len(data) + sum(sizes.values()))

    def _store(self, store: WeightStore, tensor: ir.TensorProtocol) -> tuple[ir.ExternalTensor, int]:
        known = self._known.get(id(tensor))
        # Held weakly, or every weight that a rejected change made would stay in memory; an id may be another's by now.
        if known is None or known[0]() is not tensor:
            entry = store.put(tensor.tobytes())
            stored = ir.ExternalTensor(
                entry.path,
                0,
                entry.size,
                dtype=tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=tensor.name or "",
                base_dir=self.path,
            )
            known = (weakref.ref(tensor), stored, entry.size)
            self._known |= {id(tensor): known, id(stored): (weakref.ref(stored), stored, entry.size)}
        return known[1], known[2]
