from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import tiny_models

from artifacts.errors import SourceError, UnsupportedError
from artifacts.manifest import TensorSpec
from artifacts.target import CPU
from compiler.export import Exported, export_model
from compiler.source import read_source
from compiler.tolerance import rounding_tolerance
from passes.base import Context
from passes.cleanup import InferShapes
from passes.fusion import HoistGather, UnfuseAttention
from passes.registry import CLEAN
from passes.sites import linear_sites

FUSED = {
    "Bert": True,
    "Roberta": True,
    "DistilBert": True,
    "ModernBert": True,
    "MPNet": False,
    "Electra": True,
    "Camembert": True,
    "XLMRoberta": True,
    "Albert": True,
    "DebertaV2": False,
}
QUICK = ("Bert", "DistilBert", "Roberta", "ModernBert")


def export(folder: Path, architecture: str = "Bert", task: str = "feature-extraction", **options: object) -> Exported:
    tiny_models.write_model(folder, architecture, task, **options)
    return export_model(read_source(str(folder)), seed=0)


def run(exported: Exported, folder: Path, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    path = folder / "exported.onnx"
    ir.save(exported.model, path)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return dict(zip([spec.name for spec in exported.outputs], session.run(None, feeds), strict=True))


def feeds(exported: Exported, lengths: tuple[int, ...], width: int) -> dict[str, np.ndarray]:
    """Ragged rows of random ids, padded to ``width``: wider than any row where it is larger."""
    generator = np.random.default_rng(5)
    mask = (np.arange(width) < np.array(lengths)[:, None]).astype(np.int64)
    ids = np.where(mask == 1, generator.integers(5, 100, mask.shape), 1)
    made = {"input_ids": ids, "attention_mask": mask, "token_type_ids": mask * (np.arange(width) > 3)}
    return {spec.name: made[spec.name] for spec in exported.inputs}


def assert_matches_torch(exported: Exported, folder: Path) -> None:
    assert exported.reference is not None
    for lengths, width in (((5,), 5), ((1,), 1), ((12, 3, 7), 20), ((128,), 128), ((2, 30), 30)):
        given = feeds(exported, lengths, width)
        expected, got = exported.reference(given), run(exported, folder, given)
        keep = given["attention_mask"].astype(bool)
        for name, array in expected.items():
            one, other = got[name], array
            if array.shape[:2] == keep.shape:
                one, other = one[keep], other[keep]
            error = np.linalg.norm(one - other) / np.linalg.norm(other)
            assert error <= rounding_tolerance(exported.model), (name, lengths, width)


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FUSED],
)
def test_architectures(tmp_path: Path, architecture: str) -> None:
    exported = export(tmp_path / "m", architecture)
    assert exported.attentions_expected == 2
    assert exported.attentions_emitted == (2 if FUSED[architecture] else 0)
    assert bool(exported.attention_refusal) != FUSED[architecture]
    assert_matches_torch(exported, tmp_path)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Exported, Path]:
    folder = tmp_path_factory.mktemp("classifier")
    return export(folder / "m", "Bert", "text-classification"), folder


def test_signature(classifier: tuple[Exported, Path]) -> None:
    exported, _ = classifier
    shape = ("batch", "sequence")
    assert exported.inputs == tuple(
        TensorSpec(name, "int64", shape) for name in ("input_ids", "attention_mask", "token_type_ids")
    )
    assert exported.outputs == (TensorSpec("logits", "float32", ("batch", 3)),)
    assert exported.model.opset_imports[""] in (21, 22)
    assert exported.model.ir_version == 10
    assert exported.processor is not None
    assert exported.processor.labels == ("negative", "neutral", "positive")
    assert exported.processor.pairs


def test_classifier_matches_torch(classifier: tuple[Exported, Path]) -> None:
    exported, folder = classifier
    assert_matches_torch(exported, folder)


def test_weights_have_their_names(classifier: tuple[Exported, Path]) -> None:
    from safetensors.numpy import load_file

    exported, folder = classifier
    weights = load_file(folder / "m" / "model.safetensors")
    found = exported.model.graph.initializers
    assert set(weights) <= set(found)
    for name, array in weights.items():
        stored = found[name].const_value
        assert stored is not None
        assert stored.name == name
        values = stored.numpy()
        # Matrices of linear layers stand transposed, ready for MatMul.
        assert np.array_equal(values, array) or np.array_equal(values, array.T), name
    large = [name for name, value in found.items() if value.const_value is not None and value.const_value.size > 300]
    assert set(large) <= set(weights) | {"bert.embeddings.position_ids"}


def test_names_are_unique_and_metadata_is_the_module_path_only(classifier: tuple[Exported, Path]) -> None:
    model = classifier[0].model
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    values += [value for node in model.graph for value in node.outputs]
    names = [value.name for value in values]
    assert len(set(names)) == len(names)
    assert len({node.name for node in model.graph}) == len(list(model.graph))
    assert not model.metadata_props
    for node in model.graph:
        assert set(node.metadata_props) <= {"pkg.torch.onnx.name_scopes"}
    product = next(node for node in model.graph if node.op_type == "MatMul")
    scopes = ast.literal_eval(product.metadata_props["pkg.torch.onnx.name_scopes"])
    assert scopes[-2] == "bert.encoder.layer.0.attention.self.query"


def test_a_row_without_any_token_stays_finite(classifier: tuple[Exported, Path]) -> None:
    exported, folder = classifier
    given = feeds(exported, (6, 6), 6)
    whole = run(exported, folder, given)["logits"]
    given["attention_mask"][0] = 0
    empty = run(exported, folder, given)["logits"]
    assert np.isfinite(empty).all()
    assert np.allclose(empty[1], whole[1], atol=1e-6)


@pytest.mark.parametrize(
    ("task", "outputs"),
    [
        ("token-classification", ("logits",)),
        pytest.param("question-answering", ("start_logits", "end_logits"), marks=pytest.mark.slow),
        pytest.param("fill-mask", ("logits",), marks=pytest.mark.slow),
    ],
)
def test_tasks(tmp_path: Path, task: str, outputs: tuple[str, ...]) -> None:
    exported = export(tmp_path / "m", "DistilBert", task)
    assert tuple(spec.name for spec in exported.outputs) == outputs
    assert exported.outputs[0].shape[:2] == ("batch", "sequence")
    assert_matches_torch(exported, tmp_path)


def test_pooling_modes_are_baked_in(tmp_path: Path) -> None:
    from compiler.export.heads import wrap
    from compiler.source import Pooling

    folder = tiny_models.write_sentence_model(tmp_path / "st", mode="cls_token")
    exported = export_model(read_source(str(folder)), seed=0)
    assert exported.outputs == (TensorSpec("sentence_embedding", "float32", ("batch", 32)),)
    assert exported.processor is not None
    assert exported.processor.max_length == 64
    assert_matches_torch(exported, tmp_path)
    assert exported.reference is not None
    given = feeds(exported, (4, 7), 9)
    vectors = exported.reference(given)["sentence_embedding"]
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-6)

    import torch

    hidden = torch.tensor([[[1.0, 2.0], [5.0, -6.0], [99.0, 99.0]]])
    mask = torch.tensor([[1, 1, 0]])
    results = {
        mode: wrap(torch.nn.Identity(), "feature-extraction", Pooling(mode)).select({"last_hidden_state": hidden}, mask)
        for mode in ("mean", "cls", "max", "none")
    }
    assert results["mean"][0].tolist() == [[3.0, -2.0]]
    assert results["cls"][0].tolist() == [[1.0, 2.0]]
    assert results["max"][0].tolist() == [[5.0, 2.0]]
    assert results["none"][0] is hidden


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FUSED],
)
def test_what_one_token_is_read_of_is_computed_for_it_alone(tmp_path: Path, architecture: str) -> None:
    """hoist-gather finds the last layer of whatever is exported, and leaves the numbers to padding and all lengths."""
    exported = export(tmp_path / "m", architecture, "text-classification")
    for item in (*CLEAN, HoistGather(), InferShapes()):
        outcome = item.run(exported.model, Context(CPU))
        assert item.name != "hoist-gather" or outcome.changed == 1
    shapes = [site.output.shape for site in linear_sites(exported.model)]
    lengths = [shape[1] for shape in shapes if shape is not None and len(shape) == 3]
    # Three products follow the last attention; its query is one more where it is an operator that reads it by itself.
    assert lengths.count(1) == (4 if FUSED[architecture] and architecture != "ModernBert" else 3), lengths
    assert_matches_torch(exported, tmp_path)
    assert UnfuseAttention().run(exported.model, Context(CPU)).changed == exported.attentions_emitted
    assert_matches_torch(exported, tmp_path)


def test_falls_back_where_attention_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compiler.export import attention

    def refuse(*arguments: object, **options: object) -> None:
        raise attention.AttentionRefusedError("it has softcap")

    monkeypatch.setattr(attention, "_attention", refuse)
    exported = export(tmp_path / "m", "DistilBert")
    assert exported.attentions_emitted == 0
    assert exported.attention_refusal == "attention of DistilBertModel does not fit MultiHeadAttention: it has softcap"
    assert_matches_torch(exported, tmp_path)


@pytest.mark.slow
def test_falls_back_where_the_numbers_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compiler.export import attention

    right = attention._attention
    monkeypatch.setattr(
        attention, "_attention", lambda *given, scaling=None, **rest: right(*given, scaling=scaling * 1.01, **rest)
    )
    exported = export(tmp_path / "m", "DistilBert")
    assert exported.attentions_emitted == 0
    assert "differs from torch by" in exported.attention_refusal
    assert_matches_torch(exported, tmp_path)


def test_an_untrained_head_is_refused(tmp_path: Path) -> None:
    import json

    folder = tiny_models.write_model(tmp_path / "m", "DistilBert")
    config = folder / "config.json"
    content = json.loads(config.read_text()) | {"architectures": ["DistilBertForSequenceClassification"]}
    config.write_text(json.dumps(content))
    with pytest.raises(SourceError, match=r"lack classifier\.weight and . more that text-classification needs"):
        export_model(read_source(str(folder)), seed=0)


def test_weights_of_another_shape_are_refused_in_one_line(tmp_path: Path) -> None:
    import json

    folder = tiny_models.write_model(tmp_path / "m", "DistilBert")
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dim": 64}))
    with pytest.raises(SourceError) as caught:
        export_model(read_source(str(folder)), seed=0)
    assert "\n" not in str(caught.value)


def test_what_torch_cannot_export_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import DistilBertModel

    right = DistilBertModel.forward

    def forward(self: DistilBertModel, **given: torch.Tensor) -> object:
        output = right(self, **given)
        output["last_hidden_state"] = torch.special.bessel_j0(output["last_hidden_state"])
        return output

    monkeypatch.setattr(DistilBertModel, "forward", forward)
    with pytest.raises(UnsupportedError) as caught:
        export(tmp_path / "m", "DistilBert")
    assert "DistilBertModel cannot be exported (operator prims.bessel_j0" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_exporting_is_silent_and_reads_torch_checkpoints(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import torch
    from safetensors.torch import load_file

    folder = tiny_models.write_model(tmp_path / "m", "DistilBert")
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    capfd.readouterr()
    exported = export_model(read_source(str(folder)), seed=0)
    assert exported.reference is not None
    exported.reference(feeds(exported, (3,), 3))
    assert capfd.readouterr() == ("", "")
    assert_matches_torch(exported, tmp_path)
