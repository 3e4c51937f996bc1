"""Language models: one graph for prefill and decode, held against torch row by row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers
from numpy.typing import NDArray
from shared_data import SHARED
from tiny_decoders import ARCHITECTURES, CONTEXT, VOCABULARY, Decoder, write_decoder

from artifacts.errors import UnsupportedError
from artifacts.manifest import TensorSpec
from artifacts.signature import decoder_problem
from compiler.export import Exported, export_model
from compiler.export.causal_attention import Layer
from compiler.export.decoder_check import check_decoder
from compiler.source import read_source
from compiler.tolerance import rounding_tolerance
from passes.fusion.fuse_rotary import CONTEXT_LENGTH
from passes.sites import embedding_sites, linear_sites

QUICK = ("Gemma 2", "GPT-2")
STEPS = 8
PROMPTS = [[5, 9, 200, 31, 77, 12, 250, 8, 41], [17, 3, 88, 104], [60]]


def export(folder: Path, name: str, **overrides: object) -> Exported:
    return export_model(read_source(str(write_decoder(folder / "model", name, **overrides))))


def torch_model(folder: Path) -> transformers.PreTrainedModel:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def greedy(decoder: Decoder, prompts: list[list[int]], steps: int) -> tuple[list[list[int]], NDArray[np.float32]]:
    """Prompts with what follows, and the logits of each step ``[rows, steps, vocabulary]``."""
    rows = [list(prompt) for prompt in prompts]
    logits = decoder.prefill(prompts, [[len(prompt) - 1] for prompt in prompts])[:, 0]
    seen = [logits]
    while True:
        tokens = logits.argmax(-1)
        for row, token in zip(rows, tokens, strict=True):
            row.append(int(token))
        if len(seen) == steps:
            return rows, np.stack(seen, axis=1)
        logits = decoder.decode(tokens)
        seen.append(logits)


def assert_generates_as_torch(exported: Exported, folder: Path, prompts: list[list[int]], steps: int) -> None:
    """Each row alone, without padding or a cache, gives torch's logits and the same greedy tokens."""
    decoder = Decoder(exported, folder, len(prompts), CONTEXT)
    rows, logits = greedy(decoder, prompts, steps)
    model = torch_model(folder / "model")
    for prompt, row, got in zip(prompts, rows, logits, strict=True):
        with torch.inference_mode():
            whole = model(torch.tensor([row]), use_cache=False).logits[0].numpy()
        wanted = whole[len(prompt) - 1 : -1]
        assert row[len(prompt) :] == wanted.argmax(-1).tolist()
        assert np.linalg.norm(got - wanted) / np.linalg.norm(wanted) <= rounding_tolerance(exported.model)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Exported, Path]:
    folder = tmp_path_factory.mktemp("llama")
    return export(folder, "Llama tied"), folder


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in ARCHITECTURES]
)
def test_architectures(tmp_path: Path, name: str) -> None:
    exported = export(tmp_path, name)
    assert exported.attentions_emitted == exported.attentions_expected == 2
    assert decoder_problem(exported.inputs, exported.outputs) is None
    assert_generates_as_torch(exported, tmp_path, PROMPTS, STEPS)


def test_signature(llama: tuple[Exported, Path]) -> None:
    exported, _ = llama
    tokens, cache = ("batch", "sequence"), ("batch", 2, "capacity", 8)
    assert exported.inputs == (
        TensorSpec("input_ids", "int64", tokens),
        TensorSpec("position_ids", "int64", tokens),
        TensorSpec("seqlens_k", "int32", ("batch",)),
        TensorSpec("total_sequence_length", "int32", ()),
        TensorSpec("logits_index", "int64", ("batch", "positions")),
        TensorSpec("past_key_values.0.key", "float32", cache),
        TensorSpec("past_key_values.0.value", "float32", cache),
        TensorSpec("past_key_values.1.key", "float32", cache),
        TensorSpec("past_key_values.1.value", "float32", cache),
    )
    assert exported.outputs[0] == TensorSpec("logits", "float32", ("batch", "positions", VOCABULARY))
    assert exported.model.opset_imports[""] == 21
    assert exported.model.ir_version == 10
    assert exported.model.metadata_props[CONTEXT_LENGTH] == str(CONTEXT)


def test_any_batch_generates_as_torch(llama: tuple[Exported, Path]) -> None:
    exported, folder = llama
    assert_generates_as_torch(exported, folder, PROMPTS, STEPS)
    assert_generates_as_torch(exported, folder, [[7]], 3)


def test_weights_have_their_names_and_products_their_paths(llama: tuple[Exported, Path]) -> None:
    exported, folder = llama
    paths = [site.path for site in linear_sites(exported.model)]
    names = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
    projections = [f"{name}_proj" for name in names]
    assert paths == [f"model.layers.{layer}.{name}" for layer in range(2) for name in projections] + ["lm_head"]
    wanted = torch_model(folder / "model").state_dict()
    for name, tensor in wanted.items():
        stored = exported.model.graph.initializers[name].const_value
        assert stored is not None
        values = stored.numpy()
        assert any(np.array_equal(form, tensor.numpy()) for form in (values, values.T))


def test_a_tied_head_shares_the_memory_of_the_embedding(llama: tuple[Exported, Path]) -> None:
    exported, _ = llama
    (embedding,) = embedding_sites(exported.model)
    head = linear_sites(exported.model)[-1]
    assert (embedding.table.name, head.weight.name) == ("model.embed_tokens.weight", "lm_head.weight")
    table, weight = embedding.table.const_value, head.weight.const_value
    assert table is not None
    assert weight is not None
    assert np.shares_memory(table.numpy(), weight.numpy())
    assert [node.op_type for node in embedding.table.consumers()] == ["Gather"]


def test_logits_of_the_positions_asked_for(llama: tuple[Exported, Path]) -> None:
    exported, folder = llama
    decoder = Decoder(exported, folder, 2, CONTEXT)
    everything = decoder.prefill(PROMPTS[:2], np.tile(np.arange(9), (2, 1)))
    some = decoder.prefill(PROMPTS[:2], [[8, 0], [3, 3]])
    wanted = np.stack([everything[0, [8, 0]], everything[1, [3, 3]]])
    assert np.linalg.norm(some - wanted) / np.linalg.norm(wanted) <= rounding_tolerance(exported.model)


def test_the_reference_is_torch_on_the_feeds_of_a_prefill(llama: tuple[Exported, Path]) -> None:
    exported, folder = llama
    assert exported.reference is not None
    feeds = {
        "input_ids": np.array([PROMPTS[0], PROMPTS[1] + [0] * 5]),
        "position_ids": np.tile(np.arange(9), (2, 1)),
        "seqlens_k": np.array([8, 3], np.int32),
        "total_sequence_length": np.array(9, np.int32),
        "logits_index": np.array([[8], [3]]),
    }
    outputs = exported.reference(feeds)
    assert list(outputs) == ["logits"]
    model = torch_model(folder / "model")
    for row, prompt in enumerate(PROMPTS[:2]):
        with torch.inference_mode():
            alone = model(torch.tensor([prompt])).logits[0, -1].numpy()
        assert np.allclose(outputs["logits"][row, 0], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "value"), [("scale", ir.AttrFloat32("scale", 0.36)), ("window", ir.AttrInt64("local_window_size", 7))]
)
def test_a_graph_that_is_not_torch_is_refused(llama: tuple[Exported, Path], name: str, value: ir.Attr) -> None:
    exported, _ = llama
    assert exported.reference is not None
    model = exported.model.clone()
    node = next(node for node in model.graph if node.op_type == "GroupQueryAttention")
    node.attributes[value.name] = value
    layers = [Layer(heads=4, kv_heads=2, width=8, scale=8**-0.5, softcap=0.0, window=0, sinks=False)] * 2
    with pytest.raises(UnsupportedError, match="Tiny differs from torch"):
        check_decoder(model, exported.reference, layers, (VOCABULARY, CONTEXT), 0, name="Tiny")


def attributes(exported: Exported) -> list[dict[str, object]]:
    nodes = [node for node in exported.model.graph if node.op_type == "GroupQueryAttention"]
    return [{name: attribute.value for name, attribute in node.attributes.items()} for node in nodes]


def test_windows_and_soft_caps_are_the_operators(tmp_path: Path) -> None:
    sliding, full = attributes(export(tmp_path, "Gemma 2"))
    assert full == {"num_heads": 4, "kv_num_heads": 2, "scale": 0.25, "softcap": 2.0}
    assert sliding == {**full, "local_window_size": 7}


@pytest.mark.parametrize(("name", "steps"), [("stories260k", 40)])
def test_trained_models(name: str, steps: int, tmp_path: Path) -> None:
    source = SHARED / "models" / name
    if not source.is_dir():
        pytest.skip(f"{source} is absent; HASTEN_SHARED names another place")
    (tmp_path / "model").symlink_to(source)
    exported = export_model(read_source(str(source)))
    assert exported.generation is not None
    assert exported.processor is not None
    assert (exported.generation.bos, exported.generation.eos, exported.processor.max_length) == (1, (1, 2), 512)
    assert_generates_as_torch(exported, tmp_path, [[1, 403, 407], [1, 410, 261, 378, 400]], steps)
