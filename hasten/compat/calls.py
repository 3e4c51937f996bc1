"""How every pipeline is called: one input, a list, or an iterator of them, with options of the call or of all calls."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, ClassVar

from artifacts.errors import UsageError
from runtimes.closing import Closing

from .source import Source, count_of, import_torch

_AT_ONCE = 256


class Pipeline(Closing):
    """A callable over a model. What it gives for one input, it gives in a list for a list, in an iterator for one."""

    task: ClassVar[str] = ""
    """Name of the task."""
    options: ClassVar[tuple[str, ...]] = ()
    """Names of the options of a call."""

    def __init__(self, source: Source, options: Mapping[str, object]) -> None:
        """Keep what is for all calls.

        Args:
            source: The model.
            options: Options of all calls; ``batch_size``: inputs taken from an iterator at a time.

        Raises:
            UsageError: There is no such option, or its value makes no sense.
        """
        self.source = source
        self._given = self._known(options)
        self.read(self._given)

    def __call__(self, inputs: Any, **options: Any) -> Any:
        """The result for one input, a list of results for a list, an iterator of results for any other iterator.

        Raises:
            UsageError: There is no such option, an input makes no sense, or the model was closed.
            ProviderError: ONNX Runtime failed.
        """
        given = {**self._given, **self._known(options)}
        size = count_of(given.pop("batch_size", _AT_ONCE), "batch_size")
        chosen = self.read(given)
        if self.alone(inputs):
            return self.shape_alone(self.answers([inputs], chosen)[0], inputs, options)
        if isinstance(inputs, list | tuple):
            return self.answers(inputs, chosen)
        if isinstance(inputs, Iterable) and not isinstance(inputs, str | bytes | Mapping):
            return self._each(iter(inputs), chosen, size)
        raise UsageError(f"the input is a {type(inputs).__name__}", "Pass one input, or a list of them")

    def alone(self, inputs: object) -> bool:
        """Whether it is one input and not several."""
        return isinstance(inputs, str)

    def shape_alone(self, answer: Any, inputs: object, options: Mapping[str, object]) -> Any:
        """What is returned for one input, given with these options of the call."""
        return answer

    @abstractmethod
    def read(self, options: Mapping[str, Any]) -> Any:
        """The options, checked.

        Raises:
            UsageError: A value makes no sense, or is not supported.
        """

    @abstractmethod
    def answers(self, inputs: Sequence[Any], options: Any) -> list[Any]:
        """A result for each input, in order; ``options`` as `read` gave them."""

    def close(self) -> None:
        """Free the model, if it was loaded here."""
        self.source.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.source.bundle.manifest.name!r}>"

    def _each(self, inputs: Iterator[Any], options: Any, size: int) -> Iterator[Any]:
        while some := list(islice(inputs, size)):
            yield from self.answers(some, options)

    def _known(self, options: Mapping[str, object]) -> dict[str, Any]:
        known = (*self.options, "batch_size")
        if unknown := [name for name in options if name not in known]:
            raise UsageError(
                f"hasten's {self.task} pipeline has no option {unknown[0]!r}", f"It has {', '.join(known)}"
            )
        return dict(options)


def texts_of(inputs: Sequence[Any]) -> list[str]:
    """The inputs, each of them a text.

    Raises:
        UsageError: One is not.
    """
    for index, one in enumerate(inputs):
        if not isinstance(one, str):
            raise UsageError(f"input {index} is {type(one).__name__}, not a str", "Pass texts")
    return list(inputs)


def check_truncation(options: Mapping[str, object]) -> None:
    """Refuse to leave long texts uncut: hasten cuts them at the model's length.

    Raises:
        UsageError: ``truncation`` is there, and is neither True nor None.
    """
    if options.get("truncation") not in {None, True, "longest_first"}:
        raise UsageError("hasten always truncates texts to the model's length", "Leave out truncation")


def as_tensor(array: Any) -> Any:
    """A torch tensor of an array.

    Raises:
        InstallationError: torch is not installed.
    """
    return import_torch().from_numpy(array)
