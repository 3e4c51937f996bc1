"""Ranges kept between processes by the content of all that they depend on, in the user's cache folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from passes.statistics import BINS, SAMPLE_ROWS, Activation, ActivationAccumulator
from runtimes.environment import cache_directory
from runtimes.remember import keep

from .results import Results

MOST_BYTES = 256 << 20
"""Size of all that is kept; the oldest goes first."""
_KIND = "calibration"
_FIELDS = tuple(field.name for field in fields(Activation))


class ActivationResults(Results[Activation]):
    """Ranges, histograms, means and sampled rows by name, in memory."""

    def __init__(self, names: Sequence[str], *, seed: int = 0) -> None:
        """Nothing is there yet.

        Args:
            names: Of the values, in order.
            seed: Which rows the samples draw.
        """
        self._names = tuple(names)
        self._seed = seed
        self._seeing: dict[str, ActivationAccumulator] = {}
        self._found: dict[str, Activation] = {}
        self._kept = 0

    def __getitem__(self, name: str) -> Activation:
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    @property
    def held(self) -> int:
        """Bytes of what is complete."""
        return sum(_size(activation) for activation in self._found.values())

    def begin(self, name: str) -> ActivationAccumulator:
        """What sees the value of that name from now on."""
        self._seeing[name] = ActivationAccumulator(name, seed=self._seed)
        return self._seeing[name]

    def finish(self, name: str) -> None:
        """All was seen of that value.

        Raises:
            ValueError: Nothing was.
        """
        self._found[name] = self._seeing.pop(name).result()

    def recall(self, name: str, key: str) -> bool:
        """Take it from the user's cache; whether it was there, undamaged."""
        found = recall(key)
        if found is None:
            return False
        self._found[name] = found
        self._kept += _size(found)
        return True

    def remember(self, name: str, key: str) -> None:
        """Keep it there, unless these results fill the cache already."""
        self._kept += _size(self._found[name])
        if self._kept <= MOST_BYTES:
            remember(key, self._found[name])

    def close(self) -> None:
        """Let go of everything."""
        self._seeing.clear()
        self._found.clear()


def recall(key: str) -> Activation | None:
    """The statistics kept under a key; None if there are none, or the file is damaged."""
    path = cache_path(_KIND, key)
    try:
        if path.stat().st_size > MOST_BYTES:
            return None
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            found = _read(archive)
        os.utime(path)
    except Exception:  # noqa: BLE001  # whatever a damaged file makes zipfile and numpy raise, it is a miss
        return None
    return found


def remember(key: str, activation: Activation) -> None:
    """Keep statistics. A cache that cannot be written is no error."""
    arrays: dict[str, NDArray[Any]] = {name: np.asarray(getattr(activation, name)) for name in _FIELDS}

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # the stub takes the names for its own options

    path = cache_path(_KIND, key)
    keep(path, write)
    bound(path.parent, MOST_BYTES)


def cache_path(kind: str, name: str) -> Path:
    """Where a file of arrays is kept."""
    return cache_directory() / kind / f"{name}.npz"


def bound(folder: Path, most_bytes: int) -> None:
    """Delete the oldest files of a cache until the rest is small enough; what cannot be deleted stays."""
    with suppress(OSError):
        known = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in folder.iterdir())
        excess = sum(size for _, size, _ in known) - most_bytes
        for _, size, path in known:
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= size


def _size(activation: Activation) -> int:
    return sum(np.asarray(getattr(activation, name)).nbytes for name in _FIELDS)


def _read(archive: Mapping[str, NDArray[Any]]) -> Activation:
    arrays = {name: archive[name] for name in _FIELDS}
    found = Activation(**(arrays | {"rows": int(arrays["rows"]), "reach": float(arrays["reach"])}))  # type: ignore[arg-type]
    channels = len(found.low)
    wanted: dict[str, tuple[type[np.generic], tuple[int, ...]]] = {
        "low": (np.float32, (channels,)),
        "high": (np.float32, (channels,)),
        "mean": (np.float64, (channels,)),
        "histogram": (np.int64, (BINS,)),
        "sample": (np.float32, (min(found.rows, SAMPLE_ROWS), channels)),
    }
    for name, (dtype, shape) in wanted.items():
        if arrays[name].dtype != dtype or arrays[name].shape != shape or not np.isfinite(arrays[name]).all():
            raise ValueError(f"{name} is not what it should be")
    if not (found.rows > 0 and 0.0 < found.reach < np.inf and found.histogram.sum() == found.rows * channels):
        raise ValueError("the numbers do not fit together")
    return found
