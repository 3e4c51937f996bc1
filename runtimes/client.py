"""The parent's side of ``runtimes.worker``: sessions in child processes, and timing several of them in turn."""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean, median, quantiles
from typing import Any

import numpy as np
from numpy.typing import NDArray

from artifacts.errors import ProviderError, UsageError
from artifacts.manifest import SessionOptions, TensorSpec

from .closing import Closing
from .environment import import_paths, short_reason
from .generate.feeds import fitted
from .kernels import Kernel
from .settings import Settings

Feeds = Mapping[str, NDArray[Any]]

_BOOTSTRAP = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from runtimes.worker import main; main(sys.argv[2])"
)
_CLOSE_SECONDS = 2.0
_SELF_DESTRUCT_SECONDS = 5.0


class Worker(Closing):
    """A session in a child process. Use it as a context manager.

    Args:
        model: The ``.onnx`` file.
        provider: Execution provider, by full name.
        options: The variant's session options.
        device: ``""`` for the provider's default, else ``cpu``, ``cuda:1``...
        threads: Threads within an operator; 0 means the physical cores this process may use.
        settings: How the session uses the machine; None: the default for that many threads.
        wide: Open it for ``settings.lanes`` runs at once. :meth:`time` then takes the seconds of that many together.
        timeout: Seconds that loading, one run, or one block of timing (beyond its own seconds) may take.
        record_assignment: Keep which node went to which provider, for :meth:`assignment`.

    Raises:
        ProviderError: The model does not load there, or the child crashed or hung. The same for every method.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __init__(
        self,
        model: Path,
        provider: str,
        *,
        options: SessionOptions | None = None,
        device: str = "",
        threads: int = 0,
        settings: Settings | None = None,
        wide: bool = False,
        timeout: float = 120.0,
        record_assignment: bool = True,
    ) -> None:
        self.provider = provider
        self.timeout = timeout
        self._lock = threading.Lock()
        self._load = {
            "model": str(Path(model).resolve()),
            "provider": provider,
            "device": device,
            "threads": threads,
            "settings": vars(settings) if settings is not None else {},
            "wide": wide,
            "record": record_assignment,
            "options": vars(options or SessionOptions()),
        }
        self._open()

    def _open(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="hasten-worker-", ignore_cleanup_errors=True)
        self._stderr = (Path(self._folder.name) / "stderr").open("wb")
        self._process = self._spawn()
        self._answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._read, args=(self._process, self._answers), daemon=True).start()
        try:
            reply = self._ask("load", f"loading {Path(str(self._load['model'])).name}", self._load)
        except BaseException:
            self.close()
            raise
        self.inputs, self.outputs = (
            tuple(TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in reply[key])
            for key in ("inputs", "outputs")
        )

    def restart(self) -> None:
        """Load the same in a new process, once the old one has ended.

        How a process lies in memory and caches makes it faster or slower than its twin by up to 3 % for as long as it
        lives: what is measured in one process only is known no better than that.
        """
        self.close()
        self._open()

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._process.pid

    def run(self, feeds: Feeds) -> dict[str, NDArray[Any]]:
        """Outputs by name."""
        inputs, outputs = self._file("feeds.npz"), self._file("outputs.npz")
        names = write_feeds(inputs, self.fitted(feeds))
        reply = self._ask("run", "running the model", {"feeds": inputs, "names": names, "outputs": outputs})
        with np.load(outputs, allow_pickle=False) as arrays:
            return {name: arrays[f"arr_{index}"] for index, name in enumerate(reply["names"])}

    def time(self, feeds: Feeds, *, seconds: float | None = None, repeats: int | None = None) -> list[float]:
        """Seconds of each call: ``repeats`` calls, or as many as start within ``seconds`` (at least two).

        One call more is made before them and dropped: it pays for buffers and kernels of a new shape.
        """
        path = self._file("feeds.npz")
        return self._time(path, write_feeds(path, self.fitted(feeds)), seconds, repeats)

    def fitted(self, feeds: Feeds) -> Feeds:
        """The feeds as the model takes them; see `runtimes.generate.feeds.fitted`."""
        return fitted(feeds, self.inputs)

    def assignment(self) -> dict[str, tuple[tuple[str, str], ...]]:
        """(node name, operator type) by provider."""
        nodes = self._ask("assignment", "listing the nodes")["nodes"]
        return {name: tuple((node, operator) for node, operator in found) for name, found in nodes.items()}

    def fallback(self) -> tuple[str, ...]:
        """``name (operator)`` of the nodes that another provider runs."""
        return tuple(
            f"{name or '?'} ({operator})"
            for provider, nodes in self.assignment().items()
            if provider != self.provider
            for name, operator in nodes
        )

    def optimized(self) -> dict[str, int]:
        """Nodes by operator type in the graph that ONNX Runtime made of the model at load. Loads it once more."""
        operators: dict[str, int] = self._ask("optimized", "saving the optimized graph")["operators"]
        return operators

    def profile(self, feeds: Feeds, *, runs: int = 8) -> tuple[Kernel, ...]:
        """What each kernel takes of a run. Loads the model once more, to be profiled."""
        path = self._file("feeds.npz")
        request = {"feeds": path, "names": write_feeds(path, self.fitted(feeds)), "runs": runs}
        return tuple(Kernel(*one) for one in self._ask("profile", "profiling the model", request)["kernels"])

    def devices(self) -> tuple[str, ...]:
        """Names of the devices that the provider sees."""
        return tuple(self._ask("devices", "listing devices")["devices"])

    def close(self) -> None:
        """End the child: politely, then not."""
        if self._process.poll() is None:
            with suppress(OSError, ValueError):
                self._send({"op": "exit"})
            try:
                self._process.wait(_CLOSE_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()
        self._stderr.close()
        self._folder.cleanup()

    def _file(self, name: str) -> str:
        folder = Path(self._folder.name)
        if not folder.exists():
            raise ProviderError("the child is closed")
        return str(folder / name)

    def _spawn(self) -> subprocess.Popen[bytes]:
        if not sys.executable:
            raise ProviderError("this Python does not know its own executable, so no child process can be started")
        # -P and our own sys.path: a folder named `artifacts` in the working directory must not become a package.
        return subprocess.Popen(
            [sys.executable, "-P", "-c", _BOOTSTRAP, json.dumps(import_paths()), self._folder.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
        )

    @staticmethod
    def _read(process: subprocess.Popen[bytes], answers: queue.SimpleQueue[bytes]) -> None:
        if process.stdout is not None:
            with process.stdout:
                for line in process.stdout:
                    answers.put(line)
        answers.put(b"")

    def _time(self, path: str, names: list[str], seconds: float | None, repeats: int | None) -> list[float]:
        wrong = (seconds is not None and seconds < 0.0) or (repeats is not None and repeats < 1)
        if (seconds is None) == (repeats is None) or wrong:
            raise UsageError("timing needs either a positive number of repeats or of seconds")
        calls = None if repeats is None else repeats + 1
        arguments = {"feeds": path, "names": names, "repeats": calls, "seconds": seconds}
        reply = self._ask("time", "timing the model", arguments, extra=seconds or 0.0)
        times: list[float] = reply["seconds"]
        return times[1:]

    def _ask(
        self, operation: str, doing: str, arguments: Mapping[str, object] | None = None, *, extra: float = 0.0
    ) -> dict[str, Any]:
        limit = self.timeout + extra
        with self._lock:
            try:
                self._send({"op": operation, "limit": limit + _SELF_DESTRUCT_SECONDS, **(arguments or {})})
                line = self._answers.get(timeout=limit)
            except queue.Empty:
                self._process.kill()
                self._process.wait()
                raise ProviderError(f"the child did not finish {doing} in {limit:g} s and was killed") from None
            except (OSError, ValueError):
                line = b""
        if not line:
            raise ProviderError(self._death(doing))
        reply: dict[str, Any] = json.loads(line)
        if not reply["ok"]:
            raise ProviderError(reply["error"])
        return reply

    def _send(self, request: dict[str, Any]) -> None:
        if self._process.stdin is None or self._process.stdin.closed:
            raise OSError("the child is closed")
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()

    def _death(self, doing: str) -> str:
        code = self._process.wait()
        if code < 0:
            try:
                how = f"with signal {-code} ({signal.Signals(-code).name})"
            except ValueError:
                how = f"with signal {-code}"
        else:
            how = f"with exit code {code}"
        said = ""
        with suppress(OSError):
            lines = (Path(self._folder.name) / "stderr").read_text(encoding="utf-8", errors="replace").split("\n")
            said = next((f": {short_reason(RuntimeError(line))}" for line in reversed(lines) if line.strip()), "")
        return f"the child died {how} while {doing}{said}"


def write_feeds(path: str, feeds: Feeds) -> list[str]:
    """Write the arrays as ``arr_0``... and return their names, in that order."""
    np.savez(path, *feeds.values())
    return list(feeds)


@dataclass(frozen=True)
class Ratio:
    """How many times faster: above 1, the candidate is. The quartiles are over rounds."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Timings:
    """What :func:`interleave` measured.

    Attributes:
        rounds: name -> shape -> round -> milliseconds, each of one block of calls. `interleave` takes the fastest call
            of a block: what other processes do to a call only ever slows it down.
    """

    rounds: Mapping[str, tuple[tuple[float, ...], ...]]

    def __add__(self, more: Timings) -> Timings:
        """The rounds of both, of the same workers at the same shapes."""
        return Timings(
            {
                name: tuple(old + new for old, new in zip(shapes, more.rounds[name], strict=True))
                for name, shapes in self.rounds.items()
            }
        )

    def ms(self, name: str, shape: int) -> float:
        """Median milliseconds over the rounds."""
        return median(self.rounds[name][shape])

    def ratio(self, base: str, candidate: str, shape: int | None = None) -> Ratio:
        """``base`` ms / ``candidate`` ms: how many times faster the candidate is.

        Taken within each round, whose blocks ran next to each other; the geometric mean over all shapes, or one shape.
        """
        shapes = range(len(self.rounds[base])) if shape is None else (shape,)
        per_round = [
            geometric_mean(self.rounds[base][index][turn] / self.rounds[candidate][index][turn] for index in shapes)
            for turn in range(len(self.rounds[base][0]))
        ]
        if len(per_round) == 1:
            return Ratio(per_round[0], per_round[0], per_round[0])
        low, middle, high = quantiles(per_round, n=4, method="inclusive")
        return Ratio(middle, low, high)


def interleave(
    workers: Mapping[str, Worker], shapes: Sequence[Feeds], *, rounds: int = 5, seconds: float = 0.2
) -> Timings:
    """Time the workers in turn, A B A B..., each block at least two calls and about ``seconds`` long.

    Args:
        workers: Sessions by name, all loaded.
        shapes: Feeds that every worker takes.
        rounds: Blocks of each worker at each shape.
        seconds: Length of a block; its first call is dropped.
    """
    if not workers or not shapes or rounds < 1:
        raise UsageError("timing needs a worker, a shape and a round")
    measured: dict[str, list[list[float]]] = {name: [[] for _ in shapes] for name in workers}
    with tempfile.TemporaryDirectory(prefix="hasten-timing-", ignore_cleanup_errors=True) as folder:
        files = [_written(folder, index, feeds, workers) for index, feeds in enumerate(shapes)]
        for _ in range(rounds):
            for index, written in enumerate(files):
                for name, worker in workers.items():
                    times = worker._time(*written[name], seconds, None)
                    measured[name][index].append(min(times) * 1e3)
    return Timings({name: tuple(tuple(blocks) for blocks in values) for name, values in measured.items()})


def _written(folder: str, index: int, feeds: Feeds, workers: Mapping[str, Worker]) -> dict[str, tuple[str, list[str]]]:
    """Worker -> the file of the feeds as it takes them, one for all that take them as they are, and their names."""
    shared = str(Path(folder) / f"{index}.npz")
    names = write_feeds(shared, feeds)
    found = {}
    for number, (name, worker) in enumerate(workers.items()):
        fed = worker.fitted(feeds)
        own = str(Path(folder) / f"{index}-{number}.npz")
        found[name] = (shared, names) if fed is feeds else (own, write_feeds(own, fed))
    return found
