"""How the perplexity of pystories_lm rises as more of it goes, by each method; measured, or drawn.

    python benchmarks/curves.py --json CURVES.json [--quick] [--only FAMILY]    # some 30 compiles by the real command
    python benchmarks/curves.py --draw CURVES.json OUT.svg

Every bundle is float32; perplexity is that of 40,000 tokens of each of two held-out texts, their geometric mean over
the dense model's. The picture is plain SVG, the same bytes for the same figures, and follows the reader's light or dark
scheme.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

from compression import compile_step
from decoder_quality import perplexity_of, write_seen
from measure import SHARED, machine_line

Curve = Mapping[str, float]
"""Share that goes, in percent -> perplexity over the dense model's."""

FAMILIES: Mapping[str, tuple[tuple[int, ...], Mapping[str, str]]] = {
    "zeros: share of each weight": (
        (30, 50, 60, 70),
        {
            "magnitude": "prune(ratio={gone}, method=magnitude)",
            "Wanda": "prune(ratio={gone}, method=wanda)",
            "SparseGPT": "prune(ratio={gone})",
        },
    ),
    "low rank: share of the parameters": (
        (10, 20, 30, 40),
        {
            "plain SVD": "factor(ratio={kept}, method=svd, allocation=uniform, joint=false)",
            "whitened, one ratio": "factor(ratio={kept}, allocation=uniform, joint=false)",
            "whitened, allocated": "factor(ratio={kept})",
        },
    ),
    "structure: share of heads and neurons": (
        (10, 20, 30),
        {
            "no repair": "prune-heads(ratio={gone}, repair=false); prune-neurons(ratio={gone}, repair=false)",
            "repaired": "prune-heads(ratio={gone}); prune-neurons(ratio={gone})",
        },
    ),
}
SIZE, LEFT, TOP, ACROSS, NAMES = 230, 60, 44, 430, 130
KINDS = ("first", "second", "third")
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #24292f } .head { font-weight: 600; font-size: 13px }
.note { fill: #57606a; font-size: 11px } .end { text-anchor: end } .middle { text-anchor: middle }
.grid { stroke: #d0d7de; stroke-width: 1 } polyline { fill: none; stroke-width: 2 }
.first { stroke: #afb8c1; fill: #afb8c1 } .second { stroke: #54aeff; fill: #54aeff }
.third { stroke: #1a7f37; fill: #1a7f37 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .note { fill: #9198a1 } .grid { stroke: #3d444d }
  .first { stroke: #656c76; fill: #656c76 } .second { stroke: #388bfd; fill: #388bfd }
  .third { stroke: #3fb950; fill: #3fb950 }
}
polyline.first, polyline.second, polyline.third { fill: none }
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one share of each method")
    parser.add_argument("--only", choices=[_short(family) for family in FAMILIES], help="one family of methods")
    parser.add_argument("--json", type=Path, help="write the figures here; what is there of other families stays")
    parser.add_argument("--draw", type=Path, nargs=2, metavar=("CURVES.json", "OUT.svg"), help="draw measured figures")
    options = parser.parse_args()
    if options.draw:
        source, target = options.draw
        figures = json.loads(source.read_text(encoding="utf-8"))
        target.write_text(draw(figures["curves"], figures["machine"]), encoding="utf-8")
        return 0
    model, data = SHARED / "models" / "pystories_lm", SHARED / "data" / "pystories"
    if not (model.exists() and data.exists()):
        print(f"pystories_lm is not at {model}: nothing is measured")
        return 0
    chosen = [family for family in FAMILIES if options.only in (None, _short(family))]
    figures = {"machine": machine_line(), "curves": measure(model, data, chosen, quick=options.quick)}
    if options.json:
        known = json.loads(options.json.read_text(encoding="utf-8"))["curves"] if options.json.exists() else {}
        figures["curves"] = known | figures["curves"]
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


def _short(family: str) -> str:
    return family.partition(":")[0]


def measure(model: Path, data: Path, families: Sequence[str], *, quick: bool) -> dict[str, dict[str, Curve]]:
    """Family -> method -> its curve."""
    texts = [data / "python.txt", data / "stories.txt"]
    with tempfile.TemporaryDirectory(prefix="hasten-benchmark-") as place:
        folder = Path(place)
        seen = write_seen(folder / "seen.txt", texts)

        def perplexities(step: str) -> list[float]:
            bundle = compile_step(model, folder / "bundle", step, seen, "--force")
            return [perplexity_of(bundle, path) for path in texts]

        dense = perplexities("")
        found: dict[str, dict[str, Curve]] = {}
        for family in families:
            shares, methods = FAMILIES[family]
            for name, step in methods.items():
                curve: dict[str, float] = {}
                for share in shares[1:2] if quick else shares:
                    gone = perplexities(step.format(gone=share / 100, kept=round(1 - share / 100, 2)))
                    curve[str(share)] = math.prod(one / whole for one, whole in zip(gone, dense, strict=True)) ** 0.5
                    print(f"{family}, {name}, {share} %: {curve[str(share)]:.4f}x", flush=True)
                found.setdefault(family, {})[name] = curve
    return found


def draw(families: Mapping[str, Mapping[str, Curve]], footer: str) -> str:
    """The picture: a panel for each family side by side, the rise on a logarithmic scale."""
    width, height = ACROSS * len(families), TOP + SIZE + 70
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        f"<style>{STYLE}</style>",
    ]
    for index, (family, methods) in enumerate(families.items()):
        lines += _panel(family, methods, index * ACROSS)
    lines += [f'<text class="note" x="8" y="{height - 10}">{escape(footer)}</text>', "</svg>"]
    return "\n".join(lines) + "\n"


def _panel(title: str, methods: Mapping[str, Curve], left: int) -> Iterator[str]:
    shares = sorted({int(share) for curve in methods.values() for share in curve})
    rises = [max(value - 1.0, 1e-4) for curve in methods.values() for value in curve.values()]
    low, high = math.floor(math.log10(min(rises))), math.ceil(math.log10(max(rises)))
    zero, end = left + LEFT, TOP + SIZE

    def place(share: float, rise: float) -> tuple[float, float]:
        x = zero + SIZE * (share - shares[0]) / max(1, shares[-1] - shares[0])
        return x, end - SIZE * (math.log10(max(rise, 1e-4)) - low) / max(1, high - low)

    yield f'<text class="head" x="{left + 8}" y="18">{escape(title)}</text>'
    yield f'<text class="note" x="{left + 8}" y="34">rise of the perplexity of pystories_lm, lower is better</text>'
    for power in range(low, high + 1):
        y = place(shares[0], 10.0**power)[1]
        yield f'<path class="grid" d="M{zero} {y:.1f}H{zero + SIZE}"/>'
        yield f'<text class="note end" x="{zero - 6}" y="{y + 4:.1f}">{100 * 10.0**power:g} %</text>'
    for share in shares:
        yield f'<text class="note middle" x="{place(share, 1.0)[0]:.1f}" y="{end + 18}">{share} %</text>'
    kinds = KINDS[-len(methods) :]
    ends = _apart([place(shares[-1], curve[max(curve, key=int)] - 1.0)[1] for curve in methods.values()])
    for kind, (name, curve), height in zip(kinds, methods.items(), ends, strict=True):
        points = [place(int(share), value - 1.0) for share, value in curve.items()]
        yield f'<polyline class="{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'
        yield from (f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points)
        yield f'<text x="{zero + SIZE + 10}" y="{height + 4:.1f}">{escape(name)}</text>'


def _apart(heights: Sequence[float]) -> list[float]:
    """The heights of names, moved until no two of them overlap."""
    placed = dict.fromkeys(range(len(heights)), 0.0)
    last = -math.inf
    for index in sorted(placed, key=lambda index: heights[index]):
        last = placed[index] = max(heights[index], last + 15.0)
    return list(placed.values())


if __name__ == "__main__":
    sys.exit(main())
