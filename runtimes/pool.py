"""The sessions of a loaded model: one for a single input, and one that runs several batches of a long input at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

from artifacts.errors import HastenError, UsageError
from artifacts.manifest import TensorSpec

from .settings import MAX_TOKENS

if TYPE_CHECKING:
    from .generate.adapters import AdaptedSession

Arrays = dict[str, NDArray[Any]]

WIDEN_AFTER = 64
"""Batches of long inputs before the second session is opened: about what it takes to earn its loading."""
_ROUNDS = 4


class Runner(Protocol):
    """What runs a graph."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Inputs of the graph."""
        ...

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """Outputs by name."""
        ...

    def close(self) -> None:
        """Free the graph."""
        ...


class SessionPool:
    """A session that runs one batch on all threads, and a wide one that runs a batch in each of its lanes.

    The first answers a single input soonest; the second gets more done, and costs the memory of a session once more
    (all-MiniLM-L6-v2: 0.1 GB on the CPU provider, 0.25 GB on OpenVINO). So it is opened once `WIDEN_AFTER` batches of
    long inputs have been seen, and kept until `close`. Safe to use from several threads.

    Args:
        session: The first, open.
        lanes: Batches that the wide one runs at once; 1: there is none.
        max_tokens: Padded tokens a batch, where the caller does not say.
        padding: Tokens of padding that cost as much as one more run; None: nobody knows.
        widen: Opens the wide one, tested; None: there is none.
        adapt: Opens the graph that takes adapters, tested; None: there is none.
    """

    def __init__(
        self,
        session: Runner,
        *,
        lanes: int = 1,
        max_tokens: int = MAX_TOKENS,
        padding: int | None = None,
        widen: Callable[[], Runner] | None = None,
        adapt: Callable[[], AdaptedSession] | None = None,
    ) -> None:
        self.session: Runner = session
        self.inputs = session.inputs
        self.max_tokens = max_tokens
        self.padding = padding
        self._lanes = lanes
        self._widen = widen if lanes > 1 else None
        self._wide: Runner | None = None
        self._seen = 0
        self._refusal = ""
        self._adapt = adapt
        self._adapted: AdaptedSession | None = None
        self._lock = threading.Lock()

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """Outputs by name, of the first session."""
        return self.session.run(feeds)

    def choose(self, batches: int) -> tuple[Runner, int]:
        """The session for so many batches that wait together, and how many of them to run on it at once."""
        if batches == 1 or (self._wide is None and self._widen is None):
            return self.session, 1
        with self._lock:
            self._seen += batches
            if self._widen is not None and self._seen > WIDEN_AFTER:
                self._open_wide(self._widen)
            # A last round that leaves lanes empty must not cost what the others gained.
            if self._wide is not None and batches >= _ROUNDS * self._lanes:
                return self._wide, self._lanes
        return self.session, 1

    def adapted(self) -> AdaptedSession:
        """The graph that takes adapters; loaded when it is first asked for, and the first session from then on.

        Raises:
            UsageError: There is none for what runs here.
            ProviderError: It does not load, or computes wrong results.
        """
        with self._lock:
            if self._adapted is None:
                if self._adapt is None:
                    raise UsageError("this model takes no adapters", "Load a bundle that has some")
                self._adapted = self._adapt()
                # Whoever comes now runs this one, so that the weights are not in memory twice for long.
                self.session = self._adapted
            return self._adapted

    def explain(self) -> str:
        """What became of the wide session, in one line; empty as long as nothing did."""
        if self._refusal:
            return f"no lanes are used: {self._refusal}"
        return f"{self._lanes} lanes are open" if self._wide is not None else ""

    def close(self) -> None:
        """Free the graphs."""
        with self._lock:
            self._widen = self._adapt = None
            wide, self._wide = self._wide, None
            self._adapted = None
        if wide is not None:
            wide.close()
        self.session.close()

    def _open_wide(self, widen: Callable[[], Runner]) -> None:
        self._widen = None
        try:
            self._wide = widen()
        except HastenError as error:  # The first session does the work too, only slower.
            self._refusal = error.what
