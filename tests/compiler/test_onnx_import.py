from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import tiny_models
from onnx import TensorProto, helper, numpy_helper

from artifacts.errors import SourceError, UnsupportedError
from artifacts.manifest import TensorSpec
from compiler.export import export_model
from compiler.export.onnx_import import index_limits, random_feeds
from compiler.source import read_source

INT64, FLOAT = TensorProto.INT64, TensorProto.FLOAT


def save(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: dict[str, tuple[int, list[int | str]]],
    outputs: dict[str, tuple[int, list[int | str]]],
    weights: dict[str, np.ndarray],
    *,
    opsets: dict[str, int] | None = None,
    ir_version: int = 9,
    external: bool = False,
) -> str:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, *spec) for name, spec in inputs.items()],
        [helper.make_tensor_value_info(name, *spec) for name, spec in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    imports = [helper.make_opsetid(*pair) for pair in (opsets or {"": 18}).items()]
    model = helper.make_model(graph, opset_imports=imports, ir_version=ir_version)
    options = {"save_as_external_data": True, "location": "weights.bin", "size_threshold": 0} if external else {}
    onnx.save(model, path, **options)
    return str(path)


def encoder(path: Path, **options: object) -> str:
    """input_ids, attention_mask -> last_hidden_state: a table, masked."""
    table = np.random.default_rng(0).standard_normal((len(tiny_models.vocabulary()), 4)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"], name="look_up"),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=FLOAT),
        helper.make_node("Unsqueeze", ["mask", "last"], ["wide"]),
        helper.make_node("Mul", ["rows", "wide"], ["last_hidden_state"]),
    ]
    shape: list[int | str] = ["batch", "sequence"]
    inputs = {"input_ids": (INT64, shape), "attention_mask": (INT64, shape)}
    outputs = {"last_hidden_state": (FLOAT, [*shape, 4])}
    weights = {"table": table, "last": np.array([-1], np.int64)}
    return save(path, nodes, inputs, outputs, weights, **options)


def linear(path: Path, op: str = "MatMul", domain: str = "", **options: object) -> str:
    node = helper.make_node(op, ["x", "weight"], ["y"], name="the_node", domain=domain)
    return save(
        path,
        [node],
        {"x": (FLOAT, ["batch", 4])},
        {"y": (FLOAT, ["batch", 3])},
        {"weight": np.arange(12, dtype=np.float32).reshape(4, 3)},
        **options,
    )


def test_plain_tensors(tmp_path: Path) -> None:
    exported = export_model(read_source(linear(tmp_path / "m.onnx", external=True)))
    assert exported.inputs == (TensorSpec("x", "float32", ("batch", 4)),)
    assert exported.outputs == (TensorSpec("y", "float32", ("batch", 3)),)
    assert (exported.reference, exported.processor, dict(exported.files)) == (None, None, {})
    weight = exported.model.graph.initializers["weight"].const_value
    assert isinstance(weight, ir.ExternalTensor)  # left on disk


def test_text_models_take_the_tokenizer_beside_them(tmp_path: Path) -> None:
    tiny_models.write_tokenizer(tmp_path)
    source = read_source(encoder(tmp_path / "m.onnx"), "sentence-similarity")
    exported = export_model(source)
    assert source.task == "feature-extraction"
    assert exported.processor is not None
    assert exported.processor.max_length == 128
    (tmp_path / "onnx").mkdir()
    nested = read_source(encoder(tmp_path / "onnx" / "m.onnx"), "feature-extraction")
    assert nested.tokenizer == tmp_path
    assert export_model(nested).processor == exported.processor


def test_text_models_need_the_inputs_and_outputs_of_their_task(tmp_path: Path) -> None:
    tiny_models.write_tokenizer(tmp_path)
    with pytest.raises(SourceError, match=r"takes x; feature-extraction needs input_ids"):
        export_model(read_source(linear(tmp_path / "m.onnx"), "feature-extraction"))
    with pytest.raises(SourceError, match=r"gives last_hidden_state; text-classification needs logits"):
        export_model(read_source(encoder(tmp_path / "e.onnx"), "text-classification"))


def test_unknown_operators_are_named(tmp_path: Path) -> None:
    path = linear(tmp_path / "m.onnx", "Frobnicate", "com.example", opsets={"": 18, "com.example": 1})
    with pytest.raises(
        UnsupportedError, match=r"no operator com\.example::Frobnicate, which the node the_node of m\.onnx"
    ):
        export_model(read_source(path))
    with pytest.raises(UnsupportedError, match=r"no operator MatMull, which the node the_node"):
        export_model(read_source(linear(tmp_path / "n.onnx", "MatMull")))


def test_operators_of_local_functions_count_as_known(tmp_path: Path) -> None:
    path = Path(linear(tmp_path / "m.onnx", "Twice", "local", opsets={"": 18, "local": 1}))
    model = onnx.load(path)
    body = [helper.make_node("MatMul", ["a", "b"], ["c"])]
    function = helper.make_function("local", "Twice", ["a", "b"], ["c"], body, [helper.make_opsetid("", 18)])
    model.functions.append(function)
    onnx.save(model, path)
    assert export_model(read_source(str(path))).outputs[0].name == "y"


def test_graphs_that_onnx_runtime_refuses(tmp_path: Path) -> None:
    node = helper.make_node("MatMul", ["x", "weight"], ["y"], name="the_node")
    inputs, outputs = {"x": (FLOAT, ["batch", 5])}, {"y": (FLOAT, ["batch", 3])}
    path = save(tmp_path / "m.onnx", [node], inputs, outputs, {"weight": np.ones((4, 3), np.float32)})
    with pytest.raises(UnsupportedError, match="ONNX Runtime does not run") as caught:
        export_model(read_source(path))
    assert "\n" not in str(caught.value)


def test_old_opsets_are_converted(tmp_path: Path) -> None:
    node = helper.make_node("Unsqueeze", ["x"], ["y"], axes=[0])  # opset 13 made the axes an input
    spec: dict[str, tuple[int, list[int | str]]] = {"x": (FLOAT, [2, 3])}
    path = save(tmp_path / "m.onnx", [node], spec, {"y": (FLOAT, [1, 2, 3])}, {}, opsets={"": 11}, ir_version=4)
    exported = export_model(read_source(path))
    assert exported.model.opset_imports[""] == 18
    ir.save(exported.model, tmp_path / "converted.onnx")
    session = ort.InferenceSession(tmp_path / "converted.onnx", providers=["CPUExecutionProvider"])
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert np.array_equal(session.run(None, {"x": x})[0], x[None])


def test_initializers_among_the_inputs_are_constants(tmp_path: Path) -> None:
    node = helper.make_node("MatMul", ["x", "weight"], ["y"])
    inputs = {"x": (FLOAT, ["batch", 4]), "weight": (FLOAT, [4, 3])}
    weights = {"weight": np.ones((4, 3), np.float32)}
    path = save(tmp_path / "m.onnx", [node], inputs, {"y": (FLOAT, ["batch", 3])}, weights)
    assert [spec.name for spec in export_model(read_source(path)).inputs] == ["x"]


def test_random_feeds_fit_the_graph(tmp_path: Path) -> None:
    tiny_models.write_tokenizer(tmp_path)
    exported = export_model(read_source(encoder(tmp_path / "m.onnx")))
    limits = index_limits(exported.model)
    assert limits == {"input_ids": len(tiny_models.vocabulary())}
    feeds = random_feeds(exported.inputs, {"batch": 3, "sequence": 50}, 0, limits=limits)
    assert feeds["input_ids"].shape == (3, 50)
    assert feeds["input_ids"].max() > 50
    assert feeds["attention_mask"].all()
    session = ort.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    assert session.run(None, feeds)[0].shape == (3, 50, 4)
    again = random_feeds(exported.inputs, {"batch": 3, "sequence": 50}, 0, limits=limits)
    assert all(np.array_equal(feeds[name], again[name]) for name in feeds)


def test_random_feeds_of_every_type() -> None:
    names = ("bool", "int8", "uint8", "int32", "int64", "float16", "float32", "float64")
    feeds = random_feeds(tuple(TensorSpec(name, name, ("n", 3)) for name in names), {}, 1, limits={"int8": 1000})
    assert {name: array.dtype.name for name, array in feeds.items()} == {name: name for name in names}
    assert all(array.shape == (2, 3) for array in feeds.values())


def test_strings_are_refused(tmp_path: Path) -> None:
    node = helper.make_node("Identity", ["x"], ["y"])
    spec: tuple[int, list[int | str]] = (TensorProto.STRING, [2])
    with pytest.raises(UnsupportedError, match="x of type"):
        export_model(read_source(save(tmp_path / "m.onnx", [node], {"x": spec}, {"y": spec}, {})))
