"""Commands that use a bundle: run, bench."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table
from rich.text import Text

from artifacts.errors import DataError, UsageError

from .show import THREADS, console

if TYPE_CHECKING:
    from runtimes.bench import BenchReport
    from runtimes.client import Ratio


def machine_options(command: Any) -> Any:
    """The options by which a user overrides the choice of variant and provider."""
    for option in (
        click.option("--device", help="Where to run: cpu, cuda, cuda:1 …  [default: the fastest that is correct]"),
        click.option("--provider", help="Execution provider: cpu, openvino, cuda, tensorrt or its full name."),
        click.option("--variant", help="Variant of the bundle."),
        click.option("--threads", type=THREADS, help="Threads.  [default: physical cores]"),
    ):
        command = option(command)
    return command


@click.command("run", short_help="Run a bundle on texts, a file or standard input.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("texts", nargs=-1)
@click.option("-i", "--input", "source", type=click.Path(path_type=Path), help="Read texts or jsonl records from here.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write jsonl here, complete or not at all.")
@click.option(
    "--max-tokens", type=click.IntRange(min=1), help="Padded tokens a batch.  [default: what suits this machine]"
)
@click.option("--explain", is_flag=True, help="Say on standard error which variant and provider run, and why.")
@machine_options
def run_command(
    bundle: Path,
    texts: tuple[str, ...],
    source: Path | None,
    output: Path | None,
    max_tokens: int | None,
    explain: bool,
    device: str | None,
    provider: str | None,
    variant: str | None,
    threads: int | None,
) -> None:
    """Run BUNDLE on TEXTS, on a file, or on standard input; a line of JSON each.

    A line of a file or of standard input is a text, or a JSON object such as {"text": …}, {"question": …,
    "context": …} or, for plain tensors, {"input name": [numbers]}.
    """
    from runtimes.jsonl import read_records, run_records, to_line, write_rows
    from runtimes.load import load

    if texts and source is not None:
        raise UsageError("texts and --input were both given", "Give one of them")
    if not texts and source is None and sys.stdin.isatty():
        raise UsageError("nothing to run on", 'Give texts, --input FILE, or pipe lines in: echo "text" | hasten run …')
    with load(bundle, device=device, provider=provider, variant=variant, threads=threads or 0) as model:
        if explain:
            click.echo(model.explain(), err=True)
        stream = None if source is None else _open(source)
        records = (
            enumerate(texts, 1) if texts else read_records(stream or sys.stdin.buffer, name=str(source or "stdin"))
        )
        chunk = 2048 if texts or source is not None else 1
        name = "argument" if texts else str(source or "stdin")
        rows = run_records(model, records, name=name, max_tokens=max_tokens, chunk=chunk)
        try:
            if output is not None:
                click.echo(f"{output}: {write_rows(rows, output)} records", err=True)
                return
            for row in rows:
                sys.stdout.buffer.write(to_line(row))
                sys.stdout.buffer.flush()
        finally:
            if stream is not None:
                stream.close()


def _open(path: Path) -> Any:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", "Name a readable file") from error


def _numbers(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in value.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is no list of numbers such as 1,16", context, parameter) from error
    if any(number < 1 for number in numbers):
        raise click.BadParameter(f"{value!r} has a number below 1", context, parameter)
    return numbers


def _peers(context: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    from runtimes.peers import parse_peer

    peers = dict(parse_peer(text) for text in value)
    if len(peers) < len(value):
        raise click.BadParameter("two peers have the same name", context, parameter)
    return peers


@click.command("bench", short_help="Measure latency and throughput of a bundle.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--against", help="Compare with `reference` (needs compile --keep-reference) or with another bundle.")
@click.option("--batches", default="1,16", show_default=True, callback=_numbers, help="Rows.")
@click.option("--lengths", default="32,128", show_default=True, callback=_numbers, help="Tokens a row.")
@click.option(
    "--seconds", type=click.FloatRange(min=0, min_open=True), default=1.0, show_default=True, help="For each shape."
)
@click.option(
    "--peer",
    "peers",
    metavar="NAME=COMMAND",
    multiple=True,
    callback=_peers,
    help="Compare with a program of yours; repeatable. It speaks the protocol of docs/peers.md.",
)
@click.option(
    "--peer-timeout",
    type=click.FloatRange(min=0, max=86400, min_open=True),
    default=300.0,
    show_default=True,
    help="Seconds a peer may take for an answer.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@machine_options
def bench_command(
    bundle: Path,
    against: str | None,
    batches: tuple[int, ...],
    lengths: tuple[int, ...],
    as_json: bool,
    threads: int | None,
    **options: Any,
) -> None:
    """Measure latency and throughput of BUNDLE here, interleaved with what it is compared with."""
    from artifacts.bundle import open_bundle
    from runtimes.bench import bench

    report = bench(
        open_bundle(bundle), against=against, batches=batches, lengths=lengths, threads=threads or 0, **options
    )
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=1))
        return
    machine = report.machine
    console().print(
        Text(f"{report.name}, {report.variant} on {report.provider} ({machine.cpu}, {machine.cores} cores)")
    )
    console().print(_speed_table(report))
    if report.ratio is not None:
        faster = (f"{report.ratio.median:.2f}x", "bold")
        console().print(Text.assemble(faster, f" the speed of {report.against} over these shapes"))
    if report.peers:
        console().print()
        console().print(_peer_table(report))


def _speed_table(report: BenchReport) -> Table:
    heads = ["batch × length", "p50 ms", "p90 ms", "p99 ms", "rows/s", "calls"]
    table = _table(*heads, *(["reference ms", "faster", "quartiles"] if report.against else []))
    for row in report.rows:
        cells = [f"{row.batch} × {row.length}", *(f"{ms:.2f}" for ms in (row.p50_ms, row.p90_ms, row.p99_ms))]
        cells += [f"{row.per_second:.1f}", str(row.calls)]
        if row.ratio is not None and row.against_ms is not None:
            cells += [f"{row.against_ms:.2f}", *_faster(row.ratio)]
        table.add_row(*cells)
    return table


def _peer_table(report: BenchReport) -> Table:
    table = _table("peer", "batch × length", "peer ms", "p50 ms", "faster", "quartiles")
    for total in report.peers:
        for row in report.rows:
            result = next(result for result in row.peers if result.name == total.name)
            shape = f"{row.batch} × {row.length}"
            table.add_row(total.name, shape, f"{result.ms:.2f}", f"{row.p50_ms:.2f}", *_faster(result.ratio))
        if len(report.rows) > 1:
            table.add_row(total.name, "all of these", "", "", *_faster(total.ratio), style="bold")
    return table


def _table(*heads: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for head in heads:
        table.add_column(head, justify="left" if head in ("peer", "batch × length") else "right", no_wrap=True)
    return table


def _faster(ratio: Ratio) -> tuple[str, str]:
    return f"{ratio.median:.2f}x", f"{ratio.low:.2f} to {ratio.high:.2f}"
