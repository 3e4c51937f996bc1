"""``hasten bench`` of a language model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table
from rich.text import Text

from artifacts.bundle import Bundle
from artifacts.errors import UsageError

from .show import console, size_text

if TYPE_CHECKING:
    from runtimes.client import Ratio
    from runtimes.generate.bench import DecoderReport


def bench_language_model(
    bundle: Bundle, *, as_json: bool, peers: Mapping[str, Sequence[str]], peer_timeout: float, **options: Any
) -> None:
    """Measure and show; see `runtimes.generate.bench.bench_decoder`.

    Raises:
        UsageError: Peers are asked for: their protocol is one of encoders.
    """
    from runtimes.generate.bench import bench_decoder

    if peers:
        raise UsageError("--peer is for models that take one input at a time", "See benchmarks/decoder.py")
    report = bench_decoder(bundle, **options)
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=1))
        return
    cpu = f"{report.machine.cpu}, {report.machine.cores} cores"
    console().print(Text(f"{report.name}, {report.variant} on {report.provider} ({cpu})"))
    console().print(_table(report))
    console().print(
        Text(
            f"a step reads {size_text(report.weight_bytes)} of weights; this machine moves "
            f"{report.memory_bandwidth / 1e9:.1f} GB/s; loaded in {report.load_seconds:.2f} s, "
            f"at most {size_text(report.peak_bytes)} of memory"
        )
    )
    if report.against:
        console().print(Text(f"\nagainst {report.against}: times as fast, with quartiles over the rounds"))
        console().print(_ratios(report))


def _table(report: DecoderReport) -> Table:
    table = _plain(
        ["batch × prompt", "prefill\ntok/s", "first\ntoken ms", "decode\ntok/s", "p50 ms", "p99 ms", "weights\nGB/s"]
    )
    for row in report.rows:
        share = row.bandwidth / report.memory_bandwidth
        cells = [f"{row.batch} × {row.prompt}", f"{row.prefill_per_second:.0f}", f"{row.first_ms:.1f}"]
        cells += [f"{row.decode_per_second:.1f}", f"{row.p50_ms:.2f}", f"{row.p99_ms:.2f}"]
        cells += [f"{row.bandwidth / 1e9:.1f} ({share:.0%})"]
        table.add_row(*cells)
    return table


def _ratios(report: DecoderReport) -> Table:
    table = _plain(["batch × prompt", "prefill", "quartiles", "decode", "quartiles"])
    for row in report.rows:
        ratios = [ratio for ratio in (row.prefill_ratio, row.decode_ratio) if ratio is not None]
        table.add_row(f"{row.batch} × {row.prompt}", *(cell for ratio in ratios for cell in _faster(ratio)))
    return table


def _plain(heads: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for index, head in enumerate(heads):
        table.add_column(head, justify="right" if index else "left", no_wrap=True)
    return table


def _faster(ratio: Ratio) -> tuple[str, str]:
    return f"{ratio.median:.2f}x", f"{ratio.low:.2f} to {ratio.high:.2f}"
