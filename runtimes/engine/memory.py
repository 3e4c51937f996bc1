"""Answers that the response cache holds: what may be kept, under which key, in which form."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np

from artifacts.bundle import Bundle
from artifacts.errors import HastenError

from ..generate.results import Generated
from ..generate.sampling import Sampling, sampling_of
from .calls import Answer
from .stats import Counters
from .streams import read_result, tell_result
from .wire import decode, encode

if TYPE_CHECKING:
    from ..responses.cache import ResponseCache

_CHOOSING = tuple(one.name for one in fields(Sampling))


class Remembered:
    """A response cache before an engine; without one everything is computed.

    Args:
        cache: It; None: there is none.
        bundle: What answers.
        counters: Of the engine.
    """

    def __init__(self, cache: ResponseCache | None, bundle: Bundle, counters: Counters) -> None:
        self._cache = cache
        self._bundle = bundle
        self._counters = counters

    async def answer(self, method: str, items: object, make: Callable[[], Awaitable[Answer]]) -> Answer:
        """The answer to a request that asks for the same whenever it is asked.

        Raises:
            HastenError: What ``make`` raises.
        """
        if self._cache is None:
            return await make()
        made: list[Answer] = []

        async def compute() -> bytes:
            made.append(await make())
            return encode({"rows": made[0].rows, "tokens": made[0].tokens}, made[0].arrays)

        frame, hit = await self._cache.single(self._key(method, {"items": items}), compute)
        self._count(hit)
        if made:
            return made[0]
        message, arrays = decode(frame)
        held = {name: np.array(array) for name, array in arrays.items()}
        return Answer(held, message["rows"], message["tokens"], cached=True)

    async def written(
        self, prompt: object, options: Mapping[str, Any], make: Callable[[], Awaitable[list[Generated]]]
    ) -> list[Generated]:
        """The texts of a prompt.

        Raises:
            HastenError: What ``make`` raises.
        """
        key = self._key_of_texts(prompt, options)
        if key is None or self._cache is None:
            return await make()
        made: list[list[Generated]] = []

        async def compute() -> bytes:
            made.append(await make())
            return _frame(made[0])

        frame, hit = await self._cache.single(key, compute)
        self._count(hit)
        return made[0] if made else _texts(frame)

    async def texts(self, prompt: object, options: Mapping[str, Any]) -> list[Generated] | None:
        """The texts of a prompt, if they are there."""
        key = self._key_of_texts(prompt, options)
        if key is None or self._cache is None:
            return None
        frame = await self._cache.get(key)
        self._count(frame is not None)
        return None if frame is None else _texts(frame)

    async def keep_texts(self, prompt: object, options: Mapping[str, Any], texts: Sequence[Generated]) -> None:
        """Keep the texts of a prompt, if they would be the same the next time."""
        key = self._key_of_texts(prompt, options)
        if key is not None and self._cache is not None:
            await self._cache.put(key, _frame(texts))

    def _key(self, method: str, payload: Mapping[str, object]) -> str:
        from ..responses.keys import request_key

        return request_key(self._bundle.digest, method, payload)

    def _key_of_texts(self, prompt: object, options: Mapping[str, Any]) -> str | None:
        """None where the texts may be others the next time: drawn without a seed, or ended by a clock."""
        generation = self._bundle.manifest.generation
        if self._cache is None or generation is None or options.get("seconds") is not None:
            return None
        if options.get("seed") is None and (options.get("beams") or 1) == 1:
            try:
                chosen = sampling_of(generation, {name: options[name] for name in _CHOOSING if name in options})
            except (HastenError, TypeError):
                return None
            if not chosen.greedy:
                return None
        try:
            return self._key("generate", {"prompt": prompt, **{f"option {name}": one for name, one in options.items()}})
        except HastenError:
            return None

    def _count(self, hit: bool) -> None:
        self._counters.add("cache_hits" if hit else "cache_misses")


def _frame(texts: Sequence[Generated]) -> bytes:
    return encode({"texts": [tell_result(text) for text in texts]})


def _texts(frame: bytes) -> list[Generated]:
    return [text for told in decode(frame)[0]["texts"] if (text := read_result(told)) is not None]
