"""LoRA adapters of a bundle: the graphs that take them, and what each of them adds to which module."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from .constraints import MAX_INTEGER, Between, BundlePath, Count, Matches, shown

if TYPE_CHECKING:
    from .manifest import FileEntry, Variant
    from .strict import At

ADAPTERS_FOLDER = "adapters"
ADAPTERS_PREFIX = "adapters."
"""How the names of their inputs begin."""
MAX_ADAPTERS = 256
MAX_RANK = 4096
_NUMBER_BYTES = 4

Side = Annotated[int, Between(1, 1 << 24)]
Module = Annotated[str, Matches(r"[A-Za-z0-9_.]{1,256}")]


@dataclass(frozen=True)
class NonZero:
    """A finite number other than 0."""

    def problem(self, value: float) -> str:
        """What is wrong with ``value``; empty if nothing is."""
        return "" if math.isfinite(value) and value != 0.0 else f"{value} is no factor"


@dataclass(frozen=True)
class Part:
    """Neighbouring columns of a product of a graph that are those of one module.

    Attributes:
        module: Path of the module in the original model.
        start: Which of its columns is the first.
        columns: How many.
        factor: What they were multiplied by.
    """

    module: Module
    start: Count
    columns: Side
    factor: Annotated[float, NonZero()] = 1.0


@dataclass(frozen=True)
class Product:
    """A product ``x [..., rows] @ W`` of a graph that takes what adapters add.

    Attributes:
        rows: Length of what goes in.
        parts: Its columns, in order.
    """

    rows: Side
    parts: tuple[Part, ...]

    @property
    def columns(self) -> int:
        """Length of what comes out."""
        return sum(part.columns for part in self.parts)


@dataclass(frozen=True)
class AdaptedGraph:
    """A variant's graph with an input for each of what adapters add.

    Attributes:
        model: Path of the graph, always ``<id>.adapters.onnx``.
        products: The n-th takes the inputs that `adapter_inputs` names for n.
    """

    model: BundlePath
    products: tuple[Product, ...]


@dataclass(frozen=True)
class AdaptedModule:
    """What an adapter does to one module: ``y = x W + (x A) B``.

    Attributes:
        path: Of the module in the original model.
        rows: Of A.
        columns: Of B.
        rank: Columns of A, rows of B.
    """

    path: Module
    rows: Side
    columns: Side
    rank: Annotated[int, Between(1, MAX_RANK)]

    @property
    def numbers(self) -> int:
        """Of A and B together."""
        return self.rank * (self.rows + self.columns)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter.

    Attributes:
        name: What a call names it by.
        weights: Path of its numbers, always ``adapters/<name>.bin``: for each module A and then B, float32 in little
            endian, row after row; what they are scaled by is in B.
        source: Hash of the files that it was made of.
        base: What they say that it was trained on; may be empty.
        modules: Those that it changes, in the order of the numbers.
    """

    name: Annotated[str, Matches(r"[a-z0-9][a-z0-9._-]{0,63}")]
    weights: BundlePath
    source: Annotated[str, Matches(r"sha256:[0-9a-f]{64}")]
    base: Annotated[str, Matches(r".{0,256}")]
    modules: tuple[AdaptedModule, ...]

    @property
    def size(self) -> int:
        """Bytes of its numbers."""
        return _NUMBER_BYTES * sum(module.numbers for module in self.modules)


def adapter_inputs(product: int) -> tuple[str, str, str]:
    """Names of the inputs of a product: A ``[rows, ranks]``, B ``[ranks, columns]``, rows ``[batch, 1, ranks]``."""
    base = f"{ADAPTERS_PREFIX}{product}"
    return f"{base}.a", f"{base}.b", f"{base}.rows"


def adapter_path(name: str) -> str:
    """Where the numbers of an adapter lie."""
    return f"{ADAPTERS_FOLDER}/{name}.bin"


def adapted_path(variant: str) -> str:
    """Where the graph of a variant that takes adapters lies."""
    return f"{variant}.adapters.onnx"


def check_adapters(
    adapters: Sequence[Adapter], variants: Sequence[Variant], files: Mapping[str, FileEntry], at: At
) -> None:
    """Hold adapters and the graphs that take them to each other and to the files.

    Raises:
        SchemaError: They break a MUST of docs/format.md.
    """
    if len(adapters) > MAX_ADAPTERS:
        raise at.field("adapters").error(f"{len(adapters)} adapters; {MAX_ADAPTERS} are allowed")
    for index, adapter in enumerate(adapters):
        _check_adapter(adapter, files, at.field("adapters").item(index))
        if adapter.name in {other.name for other in adapters[:index]}:
            raise at.field("adapters").item(index).error(f"the name {shown(adapter.name)} stands twice")
    _check_folder(adapters, files, at.field("files"))
    takers = [variant for variant in variants if variant.adapted is not None]
    if bool(takers) != bool(adapters):
        raise at.field("adapters").error("adapters and graphs that take them come together")
    for index, variant in enumerate(variants):
        if variant.adapted is not None:
            here = at.field("variants").item(index).field("adapted")
            _check_graph(variant.adapted, variant.id, files, here)
            if variant.adapted.model in {other.model for other in variants}:
                raise here.field("model").error(f"{shown(variant.adapted.model)} is the graph of a variant")
            _check_fit(variant.adapted, adapters, here)


def _check_adapter(adapter: Adapter, files: Mapping[str, FileEntry], at: At) -> None:
    if adapter.weights != adapter_path(adapter.name):
        raise at.field("weights").error(f"{shown(adapter.weights)} is not {adapter_path(adapter.name)!r}")
    if not adapter.modules:
        raise at.field("modules").error("at least one is needed")
    if len({module.path for module in adapter.modules}) < len(adapter.modules):
        raise at.field("modules").error("a module stands twice")
    entry = files.get(adapter.weights)
    if entry is None:
        raise at.field("weights").error(f"{shown(adapter.weights)} is not listed in files")
    if adapter.size > MAX_INTEGER or entry.size != adapter.size:
        raise at.field("weights").error(f"{shown(adapter.weights)} has {entry.size} bytes, its modules {adapter.size}")


def _check_folder(adapters: Sequence[Adapter], files: Mapping[str, FileEntry], at: At) -> None:
    known = {adapter.weights for adapter in adapters}
    for index, path in enumerate(files):
        if path.casefold().startswith(f"{ADAPTERS_FOLDER}/") and path not in known:
            raise at.item(index).error(f"no adapter has {shown(path)}")


def _check_graph(graph: AdaptedGraph, variant: str, files: Mapping[str, FileEntry], at: At) -> None:
    if graph.model != adapted_path(variant):
        raise at.field("model").error(f"{shown(graph.model)} is not {adapted_path(variant)!r}")
    if graph.model not in files:
        raise at.field("model").error(f"{shown(graph.model)} is not listed in files")
    if any(not product.parts for product in graph.products):
        raise at.field("products").error("a product has no columns")


def _check_fit(graph: AdaptedGraph, adapters: Sequence[Adapter], at: At) -> None:
    """Every module of every adapter has all its columns in the graph, each once."""
    spans: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
    rows: defaultdict[str, set[int]] = defaultdict(set)
    for product in graph.products:
        for part in product.parts:
            spans[part.module].append((part.start, part.columns))
            rows[part.module].add(product.rows)
    for adapter in adapters:
        for module in adapter.modules:
            stops = list(_stops(sorted(spans[module.path])))
            if stops[-1:] != [module.columns] or None in stops or rows[module.path] != {module.rows}:
                what = f"the adapter {adapter.name} changes {shown(module.path)} of {module.rows} x {module.columns}"
                raise at.field("products").error(f"{what}, and the graph has no such module")


def _stops(spans: Sequence[tuple[int, int]]) -> Iterator[int | None]:
    """Where each span ends; None for one that does not begin where the last one ended."""
    end = 0
    for start, columns in spans:
        yield start + columns if start == end else None
        end = start + columns
