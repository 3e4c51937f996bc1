from __future__ import annotations

import json
import os
import signal
import subprocess
from functools import partial
from pathlib import Path

import pytest
from session_graphs import linear

from artifacts.errors import BundleError, ProviderError, UsageError
from artifacts.target import CPU_PROVIDER, CUDA_PROVIDER, OPENVINO_PROVIDER
from runtimes import remember
from runtimes.client import Worker
from runtimes.decide import CandidateResult, Decision, decide, find_short, start
from runtimes.golden import load_golden

SLOW = partial(linear, ballast=12)
WRONG = partial(linear, scale=1.01)
BOTH = (OPENVINO_PROVIDER, CPU_PROVIDER)


def broken(path: Path) -> None:
    path.write_bytes(b"no model")


def by_name(decision: Decision) -> dict[str, CandidateResult]:
    return {candidate.name: candidate for candidate in decision.candidates}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The candidates of these tests differ by far more than the noise of two short blocks."""
    monkeypatch.setattr("runtimes.decide._ROUNDS", 2)
    monkeypatch.setattr("runtimes.decide._BLOCK_SECONDS", 0.0)


@pytest.fixture
def no_child(monkeypatch):
    """Any child process from here on is an error."""

    def forbid() -> None:
        def refuse(*_args, **_options):
            raise AssertionError("a child process was started")

        monkeypatch.setattr(subprocess, "Popen", refuse)

    return forbid


def test_a_lone_candidate_needs_no_child_and_no_cache(make_bundle, recipe, no_child, own_cache):
    bundle = make_bundle({"only": recipe(linear)})
    no_child()
    decision = decide(bundle)
    assert (decision.variant, decision.provider, decision.device) == ("only", CPU_PROVIDER, "cpu")
    assert decision.reason == "only on cpu: the only candidate"
    assert decision.candidates[0].status == "chosen"
    assert not decision.cached
    assert not list(own_cache.iterdir())


def test_start_gives_a_session_that_passed(make_bundle, recipe):
    bundle = make_bundle({"only": recipe(linear)})
    decision, session = start(bundle, threads=1)
    golden = load_golden(bundle)
    assert session.run(golden.feeds)["y"].shape == golden.outputs["y"].shape
    assert (session.provider, session.threads) == (decision.provider, 1)


def test_a_lone_candidate_that_is_wrong_or_broken(make_bundle, recipe):
    for build, said in ((WRONG, "golden error 0.01, allowed 0.0001"), (broken, r"cpu cannot load only\.onnx")):
        with pytest.raises(ProviderError, match=rf"nothing here runs this bundle correctly\. only on cpu: .*{said}"):
            decide(make_bundle({"only": recipe(build)}))


def test_the_fastest_correct_one_wins_and_is_remembered(make_bundle, recipe, no_child):
    bundle = make_bundle({"slow": recipe(SLOW), "fast": recipe(linear), "wrong": recipe(WRONG), "bad": recipe(broken)})
    decision = decide(bundle)
    found = by_name(decision)
    assert decision.variant == "fast"
    assert decision.reason.startswith("fast on cpu: ")
    assert "times as fast as slow on cpu, 2 candidates work here" in decision.reason
    assert {name: one.status for name, one in found.items()} == {
        "slow on cpu": "slower",
        "fast on cpu": "chosen",
        "wrong on cpu": "wrong",
        "bad on cpu": "failed",
    }
    assert found["wrong on cpu"].error == pytest.approx(0.01, rel=1e-3)
    assert found["fast on cpu"].error < found["fast on cpu"].ms < found["slow on cpu"].ms
    assert "cannot load bad.onnx" in found["bad on cpu"].reason
    no_child()
    again = decide(bundle)
    assert again.cached
    assert (again.reason, again.candidates) == (decision.reason, decision.candidates)


def test_other_wishes_bundles_and_machines_are_decided_anew(make_bundle, recipe, monkeypatch, own_cache):
    recipes = {"slow": recipe(SLOW), "fast": recipe(linear)}
    bundle = make_bundle(recipes)
    decide(bundle)
    assert decide(bundle).cached
    assert not decide(bundle, cache=False).cached
    assert not decide(bundle, threads=1).cached
    assert not decide(bundle, device="cpu").cached
    monkeypatch.setattr(remember, "fingerprint", lambda: "another machine")
    assert not decide(bundle).cached
    assert decide(bundle).cached
    assert not decide(make_bundle(recipes | {"third": recipe(SLOW)})).cached
    assert len(list((own_cache / "decisions").iterdir())) == 5


def test_a_corrupt_cache_is_ignored(make_bundle, recipe, own_cache):
    bundle = make_bundle({"slow": recipe(SLOW), "fast": recipe(linear)})
    decide(bundle)
    (file,) = (own_cache / "decisions").iterdir()
    whole = file.read_text()
    for damaged in (
        "",
        "{",
        "[]",
        whole.replace('"schema": 1', '"schema": 2'),
        json.dumps(json.loads(whole) | {"extra": 1}),
        whole + " " * (1 << 21),
    ):
        file.write_text(damaged)
        assert remember.recall(file.stem) is None
    for damaged in (whole.replace('"fast"', '"gone"'), whole.replace(CPU_PROVIDER, "MagicExecutionProvider")):
        file.write_text(damaged)
        decision = decide(bundle)
        assert (decision.variant, decision.cached) == ("fast", False)
        assert decide(bundle).cached


def test_a_cache_that_cannot_be_written_is_no_error(make_bundle, recipe, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("HASTEN_CACHE_DIR", str(tmp_path / "file"))
    bundle = make_bundle({"slow": recipe(SLOW), "fast": recipe(linear)})
    assert decide(bundle).variant == "fast"
    assert not decide(bundle).cached


def test_a_remembered_choice_that_no_longer_works_is_made_anew(make_bundle, recipe):
    bundle = make_bundle({"slow": recipe(SLOW), "fast": recipe(linear)})
    assert decide(bundle).variant == "fast"
    WRONG(bundle.path / "fast.onnx")
    decision = decide(bundle)
    assert (decision.variant, decision.cached) == ("slow", False)
    assert by_name(decision)["fast on cpu"].status == "wrong"


def test_refused_is_never_used(make_bundle, recipe, no_child):
    bundle = make_bundle({"fast": recipe(linear, status="refused"), "slow": recipe(SLOW)})
    no_child()
    decision = decide(bundle)
    assert decision.variant == "slow"
    assert by_name(decision)["fast on cpu"].reason == "the proof refuses it: too slow"
    for wish in ({"variant": "fast"}, {"variant": "fast", "device": "cpu"}):
        with pytest.raises(ProviderError, match="fast on cpu: the proof refuses it: too slow"):
            decide(bundle, **wish)


def test_proven_is_preferred_to_unproven(make_bundle, recipe, no_child):
    bundle = make_bundle({"fast": recipe(linear, status="unproven"), "slow": recipe(SLOW)})
    no_child()
    decision = decide(bundle)
    assert (decision.variant, decision.reason) == ("slow", "slow on cpu: the only proven candidate")
    untried = by_name(decision)["fast on cpu"]
    assert (untried.status, untried.proven) == ("untried", False)
    assert "hasten prove" in untried.reason


def test_unproven_is_used_when_nothing_proven_works_and_says_so(make_bundle, recipe):
    recipes = {
        "one": recipe(linear, status="unproven"),
        "two": recipe(SLOW, status="unproven"),
        "bad": recipe(broken),
        "wrong": recipe(WRONG),
    }
    decision = decide(make_bundle(recipes))
    assert decision.variant == "one"
    assert "unproven on this provider: run `hasten prove`" in decision.reason
    asked = decide(make_bundle(recipes), variant="two")
    assert (asked.variant, asked.candidates[0].proven) == ("two", False)
    assert asked.reason.startswith("two on cpu: the only candidate; unproven")


def test_all_that_failed_is_named(make_bundle, recipe):
    with pytest.raises(ProviderError) as caught:
        decide(make_bundle({"bad": recipe(broken), "wrong": recipe(WRONG)}))
    assert "bad on cpu: cpu cannot load bad.onnx" in str(caught.value)
    assert "wrong on cpu: golden error 0.01, allowed 0.0001" in str(caught.value)


def test_wishes(make_bundle, recipe):
    bundle = make_bundle({"slow": recipe(SLOW), "fast": recipe(linear)})
    assert decide(bundle, variant="slow", provider="cpu").variant == "slow"
    assert decide(bundle, variant="slow", provider=CPU_PROVIDER).variant == "slow"
    for wish, error, said in (
        ({"variant": "none"}, UsageError, "no variant 'none'. It has slow, fast"),
        ({"provider": "magic"}, UsageError, "unknown execution provider 'magic'"),
        ({"device": "abacus"}, UsageError, "unknown device 'abacus'"),
        ({"device": "cuda:1"}, ProviderError, "no variant of the bundle is made for device cuda:1. It has slow: cpu"),
        ({"provider": "openvino"}, ProviderError, "no variant of the bundle is made for provider openvino"),
    ):
        with pytest.raises(error, match=said):
            decide(bundle, **wish)


def test_a_provider_without_its_hardware_is_passed_over(make_bundle, recipe):
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("CUDA may work here")
    bundle = make_bundle({"gpu": recipe(linear, (CUDA_PROVIDER,)), "cpu": recipe(SLOW)})
    decision = decide(bundle)
    assert decision.variant == "cpu"
    assert by_name(decision)["gpu on cuda"].status == "failed"
    with pytest.raises(ProviderError, match=r"gpu on cuda \(cuda:1\): .*cuda"):
        decide(bundle, device="cuda:1")


def test_providers_that_hasten_does_not_know(make_bundle, recipe):
    bundle = make_bundle({"other": recipe(linear, ("MagicExecutionProvider",))})
    with pytest.raises(ProviderError, match=r"is made for this runtime\. It has other: MagicExecutionProvider"):
        decide(bundle)
    assert find_short("MagicExecutionProvider") == "MagicExecutionProvider"


def test_a_child_that_dies_takes_nothing_down(make_bundle, recipe, monkeypatch):
    bundle = make_bundle({"slow": recipe(SLOW), "fast": recipe(linear)})
    ask = Worker._ask

    def crash(self, operation, doing, arguments=None, *, extra=0.0):
        if operation == "time" and len(self.assignment()[CPU_PROVIDER]) == 1:  # The fast one is a single product.
            os.kill(self.pid, signal.SIGKILL)
        return ask(self, operation, doing, arguments, extra=extra)

    monkeypatch.setattr(Worker, "_ask", crash)
    decision = decide(bundle)
    assert decision.variant == "slow"
    failed = by_name(decision)["fast on cpu"]
    assert (failed.status, failed.ms) == ("failed", None)
    assert "the child died with signal 9 (SIGKILL) while timing the model" in failed.reason


def test_a_bundle_without_its_golden_test(make_bundle, recipe):
    bundle = make_bundle({"only": recipe(linear)})
    (bundle.path / "golden.npz").unlink()
    with pytest.raises(BundleError, match="golden"):
        decide(bundle)


@pytest.mark.usefixtures("needs_openvino")
class TestOpenVino:
    def test_each_provider_of_a_variant_is_a_candidate(self, make_bundle, recipe):
        bundle = make_bundle({"both": recipe(linear, BOTH, tolerance=0.05)})
        decision = decide(bundle)
        assert (decision.variant, decision.provider) == ("both", OPENVINO_PROVIDER)
        found = by_name(decision)
        assert set(found) == {"both on openvino", "both on cpu"}
        assert (found["both on openvino"].proven, found["both on cpu"].proven) == (True, False)
        on_cpu = decide(bundle, provider="cpu")
        assert (on_cpu.provider, on_cpu.candidates[0].proven) == (CPU_PROVIDER, False)

    def test_two_providers_are_compared(self, make_bundle, recipe):
        recipes = {
            "one": recipe(SLOW, (OPENVINO_PROVIDER,), tolerance=0.05),
            "two": recipe(linear, (CPU_PROVIDER,)),
        }
        decision = decide(make_bundle(recipes))
        assert decision.variant == "two"
        assert {one.status for one in decision.candidates} == {"chosen", "slower"}

    def test_nodes_left_to_another_provider_are_named(self, make_bundle, recipe, monkeypatch):
        bundle = make_bundle({"one": recipe(linear, (OPENVINO_PROVIDER,), tolerance=0.05)})
        nodes = tuple(f"n{index} (Det)" for index in range(5))
        monkeypatch.setattr("runtimes.session.Session.fallback", lambda self: nodes)
        decision = decide(bundle)
        assert decision.candidates[0].fallback == nodes
        assert "it leaves n0 (Det), n1 (Det), n2 (Det) and 2 more to another provider" in decision.reason
