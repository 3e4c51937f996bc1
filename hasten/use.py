"""Commands that use a bundle: run, bench."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click
from rich.table import Table
from rich.text import Text

from artifacts.errors import DataError, UsageError

from .generation import (
    GENERATION,
    Wishes,
    draft_option,
    generation_options,
    read_prompt,
    run_prompt,
    task_of,
    wishes,
    with_wishes,
)
from .show import THREADS, console

if TYPE_CHECKING:
    from runtimes.bench import BenchReport
    from runtimes.client import Ratio
    from runtimes.tasks import Task
    from runtimes.tasks.generate import Generator

_TEXTS_AT_ONCE = 32


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
@click.option(
    "--prompt", metavar="TEXT", help="Language models: write what follows, as it comes; - for standard input."
)
@click.option(
    "--chat/--no-chat",
    default=None,
    help="Language models: a prompt is a message to answer, or a text to go on with.  [default: what the model is for]",
)
@click.option("--stats", is_flag=True, help="With --prompt: say on standard error what it took.")
@generation_options
@draft_option
def run_command(
    bundle: Path,
    texts: tuple[str, ...],
    source: Path | None,
    output: Path | None,
    max_tokens: int | None,
    explain: bool,
    prompt: str | None,
    stats: bool,
    threads: int | None,
    **options: Any,
) -> None:
    """Run BUNDLE on TEXTS, on a file, or on standard input; a line of JSON each.

    A line of a file or of standard input is a text, or a JSON object such as {"text": …}, {"question": …,
    "context": …} or, for plain tensors, {"input name": [numbers]}; for a language model {"prompt": …} or
    {"messages": [{"role": "user", "content": …}]}, which may hold its options too.

    With --prompt a language model writes one text to standard output, as it comes. The options from --prompt on are
    for language models.
    """
    from runtimes.load import load

    wished = wishes(options)
    _check_inputs(bundle, texts, source, prompt, wished)
    if prompt is not None and (output is not None or max_tokens is not None):
        which = "--output" if output is not None else "--max-tokens"
        raise UsageError(f"{which} is for several texts, and --prompt writes one", "Give the prompt as TEXTS")
    if stats and prompt is None:
        raise UsageError("--stats is for --prompt", "Leave it out")
    with load(bundle, threads=threads or 0, **options) as model:
        if explain:
            click.echo(model.explain(), err=True)
        if prompt is not None:
            run_prompt(cast("Generator", model), read_prompt(prompt), wished, stats=stats)
            return
        _run_records(model, texts, source, output, max_tokens, wished)


def _check_inputs(
    bundle: Path, texts: tuple[str, ...], source: Path | None, prompt: str | None, wished: Wishes
) -> None:
    given = [
        name
        for name, is_given in (("texts", texts), ("--input", source), ("--prompt", prompt))
        if is_given not in (None, ())
    ]
    if len(given) > 1:
        raise UsageError(f"{given[0]} and {given[1]} were both given", "Give one of them")
    if not given and sys.stdin.isatty():
        raise UsageError("nothing to run on", 'Give texts, --input FILE, or pipe lines in: echo "text" | hasten run …')
    if (prompt is not None or wished.any) and (task := task_of(bundle)) != GENERATION:
        raise UsageError(f"{bundle} is a {task} model: it writes no texts", "Leave out --prompt and its options")


def _run_records(
    model: Task,
    texts: tuple[str, ...],
    source: Path | None,
    output: Path | None,
    max_tokens: int | None,
    wished: Wishes,
) -> None:
    from runtimes.jsonl import read_records, run_records, to_line, write_rows

    stream = None if source is None else _open(source)
    records = enumerate(texts, 1) if texts else read_records(stream or sys.stdin.buffer, name=str(source or "stdin"))
    chunk = 2048 if texts or source is not None else 1
    if model.task == GENERATION:
        records, chunk = with_wishes(records, model.bundle.manifest, wished), min(chunk, _TEXTS_AT_ONCE)
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


def _numbers(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    if value is None:
        return None
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
@click.option("--batches", callback=_numbers, help="Rows.  [default: 1,16; language models: 1,8]")
@click.option(
    "--lengths", callback=_numbers, help="Tokens a row, or of a prompt.  [default: 32,128; language models: 128,512]"
)
@click.option("--new-tokens", type=click.IntRange(min=2), help="Language models: tokens to write.  [default: 64]")
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
    batches: tuple[int, ...] | None,
    lengths: tuple[int, ...] | None,
    new_tokens: int | None,
    as_json: bool,
    threads: int | None,
    **options: Any,
) -> None:
    """Measure latency and throughput of BUNDLE here, interleaved with what it is compared with.

    Of a language model: how fast it reads prompts and writes tokens, and how much of this machine's memory bandwidth
    its weights take.
    """
    from artifacts.bundle import open_bundle
    from runtimes.bench import bench

    given = {"batches": batches, "lengths": lengths}
    options |= {name: value for name, value in given.items() if value is not None}
    opened = open_bundle(bundle)
    if opened.manifest.task == GENERATION:
        from .decoding import bench_language_model

        options |= {} if new_tokens is None else {"new_tokens": new_tokens}
        bench_language_model(opened, as_json=as_json, threads=threads or 0, **options)
        return
    if new_tokens is not None:
        raise UsageError(f"{bundle} is a {opened.manifest.task} model: it writes no tokens", "Leave --new-tokens out")
    report = bench(opened, threads=threads or 0, **options)
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=1))
        return
    machine = report.machine
    console().print(
        Text(f"{report.name}, {report.variant} on {report.provider} ({machine.cpu}, {machine.cores} cores)")
    )
    console().print(_speed_table(report))
    if report.ratio is not None:
        console().print()
        console().print(_ratio_table(report))
        faster = (f"{report.ratio.median:.2f}x", "bold")
        console().print(Text.assemble(faster, f" the speed of {report.against} over these shapes"))
    if report.peers:
        console().print()
        console().print(_peer_table(report))


def _speed_table(report: BenchReport) -> Table:
    table = _table("batch × length", "p50 ms", "p90 ms", "p99 ms", "rows/s", "calls")
    for row in report.rows:
        cells = [f"{row.batch} × {row.length}", *(f"{ms:.2f}" for ms in (row.p50_ms, row.p90_ms, row.p99_ms))]
        table.add_row(*cells, f"{row.per_second:.1f}", str(row.calls))
    return table


def _ratio_table(report: BenchReport) -> Table:
    table = _table("batch × length", "against ms", "p50 ms", "faster", "quartiles")
    for row in report.rows:
        if row.ratio is not None and row.against_ms is not None:
            shape = f"{row.batch} × {row.length}"
            table.add_row(shape, f"{row.against_ms:.2f}", f"{row.p50_ms:.2f}", *_faster(row.ratio))
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
