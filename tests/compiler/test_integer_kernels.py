"""The forms that passes emit really run in integer kernels: asked of the profiler, not of the graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from artifacts.manifest import SessionOptions
from artifacts.target import CPU, OPENVINO, Target
from compiler.integer_kernels import IntegerKernels, count_integer_kernels, integer_kernel_note, quantized_products
from compiler.lone import lone_model, rewritten
from passes.base import Pass
from passes.quantize import DynamicInt8, StaticInt8, WeightInt8
from runtimes.client import Worker
from runtimes.providers import probe

CASES = [
    (CPU, StaticInt8()),
    (CPU, StaticInt8(integer_output=True)),
    (CPU, DynamicInt8()),
    (CPU, WeightInt8()),
    (OPENVINO, StaticInt8()),
]


@pytest.mark.parametrize(("target", "form"), CASES, ids=str)
def test_every_product_is_one_of_integers(target: Target, form: Pass, tmp_path: Path) -> None:
    if not probe(target.provider).ok:
        pytest.skip(f"{target.provider} does not work here")
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(64, 64)).astype(np.float32), rng.normal(size=64).astype(np.float32)
    sample = rng.normal(size=(32, 64)).astype(np.float32)
    for name, wanted, integer in (("float", None, 0), ("int8", form, 2)):
        model = rewritten(lone_model(weight, bias, copies=2), wanted, target, sample)
        assert model is not None
        ir.save(model, tmp_path / f"{name}.onnx")
        feeds = {"x0": sample, "x1": sample}
        with Worker(tmp_path / f"{name}.onnx", target.provider, options=SessionOptions(precision="fp32")) as worker:
            found = count_integer_kernels(model, worker, feeds)
            note = integer_kernel_note(model, worker, feeds)
        assert found == IntegerKernels(integer, integer)
        assert note == ("2 of 2 quantized products ran in integer kernels" if integer else "")


def test_products_that_fell_back_to_floats_are_told(tmp_path: Path) -> None:
    """The form for OpenVINO on another provider, where no optimizer makes one kernel of it."""
    rng = np.random.default_rng(1)
    weight, sample = rng.normal(size=(64, 64)).astype(np.float32), rng.normal(size=(32, 64)).astype(np.float32)
    model = rewritten(lone_model(weight, np.zeros(64, np.float32)), StaticInt8(), OPENVINO, sample)
    assert model is not None
    ir.save(model, tmp_path / "int8.onnx")
    plain = SessionOptions(optimization_level="disabled")
    with Worker(tmp_path / "int8.onnx", CPU.provider, options=plain) as worker:
        assert integer_kernel_note(model, worker, {"x0": sample}) == "0 of 1 quantized products ran in integer kernels"


def test_what_cannot_be_counted_is_no_failure(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    weight, sample = rng.normal(size=(64, 64)).astype(np.float32), rng.normal(size=(32, 64)).astype(np.float32)
    model = rewritten(lone_model(weight, np.zeros(64, np.float32)), StaticInt8(), CPU, sample)
    assert model is not None
    ir.save(model, tmp_path / "int8.onnx")
    with Worker(tmp_path / "int8.onnx", CPU.provider) as worker:
        note = integer_kernel_note(model, worker, {"x0": sample[:, :3]})
        assert note.startswith("integer kernels could not be counted: ")
        worker.provider = "CUDAExecutionProvider"
        assert integer_kernel_note(model, worker, {"x0": sample}) == ""


def test_quantized_products_of_a_graph() -> None:
    """Integers on both sides: weights that are unpacked to floats before a float product do not count."""
    rng = np.random.default_rng(3)
    weight, bias = rng.normal(size=(32, 16)).astype(np.float32), np.zeros(16, np.float32)
    sample = rng.normal(size=(8, 32)).astype(np.float32)
    for target, form in CASES:
        model = rewritten(lone_model(weight, bias, copies=3), form, target, sample)
        assert model is not None
        assert quantized_products(model) == 3
    model = rewritten(lone_model(weight, bias, copies=1), StaticInt8(), OPENVINO, sample)
    assert model is not None
    next(node for node in model.graph if node.op_type == "MatMul").replace_input_with(0, model.graph.inputs[0])
    assert quantized_products(model) == 0
    assert quantized_products(lone_model(weight, bias)) == 0
