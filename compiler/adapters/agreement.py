"""A bundle with an adapter, run before it is written; and held against the original model with the same adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from artifacts.adapters import Adapter
from artifacts.bundle import Bundle
from artifacts.errors import FidelityError, UsageError
from artifacts.manifest import Manifest, Variant
from runtimes.generate.adapters import open_graph
from runtimes.generate.feeds import fitted
from runtimes.golden import Golden, load_golden, relative_error

from ..quiet import quiet
from ..source import read_source
from .peft import Lora

_ALLOWED = 3.0
"""How many times the error of the variant without the adapter the one with it may have: the change of the weights is
added to rounded ones, so that the two errors are of one size."""


@dataclass(frozen=True)
class Agreement:
    """How far a variant with an adapter is off the original model with it, on the golden prompts.

    Attributes:
        variant: Its id.
        error: Relative L2 distance of the logits.
        without: The same of both without the adapter.
        effect: How far the adapter moves the original's logits.
    """

    variant: str
    error: float
    without: float
    effect: float


def agreement(bundle: Bundle, lora: Lora, adapter: Adapter, against: str | None) -> tuple[Agreement, ...]:
    """Run every variant that takes adapters, and compare it with the original.

    Args:
        bundle: With the adapter.
        lora: The adapter as it was trained.
        adapter: The same in the manifest.
        against: The original model: a folder or a hub id; None: compare with nothing, and return nothing.

    Raises:
        ProviderError: ONNX Runtime does not load a graph, or computes something else without the adapter than before.
        UsageError: That is not the model that the bundle was made of.
        SourceError: It cannot be read.
        FidelityError: The logits of a variant are not finite, or further off than its rounding explains.
    """
    golden = load_golden(bundle)
    original = None if against is None else _original(against, bundle.manifest, lora, golden)
    found = []
    for variant in bundle.manifest.variants:
        if variant.adapted is None:
            continue
        feeds = dict(fitted(golden.feeds, bundle.manifest.inputs_of(variant)))
        adapted = open_graph(bundle, variant, variant.adapted)
        try:
            without = adapted.run(feeds)["logits"]
            rows = adapted.feeds([adapter.name] * len(feeds["input_ids"]))
            logits = adapted.session.run({**feeds, **rows})["logits"]
        finally:
            adapted.close()
        if not np.isfinite(logits).all():
            raise FidelityError(f"the logits of {variant.id} with {adapter.name} are not finite", "Train it again")
        if original is None:
            continue
        plain, wanted = original
        one = Agreement(
            variant.id, relative_error(logits, wanted), relative_error(without, plain), relative_error(wanted, plain)
        )
        _check(one, variant)
        found.append(one)
    return tuple(found)


def _check(one: Agreement, variant: Variant) -> None:
    allowed = max(_ALLOWED * one.without, variant.tolerance)
    if not one.error <= allowed:
        what = f"{one.variant} with the adapter is off by {one.error:.2g}, without it by {one.without:.2g}"
        raise FidelityError(f"{what}; {allowed:.2g} is allowed", "Report this: the adapter was not added")


def _original(
    against: str, manifest: Manifest, lora: Lora, golden: Golden
) -> tuple[NDArray[np.generic], NDArray[np.generic]]:
    """Logits of the original model on the golden prompts, without the adapter and with it."""
    from ..export.decoder import load_original
    from ..export.decoder_head import TorchDecoder

    source = read_source(against, manifest.task)
    if source.digest != manifest.source.digest:
        raise UsageError(f"{against} is not the model that the bundle was made of", "Pass that one, or leave it out")
    size = golden.outputs["logits"].shape[2]
    with quiet():
        model = load_original(source)
        decoder = TorchDecoder(model)
        plain = decoder(golden.feeds)["logits"]
        if plain.shape[2] != size:
            raise UsageError("the vocabulary of the bundle was trimmed", "Leave out --against: it cannot be compared")
        with _merged(model, lora):
            wanted = decoder(golden.feeds)["logits"]
    return plain, wanted


@contextmanager
def _merged(model: Any, lora: Lora) -> Iterator[None]:
    """Within the block, the weights of the model are those with the adapter."""
    import torch

    before: list[tuple[Any, Any]] = []
    try:
        for module in lora.modules:
            owner = model.get_submodule(module.entry.path)
            change = torch.from_numpy(module.a @ module.b)
            before.append((owner, owner.weight))
            # A Linear holds [columns, rows], the Conv1D of GPT-2 [rows, columns]. A parameter that is tied stays.
            weight = owner.weight.data + (change.T if isinstance(owner, torch.nn.Linear) else change)
            owner.weight = torch.nn.Parameter(weight, requires_grad=False)
        yield
    finally:
        for owner, weight in before:
            owner.weight = weight
