from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny_models
from onnx import TensorProto, helper, numpy_helper

from artifacts.errors import SourceError, UnsupportedError, UsageError
from compiler.source import Pooling, read_source


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_model(tmp_path_factory.mktemp("source") / "bert")


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    copy = tmp_path / "bert"
    copy.mkdir()
    for file in pristine.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def write_onnx(path: Path, *, opset: int = 18, op: str = "MatMul", domain: str = "", external: bool = False) -> Path:
    weight = numpy_helper.from_array(np.ones((4, 3), np.float32), "weight")
    node = helper.make_node(op, ["x", "weight"], ["y"], name="the_node", domain=domain)
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
        [weight],
    )
    imports = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    model = helper.make_model(graph, opset_imports=imports, ir_version=9)
    if external:
        onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    else:
        onnx.save(model, path)
    return path


def test_reads_a_folder(folder: Path) -> None:
    source = read_source(str(folder))
    assert (source.name, source.kind, source.task, source.architecture) == (
        "bert",
        "huggingface",
        "feature-extraction",
        "BertModel",
    )
    assert source.pooling == Pooling("mean", normalize=False)
    assert source.digest.startswith("sha256:")
    assert len(source.digest) == 71


def test_digest_follows_contents_and_not_names_or_other_files(folder: Path, pristine: Path) -> None:
    before = read_source(str(folder)).digest
    assert before == read_source(str(pristine)).digest
    (folder / "README.md").write_text("no part of the model")
    assert read_source(str(folder)).digest == before
    edit_config(folder, layer_norm_eps=1e-3)
    assert read_source(str(folder)).digest != before


@pytest.mark.parametrize(("mode", "pooled"), [("mean_tokens", "mean"), ("cls_token", "cls"), ("max_tokens", "max")])
def test_reads_a_sentence_transformers_folder(tmp_path: Path, mode: str, pooled: str) -> None:
    source = read_source(str(tiny_models.write_sentence_model(tmp_path / "st", mode=mode, length=50)))
    assert source.task == "feature-extraction"
    assert source.pooling == Pooling(pooled, normalize=True, max_length=50)


def test_pooling_can_be_overridden(tmp_path: Path) -> None:
    folder = str(tiny_models.write_sentence_model(tmp_path / "st"))
    assert read_source(folder, pooling="cls").pooling == Pooling("cls", normalize=True, max_length=64)
    assert read_source(folder, pooling="none").pooling == Pooling("none", normalize=False, max_length=64)


def test_unknown_sentence_modules_and_poolings_are_refused(tmp_path: Path) -> None:
    folder = tiny_models.write_sentence_model(tmp_path / "st", mode="mean_sqrt_len_tokens")
    with pytest.raises(UnsupportedError, match="mean_sqrt_len_tokens"):
        read_source(str(folder))
    listing = folder / "modules.json"
    modules = [*json.loads(listing.read_text()), {"path": "3_Dense", "type": "sentence_transformers.models.Dense"}]
    listing.write_text(json.dumps(modules))
    with pytest.raises(UnsupportedError, match="Dense"):
        read_source(str(folder))
    listing.write_text(json.dumps([{"path": "../..", "type": "sentence_transformers.models.Transformer"}]))
    with pytest.raises(SourceError, match="outside its folder"):
        read_source(str(folder))


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("DistilBertForSequenceClassification", "text-classification"),
        ("BertForTokenClassification", "token-classification"),
        ("RobertaForQuestionAnswering", "question-answering"),
        ("ModernBertForMaskedLM", "fill-mask"),
        ("LlamaForCausalLM", "text-generation"),
        ("GPT2LMHeadModel", "text-generation"),
    ],
)
def test_infers_the_task(folder: Path, architecture: str, task: str) -> None:
    edit_config(folder, architectures=[architecture])
    source = read_source(str(folder))
    assert source.task == task
    assert source.pooling is None
    assert read_source(str(folder), "sentence-similarity").task == "feature-extraction"


@pytest.mark.parametrize(
    ("changes", "task", "text"),
    [
        ({"architectures": None}, None, "names no architectures"),
        ({"architectures": []}, None, "names no architectures"),
        ({"architectures": "BertModel"}, None, "names no architectures"),
        ({"model_type": None}, None, "names no model_type"),
        ({}, "text-classification", "serves feature-extraction, not text-classification"),
        ({"architectures": ["T5ForConditionalGeneration"]}, None, "serves text2text-generation"),
        ({"architectures": ["NoSuchModel"]}, None, "no architecture NoSuchModel"),
        ({"architectures": ["os.system"]}, None, "no architecture"),
    ],
)
def test_bad_configs(folder: Path, changes: dict[str, object], task: str | None, text: str) -> None:
    edit_config(folder, **changes)
    with pytest.raises(SourceError, match=text):
        read_source(str(folder), task)


def test_bad_options(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown task 'translation'.*token-classification"):
        read_source(str(folder), "translation")
    with pytest.raises(UsageError, match="unknown pooling"):
        read_source(str(folder), pooling="sum")
    with pytest.raises(UsageError, match="is empty"):
        read_source(" ")
    with pytest.raises(UsageError, match=r"for \.onnx files"):
        read_source(str(folder), "tensors")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null", b'{"a": ' * 100_000])
def test_corrupt_config(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(SourceError, match=r"config\.json"):
        read_source(str(folder))


def test_missing_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such model"):
        read_source(str(tmp_path / "nowhere"))
    (folder / "tokenizer.json").rename(folder / "away")
    with pytest.raises(SourceError, match="holds no tokenizer"):
        read_source(str(folder))
    (folder / "model.safetensors").rename(folder / "away")
    with pytest.raises(SourceError, match=r"holds no model\.safetensors"):
        read_source(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(SourceError, match=r"no config\.json"):
        read_source(str(folder))
    with pytest.raises(SourceError, match="neither a model folder nor"):
        read_source(str(folder / "away"))


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    path.write_bytes(
        {
            "empty": b"",
            "short": content[:-1],
            "header only": content[: header - 1],
            "eight bytes": content[:5],
            "long": content + b"\0",
            "text": b"version https://git-lfs.github.com/spec/v1\n",
            "huge header": (1 << 40).to_bytes(8, "little") + content[8:],
            "no json": content[:8] + b"x" * (header - 8) + content[header:],
        }[how]
    )


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("empty", "is empty"),
        ("short", "truncated"),
        ("header only", "truncated"),
        ("eight bytes", "not a safetensors"),
        ("long", "longer than"),
        ("text", "not a safetensors"),
        ("huge header", "not a safetensors"),
        ("no json", "corrupt safetensors header"),
    ],
)
def test_damaged_safetensors(folder: Path, how: str, text: str) -> None:
    damage(folder / "model.safetensors", how)
    with pytest.raises(SourceError, match=text):
        read_source(str(folder))


def test_shards_are_checked_each(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.rename(folder / "model-00001-of-00002.safetensors")
    index = folder / "model.safetensors.index.json"
    table = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index.write_text(json.dumps({"weight_map": table}))
    with pytest.raises(SourceError, match=r"model-00002-of-00002\.safetensors .* is missing"):
        read_source(str(folder))
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(SourceError, match="outside its folder"):
        read_source(str(folder))
    index.write_text(json.dumps({"weight_map": {"a": table["a"]}}))
    with pytest.raises(SourceError, match=r"00001-of-00002\.safetensors does not hold a, as model\.safetensors\.index"):
        read_source(str(folder))
    index.write_text(json.dumps({"weight_map": {"embeddings.word_embeddings.weight": table["a"]}}))
    assert read_source(str(folder)).task == "feature-extraction"


def test_torch_checkpoints(folder: Path) -> None:
    import pickle

    import torch

    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save({"a": torch.zeros(2)}, path)
    assert read_source(str(folder)).path == folder
    whole = path.read_bytes()
    for content, text in ((b"", "empty"), (whole[:-30], "truncated"), (pickle.dumps({}), "bare pickle")):
        path.write_bytes(content)
        with pytest.raises(SourceError, match=text):
            read_source(str(folder))


def test_reads_an_onnx_file(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "linear.onnx", external=True)
    source = read_source(str(path))
    assert (source.name, source.kind, source.task, source.tokenizer) == ("linear", "onnx", "tensors", None)
    before = source.digest
    weights = tmp_path / "weights.bin"
    weights.write_bytes(bytes(len(weights.read_bytes())))
    assert read_source(str(path)).digest != before


@pytest.mark.parametrize("content", [b"", b"hello world, this is no model", b"\x08", b"\x08\x09"])
def test_no_onnx_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(content)
    with pytest.raises(SourceError, match=r"broken\.onnx"):
        read_source(str(path))


def test_truncated_onnx_at_any_byte(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "cut.onnx")
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(SourceError):
            read_source(str(path))


def test_external_data(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "linear.onnx", external=True)
    data = tmp_path / "weights.bin"
    data.write_bytes(data.read_bytes()[:-4])
    with pytest.raises(SourceError, match=r"truncated: weight lies past its end"):
        read_source(str(path))
    data.unlink()
    with pytest.raises(SourceError, match=r"external data weights\.bin of linear\.onnx is missing"):
        read_source(str(path))


def test_onnx_opset_and_tasks(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="opset 99"):
        read_source(str(write_onnx(tmp_path / "new.onnx", opset=99)))
    with pytest.raises(SourceError, match="needs a tokenizer"):
        read_source(str(write_onnx(tmp_path / "plain.onnx")), "feature-extraction")


def test_an_encoder_decoder_fills_no_masks(folder: Path) -> None:
    edit_config(folder, architectures=["BartForConditionalGeneration"], is_encoder_decoder=True)
    with pytest.raises(UnsupportedError, match="it writes texts, and fills no masks"):
        read_source(str(folder))


def test_a_decoder_is_not_compiled_from_a_graph(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="decoders are compiled from their weights"):
        read_source(str(write_onnx(tmp_path / "plain.onnx")), "text-generation")


def test_hub_ids_fail_fast_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Nothing listens on port 9: what a machine without a network sees, and quick.
    script = (
        "from compiler.source import read_source\n"
        "from artifacts.errors import SourceError\n"
        "try:\n    read_source('owner/no-such-model')\n"
        "except SourceError as error:\n    print(error)\n"
    )
    for extra in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        environment = {**os.environ, "HF_HOME": str(tmp_path), **extra}
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert "owner/no-such-model is no path" in done.stdout, done.stderr
        assert "pass its folder" in done.stdout
        assert time.monotonic() - start < 30


def test_cheap_checks_import_nothing_heavy(folder: Path) -> None:
    damage(folder / "model.safetensors", "short")
    script = (
        f"import sys\nfrom compiler.source import read_source\n"
        f"try:\n    read_source({str(folder)!r})\nexcept Exception as error:\n    print(type(error).__name__)\n"
        "print([name for name in ('torch', 'transformers', 'onnx_ir', 'optimum') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["SourceError", "[]"], done.stdout + done.stderr
