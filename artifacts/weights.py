"""The weights of a bundle that is being written, content-addressed."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from .digest import CHUNK, sha256_bytes
from .manifest import FileEntry
from .swap import output_errors


class WeightStore:
    """The weights of a bundle that is being written: one file a tensor, named by its hash, so written once."""

    def __init__(self, directory: Path) -> None:
        """Keep them in ``directory``, the folder ``weights`` of a staging folder; made when needed."""
        self.directory = directory

    def put(self, data: memoryview | bytes) -> FileEntry:
        """Keep the bytes of a tensor, in the order of their memory.

        Returns:
            The file that holds them.

        Raises:
            OutputError: They cannot be written; nothing half-written stays.
        """
        view = memoryview(data)
        raw = view.cast("B") if view.c_contiguous and view.nbytes else memoryview(view.tobytes())
        digest = sha256_bytes(raw)
        entry = FileEntry(f"weights/{digest}.bin", raw.nbytes, digest)
        place = self.directory / f"{digest}.bin"
        partial = self.directory / f"{secrets.token_hex(8)}.partial"
        with output_errors(self.directory):
            if place.exists():
                return entry
            self.directory.mkdir(parents=True, exist_ok=True)
            try:
                with partial.open("xb", buffering=0) as file:
                    for start in range(0, raw.nbytes, CHUNK):
                        _write_all(file.fileno(), raw[start : start + CHUNK])
                partial.replace(place)
            finally:
                partial.unlink(missing_ok=True)
        return entry


def _write_all(handle: int, data: memoryview) -> None:
    while data:
        data = data[os.write(handle, data) :]
