"""Texts from a language model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np

from artifacts.bundle import Bundle
from artifacts.errors import BundleError, DataError, UsageError

from ..generate.adapters import AdaptedSession, check_adapter
from ..generate.beam import BeamSearch
from ..generate.cache import check_memory, layout_of, rows_that_fit
from ..generate.constrain import Constraints
from ..generate.decoder import Decoder
from ..generate.draft import Draft
from ..generate.loop import Loop, Request
from ..generate.options import RECORD_OPTIONS, Options, counted
from ..generate.pace import Pace
from ..generate.prefixes import BLOCK, PrefixCache
from ..generate.prompts import PromptEncoder, check_ids, check_length, is_integer, is_one, token_ids
from ..generate.results import Generated, Perplexity, Piece
from ..generate.reuse import PromptCache
from ..generate.speculate import Speculator
from ..pool import Runner
from ..session import Session
from .base import Record, Task

if TYPE_CHECKING:
    from ..generate.chat import ChatTemplate

Message = Mapping[str, object]
Prompt = str | Sequence[Message] | Sequence[int]
"""A text, the messages of a chat, or token ids."""

MAX_ROWS = 32
"""Texts that are written at once; more wait until one ends."""
WINDOW = 512
"""Tokens of a window of `Generator.perplexity`."""
_FIRST_TOKENS = 512
_PACE = Pace()
_MOST = 1 << 53


class Generator(Task):
    """A decoder: continues prompts, answers chats, and tells how likely texts are."""

    task: ClassVar[str] = "text-generation"
    method: ClassVar[str] = "generate(prompt)"

    def __init__(self, bundle: Bundle, session: Runner, *, explanation: str = "") -> None:
        """As `Task`.

        Raises:
            BundleError: The manifest has no text processor, or says nothing of generation.
        """
        super().__init__(bundle, session, explanation=explanation)
        manifest = bundle.manifest
        if manifest.processor is None or manifest.generation is None:
            raise BundleError(f"{bundle.path} does not say how to generate texts", "Compile the model again")
        self.processor = manifest.processor
        self.generation = manifest.generation
        self.encoder = PromptEncoder(bundle.path / manifest.processor.tokenizer, manifest.generation.bos)
        self.vocabulary = int(manifest.outputs[0].shape[2])
        self.layout = layout_of(session.inputs)
        self.speculator = Speculator()
        self._draft: Generator | None = None

    @property
    def context(self) -> int:
        """Most tokens of a prompt and its answer together."""
        return self.processor.max_length

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The model's chat template; where it has none, rendering says so.

        Raises:
            BundleError: It cannot be read.
        """
        from ..generate.chat import ChatTemplate

        path, text = self.generation.chat_template, ""
        if path:
            try:
                text = (self.bundle.path / path).read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise BundleError(f"{path} of {self.bundle.path} cannot be read: {error}") from error
        return ChatTemplate(text, special=self.generation.special, control=self.encoder.control)

    @cached_property
    def constraints(self) -> Constraints:
        """What schemas, expressions and choices become."""
        return Constraints(self.encoder, self.vocabulary)

    def generate(self, prompt: object, *, stream: bool = False, **options: Any) -> Any:
        """Write the continuation of a prompt, or the answer to a chat.

        Args:
            prompt: A text; messages ``[{"role": "user", "content": "…"}]``, which the model's chat template makes a
                prompt of; token ids; or a list of any of them.
            stream: Return an iterator of `Piece` instead. Closing it ends the generation.
            options: The fields of `Options`: ``max_new_tokens``, ``temperature``, ``stop``, ``seed`` …

        Returns:
            A `Generated`; a list of them for ``n`` > 1; and a list of that for a list of prompts.

        Raises:
            UsageError: A prompt is empty or too long, an option makes no sense, or the KV cache would not fit.
            BundleError: The tokenizer or the chat template fails.
            ProviderError: ONNX Runtime failed.
        """
        chosen = Options.of(options)
        requests, alone = self._requests(prompt, chosen), is_one(prompt)
        if chosen.beams > 1:
            if stream:
                raise UsageError("beam search cannot stream: its texts are known at the end", "Leave out one")
            return _shaped(self._search(requests, chosen), alone, chosen.n)
        pieces = self._pieces(requests, chosen)
        return pieces if stream else _shaped(_results(pieces, len(requests), chosen.n), alone, chosen.n)

    def requests(self, prompt: object, *, first: int = 0, **options: Any) -> list[Request]:
        """What a `Loop` of one's own is asked for the same texts: a request a prompt.

        Args:
            prompt: As of `generate`.
            first: The number of the first prompt; the others follow.
            options: As of `generate`, but ``beams`` and ``cache``, which a loop for all comers does not have.

        Raises:
            UsageError: As `generate`.
            BundleError: As `generate`.
        """
        chosen = Options.of(options)
        for name, given in (("beams", chosen.beams > 1), ("cache", chosen.cache is not None)):
            if given:
                raise UsageError(f"{name}: the text would not be written beside others", f"Leave out {name}")
        return self._requests(prompt, chosen, first)

    def loop(self, slots: int, capacity: int, *, pace: Pace = _PACE, prefix_bytes: int = 0) -> Loop:
        """Continuous batching for all comers: `requests` says what to add.

        Args:
            slots: Texts at once.
            capacity: Tokens of each to make room for at first, prompt included.
            pace: How reading prompts and writing texts share the time.
            prefix_bytes: Most bytes of keys and values of prompts to keep for prompts that begin alike; 0: none.

        Raises:
            UsageError: The cache would not fit; says the most tokens that do.
        """
        prefixes = PrefixCache(self.layout, prefix_bytes) if prefix_bytes else None
        decoder = self.decoder(slots, capacity)
        return Loop(decoder, self.encoder.vocabulary, pace=pace, prefixes=prefixes, speculator=self.speculator)

    def use_draft(self, draft: Generator, *, close: bool = False) -> None:
        """Let a smaller model of the same tokenizer guess how texts go on, where none of them runs beside others.

        Args:
            draft: Loaded; nobody else may use it meanwhile.
            close: Close it with this one.

        Raises:
            UsageError: It has another vocabulary.
        """
        if self.encoder.plain.get_vocab() != draft.encoder.plain.get_vocab():
            name = draft.bundle.manifest.name
            raise UsageError(f"the draft {name} has another vocabulary", "Pass a model of the same tokenizer")
        size = min(self.vocabulary, draft.vocabulary)
        self.speculator = Speculator(Draft(partial(draft.decoder, 1), draft.context, size))
        self._draft = draft if close else None

    def perplexity(self, texts: str | Iterable[str] | Sequence[int], *, window: int = WINDOW) -> Perplexity:
        """How well the model predicts texts.

        Each text is cut into windows that do not overlap; every token of a window is predicted from those before it in
        the window, so the first is not.

        Args:
            texts: A text, several, or the token ids of one.
            window: Tokens of a window, at least 2; at most the model's context is taken.

        Raises:
            UsageError: There is no token to predict, or the window is too small.
            ProviderError: ONNX Runtime failed.
        """
        length = min(counted(window, "window", 2, _MOST), self.context)
        decoder = self.decoder(1, length)
        total, count = 0.0, 0
        for ids in self._streams(texts):
            for start in range(0, len(ids) - 1, length):
                losses = decoder.losses(ids[start : start + length])
                total, count = total + float(losses.sum()), count + len(losses)
        if not count:
            raise UsageError("there is no token to predict", "Pass a text of at least two tokens")
        loss = total / count
        return Perplexity(math.exp(loss) if loss < 700.0 else math.inf, loss, count)

    def decoder(self, rows: int, capacity: int) -> Decoder:
        """Prefill and decode step by step, with a cache of one's own: what `generate` runs on.

        Args:
            rows: Texts at once.
            capacity: Tokens of each.

        Raises:
            UsageError: The cache would not fit; says the most tokens that do.
        """
        check_memory(self.layout, rows, capacity)
        adapt = self._opened().adapted
        return Decoder(self._loaded(), self.layout, self.vocabulary, rows=rows, capacity=capacity, adapt=adapt)

    def new_cache(self) -> PromptCache:
        """A cache for the calls of one conversation: ``generate(messages, cache=…)``."""
        return PromptCache()

    def rows(self, records: Sequence[Record], *, max_tokens: int | None = None) -> list[dict[str, object]]:
        """A text for each record: a text, or an object with a ``prompt``, ``messages`` or ``text``.

        A record may carry options of `generate` (``max_new_tokens``, ``temperature``, ``seed`` …); with ``n`` > 1 its
        row is ``{"texts": [...]}``. ``max_tokens`` bounds how many texts are written at once: so many contexts.
        """
        parsed = [read_record(record) for record in records]
        groups: dict[str, list[int]] = {}
        for index, (_, options) in enumerate(parsed):
            groups.setdefault(repr(sorted(options.items())), []).append(index)
        found: dict[int, dict[str, object]] = {}
        for indices in groups.values():
            for some in _portions(indices, max_tokens, self.context):
                answers = self.generate([parsed[index][0] for index in some], **parsed[some[0]][1])
                found.update(zip(some, map(_row, answers), strict=True))
        return [found[index] for index in range(len(records))]

    def close(self) -> None:
        """As `Task.close`; ends the child process of the chat template too."""
        super().close()
        if self._draft is not None:
            self._draft.close()
        if "constraints" in self.__dict__:
            self.constraints.close()
        if "chat_template" in self.__dict__:
            self.chat_template.close()

    def _loaded(self) -> Session | AdaptedSession:
        session = self._opened().session
        if not isinstance(session, Session | AdaptedSession):
            raise UsageError("generation needs the model in this process", "Load it with hasten.load")
        return session

    def _requests(self, prompt: object, chosen: Options, first: int = 0) -> list[Request]:
        if chosen.adapter is not None:
            check_adapter(self.bundle, chosen.adapter)
            self._opened().adapted().feeds([chosen.adapter])
        job = chosen.job(self.generation, self.vocabulary, self.constraints.constraint)
        alone = is_one(prompt)
        given = [prompt] if alone else list(cast("Sequence[object]", prompt))
        requests = []
        for index, one in enumerate(given):
            ids = self._ids(one, chosen)
            check_length(ids, self.context, self.vocabulary, "the prompt" if alone else f"prompt {index}")
            most = self.context - len(ids)
            requests.append(Request(ids, min(chosen.max_new_tokens or most, most), job, first + index))
        return requests

    def _ids(self, prompt: object, chosen: Options) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return self.encoder.encode(prompt, parse_special=chosen.parse_special) if prompt else ()
        if not is_one(prompt):
            if len(cast("Sequence[object]", prompt)):
                raise UsageError("a prompt in the list is a list of texts", "Pass one text for each prompt")
            return ()
        sequence = cast("Sequence[object]", prompt)
        if isinstance(sequence[0], Mapping):
            messages = cast("Sequence[Message]", prompt)
            told = self.chat_template.render(messages, tools=chosen.tools, variables=chosen.template_variables)
            return self.encoder.encode_segments(told)
        return token_ids(sequence)

    def _capacity(self, requests: Sequence[Request], chosen: Options) -> int:
        """Tokens of a row to make room for at first: all that were asked for, or some where no number was named."""
        most = _FIRST_TOKENS if chosen.max_new_tokens is None else self.context
        return max(len(one.prompt) + min(one.limit, most) for one in requests)

    def _pieces(self, requests: list[Request], chosen: Options) -> Iterator[Piece]:
        if not requests:
            return iter(())
        capacity = self._capacity(requests, chosen)
        if chosen.cache is not None:
            if len(requests) > 1:
                raise UsageError("a cache is for one text of one prompt", "Pass one prompt")
            return self._continued(requests[0], chosen.cache, capacity)
        check_memory(self.layout, 1, capacity)
        rows, shared = min(len(requests) * chosen.n, MAX_ROWS), _begin_alike(requests)
        fitting = max(1, rows_that_fit(self.layout, rows + shared, capacity))
        # Prefixes take the memory of one text more.
        prefix_bytes = capacity * self.layout.token_bytes if shared and fitting > 1 else 0
        return self.loop(max(1, min(rows, fitting - shared)), capacity, prefix_bytes=prefix_bytes).run(requests)

    def _continued(self, request: Request, cache: PromptCache, capacity: int) -> Iterator[Piece]:
        decoder = cache.prepare(
            self._loaded(),
            self.layout,
            self.vocabulary,
            request.prompt,
            capacity,
            adapter=request.job.adapter,
            adapt=self._opened().adapted,
        )
        loop = Loop(decoder, self.encoder.vocabulary, held=cache.reused, speculator=self.speculator)

        def run() -> Iterator[Piece]:
            try:
                yield from loop.run([request])
            finally:
                cache.keep(loop.held)

        return run()

    def _search(self, requests: list[Request], chosen: Options) -> list[list[Generated]]:
        if not requests:
            return []
        capacity = self._capacity(requests, chosen)
        decoder = self.decoder(chosen.beams, capacity)
        search = BeamSearch(decoder, self.encoder.vocabulary, length_penalty=chosen.length_penalty)
        return [search.search(request) for request in requests]

    def _streams(self, texts: object) -> Iterator[tuple[int, ...]]:
        if isinstance(texts, Sequence | np.ndarray) and len(texts) and is_integer(texts[0]):
            ids = token_ids(cast("Sequence[object]", texts))
            check_ids(ids, self.vocabulary, "the text")
            yield ids
            return
        for text in [texts] if isinstance(texts, str) else cast("Iterable[str]", texts):
            yield self.encoder.encode(text)


def read_record(record: Record) -> tuple[object, dict[str, Any]]:
    """The prompt of a record, and its options.

    Raises:
        DataError: It has no prompt, or one that is none.
    """
    if isinstance(record, str):
        return record, {}
    options = {name: record[name] for name in RECORD_OPTIONS if name in record}
    for name, kinds in (("messages", list), ("prompt", (str, list)), ("text", str)):
        value = record.get(name)
        if value is None:
            continue
        if not isinstance(value, kinds) or not value or not is_one(value):
            raise DataError(f'field "{name}" is no prompt', 'Write {"prompt": "…"} or {"messages": [{…}]}')
        return value, options
    raise DataError(
        f"a record has no prompt; it has {', '.join(record) or 'nothing'}",
        'Write {"prompt": "…"} or {"messages": [{"role": "user", "content": "…"}]}',
    )


def _row(answer: Generated | list[Generated]) -> dict[str, object]:
    if isinstance(answer, Generated):
        return answer.to_dict()
    return {"texts": [one.to_dict() for one in answer]}


def _results(pieces: Iterator[Piece], prompts: int, n: int) -> list[list[Generated]]:
    found = {(piece.prompt, piece.index): piece.result for piece in pieces if piece.result is not None}
    return [[found[prompt, index] for index in range(n)] for prompt in range(prompts)]


def _shaped(found: list[list[Generated]], alone: bool, n: int) -> Any:
    """One, some, or a list of either: as many dimensions as the caller asked for."""
    shaped = [texts if n > 1 else texts[0] for texts in found]
    return shaped[0] if alone else shaped


def _begin_alike(requests: Sequence[Request]) -> bool:
    """Whether two of the prompts share what the prefix cache would know of."""
    starts = [request.prompt[:BLOCK] for request in requests if len(request.prompt) > BLOCK]
    return len(set(starts)) < len(starts)


def _portions(indices: list[int], max_tokens: int | None, context: int) -> Iterator[list[int]]:
    if max_tokens is not None and max_tokens < 1:
        raise UsageError(f"max_tokens is {max_tokens}", "Pass a positive number of tokens")
    size = len(indices) if max_tokens is None else max(1, max_tokens // context)
    for start in range(0, len(indices), size):
        yield indices[start : start + size]
