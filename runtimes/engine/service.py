"""The worker process of an engine: it loads the bundle and does what the frames on its stdin say.

A thread of its own reads them, so that the model never waits for a pipe, nor what is urgent behind what came before
it. The end of stdin ends the process at once, whatever it is doing: a dead parent leaves nothing behind.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from artifacts.bundle import open_bundle
from artifacts.errors import BundleError, HastenError, UsageError

from ..answers import protect_stdout
from ..decide import start
from ..generate.adapters import open_adapted
from ..load import explain, load
from ..pool import SessionPool
from ..tasks import TASKS, Generator
from .batches import Batches
from .rows import rows_apart
from .wire import Arrays, Frames, Message, decode, encode, told_error
from .writer import Writer

Send = Callable[..., None]

_READ_BYTES = 1 << 18
_PIPE_BYTES = 1 << 20
_SET_PIPE_SIZE = 1031  # F_SETPIPE_SZ of Linux
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux


class Worker(Protocol):
    """What does the work of a loaded bundle."""

    def receive(self, message: Message, arrays: Arrays) -> None:
        """A frame came; called on the reading thread."""
        ...

    def run(self) -> None:
        """Work, on the main thread, for ever."""
        ...


def main() -> None:
    """Load what the first frame says, and work until stdin ends."""
    stdout = protect_stdout()
    _tie_to_parent()
    lock = threading.Lock()

    def send(message: Mapping[str, Any], arrays: Mapping[str, Any] | None = None) -> None:
        left = memoryview(encode(message, arrays or {}))
        with lock:
            while left:
                left = left[stdout.write(left) or 0 :]

    frames = _frames()
    first, _ = decode(next(frames))
    inbox = _Inbox()
    # The reading thread starts at once: a parent that dies while we load must not be outlived.
    threading.Thread(target=inbox.fill, args=(frames,), name="hasten-reader", daemon=True).start()
    try:
        worker, told = open_worker(first, send)
    except HastenError as error:
        send({"op": "failed", "error": told_error(error)})
        os._exit(1)
    inbox.open(worker)
    send({"op": "ready", **told})
    worker.run()


class _Inbox:
    """What was read before there is a worker for it, in order."""

    def __init__(self) -> None:
        self._held: list[tuple[Message, Arrays]] = []
        self._worker: Worker | None = None
        self._lock = threading.Lock()

    def fill(self, frames: Iterator[bytearray]) -> None:
        try:
            for frame in frames:
                told = decode(frame)
                with self._lock:
                    if self._worker is None:
                        self._held.append(told)
                    else:
                        self._worker.receive(*told)
        except Exception as error:  # noqa: BLE001 - a worker that hears nothing any more must not look alive
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            sys.stderr.flush()
            os._exit(1)

    def open(self, worker: Worker) -> None:
        with self._lock:
            self._worker = worker
            for told in self._held:
                worker.receive(*told)


def open_worker(message: Mapping[str, Any], send: Send) -> tuple[Worker, Message]:
    """The worker for a bundle, loaded, and what the parent is told of it.

    Raises:
        HastenError: As `runtimes.load.load`.
    """
    bundle = open_bundle(Path(message["path"]), verify=False)
    if message["digest"] not in ("", bundle.digest):
        raise BundleError(f"{bundle.path} holds another bundle now", "Start another engine")
    asked = {name: message[name] for name in ("device", "provider", "variant", "threads", "cache")}
    decision, session = start(bundle, **asked)
    settings = session.settings
    adapt = partial(open_adapted, bundle, decision, settings) if bundle.manifest.adapters else None
    pool = SessionPool(session, max_tokens=settings.max_tokens, padding=settings.padding, adapt=adapt)
    task = TASKS[bundle.manifest.task](bundle, pool, explanation=explain(bundle, decision, settings))
    told = {
        "digest": bundle.digest,
        "provider": decision.provider,
        "device": decision.device,
        "variant": decision.variant,
        "explanation": task.explain(),
    }
    if message["draft"]:
        alike = {name: message[name] for name in ("device", "threads", "cache")}
        draft = load(message["draft"], **alike, lanes=1)
        if not isinstance(task, Generator) or not isinstance(draft, Generator):
            raise UsageError("a draft is a language model, for a language model", "Leave out draft")
        task.use_draft(draft)
    if isinstance(task, Generator):
        wishes = {"slots": message["slots"], "prefix_bytes": message["prefix_cache"], "pause": message["pause"]}
        writer = Writer(task, send, **wishes)
        return writer, {**told, "slots": writer.slots}
    batches = Batches(task, send)
    tolerance = next(one.tolerance for one in bundle.manifest.variants if one.id == decision.variant)
    apart = rows_apart(bundle, tolerance, task.run)
    return batches, {**told, "apart": apart, "embeds": task.task == "feature-extraction", "warm": batches.warm()}


def _frames() -> Iterator[bytearray]:
    """The frames on stdin; its end ends the process."""
    frames = Frames()
    _widen_pipe(0)
    while data := os.read(0, _READ_BYTES):
        yield from frames.feed(data)
    os._exit(0)


def _widen_pipe(descriptor: int) -> None:
    """A pipe that holds a large frame at once, where the system lets us."""
    if sys.platform != "linux":
        return
    import fcntl

    try:
        fcntl.fcntl(descriptor, _SET_PIPE_SIZE, _PIPE_BYTES)
    except OSError:
        return


def _tie_to_parent() -> None:
    """Where the system can, die with the parent even if native code holds the interpreter for ever."""
    if sys.platform != "linux":
        return
    import ctypes
    import signal

    parent = os.getppid()
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)
