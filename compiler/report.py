"""The report of a compile as one HTML page: what was done, what was tried and reverted, what was proven."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from math import inf

from artifacts.manifest import Manifest
from artifacts.proof import Machine, Speed, VariantProof

from .tasks import GENERATION

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1c2330; }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse; width: 100%; margin: .6rem 0 1.2rem; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .3rem .7rem; border-bottom: 1px solid #dde2ea; vertical-align: top }
th { font-weight: 600; color: #566174; font-size: .85rem } td.n, th.n { text-align: right; white-space: nowrap }
tr.off td { color: #8a93a3 } .bar { background: #2f6fde; height: .7rem; border-radius: 2px; display: inline-block }
.note { color: #566174 } code { background: #f1f4f8; padding: .1rem .3rem; border-radius: 3px; font-size: .9em }
"""


def render(manifest: Manifest, proofs: Sequence[VariantProof], digest: str = "") -> str:
    """The page.

    Args:
        manifest: What the bundle is.
        proofs: What was measured, for each variant.
        digest: The bundle's digest, where it is known.
    """
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        f"<title>{escape(manifest.name)}: hasten report</title><style>{_STYLE}</style>",
        f"<h1>{escape(manifest.name)}</h1>",
        f"<p class=note>{escape(manifest.task)} · {escape(manifest.source.architecture)} · source "
        f"<code>{escape(manifest.source.digest[:19])}</code>"
        + (f" · bundle <code>{escape(digest[:19])}</code></p>" if digest else "</p>"),
    ]
    for proof in proofs:
        parts += _variant(proof, decoder=manifest.task == GENERATION)
    parts.append(f"<p class=note>{escape(' · '.join(f'{name} {version}' for name, version in manifest.toolchain))}</p>")
    return "".join(parts)


def _variant(proof: VariantProof, *, decoder: bool) -> Iterable[str]:
    yield f"<h2>{escape(proof.variant)}: {escape(proof.status)}</h2>"
    notes = (_bytes(proof.size), proof.reason, _machine(proof.machine))
    yield f"<p class=note>{escape(' · '.join(note for note in notes if note))}</p>"
    if proof.fidelity:
        rows = [
            (
                f.metric,
                f"{f.value:.4f}",
                f"{f.reference:.4f}",
                f"{f.drop:.4f}",
                f"{f.budget:.4f}",
                str(f.samples),
                f.data,
            )
            for f in proof.fidelity
        ]
        yield _table(("quality", "here", "reference", "drop", "allowed", "samples", "data"), rows)
    if proof.speed:
        top = max(speed.ratio for speed in proof.speed)
        yield "<table><tr><th>batch × length<th class=n>reference<th class=n>here<th class=n>faster<th>"
        for s in proof.speed:
            width = f"{12 * s.ratio / top if 0.0 < top < inf else 0.0:.1f}rem"
            yield (
                f"<tr><td>{_shape(s, decoder=decoder)}<td class=n>{s.reference_ms:.2f} ms<td class=n>{s.ms:.2f} ms"
                f"<td class=n>{s.ratio:.2f}×<td><span class=bar style='width:{width}'></span>"
            )
        yield "</table>"
    heads = ("changed", "refused", "size", "faster", "error")
    yield "<table><tr><th>step" + "".join(f"<th class=n>{head}" for head in heads) + "<th>"
    for step in proof.steps:
        ratio = f"{step.ratio:.2f}×" if step.ms else ""
        yield (
            f"<tr{'' if step.kept else ' class=off'}><td>{escape(step.name)}<td class=n>{step.changed}"
            f"<td class=n>{step.refused}<td class=n>{_bytes(step.size)}<td class=n>{ratio}"
            f"<td class=n>{step.error:.1e}<td>{'kept' if step.kept else 'not kept'}: {escape(step.reason)}"
        )
    yield "</table>"


def _shape(speed: Speed, *, decoder: bool) -> str:
    kind = "" if not decoder else " (decode step)" if speed.length == 1 else " (prompt)"
    return f"{speed.batch} × {speed.length}{kind}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}" for cell in row) for row in rows)
    return "<table><tr>" + "".join(f"<th>{escape(cell)}" for cell in head) + body + "</table>"


def _machine(machine: Machine | None) -> str:
    if machine is None:
        return ""
    return f"measured on {machine.cpu}, {machine.cores} cores, onnxruntime {machine.onnxruntime}"


def _bytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
