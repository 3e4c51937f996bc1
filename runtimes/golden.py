"""The golden test: reference inputs and outputs of the bundle, replayed on the provider about to be used."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from artifacts.bundle import Bundle
from artifacts.errors import BundleError, ProviderError
from artifacts.manifest import TensorSpec

from .environment import short_reason

GOLDEN_NAME = "golden.npz"
MAX_BYTES = 256 << 20
_MAX_MEMBERS = 512
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}

Arrays = dict[str, NDArray[Any]]


class Golden(NamedTuple):
    """Reference inputs and outputs by name."""

    feeds: Arrays
    outputs: Arrays


class Runner(Protocol):
    """A session, here or in a child process."""

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """Outputs by name."""
        ...


def load_golden(bundle: Bundle) -> Golden:
    """The golden arrays of a bundle.

    Raises:
        BundleError: ``golden.npz`` is missing, not what docs/format.md says, or does not fit the manifest.
    """
    path = bundle.path / GOLDEN_NAME
    try:
        arrays = _read(path)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
        raise BundleError(f"{GOLDEN_NAME} of {bundle.path} cannot be read: {short_reason(error)}") from error
    outputs = bundle.manifest.outputs
    if bundle.manifest.task == "text-generation":
        outputs = outputs[:1]  # What a decoder leaves in its cache beyond a row's tokens is no result.
    golden = Golden(_expected(arrays, "input", bundle.manifest.inputs), _expected(arrays, "output", outputs))
    known = len(golden.feeds) + len(golden.outputs)
    if known != len(arrays):
        raise BundleError(f"{GOLDEN_NAME} holds arrays that are no input or output of the model")
    return golden


def golden_error(runner: Runner, golden: Golden) -> float:
    """Relative L2 error ``||y - r|| / ||r||``, the largest over the outputs.

    Infinite where y is not finite, missing or of another shape.

    Raises:
        ProviderError: The session cannot run the golden inputs.
    """
    outputs = runner.run(golden.feeds)
    return max((relative_error(outputs.get(name), wanted) for name, wanted in golden.outputs.items()), default=math.inf)


def check_golden(runner: Runner, golden: Golden, tolerance: float, who: str) -> float:
    """:func:`golden_error`, if it is within the tolerance.

    Raises:
        ProviderError: It is not, or the session cannot run the golden inputs.
    """
    error = golden_error(runner, golden)
    if not error <= tolerance:
        raise ProviderError(f"{who} computes wrong results here: golden error {error:.2g}, allowed {tolerance:.2g}")
    return error


def relative_error(got: NDArray[Any] | None, wanted: NDArray[Any]) -> float:
    """``||got - wanted||₂ / ||wanted||₂`` in float64; 0 for two zeros, infinite where they cannot be compared."""
    if got is None or got.shape != wanted.shape:
        return math.inf
    reference = wanted.astype(np.float64).ravel()
    difference = got.astype(np.float64).ravel() - reference
    norm, distance = float(np.linalg.norm(reference)), float(np.linalg.norm(difference))
    if not math.isfinite(distance):
        return math.inf
    if distance == 0.0:
        return 0.0
    return distance / norm if norm > 0.0 else math.inf


def _expected(arrays: Arrays, kind: str, specs: tuple[TensorSpec, ...]) -> Arrays:
    found: Arrays = {}
    for spec in specs:
        array = arrays.get(f"{kind}.{spec.name}")
        if array is None:
            raise BundleError(f"{GOLDEN_NAME} lacks {kind}.{spec.name}")
        if array.dtype.name != spec.dtype or len(array.shape) != len(spec.shape):
            raise BundleError(
                f"{GOLDEN_NAME}: {kind}.{spec.name} is {array.dtype.name}{list(array.shape)}, "
                f"the manifest says {spec.dtype}{list(spec.shape)}"
            )
        found[spec.name] = array
    return found


def _read(path: Path) -> Arrays:
    """Every array of an uncompressed .npz, none larger than its bytes in the file.

    ``np.load`` would believe the header of a member and allocate what it says.
    """
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES >> 20} MiB")
    arrays: Arrays = {}
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if len(members) > _MAX_MEMBERS:
            raise ValueError("it holds too many arrays")
        for member in members:
            name = member.filename.removesuffix(".npy")
            if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
                raise ValueError(f"{name} is compressed")
            if name in arrays:
                raise ValueError(f"{name} is there twice")
            with archive.open(member) as file:
                version = npy.read_magic(file)
                if version not in _HEADERS:
                    raise ValueError(f"{name} has .npy version {version}")
                shape, fortran, dtype = _HEADERS[version](file)
                data = file.read()
            if dtype.hasobject or fortran or math.prod(shape) * dtype.itemsize != len(data):
                raise ValueError(f"{name} is not a plain array of its stated size")
            arrays[name] = np.frombuffer(data, dtype).reshape(shape)
    return arrays
