"""The peer's side of the decoder benchmark, as `protocol` is of the encoders': prefill and decode, timed in the peer.

Requests besides ``load`` and ``exit``:

| it reads | it answers |
|---|---|
| ``{"op": "prefill", "tokens": 512, "seconds": 2.0}`` | ``{"ok": true, "seconds": [0.6, …], "chosen": …}`` |
| ``{"op": "decode", "prompt": 128, "steps": 64, "batch": 1}`` | the same, seconds of each step |
| ``{"op": "serve", "prompts": [64, 200], "steps": [32, 80]}`` | the same, seconds until the last text is written |

A prefill ends with the logits of the last token; a step takes a token a row and ends with its logits, whose largest is
the next token. To serve is to write texts of different lengths after prompts of different lengths that come at once.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from protocol import Answering, Ids, Operation, best_of

_SEED = 21
_TRIAL_STEPS = 16
_MINIMUM_CALLS = 2


class DecoderSetting(ABC):
    """One way to run a language model."""

    batches: tuple[int, ...] = (1,)
    """Rows that it can decode at a time."""
    serves: bool = False
    """Whether rows may begin and end when they want."""

    @abstractmethod
    def prefill(self, ids: Ids) -> None:
        """Begin anew with the prompts ``ids``, int64 [batch, tokens], up to the logits of their last tokens."""

    @abstractmethod
    def step(self) -> None:
        """Add the most probable token to each row and compute the logits after it."""

    def serve(self, prompts: Sequence[Ids], steps: Sequence[int]) -> None:
        """Write so many of the most probable tokens after each prompt, int64 [tokens]."""
        raise NotImplementedError


class DecoderPeer(ABC):
    """A package at its best.

    Attributes:
        packages: Distributions whose versions are told.
    """

    packages: tuple[str, ...] = ()

    @abstractmethod
    def load(self, model: Path, texts: Sequence[str], work: Path) -> Mapping[str, Callable[[], DecoderSetting]]:
        """What may be tried: name -> makes it ready; one that raises is told and left out.

        Args:
            model: A Hugging Face folder, or what the peer calls a model.
            texts: Not used; there to be called as `protocol.Peer.load` is.
            work: A folder for what takes long to make; the next start of this peer finds it there.
        """

    @abstractmethod
    def vocabulary(self, model: Path) -> int:
        """How many token ids the model knows."""


class DecoderServer(Answering[DecoderSetting]):
    """Times prompts and steps."""

    def operations(self) -> dict[str, Operation]:
        """See `protocol.Answering`."""
        return {"prefill": self._prefill, "decode": self._decode, "serve": self._serve}

    def _prefill(self, request: Mapping[str, Any]) -> dict[str, Any]:
        ids = self._ids(1, int(request["tokens"]))

        def once(setting: DecoderSetting) -> float:
            start = time.perf_counter()
            setting.prefill(ids)
            return time.perf_counter() - start

        chosen, tried = self._choose(("prefill", ids.shape), once, 1)
        times: list[float] = []
        end = time.perf_counter() + float(request["seconds"])
        while len(times) < _MINIMUM_CALLS or time.perf_counter() < end:
            times.append(once(self._settings[chosen]))
        return {"seconds": times, "chosen": chosen, "tried": tried}

    def _decode(self, request: Mapping[str, Any]) -> dict[str, Any]:
        ids = self._ids(int(request["batch"]), int(request["prompt"]))

        def steps(setting: DecoderSetting, count: int) -> list[float]:
            setting.prefill(ids)
            times = []
            for _ in range(count):
                start = time.perf_counter()
                setting.step()
                times.append(time.perf_counter() - start)
            return times

        chosen, tried = self._choose(("decode", ids.shape), lambda one: median(steps(one, _TRIAL_STEPS)), len(ids))
        seconds = steps(self._settings[chosen], int(request["steps"]))
        return {"seconds": seconds, "chosen": chosen, "tried": tried}

    def _serve(self, request: Mapping[str, Any]) -> dict[str, Any]:
        prompts = [self._ids(1, tokens)[0] for tokens in request["prompts"]]
        steps = list(request["steps"])

        def once(setting: DecoderSetting) -> float:
            start = time.perf_counter()
            setting.serve(prompts, steps)
            return time.perf_counter() - start

        chosen, tried = self._choose(("serve", *request["prompts"]), once, 0)
        # Of the times of a block the first is dropped.
        seconds = [once(self._settings[chosen]) for _ in range(_MINIMUM_CALLS)]
        return {"seconds": seconds, "chosen": chosen, "tried": tried}

    def _choose(self, key: object, cost: Callable[[DecoderSetting], float], batch: int) -> tuple[str, dict[str, float]]:
        """The setting that costs least; of those that decode so many rows, or serve where ``batch`` is 0."""
        if key not in self._chosen:
            able = {
                name: one for name, one in self._settings.items() if (batch in one.batches if batch else one.serves)
            }
            if not able:
                raise ValueError(f"it does not decode {batch} rows at a time" if batch else "it does not serve")
            ways = {name: lambda one=one: cost(one) for name, one in able.items()}
            self._chosen[key] = best_of(ways)
        return self._chosen[key]

    def _ids(self, batch: int, tokens: int) -> Ids:
        low = min(16, self._vocabulary // 2)
        return np.random.default_rng(_SEED).integers(low, self._vocabulary, (batch, tokens), np.int64)
