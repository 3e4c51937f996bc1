from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import psutil
import pytest
from judging import Interleave, Judged, Scale, crafted
from session_graphs import WIDTH, linear, weight

from artifacts.errors import ProviderError
from artifacts.manifest import SessionOptions
from artifacts.target import CPU, CPU_PROVIDER
from compiler.calibrate import tensor_batches
from compiler.candidate import Candidate, Trial, Verdict
from compiler.evidence import Evidence
from compiler.graphs import SavedGraph
from compiler.judge import GAIN, LOSS, Judge
from compiler.metrics import Budget
from compiler.tolerance import rounding_tolerance
from passes.base import Context, Outcome, Pass
from passes.pipeline import Pipeline
from runtimes.client import Timings
from runtimes.golden import Golden


def trial(candidate: Candidate, *, lossy: bool = False, must_gain: bool = False, required: bool = False) -> Trial:
    return Trial("a change", candidate, lossy, must_gain, changed=1, required=required)


def scaled(judged: Judged, factor: float) -> Candidate:
    model = judged.model
    assert Scale(factor).run(model, Context(CPU)).changed == 1
    return judged.candidate(model)


def alive(judge: Judge) -> int:
    """Process id of the reigning candidate's child, which lives."""
    assert judge._reigning is not None
    assert psutil.pid_exists(judge._reigning.pid)
    return judge._reigning.pid


@pytest.fixture(scope="module")
def enthroned(judged: Judged) -> Iterator[Judge]:
    """For trials that must not stay."""
    with judged.judge() as judge:
        judge.enthrone(judged.candidate())
        reigning = judge._reigning
        yield judge
        assert judge._reigning is reigning, "a rejected trial took the throne"
        pid = alive(judge)
    assert not psutil.pid_exists(pid)


@pytest.fixture
def fresh(judged: Judged) -> Iterator[Judge]:
    with judged.judge() as judge:
        judge.enthrone(judged.candidate())
        yield judge


def test_the_first_candidate_is_measured(judged: Judged) -> None:
    with judged.judge() as judge:
        candidate = judge.enthrone(judged.candidate())
    assert 0.0 < candidate.error < candidate.tolerance < 1e-4


def test_a_first_candidate_with_other_numbers_than_the_original_is_refused(judged: Judged) -> None:
    with judged.judge() as judge, pytest.raises(ProviderError) as raised:
        judge.enthrone(scaled(judged, 1.01))
    assert "CPUExecutionProvider computes the unoptimized model wrongly: relative error" in str(raised.value)


def test_an_exact_change_with_other_numbers_is_rejected(judged: Judged, enthroned: Judge) -> None:
    verdict = enthroned.judge(trial(scaled(judged, 1.01)))
    assert not verdict.kept
    assert verdict.reason.startswith("numbers: relative error ")
    assert verdict.reason.endswith(f" over {verdict.candidate.tolerance:.1e}")
    assert verdict.candidate.error > 10 * verdict.candidate.tolerance
    assert verdict.miss == ""


def test_a_graph_that_does_not_load_is_rejected(judged: Judged, enthroned: Judge) -> None:
    model = judged.model
    next(node for node in model.graph if node.op_type == "Gelu").domain = "com.microsoft"
    next(node for node in model.graph if node.op_type == "Gelu").op_type = "Gelu2"
    verdict = enthroned.judge(trial(judged.candidate(model)))
    assert not verdict.kept
    assert verdict.reason.startswith("does not load: ")
    assert "Gelu2" in verdict.reason


def test_a_graph_that_does_not_run_is_rejected(judged: Judged, enthroned: Judge) -> None:
    model = judged.model
    value = next(node for node in model.graph if node.op_type == "Reshape").inputs[1]
    assert value is not None
    value.const_value = ir.tensor(np.array([7, 7, 7, 7], np.int64), name=value.name)
    verdict = enthroned.judge(trial(judged.candidate(model)))
    assert not verdict.kept
    assert verdict.reason.startswith("does not run: ")


def test_a_lossy_change_over_budget_is_rejected_with_its_miss(judged: Judged, enthroned: Judge) -> None:
    verdict = enthroned.judge(trial(scaled(judged, 40.0), lossy=True))
    assert not verdict.kept
    assert verdict.miss.startswith("cosine_mean drops by ")
    assert verdict.reason == f"quality: {verdict.miss}"


def test_a_lossy_change_within_budget_stays_and_widens_the_tolerance(
    judged: Judged, fresh: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compiler.judge.interleave", crafted(1.2))
    before = alive(fresh)
    candidate = scaled(judged, 1.05)
    verdict = fresh.judge(trial(candidate, lossy=True))
    assert verdict.kept
    assert verdict.reason == "1.20x"
    assert (verdict.ratio, verdict.miss) == (pytest.approx(1.2), "")
    assert verdict.ms == pytest.approx(10 / 1.2)
    assert verdict.candidate.error > 10 * candidate.tolerance
    assert verdict.candidate.tolerance == pytest.approx(2 * verdict.candidate.error)
    assert alive(fresh) != before
    assert not psutil.pid_exists(before)


def test_numbers_that_are_not_finite_never_stay(judged: Judged, enthroned: Judge) -> None:
    model = judged.model
    value = model.graph.initializers["encoder.layer.0.gamma"]
    assert value.const_value is not None
    value.const_value = ir.tensor(np.full_like(value.const_value.numpy(), np.nan), name="nan")
    generous = Budget("cosine_mean", 2.0)
    assert not enthroned.judge(trial(judged.candidate(model))).kept
    with judged.judge(unmeasured="not here", budget=generous) as judge:
        judge.enthrone(judged.candidate())
        verdict = judge.judge(trial(judged.candidate(model), lossy=True))
    assert not verdict.kept
    assert math.isinf(verdict.candidate.error)


def test_what_only_holds_with_the_optimizations_is_rejected(
    judged: Judged, enthroned: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = iter((1e-7, 0.5))
    monkeypatch.setattr("compiler.evidence.golden_error", lambda worker, golden: next(measured))
    verdict = enthroned.judge(trial(judged.candidate()))
    assert not verdict.kept
    assert verdict.reason == "numbers: 5.0e-01 off without ONNX Runtime's optimizations, 1.0e-07 with them"


def timed(
    judge: Judge, judged: Judged, patch: pytest.MonkeyPatch, *ratios: float, must_gain: bool
) -> tuple[Verdict, list[int]]:
    asked: list[int] = []
    patch.setattr("compiler.judge.interleave", crafted(*ratios, asked=asked))
    return judge.judge(trial(judged.candidate(), must_gain=must_gain)), asked


def test_slower_is_reverted(judged: Judged, enthroned: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict, asked = timed(enthroned, judged, monkeypatch, 0.8, must_gain=False)
    assert (verdict.kept, verdict.reason) == (False, "0.80x: slower")
    assert len(asked) == 1
    verdict, asked = timed(enthroned, judged, monkeypatch, LOSS - 0.01, must_gain=False)
    assert not verdict.kept
    assert len(asked) > 1, "a close call takes more rounds"


def in_turn(*ratios: float) -> Interleave:
    """Timings that differ from call to call: as if each pair of processes had its own luck."""
    luck = iter(ratios)

    def interleave(*given: object, **options: object) -> Timings:
        return crafted(next(luck))(*given, **options)

    return interleave


@pytest.mark.parametrize(
    ("must_gain", "ratios", "kept"),
    [(False, (0.98, 1.0, 0.98), True), (False, (0.98, 0.98, 0.98), False), (True, (1.03, 0.98, 1.03), False)],
)
def test_a_close_call_is_measured_in_new_processes(
    judged: Judged,
    fresh: Judge,
    monkeypatch: pytest.MonkeyPatch,
    must_gain: bool,
    ratios: tuple[float, ...],
    kept: bool,
) -> None:
    before = alive(fresh)
    monkeypatch.setattr("compiler.judge.interleave", in_turn(*ratios))
    verdict = fresh.judge(trial(judged.candidate(), must_gain=must_gain))
    assert verdict.kept is kept
    assert not psutil.pid_exists(before)
    assert fresh.operators_at_load(), "whichever reigns, it runs"


def test_the_form_that_others_build_on_stays_though_it_is_timed_slower(
    judged: Judged, fresh: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small model is timed a hundredth slower by luck now and then, and nothing would be found in it afterwards."""
    monkeypatch.setattr("compiler.judge.interleave", crafted(0.9))
    verdict = fresh.judge(replace(trial(judged.candidate()), regardless="part of the reference"))
    assert (verdict.kept, verdict.reason) == (True, "0.90x: part of the reference")


def test_as_fast_stays_where_speed_is_not_the_purpose(
    judged: Judged, fresh: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdict, _ = timed(fresh, judged, monkeypatch, 0.995, must_gain=False)
    assert (verdict.kept, verdict.reason) == (True, "0.99x")
    verdict, _ = timed(fresh, judged, monkeypatch, 0.9, 1.0, must_gain=False)
    assert verdict.kept, "where the rounds disagree, nothing is clearly slower"


def test_what_is_for_speed_must_be_faster(judged: Judged, enthroned: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    for ratios in ((0.8,), (1.0,), (GAIN - 0.005,), (0.98, 1.1, 1.1, 0.99, 1.1, 0.97)):
        verdict, _ = timed(enthroned, judged, monkeypatch, *ratios, must_gain=True)
        assert not verdict.kept, ratios
        assert verdict.reason.endswith("x: not faster")


def test_what_is_for_speed_and_is_faster_stays(judged: Judged, fresh: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict, asked = timed(fresh, judged, monkeypatch, GAIN + 0.01, must_gain=True)
    assert verdict.kept
    assert len(asked) > 1
    verdict, asked = timed(fresh, judged, monkeypatch, 1.3, must_gain=True)
    assert verdict.kept
    assert len(asked) == 1


def test_unmeasured_and_required_changes_stay_untimed(judged: Judged, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("compiler.judge.interleave", crafted(0.1, asked=asked))
    with judged.judge(unmeasured="the target is not here") as judge:
        judge.enthrone(judged.candidate())
        verdict = judge.judge(trial(judged.candidate(), must_gain=True))
        assert (verdict.kept, verdict.reason, verdict.ratio) == (True, "the target is not here", 1.0)
        assert not judge.judge(trial(scaled(judged, 1.01))).kept
    with judged.judge() as judge:
        judge.enthrone(judged.candidate())
        verdict = judge.judge(trial(judged.candidate(), must_gain=True, required=True))
        assert (verdict.kept, verdict.reason) == (True, "the target needs it")
    assert asked == []


def test_what_onnx_runtime_fused_at_load_is_seen(judged: Judged, enthroned: Judge) -> None:
    assert "SkipLayerNormalization" in enthroned.operators_at_load()
    with judged.judge() as empty:
        assert empty.operators_at_load() == set()


def tensors(path: Path) -> tuple[Candidate, Evidence]:
    """A candidate of the linear model, and what to judge it by."""
    x = np.random.default_rng(2).standard_normal((16, WIDTH)).astype(np.float32)
    model = ir.load(path)
    golden = Golden({"x": x}, {"y": x @ weight()})
    evidence = Evidence(
        "tensors",
        golden,
        ({"x": x},),
        golden.outputs,
        (),
        "x",
        None,
        None,
        Budget("relative_l2", 0.01),
        ({"x": x},),
        {},
        tensor_batches([{"x": x}]),
    )
    graph = SavedGraph(path, (), path.stat().st_size)
    return Candidate(model, graph, Pipeline(), SessionOptions(), rounding_tolerance(model)), evidence


def test_really_faster_and_really_slower(tmp_path: Path) -> None:
    heavy, evidence = tensors(linear(tmp_path / "heavy.onnx", ballast=40))
    light, _ = tensors(linear(tmp_path / "light.onnx"))
    with Judge(evidence, CPU_PROVIDER, threads=1) as judge:
        judge.enthrone(heavy)
        verdict = judge.judge(trial(light, must_gain=True))
        assert verdict.kept
        assert verdict.ratio > 2.0
        assert verdict.ms > 0.0
        verdict = judge.judge(trial(heavy))
        assert not verdict.kept
        assert verdict.ratio < 0.5
        assert verdict.reason.endswith(": slower")


def test_a_loose_tolerance_is_bounded(judged: Judged) -> None:
    """A variant whose tolerance is beyond 1 could not be written into a manifest."""
    with judged.judge(unmeasured="not here", budget=Budget("cosine_mean", 2.0)) as judge:
        judge.enthrone(judged.candidate())
        verdict = judge.judge(trial(scaled(judged, -400.0), lossy=True))
    assert verdict.candidate.error > 0.5
    assert verdict.candidate.tolerance <= 1.0
    assert verdict.kept == (verdict.candidate.error <= 1.0)


def test_a_candidate_keeps_the_narrowest_precision(judged: Judged) -> None:
    from passes.precision import Float16
    from passes.quantize import DynamicInt8

    candidate = judged.candidate()

    def after(*passes: Pass, changed: int = 1) -> Candidate:
        results = tuple((item, Outcome(changed)) for item in passes)
        return candidate.rewritten(judged.model, judged.folder, results)

    assert after(Scale()).precision == "fp32"
    assert after(Float16()).precision == "fp16"
    assert after(DynamicInt8(), changed=0).precision == "fp32"
    quantized = after(Scale(), DynamicInt8(), Scale(2.0))
    assert quantized.precision == "int8"
    assert str(quantized.pipeline) == "scale; dynamic-int8; scale(factor=2.0)"
