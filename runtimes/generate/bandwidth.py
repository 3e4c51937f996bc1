"""What decoding one token moves through memory, and what this machine can move: the ceiling of every decoder."""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from artifacts.errors import ProviderError

from ..environment import physical_cores
from ..protobuf import fields

_ROW_READERS = {"Gather", "GatherBlockQuantized", "RotaryEmbedding", "GroupQueryAttention"}
_MOST_BYTES = 1 << 30
_LEAST_BYTES = 1 << 24
_PASSES = 5


def weight_bytes(model: Path) -> int:
    """Bytes of weights that a step of a graph reads whole; tables that only rows are read of are left out.

    Of an If, as the pass prompt-int8 leaves it, a step takes the else-branch.

    Args:
        model: The ``.onnx`` file. Weights in external data are counted from what it says of them, and not read.

    Raises:
        ProviderError: The file is not an ONNX model.
    """
    sizes: dict[str, int] = {}
    readers: dict[str, set[str]] = {}
    try:
        with model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            graphs = [(a, b) for field, a, b in fields(data, 0, len(data)) if field == 7]
            while graphs:
                for field, start, end in fields(data, *graphs.pop()):
                    if field == 1:
                        operator, inputs, branch = _node(data, start, end)
                        graphs += branch
                        for name in inputs:
                            readers.setdefault(name, set()).add(operator)
                    elif field == 5:
                        name, size = _initializer(data, start, end)
                        sizes[name] = size
    except (OSError, ValueError, IndexError) as error:
        raise ProviderError(f"{model.name} is not an ONNX model: {error}") from error
    return sum(size for name, size in sizes.items() if readers.get(name, set()) - _ROW_READERS)


def _node(data: mmap.mmap, start: int, end: int) -> tuple[str, list[str], list[tuple[int, int]]]:
    """Operator, inputs, and where the graph of its else-branch lies, if it has one."""
    # NodeProto: input = 1, op_type = 4, attribute = 5; AttributeProto: name = 1, g = 6
    operator, inputs, branch = "", [], []
    for field, a, b in fields(data, start, end):
        if field == 1:
            inputs.append(data[a:b].decode())
        elif field == 4:
            operator = data[a:b].decode()
        elif field == 5:
            parts = [(key, c, d) for key, c, d in fields(data, a, b) if key in (1, 6)]
            if any(key == 1 and data[c:d] == b"else_branch" for key, c, d in parts):
                branch += [(c, d) for key, c, d in parts if key == 6]
    return operator, inputs, branch


def _initializer(data: mmap.mmap, start: int, end: int) -> tuple[str, int]:
    # TensorProto: name = 8, raw_data = 9, external_data = 13; StringStringEntryProto: key = 1, value = 2
    name, size = "", 0
    for field, a, b in fields(data, start, end):
        if field == 8:
            name = data[a:b].decode()
        elif field == 9:
            size = b - a
        elif field == 13:
            entry = {key: data[c:d].decode() for key, c, d in fields(data, a, b)}
            size = int(entry.get(2, "0")) if entry.get(1) == "length" else size
    return name, size


def memory_bandwidth(threads: int = 0, *, most: int = _MOST_BYTES) -> float:
    """Bytes a second that this machine moves through memory, on so many threads at once: the best of five passes.

    Every thread takes the maximum of float32 numbers of its own (numpy's fastest reduction), over 1 GiB in all or an
    eighth of the free memory. A copy is timed too, counted once for what it reads and once for what it writes, and
    the larger figure is taken. Where the last cache is as large as that, it is the cache that was measured.

    Args:
        threads: Threads; 0: the physical cores this process may use.
        most: Most bytes of memory to use for it.
    """
    import psutil

    count = threads or physical_cores()
    free = int(psutil.virtual_memory().available)
    numbers = max(1, max(_LEAST_BYTES, min(most, free // 8)) // (4 * 2 * count))
    sources = [np.ones(numbers, np.float32) for _ in range(count)]
    targets = [np.zeros(numbers, np.float32) for _ in range(count)]
    with ThreadPoolExecutor(count) as pool:
        both = [*sources, *targets]
        reads = min(_timed(lambda: list(pool.map(np.max, both))) for _ in range(_PASSES))
        copies = min(_timed(lambda: list(pool.map(np.copyto, targets, sources))) for _ in range(_PASSES))
    return 2.0 * 4.0 * numbers * count / min(reads, copies)


def _timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin
