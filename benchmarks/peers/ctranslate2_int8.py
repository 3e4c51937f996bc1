"""CTranslate2's encoder with int8 weights and activations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from protocol import Block, Ids, Peer, Server, Setting, Tokenized, Vectors, cores, pool, serve

TYPES = ("int8", "int8_float32", "int8_bfloat16")


class CTranslate2(Peer):
    """See the module."""

    packages = ("ctranslate2", "transformers", "torch")

    def load(self, model: Path, texts: Sequence[str], work: Path) -> Mapping[str, Callable[[], Setting]]:
        """All threads on one batch or a batch each; what is not int8 in every type that this CPU has."""
        import ctranslate2
        from ctranslate2.converters import TransformersConverter

        path = work / "int8"
        if not path.is_dir():
            TransformersConverter(str(model)).convert(str(path), quantization="int8")
        known = ctranslate2.get_supported_compute_types("cpu")
        return {
            f"{kind}, {workers} x {cores() // workers} threads": partial(Encoder, model, path, kind, workers)
            for kind in TYPES
            if kind in known
            for workers in sorted({1, cores()})
        }


class Encoder(Tokenized):
    """An encoder with some workers, each with its share of the cores."""

    def __init__(self, model: Path, path: Path, kind: str, workers: int) -> None:
        import ctranslate2

        super().__init__(model)
        threads = max(1, cores() // workers)
        self._encoder = ctranslate2.Encoder(
            str(path), device="cpu", compute_type=kind, inter_threads=workers, intra_threads=threads
        )
        self._workers = workers
        self._pool = ThreadPoolExecutor(workers)

    def vectors(self, ids: Ids, mask: Ids) -> Vectors:
        """See `Setting.vectors`."""
        if self._workers == 1 or len(ids) == 1:
            return self._one(ids, mask)
        parts = [part for part in np.array_split(np.arange(len(ids)), self._workers) if len(part)]
        return np.concatenate(list(self._pool.map(lambda part: self._one(ids[part], mask[part]), parts)))

    def run(self, blocks: Iterable[Block]) -> Iterator[tuple[list[int], Vectors]]:
        """See `Tokenized.run`."""
        yield from self._pool.map(lambda block: (block[0], self._one(block[1], block[2])), blocks)

    def _one(self, ids: Ids, mask: Ids) -> Vectors:
        import ctranslate2

        view = ctranslate2.StorageView.from_array(ids.astype(np.int32))
        lengths = ctranslate2.StorageView.from_array(mask.sum(1).astype(np.int32))
        hidden = self._encoder.forward_batch(view, lengths).last_hidden_state
        return pool(np.array(hidden), mask)


if __name__ == "__main__":
    serve(Server(CTranslate2()))
