"""Beam search as transformers' (5.x, early_stopping=False): the likeliest texts found by following several at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .cache import check_memory
from .decoder import Decoder, Floats
from .detokenize import Vocabulary, detokenize
from .results import Finish, Generated, log_softmax
from .rows import Request
from .sampling import Sampler

_NEVER = -1.0e9

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class _Beam:
    """A text that is followed, or that ended.

    Attributes:
        tokens: Written so far, with the one that ended it.
        score: Sum of log-probabilities; over the length to the power of the penalty once it ended.
        source: Slot of the beam that it continues.
        finish: Why it ended; None: it has not.
    """

    tokens: tuple[int, ...]
    score: float
    source: int = 0
    finish: Finish | None = None


class BeamSearch:
    """Searches for one prompt at a time.

    Args:
        decoder: With as many slots as beams.
        vocabulary: Of the tokenizer.
        length_penalty: Power of the length that a score is divided by: above 0 favours long texts.
    """

    def __init__(self, decoder: Decoder, vocabulary: Vocabulary, *, length_penalty: float) -> None:
        self._decoder = decoder
        self._vocabulary = vocabulary
        self._beams = decoder.cache.rows
        self._power = length_penalty

    def search(self, request: Request) -> list[Generated]:
        """The best texts, from the best down; at most ``n`` of the request's job.

        Nothing is drawn; penalties and bias change the scores.

        Raises:
            UsageError: The texts have grown beyond the memory.
            ProviderError: ONNX Runtime failed.
        """
        prompt = request.prompt
        adapter = request.job.adapter
        first = self._decoder.prefill(
            0, [prompt], stop=lambda: request.job.interrupted() is not None, adapters=[adapter]
        )
        if first is None:
            return [self._text(_Beam((), 0.0), request, request.job.interrupted() or "cancelled")]
        self._decoder.cache.reorder([0] * self._beams, len(prompt))
        running = [_Beam((), 0.0 if index == 0 else _NEVER, index) for index in range(self._beams)]
        ended: list[_Beam] = []
        logits: Floats = np.repeat(first, self._beams, axis=0)
        while True:
            candidates = self._candidates(request, running, logits)
            ended = self._best([*ended, *(one for one in candidates[: self._beams] if one.finish is not None)])
            running = [one for one in candidates if one.finish is None][: self._beams]
            if not running or not self._may_improve(running, ended):
                return [self._text(one, request) for one in ended[: request.job.n]]
            if (why := request.job.interrupted()) is not None:
                return [self._text(one, request, why) for one in (ended or running)[: request.job.n]]
            # Fewer go on where the vocabulary is that small: the last one fills the other slots, and cannot win.
            running += [_Beam(running[-1].tokens, _NEVER, running[-1].source)] * (self._beams - len(running))
            length = len(prompt) + len(running[0].tokens) - 1
            self._make_room(length)
            self._decoder.cache.reorder([one.source for one in running], length)
            last = [one.tokens[-1] for one in running]
            logits = self._decoder.step(last, [length] * self._beams, [adapter] * self._beams)

    def _make_room(self, length: int) -> None:
        """A larger cache where the beams, all of one length, have reached the end of their slots."""
        cache = self._decoder.cache
        if length >= cache.capacity:
            check_memory(cache.layout, self._beams, 2 * cache.capacity)
            self._decoder.grow(2 * cache.capacity, [length] * self._beams)

    def _candidates(self, request: Request, running: Sequence[_Beam], logits: Floats) -> list[_Beam]:
        """The best continuations of all beams, from the best down: enough that ``beams`` of them go on."""
        scores = log_softmax(logits)
        for slot, one in enumerate(running):
            self._adjust(scores[slot], request, one)
            scores[slot] += one.score
        flat = scores.reshape(-1)
        count = min(max(2, 1 + len(request.job.end)) * self._beams, len(flat))
        best = np.argpartition(-flat, count - 1)[:count]
        found: list[_Beam] = []
        for place in best[np.lexsort((best, -flat[best]))]:
            slot, token = divmod(int(place), self._decoder.vocabulary)
            tokens = (*running[slot].tokens, token)
            finish: Finish | None = "length" if len(tokens) >= request.limit else None
            finish = "stop" if token in request.job.end else finish
            score = float(flat[place]) / (len(tokens) ** self._power if finish else 1.0)
            found.append(_Beam(tokens, score, slot, finish))
        return found

    def _adjust(self, scores: Doubles, request: Request, beam: _Beam) -> None:
        sampler = Sampler(request.job.sampling, request.prompt)
        for token in beam.tokens:
            sampler.add(token)
        sampler.adjust(scores)

    def _best(self, ended: list[_Beam]) -> list[_Beam]:
        return sorted(ended, key=lambda one: -one.score)[: self._beams]

    def _may_improve(self, running: Sequence[_Beam], ended: Sequence[_Beam]) -> bool:
        """Whether the best running beam, were it to end as long as it is, would enter the list of those that ended."""
        if len(ended) < self._beams:
            return True
        return bool(running[0].score / len(running[0].tokens) ** self._power > ended[-1].score)

    def _text(self, beam: _Beam, request: Request, finish: Finish | None = None) -> Generated:
        tokens = beam.tokens[:-1] if beam.finish == "stop" else beam.tokens
        text = detokenize(self._vocabulary, list(tokens))
        return Generated(text, tokens, beam.finish or finish or "length", len(request.prompt), score=beam.score)
