"""The whole pipeline on a tiny BERT: torch to bundle to vectors, in seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from judging import brief, faster

import hasten
from artifacts.bundle import Bundle
from compiler.compile import compile_model
from compiler.export import export_model
from compiler.source import read_source
from compiler.tolerance import rounding_tolerance
from runtimes.text import TextEncoder, pad

TEXTS = ["the cat is playing in the park", "", "a terrible film . who was in the film ?", "music", "🙂🙃", "cat " * 300]


def by_torch(folder: Path, bundle: Bundle, texts: list[str]) -> tuple[np.ndarray, float]:
    """The original model's vectors, and how far another order of the same sums may be from them."""
    exported = export_model(read_source(str(folder)))
    processor = bundle.manifest.processor
    assert processor is not None
    assert exported.reference is not None
    names = [spec.name for spec in bundle.manifest.inputs]
    tokens = TextEncoder(processor, bundle.path / processor.tokenizer, names).encode(texts)
    outputs = exported.reference(pad(tokens, names, processor))
    return np.asarray(outputs["sentence_embedding"]), rounding_tolerance(exported.model)


def relative(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    return np.linalg.norm(found - wanted, axis=1) / np.linalg.norm(wanted, axis=1)


@pytest.fixture(scope="module")
def safe(sentence_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Really measured, but so briefly that the verdicts are noise: any of them must be right."""
    with brief():
        return compile_model(sentence_folder, tmp_path_factory.mktemp("safe") / "out", recipe="safe")


@pytest.fixture(scope="module")
def original(sentence_folder: Path, safe: Bundle) -> tuple[np.ndarray, float]:
    return by_torch(sentence_folder, safe, TEXTS)


def test_safe_gives_what_torch_gives(safe: Bundle, original: tuple[np.ndarray, float]) -> None:
    vectors, tolerance = original
    (variant,) = safe.manifest.variants
    assert (variant.id, variant.precision) == ("cpu-fp32", "fp32")
    assert variant.tolerance == pytest.approx(tolerance)
    with hasten.load(safe.path) as model:
        found = model.embed(TEXTS)
        alone = np.stack([model.embed([text])[0] for text in TEXTS])
    assert found.dtype == np.float32
    assert found.shape == (len(TEXTS), 32)
    assert (relative(found, vectors) <= tolerance).all()
    assert (relative(alone, vectors) <= tolerance).all(), "padding changes nothing"
    shuffled = relative(np.roll(found, 1, axis=0), vectors)
    assert (shuffled > 100 * tolerance).all(), "the tolerance tells texts apart"


def test_int8_stays_within_its_budget(tiny_bundle: Bundle, original: tuple[np.ndarray, float]) -> None:
    vectors, _ = original
    (variant,) = tiny_bundle.manifest.variants
    assert (variant.id, variant.precision) == ("cpu-int8", "int8")
    with hasten.load(tiny_bundle.path) as model:
        found = model.embed(TEXTS)
        assert "cpu-int8" in model.explain()
    cosine = (found * vectors).sum(axis=1) / np.linalg.norm(found, axis=1) / np.linalg.norm(vectors, axis=1)
    assert cosine.mean() >= 0.99
    assert (cosine < 1.0).any(), "it was quantized"
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-5)
    (proof,) = tiny_bundle.proof.variants
    assert proof.fidelity[0].drop <= proof.fidelity[0].budget == 0.01
    assert proof.golden_error <= variant.tolerance < 0.1


def test_a_plan_repeats_a_compile_from_torch_byte_for_byte(
    tiny_bundle: Bundle, sentence_folder: Path, tmp_path: Path
) -> None:
    with faster(0.5, proof=0.9):
        again = compile_model(sentence_folder, tmp_path / "again", plan=tiny_bundle.path)
    assert again.digest == tiny_bundle.digest
    for entry in tiny_bundle.manifest.files:
        assert (again.path / entry.path).read_bytes() == (tiny_bundle.path / entry.path).read_bytes(), entry.path
