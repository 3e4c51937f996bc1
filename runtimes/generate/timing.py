"""A child process that times one language model, so that its memory is its own and no neighbour disturbs it.

``python -c … SYS_PATH`` answers on stdout what it is asked on stdin, one JSON object a line (`runtimes.peers.Peer` is
the other end):

    op      arguments                                              answer
    load    model, provider, device, threads, options {...}        seconds: what loading took
    time    batch, prompt, steps                                   prefill: s, first: s, steps: [s...]
    memory                                                         peak: bytes resident at most so far
    exit

``prefill`` is the seconds until the logits of the last token of every prompt are there, ``first`` until the first token
of every row is text, and each of ``steps`` the seconds from one token of every row to the next, as text.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from artifacts.bundle import Bundle, open_bundle
from artifacts.errors import ProviderError
from artifacts.manifest import TensorSpec

from ..answers import Reply, answer, protect_stdout
from ..session import Session
from .cache import check_memory, layout_of
from .decoder import Decoder, grouped
from .detokenize import Vocabulary
from .rows import Job, Request, Row
from .sampling import Sampling

_SEED = 22
_FIRST_ID = 16  # below it are special tokens, mostly


class Timer:
    """The operations, each a request -> reply."""

    def __init__(self) -> None:
        self._bundle: Bundle | None = None
        self._session: Session | None = None
        self._vocabulary: Vocabulary | None = None
        self._inputs: tuple[TensorSpec, ...] = ()

    def answer(self, request: Mapping[str, Any]) -> Reply:
        """The reply to one request; an error of hasten's becomes ``{"ok": false}``."""
        operations = {
            "load": self._load,
            "time": self._time,
            "memory": self._memory,
        }
        return answer(operations, request)

    def _load(self, request: Mapping[str, Any]) -> Reply:
        bundle = open_bundle(request["bundle"], verify=False)
        variant, processor = bundle.variant(request["variant"]), bundle.manifest.processor
        if processor is None:
            raise ProviderError(f"{bundle.path} has no text processor")
        begin = time.perf_counter()
        model, options = bundle.path / variant.model, variant.session
        self._session = Session(
            model, request["provider"], options=options, device=request["device"], threads=request["threads"]
        )
        self._vocabulary = Vocabulary(Tokenizer.from_file(str(bundle.path / processor.tokenizer)))
        self._bundle, self._inputs = bundle, bundle.manifest.inputs_of(variant)
        return {"seconds": time.perf_counter() - begin}

    def _time(self, request: Mapping[str, Any]) -> Reply:
        batch, length, steps = request["batch"], request["prompt"], request["steps"]
        rows = self._rows(batch, length, steps)
        decoder = self._decoder(batch, length + steps)
        begin = time.perf_counter()
        logits = []
        for group in grouped([length] * batch):
            found = decoder.prefill(group[0], [rows[index].request.prompt for index in group])
            if found is not None:
                logits += list(found)
        read = time.perf_counter()
        for row, values in zip(rows, logits, strict=True):
            row.advance(values)
        times = [read, time.perf_counter()]
        for _ in range(steps - 1):
            step = decoder.step([row.tokens[-1] for row in rows], [row.length for row in rows])
            for slot, row in enumerate(rows):
                row.advance(step[slot])
            times.append(time.perf_counter())
        gaps = np.diff(times[1:]).tolist()
        return {"prefill": read - begin, "first": times[1] - begin, "steps": gaps}

    def _rows(self, batch: int, length: int, steps: int) -> list[Row]:
        loaded, vocabulary = self._loaded()
        size = int(loaded.manifest.outputs[0].shape[2])
        ids = np.random.default_rng(_SEED).integers(min(_FIRST_ID, size - 1), size, (batch, length))
        job = Job(Sampling(), end=frozenset())
        return [Row(Request(tuple(prompt), steps + 1, job), 0, vocabulary) for prompt in ids.tolist()]

    def _decoder(self, rows: int, capacity: int) -> Decoder:
        loaded, _ = self._loaded()
        if self._session is None:
            raise ProviderError("no model was loaded into this process")
        layout = layout_of(self._inputs)
        check_memory(layout, rows, capacity)
        size = int(loaded.manifest.outputs[0].shape[2])
        return Decoder(self._session, layout, size, rows=rows, capacity=capacity)

    def _memory(self, _: Mapping[str, Any]) -> Reply:
        return {"peak": peak_memory()}

    def _loaded(self) -> tuple[Bundle, Vocabulary]:
        if self._bundle is None or self._vocabulary is None:
            raise ProviderError("no model was loaded into this process")
        return self._bundle, self._vocabulary


def peak_memory() -> int:
    """Most bytes that this process was resident with so far; what it is now, where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return int(getattr(psutil.Process().memory_info(), "peak_wset", 0))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most << 10


def main() -> None:
    """Serve until ``exit`` or the end of stdin."""
    answers = protect_stdout()
    timer = Timer()
    for line in sys.stdin:
        request = json.loads(line)
        if request["op"] == "exit":
            break
        answers.write(json.dumps(timer.answer(request)).encode() + b"\n")
