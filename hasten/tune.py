"""Commands that look at how a bundle runs on this machine: tune, profile."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from .generation import GENERATION, task_of
from .show import console
from .use import machine_options


@click.command("tune", short_help="Find the session settings that are best on this machine.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--seconds", type=click.FloatRange(min=0, min_open=True), default=60.0, show_default=True, help="Time to try in."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@machine_options
def tune_command(bundle: Path, as_json: bool, threads: int | None, **options: Any) -> None:
    """Measure threads, spinning, memory arena, lanes and batch size of BUNDLE here; later loads use what is best."""
    from runtimes.tune import tune_bundle

    report = tune_bundle(bundle, threads=threads or 0, **options)
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=1))
        return
    console().print(Text(f"{report.name}, {report.variant} on {report.provider}, {report.machine.cpu}"))
    table = Table(box=None, pad_edge=False, header_style="dim")
    for head in ("change", "faster", "quartiles", ""):
        table.add_column(head)
    for trial in report.trials:
        if trial.ratio is None:
            table.add_row(trial.change, "", "", trial.reason)
        else:
            quartiles = f"{trial.low:.2f} to {trial.high:.2f}"
            table.add_row(trial.change, f"{trial.ratio:.2f}x", quartiles, "taken" if trial.taken else "left")
    console().print(table)
    text = task_of(bundle) not in (GENERATION, "tensors")
    console().print(Text(f"from now on: {report.settings.describe(text=text)}"))
    if report.busy:
        console().print(Text("other programs kept this machine busy: tune again in a quieter hour", "yellow"))


@click.command("profile", short_help="Show which kernels a bundle spends its time in.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--batch", type=click.IntRange(min=1), default=16, show_default=True, help="Rows of the input.")
@click.option("--length", type=click.IntRange(min=1), default=128, show_default=True, help="Tokens of a row.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@machine_options
def profile_command(bundle: Path, batch: int, length: int, as_json: bool, threads: int | None, **options: Any) -> None:
    """Run BUNDLE with ONNX Runtime's profiler and show its kernels by kind, the costliest first.

    Profiling itself costs time: the shares are what counts.
    """
    from artifacts.bundle import open_bundle
    from runtimes.kernels import shares
    from runtimes.profile import profile_bundle

    kernels = profile_bundle(open_bundle(bundle), batch=batch, length=length, threads=threads or 0, **options)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(kernel) for kernel in kernels], indent=1))
        return
    total = sum(kernel.ms for kernel in kernels)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for head in ("operator", "kernel", "nodes", "ms", "share"):
        table.add_column(head, justify="left" if head in ("operator", "kernel") else "right", no_wrap=True)
    for share in shares(kernels):
        part = f"{share.ms / total:.0%}" if total else ""
        table.add_row(share.operator, share.implementation, str(share.count), f"{share.ms:.2f}", part)
    console().print(table)
    integer = sum(kernel.integer for kernel in kernels)
    console().print(Text(f"{integer} products of integers; {total:.2f} ms in kernels of a run of {batch} × {length}"))
