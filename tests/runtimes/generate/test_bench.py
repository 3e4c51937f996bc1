"""The decoder bench: its numbers come from the rounds that were measured, and its ceiling from this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import decoder_graphs
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from artifacts.bundle import Bundle
from artifacts.errors import ProviderError, UsageError
from runtimes.generate import bench
from runtimes.generate.bandwidth import memory_bandwidth, weight_bytes
from runtimes.generate.bench import bench_decoder
from runtimes.generate.timing import Timer, peak_memory


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    root = tmp_path_factory.mktemp("decoder")
    tokenizer = decoder_graphs.byte_level(root / "tokenizer.json")
    return decoder_graphs.write_decoder(root / "tiny", decoder_graphs.tiny_llama(), tokenizer)


def test_what_a_child_times_adds_up(decoder: Bundle) -> None:
    timer = Timer()
    loaded = {"variant": "cpu-fp32", "provider": "CPUExecutionProvider", "device": "cpu", "threads": 1}
    reply = timer.answer({"op": "load", "bundle": str(decoder.path), **loaded})
    assert reply["ok"], reply
    assert reply["seconds"] > 0
    for batch, length in ((1, 3), (5, 100)):
        reply = timer.answer({"op": "time", "batch": batch, "prompt": length, "steps": 9})
        assert reply["ok"], reply
        assert len(reply["steps"]) == 8
        assert 0 < reply["prefill"] < reply["first"]
        assert min(reply["steps"]) > 0
    assert timer.answer({"op": "memory"})["peak"] == peak_memory() > 1e7


def test_a_child_says_what_went_wrong(decoder: Bundle) -> None:
    timer = Timer()
    assert "no model was loaded" in timer.answer({"op": "time", "batch": 1, "prompt": 3, "steps": 2})["error"]
    gone = {"variant": "gone", "provider": "CPUExecutionProvider", "device": "cpu", "threads": 1}
    assert "no variant 'gone'" in timer.answer({"op": "load", "bundle": str(decoder.path), **gone})["error"]


def test_a_row_of_the_report() -> None:
    rounds = [{"prefill": 0.1 * i, "first": 0.11 * i, "steps": [0.01 * i, 0.03 * i]} for i in (1, 2, 4)]
    slower = [{"prefill": 0.2 * i, "first": 0.22 * i, "steps": [0.03 * i, 0.09 * i]} for i in (1, 2, 4)]
    row = bench._row((2, 50), {"ours": rounds, "theirs": slower}, 10**6)
    assert row.prefill_per_second == pytest.approx(2 * 50 / 0.2)
    assert row.first_ms == pytest.approx(220)
    steps = [0.01, 0.03, 0.02, 0.06, 0.04, 0.12]
    assert row.decode_per_second == pytest.approx(2 / np.mean(steps))
    assert row.p50_ms == pytest.approx(median(steps) * 1e3)
    assert row.p99_ms == pytest.approx(np.percentile(steps, 99) * 1e3)
    assert row.bandwidth == pytest.approx(1e6 / median(steps))
    assert row.prefill_ratio is not None
    assert row.decode_ratio is not None
    assert (row.prefill_ratio.median, row.decode_ratio.median) == (pytest.approx(2), pytest.approx(3))
    assert bench._row((2, 50), {"ours": rounds}, 1).decode_ratio is None


def test_lengths_beyond_the_context_are_left_out(decoder: Bundle) -> None:
    shapes = bench._shapes(decoder, (1, 2), (16, 112, 113, 500), 16)
    assert shapes == [(1, 16), (1, 112), (2, 16), (2, 112)]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batches": ()}, "batches [] are not positive"),
        ({"lengths": (0,)}, "lengths [0] are not positive"),
        ({"new_tokens": 1}, "1 new tokens"),
        ({"lengths": (127,), "new_tokens": 2}, "beyond the model's 128"),
        ({"batches": (10**9,)}, "KV cache"),
        ({"seconds": 0.0}, "seconds is 0.0"),
        ({"threads": -1}, "threads is -1"),
        ({"against": "reference"}, "holds no reference variant"),
        ({"variant": "gone"}, "no variant 'gone'"),
    ],
)
def test_wishes_that_cannot_be_met(decoder: Bundle, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as refused:
        bench_decoder(decoder, **{"batches": (1,), "lengths": (8,), "new_tokens": 2, **options})
    assert says in str(refused.value)


def test_a_bundle_of_another_task(make_bundle: Callable[..., Bundle], recipe: Any) -> None:
    from session_graphs import linear

    other = make_bundle({"cpu-fp32": recipe(linear)})
    with pytest.raises(UsageError, match="is a tensors model, not a language model"):
        bench_decoder(other)


# Bandwidth --------------------------------------------------------------------------------------------------------


def test_weights_that_a_step_reads(tmp_path: Path) -> None:
    """The table is gathered from, the other weights are read whole: one inside the file, one beside it, one twice."""
    arrays = {"table": (100, 8), "first": (8, 16), "second": (16, 400), "unused": (3,)}
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("MatMul", ["x", "first"], ["y"]),
        helper.make_node("MatMul", ["y", "second"], ["z"]),
        helper.make_node("MatMul", ["y", "second"], ["w"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 400]) for name in "zw"],
        [numpy_helper.from_array(np.ones(shape, np.float32), name) for name, shape in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "inside.onnx")
    onnx.save(model, tmp_path / "beside.onnx", save_as_external_data=True, location="w.bin", size_threshold=1024)
    expected = 4 * (8 * 16 + 16 * 400)
    assert weight_bytes(tmp_path / "inside.onnx") == weight_bytes(tmp_path / "beside.onnx") == expected


def test_a_tied_table_is_read_whole(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("Transpose", ["table"], ["head"]),
        helper.make_node("MatMul", ["x", "head"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 100])],
        [numpy_helper.from_array(np.ones((100, 8), np.float32), "table")],
    )
    onnx.save(helper.make_model(graph), tmp_path / "m.onnx")
    assert weight_bytes(tmp_path / "m.onnx") == 3200


def test_weights_of_a_decoder(decoder: Bundle) -> None:
    """All but the embedding and the angles of the rotary embedding, of which only rows are read."""
    model = decoder_graphs.tiny_llama()
    read = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name)
    assert weight_bytes(decoder.path / "cpu-fp32.onnx") == 4 * read + 8  # and an index


def test_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"\x3a\xff\xff\xff")
    with pytest.raises(ProviderError, match=r"m.onnx is not an ONNX model"):
        weight_bytes(tmp_path / "m.onnx")
    with pytest.raises(ProviderError, match="is not an ONNX model"):
        weight_bytes(tmp_path / "gone.onnx")


def test_memory_bandwidth_is_that_of_a_computer() -> None:
    for threads in (0, 1, 3):
        assert 1e8 < memory_bandwidth(threads, most=1 << 24) < 1e13
