"""Draw what `encoder.py --json` wrote.

    python benchmarks/plot.py RESULTS.json OUT.svg                    # milliseconds and sentences a second
    python benchmarks/plot.py RESULTS.json OUT.svg --steps VARIANT    # from float32 to a variant, a bar for each step

Plain SVG, the same bytes for the same figures; it follows the reader's light or dark scheme.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import median, quantiles
from typing import Any

ROW, BAR, HEAD, GAP = 19, 12, 40, 26
WIDTH, VALUES, LETTER, MARGIN, NARROWEST = 230, 118, 6.7, 14, 680
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #24292f }
.head { font-weight: 600; font-size: 13px } .note { fill: #57606a; font-size: 11px } .name { text-anchor: end }
.peer { fill: #afb8c1 } .ours { fill: #1a7f37 } .gain { fill: #54aeff } .loss { fill: #cf222e }
.spread { stroke: #57606a; stroke-width: 1 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .note { fill: #9198a1 } .peer { fill: #656c76 } .ours { fill: #3fb950 }
  .gain { fill: #388bfd } .spread { stroke: #9198a1 }
}
"""


@dataclass(frozen=True)
class Bar:
    """One row of a panel.

    Attributes:
        name: What stands on the left.
        start: Where the bar begins, in the panel's unit.
        end: Where it ends.
        spread: Quartiles, drawn as a line; None: none.
        value: What stands on the right.
        kind: ``peer``, ``ours``, ``gain`` or ``loss``.
    """

    name: str
    start: float
    end: float
    spread: tuple[float, float] | None
    value: str
    kind: str

    @property
    def reach(self) -> float:
        """Where the bar and its line end."""
        return max(self.end, *(self.spread or (self.end,)))


@dataclass(frozen=True)
class Panel:
    """Bars on one scale.

    Attributes:
        title: What is measured.
        note: How to read it.
        bars: From top to bottom.
    """

    title: str
    note: str
    bars: tuple[Bar, ...]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, metavar="RESULTS.json")
    parser.add_argument("out", type=Path, metavar="OUT.svg")
    parser.add_argument(
        "--steps", metavar="VARIANT", help="the steps that made this variant, instead of the contenders"
    )
    options = parser.parse_args()
    figures = json.loads(options.results.read_text(encoding="utf-8"))
    if "race" not in figures:
        parser.error(f"{options.results} holds no comparison; run encoder.py without --only claims")
    if options.steps and options.steps not in figures["steps"]:
        parser.error(f"no variant {options.steps!r}; there are {', '.join(figures['steps'])}")
    panels = [waterfall(options.steps, figures["steps"][options.steps])] if options.steps else contenders(figures)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(draw(panels, figures["machine"]), encoding="utf-8")
    return 0


def contenders(figures: Mapping[str, Any]) -> list[Panel]:
    """A panel for each shape, and one for sentences a second; the best on top."""
    results = figures["race"]["contenders"]
    shapes = dict.fromkeys(key for result in results.values() for key in result["ms"])
    panels = []
    for key in shapes:
        rows = {name: result["ms"][key] for name, result in results.items() if result["ms"].get(key)}
        bars = tuple(_bar(name, rounds, results[name]["ours"], "ms") for name, rounds in rows.items())
        title = f"{key.replace('x', ' × ')} tokens, milliseconds"
        panels.append(Panel(title, "shorter is better", tuple(sorted(bars, key=lambda bar: bar.end))))
    rates = {name: result["per_second"] for name, result in results.items() if result["per_second"]}
    if rates:
        bars = tuple(_bar(name, rounds, results[name]["ours"], "") for name, rounds in rates.items())
        best_first = tuple(sorted(bars, key=lambda bar: -bar.end))
        panels.append(Panel("sentences a second, strings to vectors", "longer is better", best_first))
    return panels


def waterfall(variant: str, steps: Mapping[str, Any]) -> Panel:
    """From the reference's milliseconds, divided by the measured ratio of each kept step, to the variant as proven."""
    start = now = float(steps["reference_ms"])
    bars = [Bar("float32 reference", 0.0, start, None, f"{start:.1f} ms", "peer")]
    for step in steps["steps"]:
        after = now / step["ratio"]
        kind = "gain" if after <= now else "loss"
        bars.append(Bar(step["name"], min(now, after), max(now, after), None, f"{step['ratio']:.2f}×", kind))
        now = after
    end = float(steps["ms"])
    bars.append(Bar(variant, 0.0, end, None, f"{end:.1f} ms, {steps['ratio']:.2f}×", "ours"))
    title = f"{steps['batch']} × {steps['length']} tokens, from float32 to {variant}"
    return Panel(title, "each step as measured when it was kept; the last bar as proven", tuple(bars))


def draw(panels: Sequence[Panel], footer: str) -> str:
    """The picture: two panels a row."""
    columns = min(2, len(panels))
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    heights = [HEAD + ROW * max(len(panel.bars) for panel in row) + GAP for row in rows]
    names = MARGIN + int(LETTER * max(len(bar.name) for panel in panels for bar in panel.bars))
    across = names + WIDTH + VALUES
    width, height = max(columns * across, NARROWEST), sum(heights) + GAP
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    ]
    lines.append(f"<style>{STYLE}</style>")
    top = 0
    for row, used in zip(rows, heights, strict=True):
        for column, panel in enumerate(row):
            lines += _panel(panel, column * across, top, names)
        top += used
    lines += [f'<text class="note" x="8" y="{height - 10}">{escape(footer)}</text>', "</svg>"]
    return "\n".join(lines) + "\n"


def _bar(name: str, rounds: Sequence[float], ours: bool, unit: str) -> Bar:
    middle = median(rounds)
    low, _, high = quantiles(rounds, n=4, method="inclusive") if len(rounds) > 1 else (middle, middle, middle)
    value = (
        f"{middle:.2f} {unit}" if middle < 10 else f"{middle:.1f} {unit}" if middle < 1000 else f"{middle:.0f} {unit}"
    )
    return Bar(name, 0.0, middle, (low, high), value.strip(), "ours" if ours else "peer")


def _panel(panel: Panel, left: int, top: int, names: int) -> Iterator[str]:
    """The elements of a panel whose upper left corner is there and whose names take that much room."""
    scale = WIDTH / max(bar.reach for bar in panel.bars)
    zero = left + names
    yield f'<text class="head" x="{left + 8}" y="{top + 18}">{escape(panel.title)}</text>'
    yield f'<text class="note" x="{left + 8}" y="{top + 32}">{escape(panel.note)}</text>'
    for index, bar in enumerate(panel.bars):
        y = top + HEAD + ROW * index
        x, length = zero + scale * bar.start, max(1.0, scale * (bar.end - bar.start))
        yield f'<text class="name" x="{zero - 6}" y="{y + 11}">{escape(bar.name)}</text>'
        yield f'<rect class="{bar.kind}" x="{x:.1f}" y="{y}" width="{length:.1f}" height="{BAR}" rx="2"/>'
        if bar.spread:
            low, high = (zero + scale * value for value in bar.spread)
            yield f'<path class="spread" d="M{low:.1f} {y + BAR / 2}H{high:.1f}"/>'
        yield f'<text x="{zero + scale * bar.reach + 6:.1f}" y="{y + 11}">{escape(bar.value)}</text>'


if __name__ == "__main__":
    sys.exit(main())
