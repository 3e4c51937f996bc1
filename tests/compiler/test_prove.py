from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from judging import brief

from artifacts.bundle import Bundle, BundleWriter, open_bundle
from artifacts.manifest import Variant
from artifacts.proof import Proof
from artifacts.target import CUDA_PROVIDER
from compiler.prove import prove_bundle
from runtimes.providers import Probe


def altered(bundle: Bundle, out: Path, graph: bytes | None = None, **changes: object) -> Bundle:
    """A copy of the bundle whose int8 variant is unproven and other than it was."""
    variants = tuple(
        replace(variant, **changes) if variant.id == "cpu-int8" else variant for variant in bundle.manifest.variants
    )
    proofs = tuple(
        replace(proof, status="unproven", provider="", machine=None, speed=()) if proof.variant == "cpu-int8" else proof
        for proof in bundle.proof.variants
    )
    with BundleWriter(out) as writer:
        for entry in (*bundle.manifest.files, *bundle.proof.files):
            (writer.staging / entry.path).parent.mkdir(parents=True, exist_ok=True)
            writer.add_file(entry.path, bundle.path / entry.path)
        if graph is not None:
            writer.add_bytes("cpu-int8.onnx", graph)
        return writer.commit(replace(bundle.manifest, variants=variants), Proof("", proofs, ()), ("report.html",))


def test_proven_variants_stay_and_absent_targets_say_why(
    encoder_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compiler.prove.probe", lambda provider: Probe(provider, False, "no such device", ()))
    before = encoder_bundle.proof.variants
    int8, cuda, reference = prove_bundle(encoder_bundle, 0)
    assert (int8, reference) == (before[0], before[2])
    unproven = replace(before[1], status="unproven")
    if before[1].status == "unproven":
        assert cuda == replace(unproven, reason=f"{CUDA_PROVIDER} does not work here: no such device")


def test_a_variant_over_its_tolerance_is_refused(encoder_bundle: Bundle, tmp_path: Path) -> None:
    bundle = altered(encoder_bundle, tmp_path / "bundle", tolerance=1e-9)
    proof = prove_bundle(bundle, 0)[0]
    assert (proof.status, proof.provider) == ("refused", "CPUExecutionProvider")
    assert proof.golden_error == pytest.approx(encoder_bundle.proof.variants[0].golden_error, rel=0.2)
    assert proof.reason == f"golden error {proof.golden_error:.1e}, allowed 1.0e-09"
    assert proof.machine is not None
    proven = bundle.with_proof(Proof("", (proof, *bundle.proof.variants[1:]), ()), {"report.html": b"<p>"})
    assert open_bundle(proven.path).proof.variants[0].status == "refused"


def test_a_variant_that_holds_is_proven_with_its_speed(encoder_bundle: Bundle, tmp_path: Path) -> None:
    bundle = altered(encoder_bundle, tmp_path / "bundle")
    assert bundle.digest == encoder_bundle.digest, "only the evidence differs"
    with brief():
        proof = prove_bundle(bundle, 0)[0]
    assert proof.status == "proven"
    assert 0.0 < proof.golden_error <= bundle.variant("cpu-int8").tolerance
    assert proof.steps == bundle.proof.variants[0].steps
    (speed,) = proof.speed
    assert (speed.batch, speed.ms > 0.0, speed.reference_ms > 0.0) == (16, True, True)
    assert math.isfinite(speed.ratio)


def test_a_graph_that_does_not_load_is_refused(encoder_bundle: Bundle, tmp_path: Path) -> None:
    bundle = altered(encoder_bundle, tmp_path / "bundle", graph=b"not a graph")
    proof = prove_bundle(bundle, 0)[0]
    assert proof.status == "refused"
    assert proof.reason


def test_a_variant_without_evidence_is_unproven(encoder_bundle: Bundle, tmp_path: Path) -> None:
    bundle = altered(encoder_bundle, tmp_path / "bundle")
    bare = replace(bundle, proof=replace(bundle.proof, variants=()))
    with brief():
        proofs = prove_bundle(bare, 0)
    assert [proof.variant for proof in proofs] == [variant.id for variant in bundle.manifest.variants]
    assert proofs[0].status == "proven"
    assert proofs[0].size == bundle.size("cpu-int8")
    assert isinstance(bundle.manifest.variants[0], Variant)
