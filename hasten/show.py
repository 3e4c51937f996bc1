"""What people see: progress and tables."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import click
from rich.console import Console, Group
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from artifacts.bundle import Bundle
from artifacts.proof import Step, VariantProof

Announce = Callable[[str, float], None]
"""Called with what begins now and the share of the work that is done, 0 to 1."""

THREADS = click.IntRange(min=1, max=1024)
"""More threads than any machine has take minutes to start, if they start."""
_STATUS = {"proven": "green", "unproven": "yellow", "refused": "red"}


@cache
def console() -> Console:
    """Standard output; 110 columns where it is no terminal, so that tables in logs are whole."""
    return Console(width=None if sys.stdout.isatty() else 110)


@contextmanager
def progress(*, hidden: bool) -> Iterator[Announce]:
    """A progress bar on standard error while the block runs; a line a stage where that is no terminal."""
    if hidden:
        yield lambda text, share: None
        return
    errors = Console(stderr=True)
    if not errors.is_terminal:
        yield lambda text, share: errors.print(f"{share:4.0%} {text}", highlight=False, markup=False)
        return
    columns = (SpinnerColumn(), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda text, share: bar.update(task, description=text, completed=share)


def proof_table(bundle: Bundle, proof: VariantProof) -> Group:
    """Steps, quality and speed of one variant."""
    head = Text.assemble(
        ("\n" + proof.variant, "bold"), " ", (proof.status, _STATUS[proof.status]), f"  {size_text(proof.size)}"
    )
    if proof.reason:
        head.append(f"  {proof.reason}", style="dim")
    parts: list[Text | Table] = [head, _steps(proof.steps)]
    if proof.fidelity:
        parts.append(_fidelity(proof))
    if proof.speed:
        parts.append(_speed(proof))
    return Group(*parts)


def _steps(steps: tuple[Step, ...]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("step", overflow="fold")
    for heading in ("changed", "refused", "size", "latency", "faster", "error"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for step in steps:
        cells = (
            step.name,
            str(step.changed),
            str(step.refused),
            size_text(step.size),
            f"{step.ms:.2f} ms" if step.ms else "",
            f"{step.ratio:.2f}x" if step.ms else "",
            f"{step.error:.1e}",
            "kept" if step.kept else step.reason.split(";")[0],  # what was left alone stands in the report
        )
        table.add_row(*(Text(cell) for cell in cells), style="" if step.kept else "dim")
    return table


def _fidelity(proof: VariantProof) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("quality", "here", "reference", "drop", "allowed", "data"):
        table.add_column(heading, justify="left" if heading in ("quality", "data") else "right", no_wrap=True)
    for f in proof.fidelity:
        numbers = (f"{number:.4f}" for number in (f.value, f.reference, f.drop, f.budget))
        table.add_row(f.metric, *numbers, f"{f.samples} × {f.data}")
    return table


def _speed(proof: VariantProof) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("batch × length", "reference", "here", "faster", "quartiles"):
        table.add_column(heading, justify="left" if heading == "batch × length" else "right", no_wrap=True)
    for s in proof.speed:
        quartiles = f"{s.low:.2f} to {s.high:.2f}"
        shape = f"{s.batch} × {s.length}"
        table.add_row(shape, f"{s.reference_ms:.2f} ms", f"{s.ms:.2f} ms", f"[bold]{s.ratio:.2f}x[/]", quartiles)
    return table


def size_text(size: int) -> str:
    """Bytes for people."""
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
