"""From a folder to a model that answers, and the story of how it was chosen."""

from __future__ import annotations

import math
import os
from pathlib import Path

from artifacts.bundle import Bundle, open_bundle
from artifacts.constraints import printable
from artifacts.errors import UsageError
from artifacts.proof import VariantProof

from .decide import CandidateResult, Decision, find_short, start
from .tasks import TASKS, Task


def load(
    path: str | os.PathLike[str],
    *,
    device: str | None = None,
    provider: str | None = None,
    variant: str | None = None,
    threads: int = 0,
    cache: bool = True,
    verify: bool = True,
) -> Task:
    """Open a bundle, choose the variant and provider that are the fastest correct ones here, and load them.

    Args:
        path: The bundle's folder.
        device: ``cpu``, ``cuda``, ``cuda:1``...; None: any.
        provider: Execution provider, full or short name; None: any.
        variant: Id of a variant; None: any.
        threads: Threads within an operator; 0: one a physical core.
        cache: Use and write the decision kept on this machine.
        verify: Hash every file before it is used.

    Returns:
        The task of the bundle, its golden test passed on the provider it runs on.

    Raises:
        UsageError: No such device, provider or variant, or a negative number of threads.
        BundleError: Not a bundle, or a damaged one.
        ProviderError: Nothing here runs the bundle correctly.
    """
    if threads < 0:
        raise UsageError(f"threads is {threads}", "Pass 0 for one a physical core, or a positive number")
    bundle = open_bundle(Path(path), verify=verify)
    decision, session = start(bundle, device=device, provider=provider, variant=variant, threads=threads, cache=cache)
    try:
        return TASKS[bundle.manifest.task](bundle, session, explanation=explain(bundle, decision))
    except BaseException:
        session.close()
        raise


def explain(bundle: Bundle, decision: Decision) -> str:
    """Which variant runs on which provider, why, what else was possible, and what the proof says: several lines."""
    manifest = bundle.manifest
    variant = bundle.variant(decision.variant)
    proof = bundle.proof.variant(variant.id)
    when = "remembered from an earlier load on this machine" if decision.cached else "decided at this load"
    lines = [
        f"{manifest.name}: {manifest.task}, {bundle.digest[:19]}, {bundle.path}",
        f"  runs       {variant.id} ({variant.precision}) on {find_short(decision.provider)}, device {decision.device}",
        f"  because    {decision.reason} ({when})",
        f"  proof      {_proof_line(proof, decision.provider)}",
        "  candidates",
        *(f"    {line}" for line in _table(decision.candidates)),
    ]
    chosen = next((one for one in decision.candidates if one.status == "chosen"), None)
    if chosen is not None and chosen.fallback:
        lines += [f"  {len(chosen.fallback)} nodes run on another provider"]
        lines += [f"    {node}" for node in chosen.fallback]
    return "\n".join(lines)


def _proof_line(proof: VariantProof | None, provider: str) -> str:
    if proof is None or proof.status == "unproven":
        return "unproven: nobody measured this variant; `hasten prove` does"
    words = [f"{proof.status} on {find_short(proof.provider)}" + (f", {proof.machine.cpu}" if proof.machine else "")]
    if proof.provider != provider:
        words[0] += f" (not on {find_short(provider)}, which it runs on here)"
    ratios = [speed.ratio for speed in proof.speed if speed.ratio > 0.0]
    if ratios:
        words.append(f"{math.prod(ratios) ** (1 / len(ratios)):.2f} times as fast as the reference")
    words += [f"{one.metric} {one.value:.4g}, reference {one.reference:.4g}" for one in proof.fidelity]
    words.append(f"golden error {proof.golden_error:.2g}")
    # Names in a proof are whatever its maker wrote: a terminal must not obey them.
    return printable("; ".join(words))


def _table(candidates: tuple[CandidateResult, ...]) -> list[str]:
    """A line a candidate, in columns."""
    cells = [
        (
            one.status,
            one.name,
            "" if one.ms is None else f"{one.ms:.3g} ms",
            "" if one.error is None else f"error {one.error:.2g}",
            "proven" if one.proven else "unproven",
            one.reason,
        )
        for one in candidates
    ]
    widths = [max(len(row[column]) for row in cells) for column in range(5)]
    return [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False) if width), row[-1]]).rstrip()
        for row in cells
    ]
