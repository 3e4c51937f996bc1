"""Statistics kept between processes by the content of all that they depend on, in the user's cache folder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from passes.statistics import BINS, SAMPLE_ROWS, Activation
from runtimes.environment import cache_directory
from runtimes.remember import keep

MOST_BYTES = 256 << 20
"""Size of all that is kept; the oldest goes first."""
_KIND = "calibration"
_NAMES = "names"
_FIELDS = tuple(field.name for field in fields(Activation))


def recall(key: str, names: Sequence[str]) -> dict[str, Activation] | None:
    """The statistics kept under a key; None if there are none of these values, or the file is damaged."""
    path = cache_path(_KIND, key)
    try:
        if path.stat().st_size > MOST_BYTES:
            return None
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            if archive[_NAMES].tolist() != list(names):
                return None
            found = {name: _read(archive, index) for index, name in enumerate(names)}
        os.utime(path)
    except Exception:  # noqa: BLE001  # whatever a damaged file makes zipfile and numpy raise, it is a miss
        return None
    return found


def remember(key: str, activations: Mapping[str, Activation]) -> None:
    """Keep statistics. A cache that cannot be written is no error, and what is larger than all of it is not kept."""
    arrays: dict[str, NDArray[Any]] = {_NAMES: np.array(list(activations))}
    for index, activation in enumerate(activations.values()):
        arrays |= {f"{index}.{name}": np.asarray(getattr(activation, name)) for name in _FIELDS}
    if sum(array.nbytes for array in arrays.values()) > MOST_BYTES:
        return

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


def _read(archive: Mapping[str, NDArray[Any]], index: int) -> Activation:
    arrays = {name: archive[f"{index}.{name}"] for name in _FIELDS}
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
