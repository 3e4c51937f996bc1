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
        console().print(Text(f"faster than {report.against}, with quartiles over the rounds"))


def _table(report: DecoderReport) -> Table:
    heads = ["batch × prompt", "prefill tok/s", "first token ms", "decode tok/s", "p50 ms", "p99 ms", "weights GB/s"]
    table = Table(box=None, pad_edge=False, header_style="dim")
    for head in (*heads, *(["prefill faster", "decode faster"] if report.against else [])):
        table.add_column(head, justify="left" if head == heads[0] else "right", no_wrap=True)
    for row in report.rows:
        share = row.bandwidth / report.memory_bandwidth
        cells = [f"{row.batch} × {row.prompt}", f"{row.prefill_per_second:.0f}", f"{row.first_ms:.1f}"]
        cells += [f"{row.decode_per_second:.1f}", f"{row.p50_ms:.2f}", f"{row.p99_ms:.2f}"]
        cells += [f"{row.bandwidth / 1e9:.1f} ({share:.0%})"]
        cells += [_faster(ratio) for ratio in (row.prefill_ratio, row.decode_ratio) if ratio is not None]
        table.add_row(*cells)
    return table


def _faster(ratio: Ratio) -> str:
    return f"{ratio.median:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})"
