"""The forms that passes emit really run in integer kernels: asked of the profiler, not of the graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from artifacts.manifest import SessionOptions
from artifacts.target import CPU, OPENVINO, Target
from compiler.lone import lone_model, rewritten
from passes.base import Pass
from passes.quantize import DynamicInt8, StaticInt8, WeightInt8
from runtimes.client import Worker
from runtimes.providers import probe

CASES = [(CPU, StaticInt8()), (CPU, DynamicInt8()), (CPU, WeightInt8()), (OPENVINO, StaticInt8())]


@pytest.mark.parametrize(("target", "form"), CASES, ids=str)
def test_every_product_is_one_of_integers(target: Target, form: Pass, tmp_path: Path) -> None:
    if not probe(target.provider).ok:
        pytest.skip(f"{target.provider} does not work here")
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(64, 64)).astype(np.float32), rng.normal(size=64).astype(np.float32)
    sample = rng.normal(size=(32, 64)).astype(np.float32)
    for name, found, integer in (("float", None, 0), ("int8", form, 2)):
        model = rewritten(lone_model(weight, bias, copies=2), found, target, sample)
        assert model is not None
        ir.save(model, tmp_path / f"{name}.onnx")
        with Worker(tmp_path / f"{name}.onnx", target.provider, options=SessionOptions(precision="fp32")) as worker:
            kernels = worker.profile({"x0": sample, "x1": sample}, runs=3)
        assert sum(kernel.integer for kernel in kernels) == integer, kernels
