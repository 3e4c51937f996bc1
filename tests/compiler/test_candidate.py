from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from judging import Judged

from artifacts.target import CPU
from compiler.lone import lone_model, rewritten
from passes.base import Outcome
from passes.quantize.weight_only import WeightOnly


@pytest.mark.parametrize(
    ("bits", "precision"), [((8,), "int8"), ((4,), "int4"), ((8, 4), "int4"), ((4, 8), "int4"), ((2, 8), "int2")]
)
def test_a_candidate_is_called_after_its_narrowest_weights(
    judged: Judged, bits: tuple[int, ...], precision: str
) -> None:
    results = tuple((WeightOnly(bits=count), Outcome(1)) for count in bits)
    made = judged.candidate().rewritten(judged.model, judged.folder, results)
    assert made.precision == precision


def test_a_pass_that_changed_nothing_names_nothing(judged: Judged) -> None:
    made = judged.candidate().rewritten(judged.model, judged.folder, ((WeightOnly(), Outcome(0)),))
    assert made.precision == "fp32"


def test_a_lone_operator_takes_forms_that_need_second_moments() -> None:
    rng = np.random.default_rng(0)
    weight, sample = (rng.standard_normal(shape).astype(np.float32) for shape in ((64, 32), (256, 64)))
    model = rewritten(lone_model(weight, np.zeros(32, np.float32)), WeightOnly(method="gptq"), CPU, sample)
    assert isinstance(model, ir.Model)
    assert [node.op_type for node in model.graph] == ["MatMulNBits"]
