"""The cost database: what one linear operator costs in each form, measured on the target once and kept.

A cost is keyed by the form (a pass with its options), the shape class ``(K, N)``, the rows of the input, the provider,
its compute precision, the threads, and the fingerprint of the machine with its versions; each is a small JSON file in
the user's cache folder. Forms of one shape are timed in turn, in one go, so that they compare.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from artifacts.errors import ProviderError
from artifacts.manifest import SessionOptions
from artifacts.target import Target
from passes.base import Pass
from passes.pipeline import Pipeline
from passes.quantize import WeightOnly
from passes.quantize.methods import Method
from runtimes.client import Worker, interleave
from runtimes.environment import cache_directory
from runtimes.fingerprint import fingerprint
from runtimes.remember import keep

from .lone import lone_model, rewritten

FLOAT = "float32"
"""The name of the form that nothing was done to."""
_COPIES = 4
_ROUNDS = 5
_SECONDS = 0.03
_VERSION = 1

Shape = tuple[int, int]


@dataclass(frozen=True)
class CostBase:
    """Costs on one provider.

    Attributes:
        target: What the forms are emitted for.
        provider: Execution provider that is timed.
        threads: Threads of a session; 0: physical cores.
        rows: Rows of the input: tokens of a batch; one figure each.
    """

    target: Target
    provider: str
    threads: int
    rows: tuple[int, ...]

    def milliseconds(
        self, forms: Sequence[Pass | None], shape: Shape, precision: str
    ) -> dict[Pass | None, tuple[float, ...]]:
        """What one operator of ``shape`` (K, N) costs in each form, in the order of ``rows``.

        ``precision`` is what the provider may compute float32 in, as in `SessionOptions`.

        A form that the pass refuses or that does not run on the provider is left out; None is the float32 form.

        Raises:
            ProviderError: The float32 form does not run either.
        """
        kernels = {form: _kernel(form) for form in forms}
        keys = {kernel: self._key(kernel, shape, precision) for kernel in kernels.values()}
        known = {kernel: _recall(key, len(self.rows)) for kernel, key in keys.items()}
        if any(found is None for found in known.values()):
            measured = self._measure(tuple(keys), shape, precision)
            for kernel, key in keys.items():
                known[kernel] = measured.get(kernel, ())
                _keep(key, {"form": _name(kernel), "shape": shape, "rows": self.rows, "ms": known[kernel]})
        return {form: costs for form, kernel in kernels.items() if (costs := known[kernel])}

    def _key(self, form: Pass | None, shape: Shape, precision: str) -> str:
        told = [_VERSION, _name(form), shape, self.rows, self.target.name, self.provider]
        told += [precision, self.threads, fingerprint()]
        return hashlib.sha256(json.dumps(told, sort_keys=True, default=list).encode()).hexdigest()

    def _measure(
        self, forms: Sequence[Pass | None], shape: Shape, precision: str
    ) -> dict[Pass | None, tuple[float, ...]]:
        rng = np.random.default_rng(0)
        weight = rng.normal(0.0, 0.05, shape).astype(np.float32)
        bias = rng.normal(0.0, 0.05, shape[1]).astype(np.float32)
        sample = rng.normal(0.0, 1.0, (256, shape[0])).astype(np.float32)
        feeds = [
            {f"x{copy}": rng.normal(0.0, 1.0, (rows, shape[0])).astype(np.float32) for copy in range(_COPIES)}
            for rows in self.rows
        ]
        workers: dict[str, Worker] = {}
        with tempfile.TemporaryDirectory(prefix="hasten-costs-") as folder, ExitStack() as stack:
            for index, form in enumerate(forms):
                model = rewritten(lone_model(weight, bias, copies=_COPIES), form, self.target, sample)
                if model is None:
                    continue
                path = Path(folder) / f"{index}.onnx"
                ir.save(model, path)
                try:
                    workers[_name(form)] = stack.enter_context(self._worker(path, precision))
                except ProviderError:
                    if form is None:
                        raise
            timings = interleave(workers, feeds, rounds=_ROUNDS, seconds=_SECONDS)
        return {
            form: tuple(min(timings.rounds[_name(form)][shape]) / _COPIES for shape in range(len(self.rows)))
            for form in forms
            if _name(form) in workers
        }

    def _worker(self, path: Path, precision: str) -> Worker:
        return Worker(path, self.provider, options=SessionOptions(precision=precision), threads=self.threads)


def _kernel(form: Pass | None) -> Pass | None:
    """The form that runs the same operators and is made soonest: how codes were chosen costs nothing when they run."""
    return replace(form, method=Method.RTN.value, ordered=False) if isinstance(form, WeightOnly) else form


def _name(form: Pass | None) -> str:
    return FLOAT if form is None else str(Pipeline((form,)))


def _folder() -> Path:
    return cache_directory() / "costs"


def _recall(key: str, count: int) -> tuple[float, ...] | None:
    """The figures kept under a key, empty for a form that does not run; None if there are none that can be read."""
    try:
        found = json.loads((_folder() / f"{key}.json").read_bytes())["ms"]
        if len(found) not in (0, count) or not all(isinstance(ms, float) and ms > 0.0 for ms in found):
            return None
        return tuple(found)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep(key: str, entry: dict[str, object]) -> None:
    """Write one entry. A cache that cannot be written is no error: the next compile measures again."""
    data = json.dumps(entry).encode()
    keep(_folder() / f"{key}.json", lambda temporary: temporary.write_bytes(data))
