"""The tables of hasten bench: whole in 80 columns."""

from __future__ import annotations

import io

from bundle_builders import a_proof
from rich.console import Console
from rich.table import Table

from hasten.decoding import _ratios, _table
from hasten.use import _ratio_table, _speed_table
from runtimes.bench import BenchReport, BenchRow
from runtimes.client import Ratio
from runtimes.generate.bench import DecodeRow, DecoderReport

SLOW, FAST = Ratio(0.98, 0.87, 1.02), Ratio(12.25, 11.5, 13.75)
ROWS = (
    DecodeRow(1, 128, 12345.6, 1234.5, 1234.5, 123.45, 234.56, 300, 12.3e9, SLOW, FAST),
    DecodeRow(16, 4096, 999.9, 98765.4, 8.5, 1234.56, 2345.67, 9, 1.2e8, FAST, SLOW),
)


def shown(table: Table) -> str:
    out = io.StringIO()
    Console(file=out, width=80).print(table)
    return out.getvalue()


def test_the_tables_of_a_language_model_fit_into_80_columns() -> None:
    machine = a_proof().variants[0].machine
    assert machine is not None
    about = ("tiny", "cpu-int4", "CPUExecutionProvider", "cpu", 0, "a/bundle: cpu-int8 on cpu", machine)
    report = DecoderReport(*about, ROWS, 1.0, 10**8, 1.5e10, 10**9)
    figures, ratios = shown(_table(report)), shown(_ratios(report))
    assert "…" not in figures + ratios
    for part in ("12346", "1234.5", "123.45", "2345.67", "12.3 (82%)", "16 × 4096"):
        assert part in figures, part
    for part in ("0.98x", "0.87 to 1.02", "12.25x", "11.50 to 13.75"):
        assert ratios.count(part) == 2, part


def test_the_tables_of_an_encoder_fit_into_80_columns() -> None:
    machine = a_proof().variants[0].machine
    assert machine is not None
    about = ("tiny", "cpu-int8", "CPUExecutionProvider", "cpu", 0, "reference on cpu", machine)
    rows = (
        BenchRow(16, 4096, 12345.67, 12345.68, 12345.69, 12345.6, 10**6, 98765.43, FAST),
        BenchRow(1, 32, 1.5, 1.6, 1.75, 666.6, 300, 1.25, SLOW),
    )
    report = BenchReport(*about, rows, FAST)
    figures, ratios = shown(_speed_table(report)), shown(_ratio_table(report))
    assert "…" not in figures + ratios
    for part in ("12345.67", "12345.69", "1000000", "16 × 4096", "666.6"):
        assert part in figures, part
    for part in ("98765.43", "12.25x", "11.50 to 13.75", "0.98x", "0.87 to 1.02"):
        assert part in ratios, part
