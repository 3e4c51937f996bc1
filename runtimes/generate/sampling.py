"""From logits to the next token: penalties, temperature and cut-offs, drawn from a generator of the row's own.

The order is that of transformers' processors: repetition penalty (Keskar et al. 2019, CTRL), frequency and presence
penalties (OpenAI's API), logit bias, temperature, top-k, top-p (Holtzman et al. 2020), min-p (Nguyen et al. 2024).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from artifacts.errors import ProviderError, UsageError
from artifacts.manifest import Generation

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Int64 = NDArray[np.int64]

_FIRST_CUT = 256
_GROWTH = 8
_MOST_SEED = 1 << 63
_MOST_BIAS = 1e30


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        sample: Draw it; otherwise the likeliest is taken.
        temperature: What logits are divided by, >= 0; 0 takes the likeliest.
        top_k: Draw from that many likeliest; 0: from all.
        top_p: Draw from the fewest likeliest whose probabilities reach this, in [0, 1]; at least one stays.
        min_p: Draw from tokens at least this likely, as a share of the likeliest one's probability, in [0, 1].
        repetition_penalty: Positive logits of tokens in the prompt or the text are divided by it, negative ones
            multiplied; > 0.
        frequency_penalty: Subtracted from a token's logit for each time that it is in the text, without the prompt.
        presence_penalty: Subtracted once if it is.
        bias: Token id -> what is added to its logit; -inf forbids it.
        seed: Same seed, same text; None: another one each time.
    """

    sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return not self.sample or self.temperature == 0.0

    def check(self, vocabulary: int) -> None:
        """Refuse what cannot be done with so many tokens.

        Raises:
            UsageError: A number is out of its range, or not finite, or a token id is none.
        """
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise UsageError(f"{name} is {value}", f"Pass a number in [{low:g}, {high:g}]")
        for name, value in (("top_k", self.top_k), ("seed", 0 if self.seed is None else self.seed)):
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _MOST_SEED:
                raise UsageError(f"{name} is {value}", "Pass a whole number that is not negative")
        if not isinstance(self.bias, Mapping):
            raise UsageError(f"bias is {type(self.bias).__name__}", "Pass {token id: what is added to its logit}")
        for token, value in self.bias.items():
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocabulary:
                raise UsageError(f"bias is given for token {token}", f"Token ids are 0 to {vocabulary - 1}")
            if isinstance(value, bool) or not isinstance(value, int | float) or not _addable(value):
                raise UsageError(f"the bias of token {token} is {value}", "Pass a number, or -inf to forbid it")
        if sum(value == -math.inf for value in self.bias.values()) >= vocabulary:
            raise UsageError("bias forbids every token", "Leave one")


def _addable(value: float) -> bool:
    return value == -math.inf or -_MOST_BIAS <= value <= _MOST_BIAS


_RANGES = (
    ("temperature", 0.0, 100.0),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("repetition_penalty", 0.01, 100.0),
    ("frequency_penalty", -100.0, 100.0),
    ("presence_penalty", -100.0, 100.0),
)


def sampling_of(defaults: Generation, given: Mapping[str, Any]) -> Sampling:
    """The model's own defaults with what the user gave (None: not given).

    Who gives a temperature above 0, top_k, top_p or min_p, and does not say ``sample``, wants to sample.

    Raises:
        UsageError: ``sample=True`` with a temperature of 0.
    """
    told = {name: value for name, value in given.items() if value is not None}
    if told.get("sample") and told.get("temperature") == 0:
        raise UsageError("sample=True with a temperature of 0", "Raise the temperature, or pass sample=False")
    if "sample" not in told and any(name in told for name in ("temperature", "top_k", "top_p", "min_p")):
        told["sample"] = told.get("temperature") != 0
    own = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "sample")
    return Sampling(**({name: getattr(defaults, name) for name in own} | told))


class Sampler:
    """Chooses the tokens of one row. It holds what the penalties need to know of the row, and its own generator.

    Args:
        sampling: How to choose, checked.
        prompt: Token ids of the prompt.
        index: Which of several texts of one prompt; each draws differently, wherever it stands in a batch.
    """

    def __init__(self, sampling: Sampling, prompt: Iterable[int], index: int = 0) -> None:
        self._sampling = sampling
        self._counts: dict[int, int] = {}
        self._seen = set(prompt) if sampling.repetition_penalty != 1.0 else set()
        self._biased = np.fromiter(sampling.bias, np.int64, len(sampling.bias))
        self._bias = np.fromiter(sampling.bias.values(), np.float32, len(sampling.bias))
        seed = None if sampling.seed is None else (sampling.seed, index)
        self._random = None if sampling.greedy else np.random.default_rng(seed)

    def adjust(self, logits: Floats | Doubles) -> None:
        """Apply the penalties and the bias to ``logits`` [vocabulary], in place."""
        chosen = self._sampling
        if self._seen:
            seen = np.fromiter(self._seen, np.int64, len(self._seen))
            penalized = logits[seen]
            factor = np.float32(chosen.repetition_penalty)
            logits[seen] = np.where(penalized < 0.0, penalized * factor, penalized / factor)
        if self._counts and (chosen.frequency_penalty or chosen.presence_penalty):
            tokens = np.fromiter(self._counts, np.int64, len(self._counts))
            counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            logits[tokens] -= counts * np.float32(chosen.frequency_penalty) + np.float32(chosen.presence_penalty)
        if len(self._biased):
            logits[self._biased] += self._bias

    def choose(self, logits: Floats) -> int:
        """The next token for ``logits`` float32 [vocabulary], which are altered in place.

        Raises:
            ProviderError: A logit is not finite: the model computes nonsense here.
        """
        self.adjust(logits)
        best = int(logits.argmax())
        if not math.isfinite(logits[best]):
            raise ProviderError("the model computed logits that are not finite", "Run `hasten verify`")
        if self._random is None:
            return best
        tokens, probabilities = distribution(logits, self._sampling)
        drawn = self._random.random() * probabilities.sum()
        place = int(np.searchsorted(np.cumsum(probabilities), drawn, side="right"))
        return int(tokens[min(place, len(tokens) - 1)])

    def add(self, token: int) -> None:
        """Count a token that became part of the text."""
        if self._sampling.repetition_penalty != 1.0:
            self._seen.add(token)
        if self._sampling.frequency_penalty or self._sampling.presence_penalty:
            self._counts[token] = self._counts.get(token, 0) + 1


def distribution(logits: Floats, sampling: Sampling) -> tuple[Int64, Doubles]:
    """What may be drawn: token ids int64 [n], from the likeliest down, and their probabilities float64 [n].

    Without a cut-off the ids are all, in their order. Equal logits are ranked by id, the lower one first.

    Args:
        logits: float32 [vocabulary], penalties applied; not altered.
        sampling: Temperature > 0 and the cut-offs.
    """
    scaled = logits.astype(np.float64) / sampling.temperature
    scaled -= scaled.max()
    weights = np.exp(scaled)
    top_k = sampling.top_k if 0 < sampling.top_k < len(weights) else 0
    if not top_k and sampling.top_p >= 1.0:
        tokens = np.arange(len(weights))
        if sampling.min_p > 0.0:
            tokens = np.flatnonzero(weights >= sampling.min_p)
        kept = weights[tokens]
        return tokens, kept / kept.sum()
    total = weights.sum()
    if top_k:
        tokens = _largest(logits, top_k)
        total = weights[tokens].sum()
    else:
        tokens = _reaching(logits, weights, sampling.top_p * total)
    kept = weights[tokens]
    if sampling.top_p < 1.0:
        # The first stays, and each whose predecessors do not yet reach top_p.
        before = np.cumsum(kept) - kept
        count = max(1, int(np.count_nonzero(before < sampling.top_p * total)))
        tokens, kept = tokens[:count], kept[:count]
    if sampling.min_p > 0.0:
        stay = kept >= sampling.min_p
        tokens, kept = tokens[stay], kept[stay]
    return tokens, kept / kept.sum()


def _reaching(logits: Floats, weights: Doubles, least: float) -> Int64:
    """Ids of the largest logits, from the largest down, enough of them that their weights add up to ``least``."""
    count = _FIRST_CUT
    while count < len(logits):
        tokens = _largest(logits, count)
        if weights[tokens].sum() >= least:
            return tokens
        count *= _GROWTH
    return np.argsort(-logits, kind="stable")


def _largest(logits: Floats, count: int) -> Int64:
    """Ids of the ``count`` largest logits, from the largest down; of equal ones the lower id.

    They are ranked before the temperature and the exponential, which make neighbours equal.
    """
    if count >= len(logits):
        return np.argsort(-logits, kind="stable")
    least = np.partition(logits, len(logits) - count)[len(logits) - count]
    above = np.flatnonzero(logits > least)
    tokens = np.concatenate([above, np.flatnonzero(logits == least)[: count - len(above)]])
    return tokens[np.lexsort((tokens, -logits[tokens]))]
