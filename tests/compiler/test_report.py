from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser

import pytest

from artifacts.bundle import Bundle
from artifacts.proof import Fidelity, Machine, Speed, Step
from compiler.report import render

_OPEN = {"html", "meta", "tr", "td", "th"}
"""Elements whose end may be left out (or that have none)."""
_KNOWN = {"title", "style", "h1", "h2", "p", "code", "table", "span", *_OPEN}


class Strict(HTMLParser):
    """Collects the text; every other element must be closed where it was opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.cells: list[str] = []
        self.text = ""
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in _KNOWN, tag
        self.attributes += attrs
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in _OPEN:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] == "table":
            self.rows[-1][-1] += data


def parsed(page: str) -> Strict:
    reader = Strict()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    assert {name for name, _ in reader.attributes} <= {"lang", "charset", "class", "style"}
    return reader


def test_it_tells_every_step_and_every_figure(encoder_bundle: Bundle) -> None:
    page = render(encoder_bundle.manifest, encoder_bundle.proof.variants)
    reader = parsed(page)
    told = [row[0] for row in reader.rows]
    for proof in encoder_bundle.proof.variants:
        assert f"{proof.variant}: {proof.status}" in reader.text
        assert f"{proof.size / 1e6:.1f} MB" in reader.text
        for step in proof.steps:
            row = next(row for row in reader.rows if row[0] == step.name and row[-1].endswith(step.reason))
            assert row[1:3] == [str(step.changed), str(step.refused)]
            assert row[-1].startswith("kept: " if step.kept else "not kept: ")
        for figure in proof.fidelity:
            assert figure.metric in told
        for speed in proof.speed:
            assert f"{speed.batch} × {speed.length}" in told
    assert (encoder_bundle.path / "report.html").read_text() == page


def test_the_digest_is_told_where_it_is_known(encoder_bundle: Bundle) -> None:
    page = render(encoder_bundle.manifest, encoder_bundle.proof.variants, encoder_bundle.digest)
    assert f"bundle {encoder_bundle.digest[:19]}" in parsed(page).text


def test_no_text_becomes_markup(encoder_bundle: Bundle) -> None:
    evil = "<script>alert('x')</script>\"'><img src=x onerror=alert(1)>&amp;</table>"
    proof = encoder_bundle.proof.variants[0]
    machine = Machine(evil, 2, 1.0, evil, evil, evil, (evil,))
    step = Step(evil, 1, 0, kept=True, reason=evil, size=1, ms=1.0, ratio=1.0, error=float("inf"))
    hurt = replace(
        proof,
        machine=machine,
        steps=(step,),
        fidelity=(Fidelity(evil, 1.0, 1.0, 0.0, 0.1, 3, evil),),
        speed=(Speed(1, 2, 1.0, 1.0, 1.0, 1.0, 1.0),),
        reason=evil,
    )
    source = replace(encoder_bundle.manifest.source, architecture=evil)
    manifest = replace(encoder_bundle.manifest, name=evil, source=source, toolchain=((evil, evil),))
    reader = parsed(render(manifest, (hurt,)))
    assert reader.text.count("<script>") >= 8
    assert "<img" not in render(manifest, (hurt,))


@pytest.mark.parametrize("ratio", [0.0, float("inf"), float("nan")])
def test_odd_figures_make_a_page_too(encoder_bundle: Bundle, ratio: float) -> None:
    proof = encoder_bundle.proof.variants[0]
    speed = Speed(1, 2, 1.0, 1.0, ratio, ratio, ratio)
    parsed(render(encoder_bundle.manifest, (replace(proof, speed=(speed,)),)))
    parsed(render(encoder_bundle.manifest, ()))


def test_the_shapes_of_a_decoder_are_told_apart(encoder_bundle: Bundle) -> None:
    speeds = tuple(Speed(batch, length, 2.0, 1.0, 2.0, 1.9, 2.1) for batch, length in ((8, 1), (1, 128)))
    proofs = [replace(encoder_bundle.proof.variants[0], speed=speeds)]
    decoder = replace(encoder_bundle.manifest, task="text-generation")
    told = [row[0] for row in parsed(render(decoder, proofs)).rows if row]
    assert {"8 × 1 (decode step)", "1 × 128 (prompt)"} <= set(told)
    assert {"8 × 1", "1 × 128"} <= {row[0] for row in parsed(render(encoder_bundle.manifest, proofs)).rows if row}
