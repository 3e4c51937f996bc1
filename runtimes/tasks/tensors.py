"""Plain tensors in, plain tensors out: a graph whose task hasten does not know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from artifacts.errors import DataError, UsageError

from .base import Record, Task


class TensorRunner(Task):
    """Runs the graph and nothing else; see `Task.run`."""

    task: ClassVar[str] = "tensors"

    def rows(self, records: Sequence[Record], *, max_tokens: int | None = None) -> list[dict[str, object]]:
        """Records are objects of nested lists by input name; results are nested lists by output name."""
        return [self._row(record) for record in records]

    def _row(self, record: Record) -> dict[str, object]:
        if not isinstance(record, Mapping):
            raise DataError("a record of a tensors model is a JSON object", f"Give {', '.join(self._specs)}")
        try:
            outputs = self.run({name: np.asarray(record[name]) for name in self._specs if name in record})
        except (UsageError, ValueError) as error:
            raise DataError(str(error)) from error
        return {name: value.tolist() for name, value in outputs.items()}
