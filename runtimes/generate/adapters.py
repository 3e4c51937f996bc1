"""LoRA adapters as a call names them: read when first asked for, and put side by side for the rows of a batch."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from artifacts.adapters import ADAPTERS_PREFIX, AdaptedGraph, Adapter, Product, adapter_inputs
from artifacts.bundle import Bundle
from artifacts.constraints import shown
from artifacts.errors import BundleError, HastenError, UsageError
from artifacts.manifest import TensorSpec, Variant

from ..golden import load_golden
from ..session import Binding, Session
from .check import check_decoder

if TYPE_CHECKING:
    from ..decide import Decision
    from ..settings import Settings

Arrays = dict[str, NDArray[Any]]
Floats = NDArray[np.float32]

_KEPT = 2
"""Sets of several adapters whose weights are kept side by side, which are copies; a single one's are not."""


class Factors(NamedTuple):
    """What an adapter adds to a product: ``(x a) b``, a float32 [rows, ranks], b float32 [ranks, columns]."""

    a: Floats
    b: Floats


def read_adapter(folder: Path, adapter: Adapter, graph: AdaptedGraph) -> tuple[Factors, ...]:
    """The factors of an adapter for each product of a graph; of rank 0 where it leaves the product alone.

    Args:
        folder: The bundle's.
        adapter: Of its manifest.
        graph: Of one of its variants.

    Raises:
        BundleError: Its file cannot be read, has another size than stated, or holds numbers that are not finite.
    """
    path = folder / adapter.weights
    try:
        numbers = np.fromfile(path, "<f4")
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror or error}", "Get the bundle again") from error
    if numbers.nbytes != adapter.size or path.stat().st_size != adapter.size:
        raise BundleError(f"{path} has not the {adapter.size} bytes that are stated", "Get the bundle again")
    if not np.isfinite(numbers).all():
        raise BundleError(f"{path} holds numbers that are not finite", "Add the adapter again")
    found: dict[str, Factors] = {}
    start = 0
    for module in adapter.modules:
        middle, end = start + module.rows * module.rank, start + module.numbers
        a = numbers[start:middle].reshape(module.rows, module.rank)
        found[module.path] = Factors(a, numbers[middle:end].reshape(module.rank, module.columns))
        start = end
    return tuple(_of_product(product, found) for product in graph.products)


def _of_product(product: Product, modules: Mapping[str, Factors]) -> Factors:
    """Of modules whose columns lie in one product: A behind each other, B in blocks, 0 beside them."""
    paths = [path for path in dict.fromkeys(part.module for part in product.parts) if path in modules]
    ranks = [modules[path].b.shape[0] for path in paths]
    starts = dict(zip(paths, np.cumsum([0, *ranks]).tolist(), strict=False))
    a = [modules[path].a for path in paths] or [np.zeros((product.rows, 0), np.float32)]
    b, place = np.zeros((sum(ranks), product.columns), np.float32), 0
    for part in product.parts:
        if part.module in modules:
            own = modules[part.module].b[:, part.start : part.start + part.columns]
            top = starts[part.module]
            b[top : top + len(own), place : place + part.columns] = np.float32(part.factor) * own
        place += part.columns
    return Factors(np.ascontiguousarray(np.concatenate(a, axis=1), np.float32), b)


@dataclass(frozen=True, eq=False)
class _Stack:
    """Some adapters side by side: the inputs that do not depend on who uses them, and whose each column of A is."""

    inputs: Arrays
    owners: tuple[tuple[str, NDArray[np.int64]], ...]


class AdapterWeights:
    """Inputs of a graph that takes adapters. Not to be used by two threads at once.

    Args:
        graph: Of the manifest.
        factors: Of each adapter, as `read_adapter` gives them; more may be put in.
    """

    def __init__(self, graph: AdaptedGraph, factors: dict[str, tuple[Factors, ...]]) -> None:
        self.factors = factors
        self._graph = graph
        self._stacks: dict[tuple[str, ...], _Stack] = {}

    def feeds(self, rows: Sequence[str]) -> Arrays:
        """A, B and who uses which of their ranks, for every product.

        Args:
            rows: The adapter of each row of the batch; empty: none.
        """
        active = tuple(sorted({name for name in rows if name}))
        if active not in self._stacks:
            copies = [names for names in self._stacks if len(names) > 1]
            if len(active) > 1 and len(copies) >= _KEPT:
                del self._stacks[copies[0]]
            self._stacks[active] = self._stack(active)
        stack = self._stacks[active]
        chosen = np.array([active.index(name) if name else -1 for name in rows], np.int64)[:, None, None]
        made: dict[bytes, NDArray[Any]] = {}
        found = dict(stack.inputs)
        for name, owners in stack.owners:
            key = owners.tobytes()
            if key not in made:
                made[key] = (chosen == owners).astype(np.float32)
            found[name] = made[key]
        return found

    def _stack(self, active: tuple[str, ...]) -> _Stack:
        inputs: Arrays = {}
        owners = []
        for index, product in enumerate(self._graph.products):
            own = [self.factors[name][index] for name in active]
            names = adapter_inputs(index)
            if len(own) == 1:
                inputs[names[0]], inputs[names[1]] = own[0]
            else:
                none = Factors(np.zeros((product.rows, 0), np.float32), np.zeros((0, product.columns), np.float32))
                inputs[names[0]] = np.concatenate([one.a for one in own] or [none.a], axis=1)
                inputs[names[1]] = np.concatenate([one.b for one in own] or [none.b], axis=0)
            owners.append((names[2], np.repeat(np.arange(len(own)), [len(one.b) for one in own])))
        return _Stack(inputs, tuple(owners))


class AdaptedSession:
    """The graph of a variant that takes adapters, loaded, and the adapters that were used so far.

    Args:
        bundle: Where both lie.
        session: The graph.
        graph: What the manifest says of it.
    """

    def __init__(self, bundle: Bundle, session: Session, graph: AdaptedGraph) -> None:
        self.session = session
        self._bundle = bundle
        self._graph = graph
        self._known = {one.name: one for one in bundle.manifest.adapters or ()}
        self._weights = AdapterWeights(graph, {})
        self._lock = threading.Lock()

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Those of the plain graph."""
        return tuple(spec for spec in self.session.inputs if not spec.name.startswith(ADAPTERS_PREFIX))

    def feeds(self, rows: Sequence[str]) -> Arrays:
        """The inputs beside those of the plain graph; see `AdapterWeights.feeds`.

        Raises:
            BundleError: An adapter cannot be read.
        """
        with self._lock:
            for name in {name for name in rows if name} - set(self._weights.factors):
                self._weights.factors[name] = read_adapter(self._bundle.path, self._known[name], self._graph)
            return self._weights.feeds(rows)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """As `Session.run` of the plain graph: nobody uses an adapter."""
        return self.session.run({**feeds, **self.feeds([""] * len(feeds["input_ids"]))})

    def bind(
        self,
        inputs: Mapping[str, NDArray[Any]],
        outputs: Mapping[str, NDArray[Any]],
        adapters: Sequence[str] = (),
    ) -> Binding:
        """As `Session.bind` of the plain graph; ``adapters``: that of each row, empty: none."""
        return self.session.bind({**inputs, **self.feeds(adapters or [""] * len(inputs["input_ids"]))}, outputs)

    def close(self) -> None:
        """Free the graph."""
        self.session.close()


def open_adapted(bundle: Bundle, decision: Decision, settings: Settings) -> AdaptedSession:
    """Load the graph that takes adapters, where the plain one runs; without one in use it passed the golden test.

    Raises:
        UsageError: The variant takes none.
        BundleError: The golden arrays cannot be read.
        ProviderError: It does not load, is not the graph that the manifest states, or computes wrong results.
    """
    variant = bundle.variant(decision.variant)
    takers = [one.id for one in bundle.manifest.variants if one.adapted is not None]
    if variant.adapted is None or decision.provider not in variant.providers[:1]:
        raise UsageError(f"{variant.id} takes no adapters here", f"Load it with variant={takers[0]!r} on the cpu")
    return open_graph(bundle, variant, variant.adapted, device=decision.device, settings=settings)


def open_graph(
    bundle: Bundle, variant: Variant, graph: AdaptedGraph, *, device: str = "", settings: Settings | None = None
) -> AdaptedSession:
    """Load the graph of a variant that takes adapters; without one in use it passed the golden test.

    Raises:
        BundleError: The golden arrays cannot be read.
        ProviderError: It does not load, is not the graph that the manifest states, or computes wrong results.
    """
    path, provider = bundle.path / graph.model, variant.providers[0]
    session = Session(path, provider, options=variant.session, device=device, settings=settings)
    adapted = AdaptedSession(bundle, session, graph)
    inputs, golden = bundle.manifest.inputs_of(variant), load_golden(bundle)
    try:
        check_decoder(cast("Session", adapted), inputs, golden, variant.tolerance, f"{variant.id} with adapters")
    except HastenError:
        session.close()
        raise
    return adapted


def check_adapter(bundle: Bundle, name: str) -> None:
    """Refuse the name of an adapter that a bundle does not have.

    Raises:
        UsageError: It has none of that name; lists those that it has.
    """
    known = [one.name for one in bundle.manifest.adapters or ()]
    if name not in known:
        remedy = f"It has {', '.join(known)}" if known else "Add one with `hasten adapter add`"
        raise UsageError(f"the bundle has no adapter {shown(name)}", remedy)
