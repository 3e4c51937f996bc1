"""Plain tensors of several requests in one run, where the rows of a model know nothing of each other."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

import numpy as np

from artifacts.bundle import Bundle
from artifacts.errors import HastenError
from artifacts.manifest import Manifest

from ..golden import load_golden, relative_error
from .wire import Arrays

Run = Callable[[Arrays], Arrays]

_LARGEST = 1 << 20
"""Bytes of a request's tensors: larger ones gain nothing from company, and would only be copied."""


def has_rows(manifest: Manifest) -> bool:
    """Whether the manifest says that every input and output begins with one and the same dynamic axis, the batch's.

    It stands nowhere else, and no output has an extent that the inputs do not tell: what was computed together can be
    taken apart again.
    """
    specs = (*manifest.inputs, *manifest.outputs)
    axes = {spec.shape[0] if spec.shape else 0 for spec in specs}
    axis = axes.pop()
    if axes or not isinstance(axis, str):
        return False
    told = {extent for spec in manifest.inputs for extent in spec.shape[1:]}
    rest = {extent for spec in manifest.outputs for extent in spec.shape[1:]}
    return axis not in told | rest and all(isinstance(extent, int) or extent in told for extent in rest)


def rows_apart(bundle: Bundle, tolerance: float, run: Run) -> bool:
    """Whether a row comes out the same in company: tensors of several callers may be computed together then.

    Rows of a text model know nothing of each other. Of another graph nobody knows, so its first golden row is run
    alone and beside its last and zeros.

    Args:
        bundle: What is loaded.
        tolerance: Relative L2 error up to which two results are the same.
        run: The graph.
    """
    if not has_rows(bundle.manifest):
        return False
    if bundle.manifest.processor is not None:
        return True
    try:
        feeds = load_golden(bundle).feeds
        alone = run({name: array[:1] for name, array in feeds.items()})
        joined = {name: np.concatenate([a[:1], a[-1:], np.zeros_like(a[:1])]) for name, a in feeds.items()}
        beside = run(joined)
    except HastenError:
        return False
    return all(relative_error(beside[name][:1], array) <= tolerance for name, array in alone.items())


def form_of(feeds: Arrays) -> Hashable:
    """What tensors have to agree in to be computed together: names, dtypes, extents but the first; None: with none."""
    rows = {array.shape[0] if array.ndim else 0 for array in feeds.values()}
    size = sum(array.nbytes for array in feeds.values())
    if len(rows) != 1 or 0 in rows or size > _LARGEST:
        return None
    return tuple(sorted((name, array.dtype.str, array.shape[1:]) for name, array in feeds.items()))


def pack(parts: Iterable[tuple[int, Mapping[str, np.ndarray]]]) -> Arrays:
    """The arrays of numbered parts under names that tell them apart on the wire."""
    return {f"{index} {name}": array for index, arrays in parts for name, array in arrays.items()}


def unpack(arrays: Arrays, count: int) -> list[Arrays]:
    """The arrays of each part; none for a part that has none."""
    parts: list[Arrays] = [{} for _ in range(count)]
    for key, array in arrays.items():
        index, _, name = key.partition(" ")
        parts[int(index)][name] = array
    return parts


def run_together(parts: Sequence[Arrays], run: Run) -> list[Arrays]:
    """The outputs of each part, computed in one run where there are several.

    Raises:
        HastenError: As the run; nobody knows then whose fault it is.
    """
    counts = [len(next(iter(part.values()))) for part in parts] if len(parts) > 1 else []
    if not counts:
        return [run(part) for part in parts]
    outputs = run({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    if any(array.shape[:1] != (sum(counts),) for array in outputs.values()):
        return [run(part) for part in parts]  # The manifest promised rows, and there are none.
    ends = np.cumsum(counts).tolist()
    return [
        {name: array[end - count : end] for name, array in outputs.items()}
        for count, end in zip(counts, ends, strict=True)
    ]
