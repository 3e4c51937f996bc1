"""What only a machine with a CUDA device can show: pytest -m gpu."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_models import write_model

import hasten
from artifacts.target import CUDA_PROVIDER

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    from runtimes.providers import probe

    found = probe(CUDA_PROVIDER)
    if not found.ok:
        pytest.skip(found.reason)
    folder = tmp_path_factory.mktemp("gpu")
    return hasten.compile_model(write_model(folder / "tiny"), folder / "out", targets=("cuda",), max_drop=0.02)


def test_a_cuda_variant_is_proven_in_float16(bundle):
    variant = next(variant for variant in bundle.manifest.variants if variant.target == "cuda")
    proof = bundle.proof.variant(variant.id)
    assert variant.precision == "fp16"
    assert proof is not None
    assert (proof.status, proof.provider) == ("proven", CUDA_PROVIDER)
    assert proof.speed


def test_cuda_and_cpu_agree(bundle):
    texts = ["a man is playing guitar", "the cat", ""]
    with hasten.load(bundle.path, device="cuda", cache=False) as gpu, hasten.load(bundle.path, provider="cpu") as cpu:
        here, there = gpu.embed(texts), cpu.embed(texts)
    cosines = np.sum(here * there, axis=1) / np.linalg.norm(here, axis=1) / np.linalg.norm(there, axis=1)
    assert cosines.min() > 0.98
