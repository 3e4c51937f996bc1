"""A large checkpoint through the whole compile: the same bundle as otherwise, and no float32 graph on the way."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from judging import Judged, Scale, brief
from tiny_decoders import write_decoder

from artifacts.bundle import Bundle
from artifacts.errors import FidelityError, ProviderError
from artifacts.target import CPU
from compiler.candidate import Candidate, Trial
from compiler.compile import compile_model
from compiler.export import streaming
from compiler.judge import Judge
from compiler.metrics import Budget
from passes.base import Context
from passes.deferred import DeferredTensor
from runtimes.client import Worker

SIZE = {"hidden_size": 160, "head_dim": 16, "intermediate_size": 192, "vocab_size": 512, "num_hidden_layers": 6}
Loaded = list[Path]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_decoder(tmp_path_factory.mktemp("llama") / "tiny", "Llama tied", **SIZE)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Loaded:
    """The graphs that were loaded by a child process."""
    paths: Loaded = []
    started = Worker.__init__

    def start(worker: Worker, model: Path, *args: object, **options: object) -> None:
        paths.append(model)
        started(worker, model, *args, **options)  # type: ignore[arg-type]  # handed on as they came

    monkeypatch.setattr(Worker, "__init__", start)
    return paths


def compiled(source: Path, out: Path, recipe: str, **options: object) -> Bundle:
    return compile_model(source, out, recipe=recipe, max_drop=0.3, **options)


def float32(path: Path) -> int:
    """Bytes of the large float32 tensors of a graph."""
    values = ir.load(path).graph.initializers.values()
    tensors = [value.const_value for value in values if value.const_value is not None]
    floats = [one.nbytes for one in tensors if one.dtype == ir.DataType.FLOAT and one.nbytes > 64 << 10]
    return sum(floats)


def test_the_same_bundle(llama: Path, tmp_path: Path, loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    with brief():
        whole = compiled(llama, tmp_path / "whole", "int8")
    assert whole.proof.variants[0].speed
    monkeypatch.setattr(streaming, "LARGE", 0)
    loaded.clear()
    lazy = compiled(llama, tmp_path / "lazy", "int8")
    one, other = whole.manifest.variants[0], lazy.manifest.variants[0]
    assert (one.weights, one.pipeline) == (other.weights, other.pipeline)
    assert other.tolerance <= one.tolerance  # that of the result; else also of what was on the way
    assert (whole.path / one.model).read_bytes() == (lazy.path / other.model).read_bytes()
    proof = lazy.proof.variants[0]
    assert proof.status == "proven"
    assert proof.speed == ()
    assert "stayed in the checkpoint" in proof.reason
    assert proof.fidelity == whole.proof.variants[0].fidelity
    waited = [step for step in proof.steps if step.reason.startswith("judged with what follows")]
    assert waited
    assert all(step.kept for step in waited)


def test_no_float32_graph_is_loaded(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "LARGE", 0)
    seen: list[int] = []
    started = Worker.__init__

    def start(worker: Worker, model: Path, *args: object, **options: object) -> None:
        seen.append(float32(model))
        started(worker, model, *args, **options)  # type: ignore[arg-type]  # handed on as they came

    monkeypatch.setattr(Worker, "__init__", start)
    compiled(llama, tmp_path / "out", "int8")
    assert seen
    assert not any(seen)


def test_float32_is_still_there_for_who_asks(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "LARGE", 0)
    bundle = compiled(llama, tmp_path / "out", "reference")
    proof = bundle.proof.variants[0]
    assert 0.0 < proof.golden_error < 1e-4
    assert proof.fidelity[0].drop == pytest.approx(0.0, abs=1e-4)


@pytest.mark.slow
def test_what_does_not_stand_as_a_whole_is_tried_step_by_step(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "LARGE", 0)
    with contextlib.suppress(FidelityError):
        bundle = compile_model(llama, tmp_path / "out", recipe="int8", max_drop=0.02)
        proof = bundle.proof.variants[0]
        assert proof.fidelity[0].drop <= 0.02
        assert not all(step.kept for step in proof.steps if step.changed)
        assert not any("follows" in step.reason for step in proof.steps)


def waiting(judged: Judged, factor: float = 1.0) -> Candidate:
    """The judged encoder with its matrices deferred, the first layer norm scaled."""
    model = judged.model
    if factor != 1.0:
        Scale(factor).run(model, Context(CPU))
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes >= 16 << 10:
            array = tensor.numpy()
            value.const_value = DeferredTensor(lambda a=array: a, ir.DataType.FLOAT, array.shape, value.name)
    return judged.candidate(model)


def test_what_waits_is_judged_with_what_rounds_it(judged: Judged, loaded: Loaded) -> None:
    with judged.judge("not here") as judge:
        judge.deferring = True
        base = judge.enthrone(waiting(judged))
        exact = judge.judge(Trial("exact", waiting(judged), lossy=False, must_gain=True, changed=1))
        assert exact.kept
        assert not loaded
        wrong = judge.judge(Trial("lossy", waiting(judged, -400.0), lossy=True, must_gain=False, changed=1))
        assert not wrong.kept
        assert wrong.miss
        right = judge.judge(Trial("lossy", waiting(judged, 1.0001), lossy=True, must_gain=False, changed=1))
        assert right.kept
        assert loaded
        assert judge.settled(right.candidate) is right.candidate
        assert judge.settled(base).error > 0.0


def test_a_search_that_rounds_nothing_is_judged_at_its_end(judged: Judged) -> None:
    with judged.judge("not here", budget=Budget("cosine_mean", 0.01)) as judge:
        judge.deferring = True
        judge.enthrone(waiting(judged))
        exact = judge.judge(Trial("exact", waiting(judged, -400.0), lossy=False, must_gain=True, changed=1))
        assert exact.kept
        with pytest.raises(ProviderError, match="computes the unoptimized model wrongly"):
            judge.settled(exact.candidate)


def test_graphs_on_disk_are_judged_as_ever(judged: Judged, loaded: Loaded) -> None:
    judge: Judge
    with judged.judge("not here") as judge:
        judge.deferring = True
        assert judge.enthrone(judged.candidate()).error > 0.0
    assert len(loaded) == 1
    assert np.isfinite(judged.evidence.golden.outputs["sentence_embedding"]).all()
