from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from builders import GraphBuilder, evaluate, random

from artifacts.digest import sha256_file
from compiler.graphs import EXTERNAL_FROM, GraphFolder
from passes.deferred import DeferredTensor

FEEDS = {"x": random(9, 3, 64)}


def model(*, twice: bool = False, seed: int = 0) -> ir.Model:
    """y = (x @ big) @ other + small; ``twice``: both factors are the same bytes."""
    builder = GraphBuilder()
    x = builder.input("x", ["n", 64])
    big = builder.constant(random(seed, 64, 64), "big")
    other = builder.constant(random(seed if twice else seed + 1, 64, 64), "other")
    small = builder.constant(random(7, 64), "small")
    product = builder.add("MatMul", builder.add("MatMul", x, big), other)
    return builder.finish(builder.add("Add", product, small, shape=["n", 64]))


def run(path: Path) -> np.ndarray:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, FEEDS)[0]


def test_large_tensors_get_a_file_each_and_small_ones_stay(tmp_path: Path) -> None:
    made = model()
    expected = next(iter(evaluate(made, FEEDS).values()))
    saved = GraphFolder(tmp_path).save(made)
    assert len(saved.weights) == 2
    assert sorted(saved.weights) == list(saved.weights)
    for name in saved.weights:
        assert (tmp_path / name).stat().st_size == 64 * 64 * 4 == EXTERNAL_FROM
        assert Path(name).stem == sha256_file(tmp_path / name)
    assert saved.size == saved.path.stat().st_size + 2 * EXTERNAL_FROM
    proto = onnx.load(saved.path, load_external_data=False)
    inline = {tensor.name for tensor in proto.graph.initializer if not tensor.external_data}
    assert inline == {"small"}
    np.testing.assert_allclose(run(saved.path), expected, rtol=1e-5, atol=1e-4)


def test_small_tensors_of_a_source_with_a_data_file_come_along(tmp_path: Path) -> None:
    made = model()
    expected = next(iter(evaluate(made, FEEDS).values()))
    (tmp_path / "source").mkdir()
    (tmp_path / "out").mkdir()
    ir.save(made, tmp_path / "source" / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    saved = GraphFolder(tmp_path / "out").save(ir.load(tmp_path / "source" / "m.onnx"))
    assert len(saved.weights) == 2
    assert np.array_equal(run(saved.path), expected)


def test_equal_tensors_are_one_file_and_other_graphs_share_it(tmp_path: Path) -> None:
    folder = GraphFolder(tmp_path)
    first = folder.save(model(twice=True))
    assert len(first.weights) == 1
    assert first.size == first.path.stat().st_size + EXTERNAL_FROM
    second = folder.save(model())
    assert set(first.weights) < set(second.weights)
    assert len(list((tmp_path / "weights").iterdir())) == 2
    assert first.path != second.path
    assert run(first.path).shape == (3, 64)


def test_one_tensor_under_two_names(tmp_path: Path) -> None:
    made = model()
    initializers = made.graph.initializers
    initializers["other"].const_value = initializers["big"].const_value
    expected = next(iter(evaluate(made, FEEDS).values()))
    saved = GraphFolder(tmp_path).save(made)
    assert len(saved.weights) == 1
    np.testing.assert_allclose(run(saved.path), expected, rtol=1e-5, atol=1e-4)


def test_the_same_model_makes_the_same_bytes(tmp_path: Path) -> None:
    folder = GraphFolder(tmp_path / "one")
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    made = model()
    first, again = folder.save(made), folder.save(made)
    elsewhere = GraphFolder(tmp_path / "two").save(model())
    assert first.path.read_bytes() == again.path.read_bytes() == elsewhere.path.read_bytes()
    assert first.weights == again.weights == elsewhere.weights


def test_saving_again_writes_no_weights_again(tmp_path: Path) -> None:
    folder = GraphFolder(tmp_path)
    made = model()
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in folder.save(made).weights}
    for name in before:
        (tmp_path / name).chmod(0o400)
    clone = made.clone()
    clone.graph.initializers["small"].const_value = ir.tensor(random(1, 64), name="small")
    saved = folder.save(clone)
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in saved.weights} == before


def test_the_model_in_memory_reads_its_weights_from_the_files(tmp_path: Path) -> None:
    made = model()
    whole = made.graph.initializers["big"].const_value
    assert whole is not None
    GraphFolder(tmp_path).save(made)
    mapped = made.graph.initializers["big"].const_value
    assert isinstance(mapped, ir.ExternalTensor)
    np.testing.assert_array_equal(mapped.numpy(), whole.numpy())


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT16, ir.DataType.INT8, ir.DataType.BFLOAT16, ir.DataType.INT4])
def test_types_survive(tmp_path: Path, dtype: ir.DataType) -> None:
    import ml_dtypes

    kind = {"BFLOAT16": ml_dtypes.bfloat16, "INT4": ml_dtypes.int4}.get(dtype.name) or dtype.numpy()
    array = (random(3, 256, 256) * 3).astype(kind)
    builder = GraphBuilder()
    weight = builder.constant(np.zeros(1, np.float32), "w")
    weight.const_value = ir.tensor(array, dtype=dtype, name="w")
    weight.dtype, weight.shape = dtype, ir.Shape((256, 256))
    made = builder.finish(builder.add("Cast", weight, to=ir.DataType.FLOAT, shape=[256, 256]))
    saved = GraphFolder(tmp_path).save(made)
    assert (tmp_path / saved.weights[0]).stat().st_size == 256 * 256 * dtype.bitwidth // 8
    session = ort.InferenceSession(saved.path, providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {})[0], array.astype(np.float32))


def test_weights_inside_a_branch_are_saved_too(tmp_path: Path) -> None:
    builder = GraphBuilder()
    flag = builder.input("flag", [], ir.DataType.BOOL)
    branches = []
    for name, seed in (("then", 1), ("else", 2)):
        inner = GraphBuilder()
        weight = inner.constant(random(seed, 64, 64), f"{name}_w")
        output = inner.add("Neg", weight, name=name, shape=[64, 64])
        inner.graph.outputs.append(output)
        branches.append(inner.graph)
    chosen = builder.add("If", flag, then_branch=branches[0], else_branch=branches[1], shape=[64, 64])
    saved = GraphFolder(tmp_path).save(builder.finish(chosen))
    assert len(saved.weights) == 2
    session = ort.InferenceSession(saved.path, providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {"flag": np.array(True)})[0], -random(1, 64, 64))


class Source:
    """Weights that wait elsewhere, and how often they were read."""

    def __init__(self) -> None:
        self.count = 0

    def defer(self, made: ir.Model) -> ir.Model:
        """The same model, its matrices deferred."""
        for value in made.graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and tensor.nbytes >= EXTERNAL_FROM:
                value.const_value = self._deferred(str(value.name), tensor.numpy())
        return made

    def _deferred(self, name: str, array: np.ndarray) -> DeferredTensor:
        def make() -> np.ndarray:
            self.count += 1
            return array

        return DeferredTensor(make, ir.DataType.FLOAT, array.shape, name, name)


def test_a_graph_of_deferred_weights_is_written_when_somebody_asks_for_it(tmp_path: Path) -> None:
    source, folder = Source(), GraphFolder(tmp_path)
    made = source.defer(model())
    saved = folder.save(made)
    assert saved.pending
    assert saved.size == 2 * EXTERNAL_FROM
    assert not list(tmp_path.iterdir())
    assert source.count == 0
    path = saved.path
    assert not saved.pending
    assert source.count == 2
    assert saved.size == path.stat().st_size + 2 * EXTERNAL_FROM
    assert len(saved.weights) == 2
    plain = GraphFolder(tmp_path / "other")
    plain.path.mkdir()
    assert plain.save(model()).path.read_bytes() == path.read_bytes()
    assert isinstance(made.graph.initializers["big"].const_value, DeferredTensor)  # no map of the file


def test_what_is_not_deferred_is_written_at_once_and_nothing_twice(tmp_path: Path) -> None:
    source, folder = Source(), GraphFolder(tmp_path)
    made = source.defer(model())
    made.graph.initializers["other"].const_value = ir.tensor(random(5, 64, 64), name="other")
    first, second = folder.save(made), folder.save(made.clone())
    assert first.pending
    assert second.pending
    assert isinstance(made.graph.initializers["other"].const_value, ir.ExternalTensor)
    assert len(list((tmp_path / "weights").iterdir())) == 1
    assert first.weights == second.weights
    assert source.count == 1


def test_a_pending_graph_is_what_it_was_when_it_was_saved(tmp_path: Path) -> None:
    made = Source().defer(model())
    saved = GraphFolder(tmp_path).save(made)
    made.graph.initializers["small"].const_value = ir.tensor(random(1, 64), name="small")
    np.testing.assert_allclose(run(saved.path), next(iter(evaluate(model(), FEEDS).values())), rtol=1e-5, atol=1e-4)
