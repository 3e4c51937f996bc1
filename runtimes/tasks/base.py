"""What every loaded model can do, whatever its task."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import numpy as np
from numpy.typing import NDArray

from artifacts.bundle import Bundle
from artifacts.errors import BundleError, DataError, UsageError
from artifacts.manifest import TensorSpec

from ..closing import Closing
from ..items import Item
from ..pipeline import ahead, flow
from ..pool import Arrays, Runner, SessionPool
from ..text import Batch, TextEncoder

if TYPE_CHECKING:
    from .answer import Answer
    from .classify import Classification
    from .fill import Filling
    from .tag import Entity

Record = str | Mapping[str, object]
"""A line of input to `hasten run`: a text, or an object with named fields."""


class Task(Closing):
    """A loaded bundle. Each task overrides the one method that is its own; the others say which one that is.

    A task is a context manager, and may be used from several threads.
    """

    task: ClassVar[str] = ""
    """Name of the task in the manifest."""
    method: ClassVar[str] = "run(feeds)"
    """How the task is called, for error texts."""

    def __init__(self, bundle: Bundle, session: Runner, *, explanation: str = "") -> None:
        """Wrap a session that is already loaded.

        Args:
            bundle: Where the graph is from.
            session: The graph, ready to run: one session, or a pool of them.
            explanation: Why this variant and provider, in lines.
        """
        self.bundle = bundle
        self._pool: SessionPool | None = session if isinstance(session, SessionPool) else SessionPool(session)
        self._explanation = explanation
        self._specs = {spec.name: spec for spec in session.inputs}

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """Run the graph on plain tensors. Integers that fit and floats are converted to the type that the graph takes.

        Args:
            feeds: An array for every input of the graph, by name.

        Returns:
            Every output of the graph, by name.

        Raises:
            UsageError: An input is missing, unknown, of another type or rank, or the model was closed.
            ProviderError: ONNX Runtime failed.
        """
        return self._run(self._opened().session, feeds)

    def explain(self) -> str:
        """Why this variant on this provider, and how it uses the machine: several lines to read."""
        told = self._pool.explain() if self._pool is not None else ""
        return f"{self._explanation}\n  now        {told}" if told else self._explanation

    def close(self) -> None:
        """Free the graph. Calling it again does nothing; running afterwards is a UsageError."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.bundle.manifest.name!r}>"

    def embed(self, texts: Iterable[str], *, max_tokens: int | None = None) -> NDArray[np.float32]:
        """Vectors of texts; see `Embedder.embed`."""
        self._refuse("embed")

    def embed_iter(self, texts: Iterable[str], *, max_tokens: int | None = None) -> Iterator[NDArray[np.float32]]:
        """Vectors of texts, one after another; see `Embedder.embed_iter`."""
        self._refuse("embed_iter")

    def classify(self, texts: Iterable[Item], *, max_tokens: int | None = None) -> list[Classification]:
        """Classes of texts; see `Classifier.classify`."""
        self._refuse("classify")

    def tag(self, texts: Iterable[str], *, max_tokens: int | None = None) -> list[list[Entity]]:
        """Entities in texts; see `Tagger.tag`."""
        self._refuse("tag")

    def answer(
        self,
        question: str,
        context: str,
        *,
        no_answer: bool = False,
        max_answer_tokens: int = 15,
        max_tokens: int | None = None,
    ) -> Answer:
        """The answer in a context; see `Answerer.answer`."""
        self._refuse("answer")

    def fill(self, text: str, top_k: int = 5) -> list[Filling]:
        """Tokens for a mask; see `Filler.fill`."""
        self._refuse("fill")

    def generate(self, *args: Any, **options: Any) -> Any:
        """Texts that go on from prompts; see `Generator.generate`."""
        self._refuse("generate")

    def perplexity(self, *args: Any, **options: Any) -> Any:
        """How well the model predicts texts; see `Generator.perplexity`."""
        self._refuse("perplexity")

    @abstractmethod
    def rows(self, records: Sequence[Record], *, max_tokens: int | None = None) -> list[dict[str, object]]:
        """Results for `hasten run`, one JSON-ready object a record, in order.

        Raises:
            DataError: A record lacks a field, or a field is of the wrong type.
        """

    def _opened(self) -> SessionPool:
        if self._pool is None:
            raise UsageError("the model was closed", "Load it again")
        return self._pool

    def _run(self, runner: Runner, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        self._opened()
        unknown = sorted(set(feeds) - set(self._specs))
        missing = sorted(set(self._specs) - set(feeds))
        if unknown or missing:
            wrong = f"unknown input {unknown[0]!r}" if unknown else f"input {missing[0]!r} is missing"
            raise UsageError(wrong, f"The graph takes {', '.join(self._specs)}")
        return runner.run({name: _convert(value, self._specs[name]) for name, value in feeds.items()})

    def _refuse(self, asked: str) -> NoReturn:
        raise UsageError(f"this is a {self.bundle.manifest.task} model: it has no .{asked}()", f"Use .{self.method}")

    def _output(self, outputs: Arrays, *names: str) -> NDArray[Any]:
        for name in names:
            if name in outputs:
                return outputs[name]
        raise BundleError(
            f"the graph has no output {' or '.join(names)}", f"It has {', '.join(outputs)}; use .run(feeds)"
        )


class TextTask(Task):
    """A task whose graph takes tokenized text."""

    def __init__(self, bundle: Bundle, session: Runner, *, explanation: str = "") -> None:
        """As `Task`.

        Raises:
            BundleError: The manifest has no text processor, or the graph takes what no tokenizer makes.
        """
        super().__init__(bundle, session, explanation=explanation)
        processor = bundle.manifest.processor
        if processor is None:
            raise BundleError(f"{bundle.path} has no text processor", "Compile the model again, or use .run(feeds)")
        self.processor = processor
        self.encoder = TextEncoder(processor, bundle.path / processor.tokenizer, tuple(self._specs))

    def _batches(
        self, items: Iterable[Item], *, max_tokens: int | None = None, offsets: bool = False
    ) -> Iterator[tuple[Batch, Arrays]]:
        """Batches of the items with what the graph makes of them, in any order: `Batch.indices` says of which items.

        A chunk of the items is tokenized while the one before it runs, and a long input runs in lanes; see
        `SessionPool`. Memory does not grow with the number of items.

        Raises:
            UsageError: ``max_tokens`` < 1, or the model was closed.
            BundleError: The tokenizer fails.
            ProviderError: ONNX Runtime failed.
        """
        pool = self._opened()
        tokens = pool.max_tokens if max_tokens is None else max_tokens
        prepare = partial(self.encoder.prepare, max_tokens=tokens, padding=pool.padding, offsets=offsets)
        return self._flow(ahead(prepare, self.encoder.chunks(items)))

    def _flow(self, chunks: Iterable[Sequence[Batch]]) -> Iterator[tuple[Batch, Arrays]]:
        """As `_batches`, for batches already made."""
        found = flow(chunks, self._opened(), lambda runner, batch: self._run(runner, batch.feeds))
        return (batch.spread(outputs) for batch, outputs in found)

    def label(self, index: int) -> str:
        """Name of a class; LABEL_i where the manifest names none."""
        labels = self.processor.labels
        return labels[index] if index < len(labels) else f"LABEL_{index}"


def text_field(record: Record, name: str) -> str:
    """A field of a record; a bare text is its own ``text`` field.

    Raises:
        DataError: There is no such field, or it is not a text.
    """
    if isinstance(record, str) and name == "text":
        return record
    value = record.get(name) if isinstance(record, Mapping) else None
    if not isinstance(value, str):
        found = ", ".join(record) if isinstance(record, Mapping) else "plain text"
        problem = "is not a text" if value is not None else f"is missing; the record has {found or 'nothing'}"
        raise DataError(f'field "{name}" {problem}', f'Give each record a "{name}"')
    return value


def _convert(value: object, spec: TensorSpec) -> NDArray[Any]:
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise UsageError(f"input {spec.name!r} is not an array: {error}", "Pass a numpy array") from error
    if array.ndim != len(spec.shape):
        raise UsageError(
            f"input {spec.name!r} has {array.ndim} axes", f"The graph takes {len(spec.shape)}: {spec.shape}"
        )
    if any(isinstance(fixed, int) and fixed != size for fixed, size in zip(spec.shape, array.shape, strict=True)):
        raise UsageError(f"input {spec.name!r} has the shape {array.shape}", f"The graph takes {spec.shape}")
    if spec.dtype == "str":
        return array
    try:
        wanted = np.dtype(spec.dtype)
    except TypeError as error:
        raise UsageError(
            f"input {spec.name!r} is {spec.dtype}, which numpy does not have", "Use another variant"
        ) from error
    if array.dtype == wanted:
        return array
    # A Python list of floats is float64: narrowing a float loses digits only, which is what the graph computes in.
    if not np.can_cast(array.dtype, wanted, "same_kind"):
        raise UsageError(f"input {spec.name!r} is {array.dtype}", f"The graph takes {spec.dtype}")
    converted: NDArray[Any] = array.astype(wanted)
    if array.dtype.kind in "iu" and not np.array_equal(converted, array):
        raise UsageError(f"input {spec.name!r} has numbers too large for {spec.dtype}", f"The graph takes {spec.dtype}")
    return converted
