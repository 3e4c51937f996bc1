"""The encoder shapes of the field, from torch to int8 on both execution providers that run on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from judging import faster
from tiny_models import write_model

from artifacts.bundle import open_bundle
from artifacts.target import OPENVINO_PROVIDER
from compiler.compile import compile_model
from passes.pipeline import parse
from runtimes.client import Worker
from runtimes.golden import golden_error, load_golden
from runtimes.providers import probe

pytestmark = pytest.mark.slow
ARCHITECTURES = ("Bert", "Roberta", "DistilBert", "MPNet", "ModernBert", "DebertaV2")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_compiles_to_int8_and_keeps_its_quality(architecture: str, tmp_path: Path) -> None:
    """Random weights forgive less than trained ones: 5 % here, where a trained model keeps 1 %."""
    source = write_model(tmp_path / "model", architecture)
    here = probe(OPENVINO_PROVIDER).ok
    targets = ("cpu", "openvino") if here else ("cpu",)
    with faster():
        compile_model(source, tmp_path / "out", targets=targets, max_drop=0.05)
    bundle = open_bundle(tmp_path / "out")
    golden = load_golden(bundle)
    assert [variant.target for variant in bundle.manifest.variants] == list(targets)
    for variant in bundle.manifest.variants:
        assert variant.precision == "int8"
        assert any("int8" in item.name for item in parse(variant.pipeline).passes)
        proof = bundle.proof.variant(variant.id)
        assert proof is not None
        assert next(row for row in proof.fidelity if row.metric == "cosine_mean").value >= 0.95
        with Worker(bundle.path / variant.model, variant.providers[0], options=variant.session) as worker:
            assert golden_error(worker, golden) <= variant.tolerance
