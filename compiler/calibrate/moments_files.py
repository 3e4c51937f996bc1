"""Second moments in files: K² numbers a value are too many to hold for all values at once.

A file holds the lower triangle, row by row, in float32, each element divided by the powers of two just above the
largest ``|x|`` of its two channels, so that none is larger than 1. It is read as float64. The rounding, 2^-24 of each
element, is less than that of the sums (see `passes.statistics.MomentsAccumulator`). What is recalled from the cache
equals what was gathered: both were in such a file.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from artifacts.swap import output_errors
from passes.statistics import Moments
from runtimes.remember import keep

from .store import bound, cache_path

MOST_BYTES = 2 << 30
"""Size of all that is kept; the oldest goes first. Those of a decoder of half a billion parameters are 1.2 GB."""
_KIND = "moments"


class MomentsFiles(Mapping[str, Moments]):
    """Second moments by name, each read from its file whenever it is asked for. The files go when the object does.

    Attributes:
        paths: The files, by name.
        close: Deletes the files now.
    """

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        """Nothing is written yet.

        Args:
            names: Of the values, in order.
            folder: Where a folder for the files is made.

        Raises:
            OutputError: It cannot be made.
        """
        with output_errors(folder):
            made = Path(tempfile.mkdtemp(prefix="moments-", dir=folder))
        self.close = weakref.finalize(self, shutil.rmtree, made, ignore_errors=True)
        self.paths = {name: made / f"{index}.npz" for index, name in enumerate(names)}

    def __getitem__(self, name: str) -> Moments:
        return _read(self.paths[name], name)

    def __contains__(self, name: object) -> bool:
        return name in self.paths

    def __iter__(self) -> Iterator[str]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def write(self, name: str, moments: Moments) -> None:
        """Write those of one of the names.

        Raises:
            OutputError: It cannot be written.
        """
        arrays = {
            "name": np.array(name),
            "rows": np.array(moments.rows),
            "absmax": moments.absmax,
            "mean": moments.mean,
            "second": _packed(moments.second, moments.absmax),
        }
        with output_errors(self.paths[name]), self.paths[name].open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # the stub takes the names for its own options


def recall(key: str, names: Sequence[str], folder: Path) -> MomentsFiles | None:
    """The moments kept under a key, all of them read once; None if there are none of these values, or one is damaged.

    Args:
        key: What they depend on.
        names: Of the values, in order.
        folder: See `MomentsFiles`.

    Raises:
        OutputError: A folder cannot be made there.
    """
    kept = [_path(key, index) for index in range(len(names))]
    if not all(path.is_file() for path in kept):
        return None
    files = MomentsFiles(names, folder)
    try:
        for path, name in zip(kept, names, strict=True):
            _link(path, files.paths[name])
            _read(files.paths[name], name)
            os.utime(path)
    except Exception:  # noqa: BLE001  # whatever a damaged file makes zipfile and numpy raise, it is a miss
        files.close()
        return None
    return files


def remember(key: str, files: MomentsFiles) -> None:
    """Keep moments. A cache that cannot be written is no error, and what is larger than all of it is not kept."""
    if sum(path.stat().st_size for path in files.paths.values()) > MOST_BYTES:
        return
    for index, path in enumerate(files.paths.values()):
        keep(_path(key, index), partial(_link, path))
    bound(_path(key, 0).parent, MOST_BYTES)


def _path(key: str, index: int) -> Path:
    return cache_path(_KIND, f"{key}.{index}")


def _link(source: Path, target: Path) -> None:
    """The same file under another name, or a copy where the file system has no such thing."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def _read(path: Path, name: str) -> Moments:
    """Moments from a file.

    Raises:
        ValueError: It is not what it should be, or of another value than ``name``; other errors where it is damaged.
    """
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        rows, absmax, mean = int(archive["rows"]), archive["absmax"], archive["mean"]
        packed, stated = archive["second"], archive["name"].tolist()
    channels = len(absmax)
    wanted = ((absmax, np.float32, channels), (mean, np.float64, channels))
    for array, dtype, size in (*wanted, (packed, np.float32, channels * (channels + 1) // 2)):
        if array.dtype != dtype or array.shape != (size,) or not np.isfinite(array).all():
            raise ValueError("an array is not what it should be")
    if rows < 1 or stated != name:
        raise ValueError("the numbers do not fit together")
    return Moments(rows, _unpacked(packed, absmax), absmax, mean)


def _scale(absmax: NDArray[np.float32]) -> NDArray[np.float64]:
    """Powers of two above the largest ``|x|`` of each channel, float64 [K]."""
    return np.ldexp(1.0, np.frexp(absmax)[1])


def _packed(second: NDArray[np.float64], absmax: NDArray[np.float32]) -> NDArray[np.float32]:
    """The lower triangle of ``second [K, K]``, scaled, float32 [K (K + 1) / 2]."""
    scale = _scale(absmax)
    packed = np.empty(len(second) * (len(second) + 1) // 2, np.float32)
    end = 0
    for index, row in enumerate(second):
        start, end = end, end + index + 1
        packed[start:end] = row[: index + 1] / (scale[: index + 1] * scale[index])
    return packed


def _unpacked(packed: NDArray[np.float32], absmax: NDArray[np.float32]) -> NDArray[np.float64]:
    scale = _scale(absmax)
    second = np.empty((len(scale), len(scale)))
    end = 0
    for index in range(len(scale)):
        start, end = end, end + index + 1
        row = packed[start:end] * (scale[: index + 1] * scale[index])
        second[index, : index + 1] = row
        second[: index + 1, index] = row
    return second
