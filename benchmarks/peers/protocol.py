"""The peer's side of docs/peers.md, for peers that try several settings and keep the best. Imports nothing of hasten.

A peer script defines a `Peer` whose `load` gives its settings, and ends in ``serve(Server(MyPeer()))``. It reads
requests from stdin, or loads at once when started with ``--model``. What libraries print to stdout goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shutil
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, BinaryIO, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Vectors = NDArray[np.float32]
Block = tuple[list[int], Ids, Ids]
"""Rows of some texts: where they stand in the list, ids [rows, longest], and 1 where there is a token."""
Kind = TypeVar("Kind")
Kind_co = TypeVar("Kind_co", covariant=True)
Operation = Callable[[Mapping[str, Any]], dict[str, Any]]

BATCHES = (16, 32, 64)
"""Rows a batch that are tried on text."""
CALIBRATION_SENTENCES = 300
_SEED = 20
_MINIMUM_CALLS = 3
_TRIAL_SECONDS = 0.25
_TRIAL_TEXTS = 256
_FINALISTS = 3
_FINAL_TURNS = 2


class Setting(ABC):
    """One way to run the model.

    Attributes:
        batches: Rows a batch to try on text.
        shapes: Whether it takes part in timing of fixed shapes.
        texts: Whether it takes part in embedding of texts.
    """

    batches: tuple[int, ...] = BATCHES
    shapes: bool = True
    texts: bool = True

    @abstractmethod
    def vectors(self, ids: Ids, mask: Ids) -> Vectors:
        """From ids and mask, int64 [n, length], to vectors of length 1, float32 [n, d]."""

    @abstractmethod
    def embed(self, texts: Sequence[str], batch: int) -> Vectors:
        """From strings to vectors of length 1, float32 [n, d], in the order given."""


class Tokenized(Setting):
    """A setting of a runtime that knows no strings: tokenizes all texts at once, sorts by length, pads in batches."""

    def __init__(self, model: Path) -> None:
        self._model = model

    @cached_property
    def tokenizer(self) -> Any:
        """See `read_tokenizer`."""
        return read_tokenizer(self._model)

    def embed(self, texts: Sequence[str], batch: int) -> Vectors:
        """See `Setting.embed`."""
        rows = [encoding.ids for encoding in self.tokenizer.encode_batch_fast(list(texts))]
        found: Vectors | None = None
        for indices, vectors in self.run(_blocks(rows, batch)):
            if found is None:
                found = np.empty((len(rows), vectors.shape[1]), np.float32)
            found[indices] = vectors
        return np.empty((0, 0), np.float32) if found is None else found

    def run(self, blocks: Iterable[Block]) -> Iterator[tuple[list[int], Vectors]]:
        """The vectors of each block; a runtime that computes several at a time overrides it."""
        for indices, ids, mask in blocks:
            yield indices, self.vectors(ids, mask)


class Peer(ABC):
    """A package at its best.

    Attributes:
        packages: Distributions whose versions are told.
    """

    packages: tuple[str, ...] = ()

    @abstractmethod
    def load(self, model: Path, texts: Sequence[str], work: Path) -> Mapping[str, Callable[[], Setting]]:
        """What may be tried: name -> makes it ready. Each is called once; one that raises is told and left out.

        Args:
            model: A sentence-transformers folder.
            texts: For calibration; may be empty.
            work: A folder for what takes long to make; the next start of this peer finds it there.
        """

    def vocabulary(self, model: Path) -> int:
        """How many token ids the model knows."""
        return int(json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"])


class Loads(Protocol[Kind_co]):
    """What a server asks of a peer: `Peer`, or another benchmark's."""

    @property
    def packages(self) -> tuple[str, ...]:
        """See `Peer`."""
        ...

    def load(self, model: Path, texts: Sequence[str], work: Path) -> Mapping[str, Callable[[], Kind_co]]:
        """See `Peer.load`."""
        ...

    def vocabulary(self, model: Path) -> int:
        """See `Peer.vocabulary`."""
        ...


class Answering(ABC, Generic[Kind]):
    """Answers requests, one JSON object each: what the servers of all benchmarks share."""

    def __init__(self, peer: Loads[Kind]) -> None:
        self._peer = peer
        self._settings: dict[str, Kind] = {}
        self._vocabulary = 0
        self._chosen: dict[object, tuple[str, dict[str, float]]] = {}

    @abstractmethod
    def operations(self) -> dict[str, Operation]:
        """What it answers besides ``load``."""

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The reply; whatever goes wrong in a package is told, not raised."""
        operations = {"load": self._load, **self.operations()}
        try:
            return {"ok": True, **operations[request["op"]](request)}
        except Exception as error:  # noqa: BLE001 - a package may raise anything, and the asker wants one line
            return {"ok": False, "error": one_line(error)}

    def _load(self, request: Mapping[str, Any]) -> dict[str, Any]:
        start = time.perf_counter()
        model, work = Path(request["model"]), Path(request["work"])
        work.mkdir(parents=True, exist_ok=True)
        texts = read_lines(Path(request["texts"]))[:CALIBRATION_SENTENCES] if request.get("texts") else []
        failed = {}
        for name, make in self._peer.load(model, texts, work).items():
            try:
                self._settings[name] = make()
            except Exception as error:  # noqa: BLE001 - one setting that does not work here is no reason to give up
                failed[name] = one_line(error)
        if not self._settings:
            raise RuntimeError(f"no setting works: {failed}")
        self._vocabulary = self._peer.vocabulary(model)
        versions = {name: version(name) for name in self._peer.packages}
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "settings": list(self._settings), "failed": failed, "versions": versions}


class Server(Answering[Setting]):
    """Times shapes and embeds texts."""

    def operations(self) -> dict[str, Operation]:
        """See `Answering`."""
        return {"time": self._time, "embed": self._embed}

    def _time(self, request: Mapping[str, Any]) -> dict[str, Any]:
        shape = int(request["batch"]), int(request["length"])
        ids, mask = inputs(*shape, self._vocabulary)
        if shape not in self._chosen:
            self._chosen[shape] = best_of(
                {
                    name: lambda setting=setting: median(calls(setting, ids, mask, _TRIAL_SECONDS))  # type: ignore[misc]
                    for name, setting in self._loaded().items()
                    if setting.shapes
                }
            )
        chosen, tried = self._chosen[shape]
        seconds = calls(self._settings[chosen], ids, mask, float(request["seconds"]))
        return {"seconds": seconds, "chosen": chosen, "tried": tried}

    def _embed(self, request: Mapping[str, Any]) -> dict[str, Any]:
        texts = read_lines(Path(request["texts"]))
        ways = {
            f"{name}, {batch} rows" if batch else name: (setting, batch)
            for name, setting in self._loaded().items()
            if setting.texts
            for batch in setting.batches
        }
        if "texts" not in self._chosen:
            sample = texts[:: max(1, len(texts) // _TRIAL_TEXTS)]
            self._chosen["texts"] = best_of({name: _embedding(*way, sample) for name, way in ways.items()})
        chosen, tried = self._chosen["texts"]
        setting, batch = ways[chosen]
        start = time.perf_counter()
        vectors = setting.embed(texts, batch)
        seconds = time.perf_counter() - start
        np.save(request["out"], np.asarray(vectors, np.float32))
        return {"seconds": seconds, "chosen": chosen, "tried": tried}

    def _loaded(self) -> dict[str, Setting]:
        if not self._settings:
            raise RuntimeError("nothing was loaded")
        return self._settings


def serve(server: Answering[Any]) -> None:
    """Answer requests until ``exit`` or the end of stdin, which ends the process whatever it is doing."""
    options = _arguments()
    answers = _protect_stdout()
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="peer-", ignore_cleanup_errors=True) as folder:
        threading.Thread(target=_listen, args=(requests, folder), daemon=True).start()
        failed = None
        if options.model:
            loaded = server.answer({"op": "load", "work": folder, **vars(options)})
            failed = None if loaded["ok"] else loaded
        while (request := json.loads(requests.get()))["op"] != "exit":
            answers.write(json.dumps(failed or server.answer(request)).encode() + b"\n")
    os._exit(0)  # the destructors of native libraries have crashed at interpreter exit; nothing here needs them


def best_of(ways: Mapping[str, Callable[[], float]]) -> tuple[str, dict[str, float]]:
    """The name of the fastest way, and the milliseconds of each.

    Each is called twice, the first time to warm up; the three fastest are called again in turn, and the best time of
    each counts.
    """
    tried = {}
    for name, measure in ways.items():
        measure()
        tried[name] = measure()
    for name in sorted(tried, key=tried.__getitem__)[:_FINALISTS] * _FINAL_TURNS if len(tried) > 1 else ():
        tried[name] = min(tried[name], ways[name]())
    return min(tried, key=tried.__getitem__), {name: 1e3 * seconds for name, seconds in tried.items()}


def calls(setting: Setting, ids: Ids, mask: Ids, seconds: float) -> list[float]:
    """Seconds of each call, for about ``seconds``."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < _MINIMUM_CALLS or time.perf_counter() < end:
        start = time.perf_counter()
        setting.vectors(ids, mask)
        times.append(time.perf_counter() - start)
    return times


def inputs(batch: int, length: int, vocabulary: int) -> tuple[Ids, Ids]:
    """Random ids, the same for the same shape, and a mask of ones: int64 [batch, length]."""
    low, high = min(1000, vocabulary // 2), max(vocabulary, 2)
    ids = np.random.default_rng(_SEED).integers(low, high, (batch, length), np.int64)
    return ids, np.ones((batch, length), np.int64)


def pool(hidden: NDArray[Any], mask: Ids) -> Vectors:
    """Mean over the attended tokens, of length 1: float32 [n, d] from [n, length, d]."""
    weights = mask.astype(np.float32)
    summed = np.matmul(weights[:, None, :], hidden)[:, 0]
    return unit(summed / np.maximum(weights.sum(1, keepdims=True), 1e-9))


def unit(vectors: NDArray[Any]) -> Vectors:
    """Rows of length 1, float32."""
    lengths = np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return np.asarray(vectors / lengths, np.float32)


def read_tokenizer(model: Path) -> Any:
    """The model's tokenizer, truncating as sentence-transformers does, padding nothing."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(longest(model))
    return tokenizer


def longest(model: Path) -> int:
    """Most tokens of a text, as sentence-transformers reads it."""
    path = model / "sentence_bert_config.json"
    return int(json.loads(path.read_text())["max_seq_length"]) if path.is_file() else 512


def read_lines(path: Path) -> list[str]:
    """One text a line."""
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def one_line(error: BaseException) -> str:
    """What went wrong."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _embedding(setting: Setting, batch: int, texts: Sequence[str]) -> Callable[[], float]:
    def measure() -> float:
        start = time.perf_counter()
        setting.embed(texts, batch)
        return time.perf_counter() - start

    return measure


def _blocks(rows: Sequence[Sequence[int]], batch: int) -> Iterator[Block]:
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    for start in range(0, len(order), batch):
        indices = order[start : start + batch]
        ids = np.zeros((len(indices), max(1, len(rows[indices[0]]))), np.int64)
        mask = np.zeros_like(ids)
        for row, index in enumerate(indices):
            ids[row, : len(rows[index])] = rows[index]
            mask[row, : len(rows[index])] = 1
        yield indices, ids, mask


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A peer of docs/peers.md; it reads requests from standard input.")
    parser.add_argument("--model", help="load this sentence-transformers folder at once")
    parser.add_argument("--texts", help="calibrate on the lines of this file")
    return parser.parse_args()


def _protect_stdout() -> BinaryIO:
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return answers


def _listen(requests: queue.SimpleQueue[str], folder: str) -> None:
    for line in sys.stdin:
        requests.put(line)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)
