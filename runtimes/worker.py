"""A child process that holds one session: a provider that crashes, hangs or disturbs its neighbours does it alone.

``python -m runtimes.worker`` reads one JSON object a line from stdin and answers each with one line on stdout. Arrays
travel as ``.npz`` files; their names stand in the request and the answer, the arrays are ``arr_0``, ``arr_1``...

    op          arguments                                                   answer
    load        model, provider, device, threads, record, options {...},    inputs, outputs: [name, dtype, shape]...
                settings {...}, wide (both may be left out)
    run         feeds: path, names: [...], outputs: path                    names: [...]
    time        feeds: path, names: [...], repeats | null, seconds | null   seconds: [...]
    assignment                                                              nodes: {provider: [name, operator]...}
    optimized                                                               operators: {operator: count}
    profile     feeds: path, names: [...], runs                             kernels: [[name, operator, kernel, ms]...]
    devices                                                                 devices: [...]
    exit

An answer has ``"ok": true``; a failure is ``{"ok": false, "error": text}``. ``time`` returns every call it made: the
parent drops the first. A call of a session loaded ``wide`` is a run in each of its lanes, all at once. Every request
carries ``limit``, the seconds after which this process ends itself even if native code holds the interpreter. The end
of stdin ends the process at once, whatever it is doing: a killed parent leaves nothing behind.
"""

from __future__ import annotations

import faulthandler
import json
import os
import queue
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from artifacts.errors import ProviderError
from artifacts.manifest import SessionOptions

from .answers import Reply, answer, protect_stdout
from .protobuf import op_types
from .session import Feeds, Session
from .settings import Settings

MINIMUM_CALLS = 3


class Server:
    """The operations, each a request -> reply."""

    def __init__(self) -> None:
        self._session: Session | None = None
        self._load: Mapping[str, Any] = {}

    def answer(self, request: Mapping[str, Any]) -> Reply:
        """The reply to one request; an error of hasten's becomes ``{"ok": false}``."""
        operations = {
            "load": self._on_load,
            "run": self._on_run,
            "time": self._on_time,
            "assignment": self._on_assignment,
            "optimized": self._on_optimized,
            "profile": self._on_profile,
            "devices": self._on_devices,
        }
        return answer(operations, request)

    def _on_load(self, request: Mapping[str, Any]) -> Reply:
        self._load = request
        self._session = _open(request, record=bool(request["record"]))
        specs = {"inputs": self._session.inputs, "outputs": self._session.outputs}
        return {key: [[spec.name, spec.dtype, list(spec.shape)] for spec in value] for key, value in specs.items()}

    def _on_run(self, request: Mapping[str, Any]) -> Reply:
        outputs = self._loaded().run(_read_arrays(request))
        np.savez(request["outputs"], *outputs.values())
        return {"names": list(outputs)}

    def _on_time(self, request: Mapping[str, Any]) -> Reply:
        feeds, repeats, seconds = _read_arrays(request), request["repeats"], request["seconds"]
        times: list[float] = []
        with _in_every_lane(self._loaded()) as run:
            end = time.perf_counter() + (seconds or 0.0)
            while len(times) < (repeats or MINIMUM_CALLS) or (seconds and time.perf_counter() < end):
                start = time.perf_counter()
                run(feeds)
                times.append(time.perf_counter() - start)
        return {"seconds": times}

    def _on_assignment(self, _: Mapping[str, Any]) -> Reply:
        return {"nodes": self._loaded().assignment()}

    def _on_optimized(self, _: Mapping[str, Any]) -> Reply:
        import tempfile

        self._loaded()
        with tempfile.TemporaryDirectory(prefix="hasten-") as folder:
            path = Path(folder) / "optimized.onnx"
            _open(self._load, optimized=path).close()
            return {"operators": op_types(path)}

    def _on_profile(self, request: Mapping[str, Any]) -> Reply:
        import tempfile

        from .kernels import read_trace

        self._loaded()
        feeds, runs = _read_arrays(request), request["runs"]
        with tempfile.TemporaryDirectory(prefix="hasten-") as folder:
            session = _open(self._load, profile=Path(folder) / "profile")
            try:
                for _ in range(runs):
                    session.run(feeds)
                kernels = read_trace(session.end_profile(), runs=runs)
            finally:
                session.close()
        return {"kernels": [[one.name, one.operator, one.implementation, one.ms] for one in kernels]}

    def _on_devices(self, _: Mapping[str, Any]) -> Reply:
        from .fingerprint import provider_devices

        return {"devices": list(provider_devices(self._loaded().provider))}

    def _loaded(self) -> Session:
        if self._session is None:
            raise ProviderError("no model was loaded into this worker")
        return self._session


@contextmanager
def _in_every_lane(session: Session) -> Iterator[Callable[[Feeds], object]]:
    """What runs its feeds once in each lane of a session, all at once, and waits for the last."""
    if session.lanes == 1:
        yield session.run
        return
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(session.lanes) as pool:
        yield lambda feeds: list(pool.map(session.run, [feeds] * session.lanes))


def _open(
    request: Mapping[str, Any], *, record: bool = False, optimized: Path | None = None, profile: Path | None = None
) -> Session:
    told = request["options"]
    options = SessionOptions(told["optimization_level"], tuple(told["disabled_optimizers"]), told["precision"])
    return Session(
        Path(request["model"]),
        request["provider"],
        options=options,
        device=request["device"],
        threads=request["threads"],
        settings=Settings(**told_settings) if (told_settings := request.get("settings")) else None,
        wide=request.get("wide", False),
        record_assignment=record,
        optimized=optimized,
        profile=profile,
    )


def _read_arrays(request: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    with np.load(request["feeds"], allow_pickle=False) as arrays:
        return {name: arrays[f"arr_{index}"] for index, name in enumerate(request["names"])}


def _listen(requests: queue.SimpleQueue[str], folder: str) -> None:
    for line in sys.stdin:
        requests.put(line)
    # The parent is gone: clean up after it, and do not wait for native code to come back.
    if folder:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


def main(folder: str = "") -> None:
    """Serve until ``exit`` or the end of stdin; then ``folder``, the parent's for our arrays, is deleted."""
    answers = protect_stdout()
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests, folder), daemon=True).start()
    server = Server()
    while True:
        request = json.loads(requests.get())
        if request["op"] == "exit":
            break
        # A C thread, needing no interpreter lock: the last resort when the parent cannot kill us.
        faulthandler.dump_traceback_later(request["limit"], exit=True)
        reply = server.answer(request)
        faulthandler.cancel_dump_traceback_later()
        answers.write(json.dumps(reply).encode() + b"\n")
    # Providers' destructors have crashed at interpreter exit; nothing here needs them.
    os._exit(0)


if __name__ == "__main__":
    main()
