"""The whole pipeline on a tiny BERT and a tiny Llama: torch to bundle to vectors and texts, in seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from judging import brief, faster
from tiny_decoders import write_decoder

import hasten
from artifacts.bundle import Bundle
from artifacts.errors import UnsupportedError, UsageError
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


PROMPTS = ["the cat", "a", "Where does the river begin?"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_decoder(tmp_path_factory.mktemp("llama") / "tiny", hidden_size=64, head_dim=16, vocab_size=512)


@pytest.fixture(scope="module")
def decoder(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """In int8, and the unoptimized graph beside it."""
    with brief():
        return compile_model(
            llama, tmp_path_factory.mktemp("decoder") / "out", recipe="int8", keep_reference=True, max_drop=0.05
        )


def greedy(folder: Path, prompt: list[int], count: int, eos: tuple[int, ...]) -> list[int]:
    """What torch writes."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = list(prompt)
    while len(ids) < len(prompt) + count and (len(ids) == len(prompt) or ids[-1] not in eos):
        with torch.inference_mode():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_a_decoder_writes_what_torch_writes(decoder: Bundle, llama: Path) -> None:
    with hasten.load(decoder.path, variant="reference") as model:
        batched = [list(text.tokens) for text in model.generate(PROMPTS, max_new_tokens=12, sample=False)]
        prompts = [list(model.encoder.encode(prompt)) for prompt in PROMPTS]
        eos = model.generation.eos
    for prompt, found in zip(prompts, batched, strict=True):
        wanted = greedy(llama, prompt, 12, eos)
        assert found == wanted[: len(found)]
        assert set(wanted[len(found) :]) <= set(eos), "the end token is no part of the text"


def test_a_decoder_in_int8_is_small_and_keeps_its_perplexity(decoder: Bundle) -> None:
    int8, reference = decoder.manifest.variants
    assert (int8.id, int8.precision, reference.id) == ("cpu-int8", "int8", "reference")
    assert "weight-only(bits=8)" in int8.pipeline
    assert decoder.size("cpu-int8") < 0.6 * decoder.size("reference")
    proof = decoder.proof.variants[0]
    perplexity, agreement = proof.fidelity
    assert (perplexity.metric, agreement.metric) == ("perplexity", "agreement")
    assert abs(perplexity.drop) <= perplexity.budget == 0.05
    assert perplexity.samples > 200
    assert agreement.value > 0.8
    assert 0.0 < proof.golden_error <= int8.tolerance < 0.2
    assert [(speed.batch, speed.length) for speed in proof.speed] == [(1, 1), (8, 1), (1, 64)]
    with hasten.load(decoder.path, variant="cpu-int8") as model:
        text = model.generate("the cat", max_new_tokens=8, sample=False)
        assert 0 < len(text.tokens) <= 8
        assert model.perplexity("the river is long").value < 1e6


@pytest.mark.slow
def test_a_plan_repeats_the_compile_of_a_decoder_byte_for_byte(decoder: Bundle, llama: Path, tmp_path: Path) -> None:
    with brief():
        again = compile_model(llama, tmp_path / "again", plan=decoder.path, max_drop=0.05)
    assert again.digest == decoder.digest


@pytest.mark.parametrize("target", ["openvino", "tensorrt"])
def test_targets_that_have_no_operator_for_decoders(llama: Path, tmp_path: Path, target: str) -> None:
    with pytest.raises(UnsupportedError, match=f"target {target} does not run decoders: .* Compile for cpu or cuda"):
        compile_model(llama, tmp_path / "out", targets=(target,), unproven=True)
    assert not (tmp_path / "out").exists()


def test_a_recipe_for_decoders_is_none_for_encoders(sentence_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the recipe int4 is not for feature-extraction"):
        compile_model(sentence_folder, tmp_path / "out", recipe="int4")
