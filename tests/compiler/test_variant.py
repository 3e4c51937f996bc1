from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from judging import Judged, crafted, faster

from artifacts.bundle import Bundle
from artifacts.errors import PassError, ProviderError
from artifacts.manifest import SessionOptions
from artifacts.target import CPU, CPU_PROVIDER, CUDA, OPENVINO
from compiler.recipe import Recipe
from compiler.variant import Workshop
from runtimes.client import Timings, Worker
from runtimes.golden import relative_error
from runtimes.providers import Probe

PLAIN = Recipe("plain", "A little.", True, {"default": ("clean", "dynamic-int8", "finish")})


@pytest.fixture
def workshop(judged: Judged, tmp_path: Path) -> Workshop:
    with faster():
        return Workshop(
            judged.evidence,
            judged.observe,
            judged.folder,
            0,
            tmp_path / "reproducer",
            lambda text, share: None,
            judged.model,
            {},
        )


@pytest.fixture
def absent(workshop: Workshop) -> None:
    """Only the CPU is here."""
    others = (CUDA.provider, OPENVINO.provider)
    workshop.probes = {provider: Probe(provider, False, "no such device", ()) for provider in others}


def test_the_reference_is_the_exported_graph_in_standard_operators(judged: Judged, workshop: Workshop) -> None:
    built = workshop.reference()
    assert built.planned.id == "reference"
    assert built.proof.status == "proven"
    assert built.proof.speed == ()
    assert built.proof.golden_error < built.planned.tolerance < 1e-4
    assert all(node.domain == "" for node in built.candidate.model.graph)
    session = ort.InferenceSession(built.candidate.graph.path, providers=[CPU_PROVIDER])
    feeds, outputs = judged.evidence.golden
    found = session.run(None, dict(feeds))[0]
    assert relative_error(found, outputs["sentence_embedding"]) < built.planned.tolerance


def test_a_wrong_export_is_refused(judged: Judged, tmp_path: Path) -> None:
    import onnx_ir as ir

    model = judged.model
    value = model.graph.initializers["encoder.layer.1.query.weight"]
    assert value.const_value is not None
    altered = value.const_value.numpy().copy()
    altered[3, 5] += 0.5
    value.const_value = ir.tensor(altered, name=value.name)
    workshop = Workshop(
        judged.evidence, judged.observe, judged.folder, 0, tmp_path, lambda text, share: None, model, {}
    )
    with pytest.raises(ProviderError, match="computes the unoptimized model wrongly"):
        workshop.reference()
    with pytest.raises(ProviderError, match="computes the unoptimized model wrongly"):
        workshop.build(CPU, PLAIN, start=0.0, span=1.0)


def test_a_recipe_that_is_taken_as_it_is_may_be_slower(workshop: Workshop) -> None:
    with faster(1.5, proof=0.7):
        built = workshop.build(CPU, replace(PLAIN, tune=False), start=0.0, span=1.0)
    assert built.planned.precision == "int8"
    assert built.proof.reason.endswith("slower than the unoptimized graph here; the recipe plain takes it as it is")


def test_what_is_slower_as_a_whole_is_reverted_as_a_whole(workshop: Workshop) -> None:
    with faster(1.5, proof=0.7):
        built = workshop.build(CPU, PLAIN, start=0.0, span=1.0)
    reference = workshop.reference()
    assert built.planned.id == "cpu-int8"
    assert built.candidate.graph == reference.candidate.graph
    assert (built.planned.precision, built.planned.pipeline) == ("fp32", reference.planned.pipeline)
    assert built.proof.reason == "slower than the unoptimized graph as a whole: everything was reverted"
    assert built.proof.status == "proven"
    assert any(step.kept for step in built.proof.steps), "the report still tells what was tried"


def test_one_shape_that_is_faster_keeps_it(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    from compiler.prove import is_slower

    with faster(1.5):
        built = workshop.build(CPU, PLAIN, start=0.0, span=1.0)
    assert [speed.ratio for speed in built.proof.speed] == pytest.approx([1.5, 1.5, 1.5])
    slow = tuple(replace(speed, ratio=0.5, low=0.4, high=0.6) for speed in built.proof.speed)
    assert is_slower(slow)
    assert not is_slower((*slow[:2], built.proof.speed[2]))
    assert not is_slower(())


def test_a_loss_is_raced_again_in_new_processes(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    pids: set[int] = set()
    luck = iter((0.97, 1.0))

    def interleave(workers: Mapping[str, Worker], *given: object, **options: object) -> Timings:
        pids.update(worker.pid for worker in workers.values())
        return crafted(next(luck))(workers, *given, **options)

    with faster(1.5):
        monkeypatch.setattr("compiler.prove.interleave", interleave)
        built = workshop.build(CPU, PLAIN, start=0.0, span=1.0)
    assert len(pids) == 4
    assert built.planned.precision == "int8", "it stays: the second time it was as fast"
    assert all(speed.low < speed.ratio < speed.high for speed in built.proof.speed)


def test_an_absent_target_is_unproven_and_never_timed(
    workshop: Workshop, absent: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*given: object, **options: object) -> None:
        raise AssertionError("timed")

    monkeypatch.setattr("compiler.judge.interleave", never)
    monkeypatch.setattr("compiler.prove.interleave", never)
    recipe = replace(PLAIN, stages={"default": ("clean", "float16", "finish")})
    built = workshop.build(CUDA, recipe, start=0.0, span=1.0)
    proof = built.proof
    assert (built.planned.id, built.planned.precision) == ("cuda-fp16", "fp16")
    assert (proof.status, proof.provider, proof.machine, proof.speed) == ("unproven", "", None, ())
    assert proof.reason == "no such device"
    assert 1e-5 < proof.golden_error < built.planned.tolerance < 0.1
    assert proof.fidelity[0].drop < 0.01
    kept = [step for step in proof.steps if step.kept]
    assert all(step.reason.startswith(proof.reason) for step in kept)
    entry = built.manifest_entry()
    assert entry.providers == CUDA.providers
    assert entry.model == "cuda-fp16.onnx"
    assert entry.weights == built.candidate.graph.weights


def test_an_absent_openvino_is_asked_to_compute_in_what_was_judged(workshop: Workshop, absent: None) -> None:
    built = workshop.build(OPENVINO, PLAIN, start=0.0, span=1.0)
    assert built.planned.session == SessionOptions(precision="fp32")
    assert built.proof.reason == "no such device"
    assert built.planned.precision == "int8"


def test_replay_gives_the_same_graph(workshop: Workshop) -> None:
    with faster():
        built = workshop.build(CPU, PLAIN, start=0.0, span=1.0)
        again = workshop.replay(built.planned)
    assert again.planned == built.planned
    assert again.candidate.graph.path.read_bytes() == built.candidate.graph.path.read_bytes()
    assert again.candidate.graph.weights == built.candidate.graph.weights
    assert again.manifest_entry() == built.manifest_entry()
    assert len(again.proof.steps) == 1
    assert again.proof.steps[0].reason.startswith("as planned")
    narrow = replace(built.planned, tolerance=built.proof.golden_error / 2)
    with pytest.raises(PassError, match=r"the plan does not hold here: cpu-int8 is off by .* the plan allows"):
        workshop.replay(narrow)


def test_the_bundle_lists_what_was_built(encoder_bundle: Bundle) -> None:
    int8, cuda, reference = encoder_bundle.manifest.variants
    assert [variant.id for variant in encoder_bundle.manifest.variants] == ["cpu-int8", cuda.id, "reference"]
    assert (int8.precision, int8.target, int8.providers) == ("int8", "cpu", (CPU_PROVIDER,))
    assert "static-int8" in int8.pipeline or "dynamic-int8" in int8.pipeline
    assert "dynamic-int8" not in reference.pipeline
    assert int8.tolerance > reference.tolerance
    assert encoder_bundle.size("cpu-int8") < 0.4 * encoder_bundle.size("reference")
    for proof, variant in zip(encoder_bundle.proof.variants, encoder_bundle.manifest.variants, strict=True):
        assert proof.variant == variant.id
        assert proof.golden_error <= variant.tolerance
        assert proof.size == encoder_bundle.size(variant.id)
    feeds: Callable[[str], np.ndarray] = np.load(encoder_bundle.path / "golden.npz").__getitem__
    for variant in encoder_bundle.manifest.variants:
        session = ort.InferenceSession(encoder_bundle.path / variant.model, providers=[CPU_PROVIDER])
        given = {value.name: feeds(f"input.{value.name}") for value in session.get_inputs()}
        (found,) = session.run(["sentence_embedding"], given)
        assert relative_error(found, feeds("output.sentence_embedding")) <= variant.tolerance
