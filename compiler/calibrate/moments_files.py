"""Second moments in files: K² numbers a value are too many to hold for all values at once.

A file holds the lower triangle, row by row, in float32, each element divided by the powers of two just above the
largest ``|x|`` of its two channels, so that none is larger than 1. It is read as float64. The rounding, 2^-24 of each
element, is less than that of the sums (see `passes.statistics.MomentsAccumulator`). What is recalled from the cache
equals what was gathered: both were in such a file.
"""

from __future__ import annotations

import io
import os
import shutil
import tempfile
import weakref
import zipfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from artifacts.swap import output_errors
from passes.statistics import Moments, MomentsAccumulator
from runtimes.remember import keep

from .results import Results
from .store import bound, cache_path

MOST_BYTES = 2 << 30
"""Size of all that is kept; the oldest goes first. Those of a decoder of half a billion parameters are 1.2 GB."""
_KIND = "moments"
_SECOND = "second"
_BUFFER = 1 << 18


class MomentsFiles(Results[Moments]):
    """Second moments by name, each read from its file whenever it is asked for. The files go when the object does.

    Attributes:
        paths: The files, by name.
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
        self._delete = weakref.finalize(self, shutil.rmtree, made, ignore_errors=True)
        self._seeing: dict[str, MomentsAccumulator] = {}
        self._kept = 0
        self.paths = {name: made / f"{index}.npz" for index, name in enumerate(names)}

    def __getitem__(self, name: str) -> Moments:
        return _read(self.paths[name])

    def __contains__(self, name: object) -> bool:
        return name in self.paths

    def __iter__(self) -> Iterator[str]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def held(self) -> int:
        """Nothing: what is complete is in files."""
        return 0

    def begin(self, name: str) -> MomentsAccumulator:
        """What sees the value of that name from now on."""
        self._seeing[name] = MomentsAccumulator(name)
        return self._seeing[name]

    def finish(self, name: str) -> None:
        """Write what was seen of that value.

        Raises:
            OutputError: It cannot be written.
            ValueError: Nothing was seen.
        """
        with output_errors(self.paths[name]):
            _write(self.paths[name], self._seeing.pop(name))

    def recall(self, name: str, key: str) -> bool:
        """Take it from the user's cache; whether it was there, undamaged: it is read once."""
        kept, path = cache_path(_KIND, key), self.paths[name]
        try:
            _link(kept, path)
            _arrays(path)
            os.utime(kept)
        except Exception:  # noqa: BLE001  # whatever a damaged file makes zipfile and numpy raise, it is a miss
            path.unlink(missing_ok=True)
            return False
        self._kept += path.stat().st_size
        return True

    def remember(self, name: str, key: str) -> None:
        """Keep it there, unless these results fill the cache already."""
        path, kept = self.paths[name], cache_path(_KIND, key)
        self._kept += path.stat().st_size
        if self._kept <= MOST_BYTES:
            keep(kept, partial(_link, path))
            bound(kept.parent, MOST_BYTES)

    def close(self) -> None:
        """Delete the files now."""
        self._seeing.clear()
        self._delete()


def _link(source: Path, target: Path) -> None:
    """The same file under another name, or a copy where the file system has no such thing."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def _write(path: Path, seen: MomentsAccumulator) -> None:
    """Moments as numpy's archive of arrays; the triangle row by row, so that it is never there twice."""
    absmax = seen.absmax
    arrays: dict[str, NDArray[Any]] = {"rows": np.array(seen.rows), "absmax": absmax, "mean": seen.mean}
    scale = _scale(absmax)
    channels = len(absmax)
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as file:
                npy.write_array(file, array, allow_pickle=False)
        entry = cast("io.RawIOBase", archive.open(f"{_SECOND}.npy", "w", force_zip64=True))
        with entry, io.BufferedWriter(entry, _BUFFER) as file:
            shape = (channels * (channels + 1) // 2,)
            descr = npy.dtype_to_descr(np.dtype(np.float32))
            npy.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
            for index, row in enumerate(seen.triangle()):
                file.write((row / (scale[: index + 1] * scale[index])).astype(np.float32).tobytes())


def _read(path: Path) -> Moments:
    """Moments from a file.

    Raises:
        ValueError: It is not what it should be; other errors where it is damaged.
    """
    rows, packed, absmax, mean = _arrays(path)
    return Moments(rows, _unpacked(packed, absmax), absmax, mean)


def _arrays(path: Path) -> tuple[int, NDArray[np.float32], NDArray[np.float32], NDArray[np.float64]]:
    """Rows, the scaled triangle, absmax and mean.

    Raises:
        ValueError: As `_read`.
    """
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        rows, absmax, mean, packed = int(archive["rows"]), archive["absmax"], archive["mean"], archive[_SECOND]
    channels = len(absmax)
    wanted = ((absmax, np.float32, channels), (mean, np.float64, channels))
    for array, dtype, size in (*wanted, (packed, np.float32, channels * (channels + 1) // 2)):
        if array.dtype != dtype or array.shape != (size,) or not np.isfinite(array).all():
            raise ValueError("an array is not what it should be")
    if rows < 1:
        raise ValueError("the numbers do not fit together")
    return rows, packed, absmax, mean


def _scale(absmax: NDArray[np.float32]) -> NDArray[np.float64]:
    """Powers of two above the largest ``|x|`` of each channel, float64 [K]."""
    return np.ldexp(1.0, np.frexp(absmax)[1])


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
