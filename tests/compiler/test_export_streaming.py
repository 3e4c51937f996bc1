"""Large checkpoints: the weights stay in their files, and the graph and torch's answers are what they are otherwise."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_decoders import ARCHITECTURES, write_decoder

from artifacts.errors import SourceError
from compiler.export import Exported, decoder, export_model, streaming
from compiler.export.streaming import StreamedModel, stream_model
from compiler.source import ModelSource, read_source
from compiler.stored_weights import StoredWeights, WeightTensor
from passes.sites import linear_sites

DEPTH = 8
DEEP = {"num_hidden_layers": DEPTH}
WIDE = {**DEEP, "hidden_size": 160, "intermediate_size": 192}
"""Matrices of more than 64 KB: smaller ones are held in memory."""


@pytest.fixture(autouse=True)
def _all_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "LARGE", 0)


def bfloat(folder: Path) -> Path:
    """The checkpoint of a folder in bfloat16."""
    path = folder / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    return folder


def streamed(source: ModelSource) -> StreamedModel | None:
    config = transformers.AutoConfig.from_pretrained(source.path)
    return stream_model(source, config)


def both(source: ModelSource, monkeypatch: pytest.MonkeyPatch) -> tuple[Exported, Exported]:
    """Loaded, and streamed."""
    calls: list[object] = []
    load = decoder.load_original
    monkeypatch.setattr(decoder, "load_original", lambda source: calls.append(source) or load(source))
    one = export_model(source)
    assert not calls, "it was loaded"
    monkeypatch.setattr(streaming, "LARGE", 1 << 40)
    other = export_model(source)
    assert calls
    return other, one


def feeds() -> dict[str, np.ndarray]:
    ids = np.random.default_rng(0).integers(0, 300, (2, 9))
    return {
        "input_ids": ids,
        "position_ids": np.tile(np.arange(9), (2, 1)),
        "seqlens_k": np.array([8, 4], np.int32),
        "total_sequence_length": np.array(9, np.int32),
        "logits_index": np.array([[0, 8], [2, 4]]),
    }


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Llama tied", WIDE),
        pytest.param("Qwen2", {**WIDE, "tie_word_embeddings": True}, marks=pytest.mark.slow),
        pytest.param("Gemma", WIDE, marks=pytest.mark.slow),
    ],
)
def test_the_same_graph_and_the_same_answers(
    name: str, options: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = read_source(str(bfloat(write_decoder(tmp_path / "model", name, **options))))
    whole, lazy = both(source, monkeypatch)
    assert (lazy.inputs, lazy.outputs, lazy.attentions_emitted) == (whole.inputs, whole.outputs, DEPTH)
    assert lazy.error <= 4 * whole.error
    assert sorted(lazy.model.graph.initializers) == sorted(whole.model.graph.initializers)
    for key, value in whole.model.graph.initializers.items():
        one, other = value.const_value, lazy.model.graph.initializers[key].const_value
        assert one is not None
        assert other is not None
        assert np.array_equal(one.numpy(), other.numpy()), key
        assert isinstance(other, WeightTensor) or other.nbytes <= 64 << 10
    assert any(isinstance(site.weight.const_value, WeightTensor) for site in linear_sites(lazy.model))
    answers = [exported.reference(feeds())["logits"] for exported in (whole, lazy) if exported.reference is not None]
    assert np.array_equal(*answers)
    assert np.array_equal(answers[1], lazy.reference(feeds())["logits"])  # type: ignore[misc]  # told above


def test_the_weights_are_gone_when_the_answer_is_there(tmp_path: Path) -> None:
    model = streamed(read_source(str(write_decoder(tmp_path / "model", "Llama tied", **DEEP))))
    assert model is not None
    most = 0

    def count(*_: object) -> None:
        nonlocal most
        most = max(most, sum(not parameter.is_meta for parameter in model.model.parameters()))

    for module in model.model.modules():
        module.register_forward_hook(count)
    model.reference(feeds())
    assert 0 < most <= 2
    assert all(parameter.is_meta for parameter in model.model.parameters())
    with pytest.raises(IndexError):
        model.reference({**feeds(), "input_ids": np.full((2, 9), 10**6)})
    assert all(parameter.is_meta for parameter in model.model.parameters())


def test_nothing_of_the_traced_weights_stays_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[weakref.ref[np.ndarray]] = []
    floats = StoredWeights.floats

    def remember(weights: StoredWeights, name: str) -> np.ndarray:
        array = floats(weights, name)
        read.append(weakref.ref(array))
        return array

    monkeypatch.setattr(StoredWeights, "floats", remember)
    exported = export_model(read_source(str(write_decoder(tmp_path / "model", "Llama tied", **WIDE))))
    gc.collect()
    held = [array.shape for one in read if (array := one()) is not None and array.nbytes > 64 << 10]
    assert read
    assert not held
    assert exported.error > 0.0


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_is_streamed_answers_as_what_is_loaded(name: str, tmp_path: Path) -> None:
    source = read_source(str(write_decoder(tmp_path / "model", name)))
    found = streamed(source)
    if found is None:
        pytest.skip("its checkpoint is not its parameters one for one")
    loaded = streaming.TorchDecoder(decoder.load_original(source))
    assert np.array_equal(found.reference(feeds())["logits"], loaded(feeds())["logits"])


def test_what_transformers_renames_is_left_to_it(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "model", "GPT-2")
    assert streamed(read_source(str(folder))) is not None
    path = folder / "model.safetensors"
    without = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    save_file(without, path, metadata={"format": "pt"})
    assert streamed(read_source(str(folder))) is None


def test_layers_that_differ_by_their_number_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their copies differ from torch, which the check of the first layers sees."""
    folder = write_decoder(tmp_path / "model", "GPT-2 by layer", n_layer=DEPTH, num_hidden_layers=DEPTH)
    source = read_source(str(folder))
    assert streamed(source) is not None
    calls = []
    load = decoder.load_original
    monkeypatch.setattr(decoder, "load_original", lambda source: calls.append(source) or load(source))
    assert export_model(source).attentions_emitted == DEPTH
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), r"lack model\.norm\.weight"),
        (lambda tensors: tensors.update(other=torch.zeros(3)), "hold the unknown tensor other"),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.zeros(3)}),
            r"model\.norm\.weight is \[3\] where config\.json makes it \[32\]",
        ),
    ],
)
def test_the_same_errors(change: object, text: str, tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "model", "Llama", **DEEP)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)  # type: ignore[operator]  # a lambda of above
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(SourceError, match=text):
        export_model(read_source(str(folder)))


def test_a_truncated_shard(tmp_path: Path) -> None:
    folder = write_decoder(tmp_path / "model", "Llama", **DEEP)
    source = read_source(str(folder))
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(SourceError, match="truncated"):
        export_model(source)


def test_a_graph_keeps_its_promise_to_the_checkpoint(tmp_path: Path) -> None:
    """Every large weight of the graph names the tensor of its own layer."""
    exported = export_model(read_source(str(write_decoder(tmp_path / "model", "Llama tied", **WIDE))))
    values: list[ir.Value] = list(exported.model.graph.initializers.values())
    for value in values:
        if isinstance(value.const_value, WeightTensor) and "lm_head" not in str(value.name):
            assert value.const_value.weight == value.name
