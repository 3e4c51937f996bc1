"""The settings of a session that are best on this machine, by measurement: a challenger against the best so far.

Both run in child processes of their own, in turn, on inputs of the model's kind. What concerns a single input (threads,
spinning, arena) is judged by latency, what concerns long inputs (lanes, tokens a batch) by tokens per second. A change
is taken where it gains `MARGIN` or more in the median of the rounds and loses in less than a quarter of them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import geometric_mean, quantiles
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from artifacts.bundle import Bundle, open_bundle
from artifacts.errors import ProviderError, UsageError
from artifacts.manifest import Manifest, SessionOptions
from artifacts.proof import Machine
from artifacts.target import CPU_PROVIDER

from . import remember
from .fingerprint import machine
from .golden import Arrays, load_golden
from .settings import Settings, counted, default_settings

if TYPE_CHECKING:
    from .client import Ratio, Worker

MARGIN = 1.05
"""Least gain for which the default is left."""
LOAD_SECONDS = 3.0
"""What tuning may add to a load that compares candidates; a challenger that is under way is finished."""

_LEAST_MS = 1.0
_ROUNDS = 5
_LOOK_SECONDS = 0.2
_BLOCK_SECONDS = 0.04
_STEP_SECONDS = 120.0
_SINGLE = ((1, 32), (1, 128))
_LENGTHS = (16, 64)
_PROMPT = 128
_LEAST_TOKENS, _MOST_TOKENS = 128, 1 << 16
_SEED = 20


@dataclass(frozen=True)
class Trial:
    """One change, measured against the best settings before it.

    Attributes:
        change: What was changed, in words.
        taken: It became the best.
        ratio: How many times faster it was: median over the rounds; None where it was not measured.
        low: First quartile.
        high: Third quartile.
        reason: Why it was not measured; empty otherwise.
    """

    change: str
    taken: bool
    ratio: float | None
    low: float | None
    high: float | None
    reason: str


@dataclass(frozen=True)
class TuneReport:
    """What tuning a bundle found.

    Attributes:
        name: Name of the model.
        variant: Variant tuned.
        provider: Execution provider, full name.
        device: Device.
        machine: This machine.
        busy: Other programs were keeping it busy: measure again in a quieter hour.
        default: What a load does without tuning.
        settings: What it does from now on.
        trials: What was measured, in order.
    """

    name: str
    variant: str
    provider: str
    device: str
    machine: Machine
    busy: bool
    default: Settings
    settings: Settings
    trials: tuple[Trial, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def tune_bundle(
    path: str | os.PathLike[str],
    *,
    device: str | None = None,
    provider: str | None = None,
    variant: str | None = None,
    threads: int = 0,
    seconds: float = 60.0,
) -> TuneReport:
    """Tune the variant that `load` chooses, and keep what is found for later loads with the same wishes.

    Args:
        path: The bundle's folder.
        device: ``cpu``, ``cuda``, ``cuda:1``...; None: any.
        provider: Execution provider, full or short name; None: any.
        variant: Id of a variant; None: any.
        threads: Threads within an operator; 0: find out how many.
        seconds: No challenger is started after that many.

    Raises:
        UsageError: No such device, provider or variant, or a number that is not positive.
        BundleError: Not a bundle, or a damaged one.
        ProviderError: Nothing here runs the bundle correctly.
    """
    from .decide import decide

    if threads < 0 or not seconds > 0.0:
        raise UsageError(f"threads is {threads}, seconds is {seconds}", "threads >= 0, 0 to find out; seconds > 0")
    bundle = open_bundle(Path(path))
    chosen = decide(bundle, device=device, provider=provider, variant=variant, threads=threads)
    busy = is_busy()
    default = default_settings(chosen.provider, chosen.device, threads)
    best, trials = tune(bundle, chosen.variant, chosen.provider, chosen.device, threads, seconds=seconds)
    remember.remember_settings(bundle.digest, chosen.variant, chosen.provider, chosen.device, threads, best)
    return TuneReport(
        bundle.manifest.name, chosen.variant, chosen.provider, chosen.device, machine(), busy, default, best, trials
    )


def tune_at_load(bundle: Bundle, variant: str, provider: str, device: str, threads: int, ms: float) -> None:
    """Tune for `LOAD_SECONDS` and keep what is found, unless that was done before or is not worth it.

    It is not worth it for a model that takes less than a millisecond, nor reliable on a machine that is busy.

    Args:
        bundle: The bundle.
        variant: Id of the variant that was chosen.
        provider: Its provider, by full name.
        device: Its device.
        threads: Threads that were asked for; 0: none in particular.
        ms: Milliseconds of its golden inputs.
    """
    about = (bundle.digest, variant, provider, device, threads)
    if ms < _LEAST_MS or LOAD_SECONDS <= 0.0 or remember.recall_settings(*about) is not None or is_busy():
        return
    best, _ = tune(bundle, variant, provider, device, threads, seconds=LOAD_SECONDS)
    remember.remember_settings(*about, best)


def tune(
    bundle: Bundle, variant: str, provider: str, device: str, threads: int, *, seconds: float
) -> tuple[Settings, tuple[Trial, ...]]:
    """The best settings found for a variant on a provider, and each trial. Nothing is kept.

    Args:
        bundle: The bundle.
        variant: Id of the variant.
        provider: Execution provider, by full name.
        device: Device.
        threads: Threads within an operator; 0: find out how many.
        seconds: No challenger is started after that many.
    """
    default = default_settings(provider, device, threads)
    chosen = bundle.variant(variant)
    with _Search(bundle, chosen.model, chosen.session, provider, device, default, time.monotonic() + seconds) as search:
        if bundle.manifest.processor is not None and bundle.manifest.generation is None:
            search.lanes()
            search.tokens()
        if threads == 0:
            search.threads()
        if provider == CPU_PROVIDER:
            search.challenge("no spinning", spinning=False)
            search.challenge("no arena", arena=False)
        return replace(search.best, tuned=True), tuple(search.trials)


def is_busy() -> bool:
    """Whether other programs keep more than half of this machine's cores at work, just now.

    A load average would still count what ended a minute ago, such as the compile of the bundle that is loaded.
    """
    import psutil

    return float(psutil.cpu_percent(_LOOK_SECONDS)) > 50.0


@dataclass(frozen=True)
class _Contestant:
    """Settings at work: a child process, and the inputs on which its cost is measured."""

    worker: Worker
    lanes: int
    inputs: tuple[tuple[int, Arrays], ...]

    def cost(self) -> float:
        """Seconds a token (or element of the first input), the geometric mean over the inputs."""
        return geometric_mean(
            min(self.worker.time(feeds, seconds=_BLOCK_SECONDS)) / (self.lanes * tokens)
            for tokens, feeds in self.inputs
        )


class _Search:
    """The best settings so far, and challenges to it. A context manager: it holds a child process."""

    def __init__(
        self,
        bundle: Bundle,
        model: str,
        options: SessionOptions,
        provider: str,
        device: str,
        default: Settings,
        deadline: float,
    ) -> None:
        self.best = default
        self.trials: list[Trial] = []
        self._bundle = bundle
        self._model = bundle.path / model
        self._options = options
        self._provider = provider
        self._device = device
        self._deadline = deadline
        self._golden = load_golden(bundle).feeds
        self._champion: tuple[bool, _Contestant] | None = None

    def lanes(self) -> None:
        """One batch after another, and half as many lanes."""
        for lanes in sorted({1, self.best.lanes // 2} - {0, self.best.lanes}):
            self.challenge(counted(lanes, "lane"), wide=True, lanes=lanes)

    def tokens(self) -> None:
        """Batches twice as large as long as that gains, else half as large."""
        for factor in (2.0, 0.5):
            gained = False
            while _LEAST_TOKENS <= (tokens := int(self.best.max_tokens * factor)) <= _MOST_TOKENS:
                if not self.challenge(f"{tokens} tokens a batch", wide=True, max_tokens=tokens):
                    break
                gained = True
            if gained:
                return

    def threads(self) -> None:
        """Half as many threads, as long as that gains."""
        while threads := self.best.threads // 2:
            if not self.challenge(counted(threads, "thread"), threads=threads):
                return

    def challenge(self, change: str, *, wide: bool = False, **fields: Any) -> bool:
        """Whether the best settings with these fields changed are better; they are the best then.

        Args:
            change: The change in words.
            wide: It concerns long inputs.
            fields: Of `Settings`.
        """
        if time.monotonic() > self._deadline:
            self.trials.append(Trial(change, False, None, None, None, "there was no time left"))
            return False
        settings = replace(self.best, **fields)
        challenger = None
        try:
            champion = self._defend(wide)
            challenger = self._enter(settings, wide)
            ratio = _race(champion, challenger)
        except ProviderError as error:
            if challenger is not None:
                challenger.worker.close()
            self.trials.append(Trial(change, False, None, None, None, error.what))
            return False
        taken = ratio.median >= MARGIN and ratio.low > 1.0
        self.trials.append(Trial(change, taken, ratio.median, ratio.low, ratio.high, ""))
        if taken:
            self.best, self._champion = settings, (wide, challenger)
        (champion if taken else challenger).worker.close()
        return taken

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._champion is not None:
            self._champion[1].worker.close()

    def _defend(self, wide: bool) -> _Contestant:
        if self._champion is not None and self._champion[0] == wide:
            return self._champion[1]
        if self._champion is not None:
            self._champion[1].worker.close()
            self._champion = None
        champion = self._enter(self.best, wide)
        self._champion = wide, champion
        return champion

    def _enter(self, settings: Settings, wide: bool) -> _Contestant:
        from .client import Worker

        worker = Worker(
            self._model,
            self._provider,
            options=self._options,
            device=self._device,
            settings=settings,
            wide=wide and settings.lanes > 1,
            timeout=_STEP_SECONDS,
            record_assignment=False,
        )
        return _Contestant(worker, settings.lanes if wide else 1, self._inputs(settings, wide))

    def _inputs(self, settings: Settings, wide: bool) -> tuple[tuple[int, Arrays], ...]:
        from .bench import synthetic

        manifest = self._bundle.manifest
        if manifest.processor is None:
            return ((1, self._golden),)
        longest = manifest.processor.max_length
        if manifest.generation is not None:
            return _decoder_inputs(manifest)
        shapes: Sequence[tuple[int, int]] = _SINGLE
        if wide:
            shapes = [(max(1, settings.max_tokens // length), length) for length in _LENGTHS]
        rng = np.random.default_rng(_SEED)
        made = [
            {
                spec.name: synthetic(spec, self._golden[spec.name], rows, min(length, longest), rng)
                for spec in manifest.inputs
            }
            for rows, length in shapes
        ]
        return tuple((next(iter(feeds.values())).size, feeds) for feeds in made)


def _decoder_inputs(manifest: Manifest) -> tuple[tuple[int, Arrays], ...]:
    """A prompt read, and a step after it: what a decoder does for one text."""
    from .generate.feeds import prompt_feeds, written_step

    feeds = (prompt_feeds(manifest, 1, _PROMPT), written_step(manifest))
    return tuple((one["input_ids"].size, one) for one in feeds)


def _race(champion: _Contestant, challenger: _Contestant) -> Ratio:
    """How many times faster the challenger is, over rounds in which both took their turn."""
    from .client import Ratio

    ratios = [champion.cost() / challenger.cost() for _ in range(_ROUNDS)]
    low, middle, high = quantiles(ratios, n=4, method="inclusive")
    return Ratio(middle, low, high)
