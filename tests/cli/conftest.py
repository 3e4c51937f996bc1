"""Tiny sources and the bundles compiled from them by the real command, once for all tests of this folder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from real_command import Finished, warm
from tiny_models import write_model, write_sentence_model

if sys.platform == "win32":
    pytest.skip("these tests fork", allow_module_level=True)

TASKS = ("feature-extraction", "text-classification", "token-classification", "question-answering", "fill-mask")


@pytest.fixture(scope="session", autouse=True)
def offline() -> Iterator[None]:
    """A hub id must fail at once, and alike with and without a network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Task -> a folder with a random BERT of two layers; ``mlp`` -> an .onnx file; ``sentence`` as all-MiniLM is."""
    root = tmp_path_factory.mktemp("sources")
    found = {task: write_model(root / task, task=task) for task in TASKS}
    return {**found, "sentence": write_sentence_model(root / "sentence"), "mlp": write_mlp(root / "mlp.onnx")}


@pytest.fixture(scope="session")
def mlp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mlp(tmp_path_factory.mktemp("mlp") / "mlp.onnx")


@pytest.fixture(scope="session")
def mlp_bundle(tmp_path_factory: pytest.TempPathFactory, mlp: Path) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "mlp"
    done = warm("compile", mlp, "-o", out, "--recipe", "reference", "--quiet")
    assert (done.code, done.out, done.err) == (0, "", "")
    return out


@pytest.fixture(scope="session")
def bundle_of(
    tmp_path_factory: pytest.TempPathFactory, sources: dict[str, Path]
) -> Callable[[str], tuple[Path, Finished]]:
    """Source -> its bundle by the recipe ``reference`` and what the command said; compiled when first asked for."""
    made: dict[str, tuple[Path, Finished]] = {}

    def make(name: str) -> tuple[Path, Finished]:
        if name not in made:
            out = tmp_path_factory.mktemp("bundles") / name
            done = warm("compile", sources[name], "-o", out, "--recipe", "reference", "--json")
            assert done.code == 0, done.err
            made[name] = (out, done)
        return made[name]

    return make


def write_mlp(path: Path) -> Path:
    """64 -> 128 -> 8 with a ReLU; its weights are large enough for files of their own."""
    generator = np.random.default_rng(0)
    weights = {
        "w1": generator.standard_normal((64, 128)) / 8,
        "b1": generator.standard_normal(128),
        "w2": generator.standard_normal((128, 8)) / 11,
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"], "first"),
        helper.make_node("Add", ["a", "b1"], ["b"], "bias"),
        helper.make_node("Relu", ["b"], ["c"], "relu"),
        helper.make_node("MatMul", ["c", "w2"], ["y"], "second"),
    ]
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8])],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path
