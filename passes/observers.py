"""Objects that watch a pipeline run: they verify, time, dump and leave reproducers, so that passes need no flags."""

from __future__ import annotations

import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import onnx_ir as ir

from artifacts.errors import OutputError, PassError
from artifacts.signature import CACHE_PREFIXES

from .base import Context, Outcome, Pass
from .grammar import Signature, check, signature

EXTERNAL_BYTES = 1024
"""Tensors from this size on go to the data file beside a dumped graph."""


class Observer(Protocol):
    """Watches each pass of a pipeline."""

    def before(self, item: Pass, model: ir.Model) -> None:
        """The pass is about to run."""
        ...

    def after(self, item: Pass, model: ir.Model, outcome: Outcome, seconds: float) -> None:
        """The pass has run for so many seconds. May raise PassError: the pass is then said to have failed."""
        ...

    def failed(self, item: Pass, model: ir.Model, rest: str, error: Exception) -> str:
        """The pass or an observer failed.

        Args:
            item: The pass.
            model: The model as it was before the pass.
            rest: Text form of the pipeline from this pass on.
            error: What was raised.

        Returns:
            A sentence for the user about what was left behind; may be empty.
        """
        ...


class Silent:
    """An observer that does nothing; base of the others."""

    def before(self, item: Pass, model: ir.Model) -> None:
        """Nothing to do."""

    def after(self, item: Pass, model: ir.Model, outcome: Outcome, seconds: float) -> None:
        """Nothing to do."""

    def failed(self, item: Pass, model: ir.Model, rest: str, error: Exception) -> str:
        """Nothing was left behind."""
        return ""


class Verifying(Silent):
    """Checks the promises of every pass: the graph's grammar, its inputs and outputs, a second run changes nothing."""

    def __init__(self, context: Context, *, rerun: bool = True) -> None:
        self._context = context
        self._rerun = rerun
        self._signature: Signature = ()

    def before(self, item: Pass, model: ir.Model) -> None:
        """Remember the inputs and outputs."""
        self._signature = signature(model)

    def after(self, item: Pass, model: ir.Model, outcome: Outcome, seconds: float) -> None:
        """Check the promises.

        Raises:
            PassError: One is broken.
        """
        check(model, self._context.target)
        was, now = _promised(self._signature, item), _promised(signature(model), item)
        if now != was:
            raise PassError(f"it changed the inputs or outputs of the graph: {sorted(set(was) ^ set(now), key=str)}")
        if not self._rerun:
            return
        again = item.run(model.clone(), self._context)
        if again.changed:
            raise PassError(f"a second run changed {again.changed} more places (the first: {outcome.changed})")


def _promised(found: Signature, item: Pass) -> Signature:
    """What of a signature a pass leaves as it is: all; or all but the KV cache, where it says that it alters that."""
    free = CACHE_PREFIXES if getattr(item, "alters_cache", False) else ()
    return tuple(one for one in found if not one[1].startswith(free))


@dataclass
class Timing(Silent):
    """Collects the seconds each pass took, in running order."""

    seconds: list[tuple[str, float]] = field(default_factory=list)

    def after(self, item: Pass, model: ir.Model, outcome: Outcome, seconds: float) -> None:
        """Note the time."""
        self.seconds.append((item.name, seconds))


class DumpOnChange(Silent):
    """Writes the graph after each pass that changed it: ``<folder>/<number>-<pass>.onnx``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = 0

    def after(self, item: Pass, model: ir.Model, outcome: Outcome, seconds: float) -> None:
        """Write the graph if it changed."""
        self._number += 1
        if outcome.changed:
            write_model(model, self._folder / f"{self._number:02d}-{item.name}.onnx")


class Reproducer(Silent):
    """On failure writes ``pipeline.txt`` (this pass and the rest), ``before.onnx`` and ``error.txt`` into a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def failed(self, item: Pass, model: ir.Model, rest: str, error: Exception) -> str:
        """Write the reproducer; a full disk must not hide the failure itself."""
        try:
            write_model(model, self._folder / "before.onnx")
            (self._folder / "pipeline.txt").write_text(rest + "\n", encoding="utf-8")
            (self._folder / "error.txt").write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        except (OSError, OutputError) as problem:
            return f"No reproducer could be written to {self._folder}: {problem}"
        return f"A reproducer is in {self._folder}"


def write_model(model: ir.Model, path: Path) -> None:
    """Save a graph for debugging, its larger tensors in ``<name>.data`` beside it.

    Raises:
        OutputError: The folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        ir.save(model.clone(), path, external_data=f"{path.name}.data", size_threshold_bytes=EXTERNAL_BYTES)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error}", "Free some space or choose another folder") from error
