"""From a folder to a model that answers, and the story of how it was chosen."""

from __future__ import annotations

import math
import os
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

from artifacts.beside import opened_beside
from artifacts.bundle import Bundle, open_bundle
from artifacts.constraints import printable
from artifacts.errors import UsageError
from artifacts.manifest import Manifest
from artifacts.proof import VariantProof

from .decide import CandidateResult, Decision, find_short, start, widen
from .generate.adapters import open_adapted
from .pool import SessionPool
from .session import Session
from .settings import Settings
from .tasks import TASKS, Generator, Task

_MOST_LANES = 1024


def load(
    path: str | os.PathLike[str],
    *,
    device: str | None = None,
    provider: str | None = None,
    variant: str | None = None,
    threads: int = 0,
    lanes: int = 0,
    cache: bool = True,
    verify: bool = True,
    draft: str | os.PathLike[str] | Task | None = None,
) -> Task:
    """Open a bundle, choose the variant and provider that are the fastest correct ones here, and load them.

    Args:
        path: The bundle's folder.
        device: ``cpu``, ``cuda``, ``cuda:1``...; None: any.
        provider: Execution provider, full or short name; None: any.
        variant: Id of a variant; None: any.
        threads: Threads within an operator; 0: as tuned, else one a physical core.
        lanes: Batches of a long input that run at once, each on one thread of a second session that is opened when the
            first long input comes; 0: as tuned, else one a thread of the CPU; 1: none, which saves the memory of the
            second session's weights.
        cache: Use and write the decision and the settings kept on this machine.
        verify: Compare the hash of every file with the one stated: of weights while they are loaded, of all else before
            it is used.
        draft: Of a language model: a smaller one of the same tokenizer that guesses how texts go on, a bundle or loaded
            (then it is not closed with the model).

    Returns:
        The task of the bundle, its golden test passed on the provider it runs on.

    Raises:
        UsageError: No such device, provider or variant, a negative number of threads or lanes, or a draft of another
            vocabulary.
        BundleError: Not a bundle, or a damaged one.
        ProviderError: Nothing here runs the bundle correctly.
    """
    if threads < 0 or not 0 <= lanes <= _MOST_LANES:
        raise UsageError(f"threads is {threads}, lanes is {lanes}", "Pass 0 for what suits this machine, or a few")
    opened = opened_beside(Path(path)) if verify else nullcontext(open_bundle(Path(path), verify=False))
    with ExitStack() as failed:
        with opened as bundle:
            decision, session = start(
                bundle, device=device, provider=provider, variant=variant, threads=threads, cache=cache
            )
            failed.callback(session.close)
            task = _task(bundle, decision, session, lanes)
        if draft is not None:
            alike = partial(load, device=device, threads=threads, cache=cache, verify=verify)
            guesser = draft if isinstance(draft, Task) else alike(draft)
            _use_draft(task, guesser, own=guesser is not draft)
        failed.pop_all()
    return task


def _task(bundle: Bundle, decision: Decision, session: Session, lanes: int) -> Task:
    settings = replace(session.settings, lanes=lanes or session.settings.lanes)
    pool = SessionPool(
        session,
        lanes=settings.lanes,
        max_tokens=settings.max_tokens,
        padding=settings.padding,
        widen=partial(widen, bundle, decision, settings),
        adapt=partial(open_adapted, bundle, decision, settings) if bundle.manifest.adapters else None,
    )
    return TASKS[bundle.manifest.task](bundle, pool, explanation=explain(bundle, decision, settings))


def _use_draft(task: Task, draft: Task, *, own: bool) -> None:
    """Let a language model guess for another."""
    with ExitStack() as stack:
        if own:
            stack.callback(draft.close)
        if not isinstance(task, Generator) or not isinstance(draft, Generator):
            raise UsageError("a draft is a language model, for a language model", "Leave out draft")
        task.use_draft(draft, close=own)
        stack.pop_all()


def explain(bundle: Bundle, decision: Decision, settings: Settings | None = None) -> str:
    """Which variant runs on which provider, why, what else was possible, and what the proof says: several lines.

    Args:
        bundle: The bundle.
        decision: What was chosen.
        settings: How the session uses the machine; None: leave it out.
    """
    manifest = bundle.manifest
    variant = bundle.variant(decision.variant)
    proof = bundle.proof.variant(variant.id)
    when = "remembered from an earlier load on this machine" if decision.cached else "decided at this load"
    lines = [
        f"{manifest.name}: {manifest.task}, {bundle.digest[:19]}, {bundle.path}",
        f"  runs       {variant.id} ({variant.precision}) on {find_short(decision.provider)}, device {decision.device}",
        f"  because    {decision.reason} ({when})",
        f"  proof      {_proof_line(proof, decision.provider)}",
        *([f"  settings   {_settings_line(manifest, settings)}"] if settings is not None else []),
        "  candidates",
        *(f"    {line}" for line in _table(decision.candidates)),
    ]
    chosen = next((one for one in decision.candidates if one.status == "chosen"), None)
    if chosen is not None and chosen.fallback:
        lines += [f"  {len(chosen.fallback)} nodes run on another provider"]
        lines += [f"    {node}" for node in chosen.fallback]
    return "\n".join(lines)


def _settings_line(manifest: Manifest, settings: Settings) -> str:
    # A decoder's texts go on together, row by row; it cuts nothing up into lanes.
    told = settings.describe(text=manifest.processor is not None and manifest.generation is None)
    return f"{told} ({'tuned on this machine' if settings.tuned else 'the defaults, not tuned on this machine'})"


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
