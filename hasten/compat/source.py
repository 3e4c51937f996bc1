"""What a drop-in computes with: a bundle's folder, a loaded model, or an engine, behind one face."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from inspect import iscoroutinefunction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from artifacts.bundle import Bundle
from artifacts.errors import InstallationError, UsageError
from artifacts.manifest import TextProcessor
from runtimes.closing import Closing
from runtimes.items import Item, check_texts
from runtimes.load import load
from runtimes.text import TextEncoder, Tokens


class Source(Closing):
    """A model to compute with.

    Attributes:
        model: The loaded model, or the engine.
        waits: Whether its methods must be awaited.
    """

    def __init__(self, model: object, *, device: object = None, task: str = "") -> None:
        """Load the bundle, if it is not loaded yet.

        Args:
            model: Folder of a bundle, a `Task`, or a (blocking) engine.
            device: Where to load a bundle; as torch and transformers name devices too: -1 is the CPU, 0 is ``cuda:0``.
            task: Task that the bundle must have; empty: any.

        Raises:
            UsageError: It is none of them, of another task, or is loaded already and a device was named.
            BundleError: Not a bundle, or a damaged one.
            ProviderError: Nothing here runs it correctly.
        """
        self._owned = isinstance(model, str | os.PathLike)
        if isinstance(model, str | os.PathLike):
            self.model: Any = load(model, device=_device(device))
        elif not all(hasattr(model, name) for name in ("bundle", "run", "rows")):
            raise UsageError(
                f"the model is a {type(model).__name__}", "Pass a bundle's folder, a loaded model, or an engine"
            )
        elif device is not None:
            raise UsageError("the model is loaded already, and a device was named", "Leave out the device")
        else:
            self.model = model
        self.waits = iscoroutinefunction(self.model.run)
        if task and self.bundle.manifest.task != task:
            found = self.bundle.manifest.task
            self.close()
            raise UsageError(f"this is a {found} model, and {task} was asked for", f"Compile a {task} model")

    @property
    def bundle(self) -> Bundle:
        """The bundle."""
        found: Bundle = self.model.bundle
        return found

    @property
    def processor(self) -> TextProcessor:
        """How texts become tensors.

        Raises:
            UsageError: The bundle takes no texts.
        """
        found = self.bundle.manifest.processor
        if found is None:
            raise UsageError(f"{self.bundle.path} takes tensors, not texts", "Use .run(feeds)")
        return found

    @cached_property
    def encoder(self) -> TextEncoder:
        """Texts to the tensors that the graph takes.

        Raises:
            BundleError: The graph takes what no tokenizer makes.
        """
        names = [spec.name for spec in self.bundle.manifest.inputs]
        return TextEncoder(self.processor, self.bundle.path / self.processor.tokenizer, names)

    def check_blocking(self) -> None:
        """Refuse an engine whose methods must be awaited.

        Raises:
            UsageError: It is one.
        """
        if self.waits:
            raise UsageError(
                "this engine is asynchronous, and the method called is not",
                "Open it with `with hasten.serve_engine(OUT) as engine`",
            )

    def logits(
        self, items: Sequence[Item], *outputs: str, offsets: bool = False
    ) -> Iterator[tuple[int, Tokens, list[NDArray[Any]]]]:
        """(place, tokens, a row of each output) of every item, short items first; rows are as long as their batch.

        Raises:
            UsageError: The graph has no such output, or the engine must be awaited.
            ProviderError: ONNX Runtime failed.
        """
        for batch in self.encoder.batches(items, offsets=offsets):
            found = self.run(batch.feeds)
            if missing := [name for name in outputs if name not in found]:
                raise UsageError(f"the graph has no output {missing[0]}", f"It has {', '.join(found)}")
            arrays = [found[name] for name in outputs]
            spread, _ = batch.spread({})
            sources = [*range(len(batch.rows)), *(row for row, _ in batch.twins)]
            for place, row in zip(spread.indices, sources, strict=True):
                yield place, batch.rows[row], [array[row] for array in arrays]

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The graph's outputs for some tensors.

        Raises:
            UsageError: The engine must be awaited.
            ProviderError: ONNX Runtime failed.
        """
        self.check_blocking()
        found: dict[str, NDArray[Any]] = self.model.run(feeds)
        return found

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """A vector for each text, float32 [n, d].

        Raises:
            UsageError: The engine must be awaited, or an element is not a str.
            ProviderError: ONNX Runtime failed.
        """
        self.check_blocking()
        found: NDArray[np.float32] = self.model.embed(texts)
        return found

    def label(self, index: int) -> str:
        """Name of a class; LABEL_i where the manifest names none."""
        labels = self.processor.labels
        return labels[index] if index < len(labels) else f"LABEL_{index}"

    def close(self) -> None:
        """Free the model, if it was loaded here."""
        if self._owned:
            self.model.close()


def lead(prompt: str, texts: object, method: str) -> list[str]:
    """The texts with a prompt before each.

    Raises:
        UsageError: They are one str, or an element is not a str.
    """
    return [prompt + str(text) for text in check_texts(texts, method=method)]


def count_of(value: object, name: str) -> int:
    """The value, a positive number.

    Raises:
        UsageError: It is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"{name} is {value!r}", "Pass a positive number")
    return value


def refuse(library: str, given: Mapping[str, object]) -> None:
    """Refuse arguments that another library takes and hasten does not; None is as good as not given.

    Raises:
        UsageError: One was given.
    """
    named = [name for name, value in given.items() if value is not None]
    if named:
        raise UsageError(f"hasten does not support {named[0]} of {library}", "Leave it out")


def import_torch() -> Any:
    """torch, if it is installed.

    Raises:
        InstallationError: It is not.
    """
    try:
        import torch
    except ImportError as error:
        raise InstallationError("torch is not installed, and tensors are its own", "Ask for numpy arrays") from error
    return torch


def _device(device: object) -> str | None:
    if device is None or isinstance(device, str):
        return device
    if isinstance(device, int) and not isinstance(device, bool):
        return "cpu" if device < 0 else f"cuda:{device}"
    return str(device)
