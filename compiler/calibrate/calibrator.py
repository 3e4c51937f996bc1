"""Observes values of a graph: runs a copy of it that gives them, within a cap on memory, and keeps what it learnt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import psutil
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from artifacts.errors import DataError
from passes.statistics import Activation, Moments, NotFiniteError
from runtimes.environment import onnxruntime as ort
from runtimes.environment import physical_cores

from ..graphs import GraphFolder
from .batches import DATA, Batch, Batches, Survey, place, survey
from .content import digests
from .footprint import measure
from .instrument import instrument
from .plan import Group, plan
from .results import Accumulator, Results
from .segments import SegmentedSession, weights_at_once
from .session import give_back
from .statistic import Activations, SecondMoments, Seen, Statistic

Announce = Callable[[str, float], None]
_VERSION = 3
_SILENCE = 0.05


@dataclass
class Calibrator:
    """Runs graphs on calibration data; its `observe` and its `moments` are what a pass is lent.

    What is known of a value is kept by itself in the user's cache, as soon as the pass over the data that saw it is
    complete, under a key of what the value depends on: the data, and the graph upstream of it. So one cache serves
    every pass that asks, whatever else of the graph was rewritten in between, and after an interruption only the rest
    is run.

    Attributes:
        batches: The data.
        folder: Where the graph's weights lie; the graphs that are run are written there, and deleted.
        memory: Bytes that it may add to the memory of this process: weights, what is fetched, statistics. Weights that
            are not in the folder yet are read once more to be written there.
        cache: Keep statistics in the user's cache folder, and look for them there.
        seed: Which rows the samples draw.
        threads: Threads within an operator, and values seen at a time; 0: the physical cores this process may use.
        announce: Told what goes on, and the share of the observation that is done.
    """

    batches: Batches
    folder: GraphFolder
    memory: int
    cache: bool = True
    seed: int = 0
    threads: int = 0
    announce: Announce | None = None
    _surveys: dict[str, Survey] = field(default_factory=dict, init=False)

    def observe(self, model: ir.Model, values: Sequence[ir.Value]) -> Mapping[str, Activation]:
        """What the values are over the data, by name.

        Args:
            model: As it is now, saved or not; it stays so.
            values: Float values of its main graph. The last axis is the channel; where it is not the same for all
                examples, as in scores of attention, all elements count as one channel.

        Raises:
            DataError: The data does not fit the graph, or an input or value is not finite: names it and the example.
            UsageError: The cap is too small for one value and one example; says what would do.
            ProviderError: ONNX Runtime cannot load the graph.
            ValueError: A value is none of the main graph's, or holds no floats.
        """
        return self._gather(model, values, Activations(self.seed))

    def moments(self, model: ir.Model, values: Sequence[ir.Value]) -> Mapping[str, Moments]:
        """Second moments of the values over the data, by name; a value that several operators read is seen once.

        As many values are seen in one pass over the data as there is memory for their sums, 4 K² bytes each. What is
        complete goes to a file, so that the mapping takes no memory: each of its items is read when it is asked for.
        The files, 2 K² bytes each, go when the mapping does.

        Args:
            model: As for `observe`.
            values: As for `observe`.

        Raises:
            OutputError: The files cannot be written.
            HastenError: As `observe`.
            ValueError: As `observe`.
        """
        return self._gather(model, values, SecondMoments())

    @property
    def used(self) -> str:
        """Digest of the data, if anything was asked of it; else empty."""
        return next((found.digest for found in self._surveys.values()), "")

    def digest(self, model: ir.Model) -> str:
        """Digest of the data, held to what the graph takes.

        Raises:
            DataError: The data does not fit the graph, or an input is not finite.
        """
        return self._survey(model).digest

    def _gather(self, model: ir.Model, values: Sequence[ir.Value], statistic: Statistic[Seen]) -> Mapping[str, Seen]:
        values = tuple(dict.fromkeys(values))
        if not values:
            return {}
        found = self._survey(model)
        keys = self._keys(model, values, found, statistic) if self.cache else {}
        results = statistic.results([_name(value) for value in values], self.folder.path)
        with ExitStack() as failed:
            failed.callback(results.close)
            missing = [v for v in values if _name(v) not in keys or not results.recall(_name(v), keys[_name(v)])]
            if missing:
                self._fill(results, keys, model, missing, found, statistic)
            failed.pop_all()
        return results

    def _fill(
        self,
        results: Results[Seen],
        keys: Mapping[str, str],
        model: ir.Model,
        values: Sequence[ir.Value],
        found: Survey,
        statistic: Statistic[Seen],
    ) -> None:
        """See the values, group by group, in as many passes over the data; each is kept when its group is complete."""
        at_once = weights_at_once(self.memory)
        apart = self.batches.rows_apart
        footprint = measure(model, values, found, self.folder, rows_apart=apart, threads=self.threads, at_once=at_once)
        cores = self.threads or physical_cores()
        groups = plan(footprint, found, self.memory, statistic, results.held, cores)
        before = _resident()
        for turn, group in enumerate(groups):
            progress = _Progress(self.announce, found.examples * len(groups), found.examples * turn)
            chosen = [values[index] for index in group.values]
            seen = [
                (results.begin(_name(value)), not footprint.channels[index])
                for index, value in zip(group.values, chosen, strict=True)
            ]
            self._pass(model, chosen, group, seen, progress, min(cores, len(seen)), before + group.spare)
            seen.clear()  # or accumulators would be there beside their results
            for value in chosen:
                _finish(results, _name(value))
                if keys:
                    results.remember(_name(value), keys[_name(value)])

    def _pass(
        self,
        model: ir.Model,
        values: Sequence[ir.Value],
        group: Group,
        seen: Sequence[tuple[Accumulator, bool]],
        progress: _Progress,
        workers: int,
        full: int,
    ) -> None:
        """Show every batch to the accumulators of the values; beside each, whether it sees one channel.

        So many values are seen at a time, each on its own core: a product of two matrices of some hundred columns
        leaves a second core little to do. From so many resident bytes on, what is free goes back after each batch;
        below, it stays for the next one: to ask for it anew costs as much time as the operators take.
        """
        graph = instrument(model, values)
        at_once, roomy = weights_at_once(self.memory), 2 * group.spare > self.memory
        with (
            SegmentedSession(graph, self.folder, at_once=at_once, threads=self.threads, roomy=roomy) as session,
            threadpool_limits(1 if workers > 1 else None, "blas"),
            ThreadPoolExecutor(workers) as pool,
        ):
            for batch in _parts(self.batches.fitted(model.graph.inputs), group.elements):
                outputs = session.run(batch)
                # Each is let go as soon as it is seen.
                seeing = [
                    pool.submit(_see, accumulator, outputs.pop(), batch, one_channel=one_channel)
                    for accumulator, one_channel in reversed(seen)
                ]
                for one in seeing:
                    one.result()
                if _resident() > full:
                    give_back()
                progress.add(len(batch.examples))

    def _survey(self, model: ir.Model) -> Survey:
        inputs = tuple(model.graph.inputs)
        signature = str([(value.name, str(value.dtype), str(value.shape)) for value in inputs])
        if signature not in self._surveys:
            self._surveys[signature] = survey(self.batches.fitted(inputs), inputs)
        return self._surveys[signature]

    def _keys(
        self, model: ir.Model, values: Sequence[ir.Value], found: Survey, statistic: Statistic[Any]
    ) -> dict[str, str]:
        """By name of the value, a digest of all that its statistic depends on."""
        told = [_VERSION, ort.__version__, repr(statistic), found.digest]
        return {
            _name(value): hashlib.sha256(json.dumps([*told, content]).encode()).hexdigest()
            for value, content in zip(values, digests(model, values, self.folder), strict=True)
        }


@dataclass
class _Progress:
    announce: Announce | None
    total: int
    done: int
    _told: float = -1.0

    def add(self, examples: int) -> None:
        share = self.done / self.total
        if self.announce is not None and share >= self._told + _SILENCE:
            self.announce("calibrating", share)
            self._told = share
        self.done += examples


def _parts(batches: Batches, elements: int) -> Iterator[Batch]:
    """The batches, cut so that none has more elements than that, or only one example."""
    for batch in batches:
        count = len(batch.examples)
        if not count or not all(array.size for array in batch.feeds.values()):
            continue
        step = max(1, elements // batch.elements) if batches.rows_apart else count
        for start in range(0, count, step):
            yield batch.part(start, min(start + step, count))


def _see(accumulator: Accumulator, output: NDArray[np.float32], batch: Batch, *, one_channel: bool) -> None:
    try:
        accumulator.update(output.reshape(-1, 1) if one_channel else output)
    except NotFiniteError as error:
        # The first axis is the examples' where it is as long; a row of statistics is one of many of an example.
        apart = output.ndim > 0 and len(output) == len(batch.examples)
        index = int(np.argmin([np.isfinite(one).all() for one in output])) if apart else 0
        which = place([batch.examples[index]] if apart else batch.examples)
        raise DataError(f"{accumulator.name} is {error.number} for {which}", "Leave it out") from error
    except ValueError as error:
        raise DataError(f"{error}: {place(batch.examples)}", "Give examples of one shape") from error


def _resident() -> int:
    """Bytes of memory that this process has now."""
    return int(psutil.Process().memory_info().rss)


def _finish(results: Results[Any], name: str) -> None:
    try:
        results.finish(name)
    except ValueError as error:
        raise DataError(f"{error} in {DATA}", "Give examples that reach it") from error


def _name(value: ir.Value) -> str:
    return value.name or ""
