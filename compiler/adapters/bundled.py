"""Add an adapter to a bundle, and take one out. The graphs that take adapters are made for those that there are."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import onnx_ir as ir

from artifacts.adapters import AdaptedGraph, Adapter, adapted_path, adapter_path
from artifacts.bundle import Bundle, BundleWriter, open_bundle
from artifacts.constraints import path_problem, shown
from artifacts.errors import UnsupportedError, UsageError
from artifacts.manifest import Manifest, Variant
from artifacts.target import CPU_PROVIDER

from ..tasks import GENERATION
from .agreement import Agreement, agreement
from .graph import adapt, modules_of
from .peft import Lora, read_lora

_MOVING = ("smooth", "awq", "absorb-norm", "fold-batch-norm")
"""Passes that scale what goes into products, and their weights against it: A would have to be scaled too."""
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_COMPILE = "Compile the model for cpu, with a recipe that does not"
_FITTING = (
    "Pass an adapter for this base; a bundle of an older hasten, or with parts pruned, takes fewer: compile it again"
)


@dataclass(frozen=True)
class Added:
    """An adapter that was added.

    Attributes:
        bundle: The bundle, as it is now.
        adapter: The adapter.
        notes: What the user should know besides.
        agreement: Each variant against the original model with the adapter, by variant; empty where it was not asked.
    """

    bundle: Bundle
    adapter: Adapter
    notes: tuple[str, ...] = ()
    agreement: tuple[Agreement, ...] = ()


def add_adapter(
    path: Path, folder: Path, name: str, *, replace_it: bool = False, any_base: bool = False, against: str | None = None
) -> Added:
    """Add the adapter of a PEFT folder to a bundle: complete, or the bundle stays as it was.

    Args:
        path: The bundle.
        folder: What PEFT's ``save_pretrained`` wrote.
        name: What calls name it by: lower case letters, digits, ``.``, ``_`` and ``-``.
        replace_it: Take the place of an adapter of that name.
        any_base: Also where it says that it was trained on a model of another name.
        against: The original model (folder or hub id): compare the bundle with it, the adapter in both.

    Raises:
        UsageError: The bundle is no language model, the name cannot be used or is taken.
        SourceError: The folder is no sound adapter, does more than LoRA, or is for another model.
        FidelityError: The bundle with the adapter is not the original with it, or its logits are not finite.
        ProviderError: ONNX Runtime does not run what was made.
        OutputError: The bundle cannot be written.
    """
    bundle = open_bundle(path)
    _check_name(bundle, name, replace_it)
    lora = read_lora(folder)
    if not any_base:
        _check_base(bundle.manifest, lora)
    adapter = Adapter(name, adapter_path(name), lora.digest, lora.base, tuple(one.entry for one in lora.modules))
    others = [one for one in bundle.manifest.adapters or () if one.name != name]
    adapters = tuple(sorted((*others, adapter), key=lambda one: one.name))
    with _Rewriting(bundle, adapter.weights) as rewriting:
        rewriting.writer.add_bytes(adapter.weights, lora.to_bytes())
        manifest, notes = rewriting.adapted(adapters)
        staged = replace(bundle, path=rewriting.writer.staging, manifest=manifest)
        found = agreement(staged, lora, adapter, against)
        return Added(rewriting.commit(manifest), adapter, notes, found)


def remove_adapter(path: Path, name: str) -> Bundle:
    """Take an adapter out of a bundle.

    Raises:
        UsageError: It has none of that name.
        OutputError: The bundle cannot be written.
    """
    bundle = open_bundle(path)
    adapters = bundle.manifest.adapters or ()
    if name not in {one.name for one in adapters}:
        known = ", ".join(one.name for one in adapters) or "none"
        raise UsageError(f"{path} has no adapter {shown(name)}", f"It has {known}")
    with _Rewriting(bundle, adapter_path(name)) as rewriting:
        manifest, _ = rewriting.adapted(tuple(one for one in adapters if one.name != name))
        return rewriting.commit(manifest)


class _Rewriting:
    """A bundle that is written again with other adapters; all else in it stays."""

    def __init__(self, bundle: Bundle, gone: str) -> None:
        """``gone``: path of the adapter that does not stay as it is."""
        self.bundle = bundle
        self.writer = BundleWriter(bundle.path)
        self._gone = {gone, *(one.adapted.model for one in bundle.manifest.variants if one.adapted is not None)}

    def __enter__(self) -> _Rewriting:
        self.writer.__enter__()
        for entry in (*self.bundle.manifest.files, *self.bundle.proof.files):
            if entry.path not in self._gone:
                # A copy: ONNX Runtime refuses weights of a branch (prompt-int8) in a file that has two names.
                self.writer.add_file(entry.path, self.bundle.path / entry.path)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.writer.__exit__(kind, error, trace)

    def adapted(self, adapters: tuple[Adapter, ...]) -> tuple[Manifest, tuple[str, ...]]:
        """The manifest with these adapters, the graphs that take them written; and what was left out.

        Raises:
            UnsupportedError: No variant can take them; says why.
        """
        old = self.bundle.manifest
        made: list[Variant] = []
        refusals: list[UnsupportedError] = []
        for variant in old.variants:
            graph = None
            try:
                graph = self._graph(variant, adapters) if adapters else None
            except UnsupportedError as error:
                refusals.append(error)
            made.append(replace(variant, adapted=graph))
        if len(refusals) == len(made):
            raise refusals[0]
        return replace(old, adapters=adapters or None, variants=tuple(made)), tuple(error.what for error in refusals)

    def commit(self, manifest: Manifest) -> Bundle:
        """Make it the bundle."""
        self.bundle.check_still_there()
        return self.writer.commit(manifest, self.bundle.proof, tuple(one.path for one in self.bundle.proof.files))

    def _graph(self, variant: Variant, adapters: Sequence[Adapter]) -> AdaptedGraph:
        """The graph of a variant that takes the adapters, written.

        Raises:
            UnsupportedError: It cannot take them.
        """
        _check_variant(variant)
        model = ir.load(self.writer.staging / variant.model)
        known = modules_of(model)
        for adapter in adapters:
            _check_modules(adapter, known, variant)
        products = adapt(model, {module.path for adapter in adapters for module in adapter.modules})
        graph = AdaptedGraph(adapted_path(variant.id), products)
        self.writer.add_bytes(graph.model, ir.to_proto(model).SerializeToString(deterministic=True))
        return graph


def _check_name(bundle: Bundle, name: str, replace_it: bool) -> None:
    if bundle.manifest.task != GENERATION:
        raise UsageError(f"{bundle.path} is a {bundle.manifest.task} model", "Adapters are for language models")
    if not _NAME.fullmatch(name) or path_problem(adapter_path(name)):
        raise UsageError(f"the name {shown(name)} cannot be used", "Pass lower case letters, digits, '.', '_' and '-'")
    if not replace_it and name in {one.name for one in bundle.manifest.adapters or ()}:
        raise UsageError(f"{bundle.path} has an adapter {name} already", "Choose another name, or pass --replace")


def _check_base(manifest: Manifest, lora: Lora) -> None:
    """Names of models are all that an adapter says of its base beside the shapes: one that differs is refused."""
    stated, held = (_last(text) for text in (lora.base, manifest.source.name))
    if stated and stated != held:
        remedy = "Pass --any-base if that is the same model under another name"
        raise UnsupportedError(f"the adapter was trained on {lora.base}, and the bundle is of {held}", remedy)


def _last(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2].casefold()


def _check_variant(variant: Variant) -> None:
    if variant.providers[0] != CPU_PROVIDER:
        raise UnsupportedError(f"{variant.id} takes no adapters: they run on the CPU provider only", _COMPILE)
    names = (text.partition("(")[0].strip() for text in variant.pipeline.split(";"))
    moving = next((name for name in names if name in _MOVING), "")
    if moving:
        what = f"{variant.id} takes no adapters: {moving} scaled what goes into its products"
        raise UnsupportedError(what, _COMPILE)


def _check_modules(adapter: Adapter, known: Mapping[str, tuple[int, int]], variant: Variant) -> None:
    """Hold what the adapter changes to the products of a graph."""
    for module in adapter.modules:
        found = known.get(module.path)
        if found is None:
            close = difflib.get_close_matches(module.path, known, n=1)
            hint = f"; it has {close[0]}" if close else ""
            what = f"the adapter {adapter.name} changes {module.path}, of which {variant.id} has no product of its own"
            raise UnsupportedError(f"{what}{hint}", _FITTING)
        if found != (module.rows, module.columns):
            what = f"the adapter {adapter.name} changes {module.path} of {module.rows} x {module.columns}"
            raise UnsupportedError(f"{what}, and in {variant.id} it is {found[0]} x {found[1]}", _FITTING)
