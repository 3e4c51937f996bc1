"""A decoder's bundle under the machinery of every bundle: golden test, decision, tuning, bench."""

from __future__ import annotations

import numpy as np
import pytest
from decoder_graphs import byte_level, write_decoder

from artifacts.errors import BundleError, ProviderError
from artifacts.manifest import SessionOptions
from artifacts.target import CPU_PROVIDER
from runtimes import tune
from runtimes.bench import bench
from runtimes.client import Worker
from runtimes.decide import decide
from runtimes.generate.check import written_error
from runtimes.golden import check_golden, golden_error, load_golden
from runtimes.load import load
from runtimes.profile import profile_bundle
from runtimes.session import Session


def test_golden_outputs_are_the_logits(decoder_bundle):
    golden = load_golden(decoder_bundle)
    assert list(golden.outputs) == ["logits"]
    assert golden.feeds["input_ids"].shape == (2, 7)
    assert golden.feeds["seqlens_k"].tolist() == [6, 3]
    session = Session(decoder_bundle.path / "cpu-fp32.onnx", CPU_PROVIDER, options=SessionOptions())
    assert check_golden(session, golden, 1e-4, "it") < 1e-5


def test_a_golden_file_with_caches_in_its_outputs_is_refused(decoder_bundle, llama, tmp_path, monkeypatch):
    path = decoder_bundle.path / "golden.npz"
    with np.load(path) as arrays:
        more = dict(arrays) | {"output.present.0.key": arrays["input.past_key_values.0.key"]}
    copy = tmp_path / "golden.npz"
    np.savez(copy, **more)
    monkeypatch.setattr("runtimes.golden.GOLDEN_NAME", str(copy))
    with pytest.raises(BundleError, match="no input or output"):
        load_golden(decoder_bundle)


def test_the_golden_test_in_a_child_process(decoder_bundle):
    with Worker(decoder_bundle.path / "cpu-fp32.onnx", CPU_PROVIDER) as worker:
        assert golden_error(worker, load_golden(decoder_bundle)) < 1e-5


@pytest.fixture(scope="module")
def two_variants(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    tokenizer = byte_level(folder / "tokenizer.json")
    return write_decoder(folder / "bundle", llama, tokenizer, variants=("cpu-fp32", "cpu-twin"))


def test_variants_are_compared(two_variants):
    decision = decide(two_variants, cache=False)
    assert {one.status for one in decision.candidates} == {"chosen", "slower"}


def test_a_step_counts_in_the_comparison(two_variants, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "runtimes.client.interleave", lambda workers, shapes, **_: seen.append(shapes) or Times(dict.fromkeys(workers))
    )
    decision = decide(two_variants, cache=False)
    golden, step = seen[0]
    assert golden["input_ids"].shape == (2, 7)
    assert (step["input_ids"].shape, step["seqlens_k"].tolist()) == ((1, 1), [127])
    assert [one.ms for one in decision.candidates] == [4.0, 4.0]


class Times(dict):
    """Timings of 2 ms for the first shape, 8 ms for the second."""

    def ms(self, _, shape):
        return (2.0, 8.0)[shape]


def test_a_graph_that_computes_something_else_is_not_used(llama, tmp_path):
    import torch

    tokenizer = byte_level(tmp_path / "tokenizer.json")
    bundle = write_decoder(tmp_path / "bundle", llama, tokenizer)
    golden = load_golden(bundle)
    arrays = {f"input.{name}": array for name, array in golden.feeds.items()}
    arrays["output.logits"] = golden.outputs["logits"] + np.float32(torch.pi)
    np.savez(tmp_path / "bundle" / "golden.npz", **arrays)
    with pytest.raises(ProviderError, match="golden error"):
        load(bundle.path, cache=False, verify=False)


def test_the_cache_is_tried_at_load(decoder_bundle):
    session = Session(decoder_bundle.path / "cpu-fp32.onnx", CPU_PROVIDER, options=SessionOptions())
    assert written_error(session, decoder_bundle.manifest.inputs, load_golden(decoder_bundle)) < 1e-5


def test_a_provider_that_copies_the_cache_is_not_used(decoder_bundle, monkeypatch):
    """As one would that computes prompts right, and writes keys and values somewhere else."""
    bind = Session.bind
    copied = lambda arrays: {name: array.copy() if "present" in name else array for name, array in arrays.items()}  # noqa: E731
    monkeypatch.setattr(Session, "bind", lambda self, inputs, outputs: bind(self, inputs, copied(outputs)))
    with pytest.raises(ProviderError, match="does not keep its KV cache in place"):
        load(decoder_bundle.path, cache=False)


def test_explain_speaks_of_no_lanes(model):
    told = model.explain()
    assert "text-generation" in told
    assert "lanes" not in told
    assert "tokens a batch" not in told


def test_tuning_measures_a_prompt_and_a_step(decoder_bundle, monkeypatch):
    seen = []
    monkeypatch.setattr(tune, "_ROUNDS", 2)
    monkeypatch.setattr(tune, "_BLOCK_SECONDS", 0.0)
    enter = tune._Search._enter
    monkeypatch.setattr(tune._Search, "_enter", lambda self, *args: seen.append(enter(self, *args)) or seen[-1])
    settings, trials = tune.tune(decoder_bundle, "cpu-fp32", CPU_PROVIDER, "cpu", 2, seconds=60.0)
    assert [one.change for one in trials] == ["no spinning", "no arena"]
    assert all(one.reason == "" for one in trials)
    assert settings.tuned
    shapes = [(tokens, feeds["input_ids"].shape, int(feeds["seqlens_k"][0])) for tokens, feeds in seen[0].inputs]
    assert shapes == [(128, (1, 128), 127), (1, (1, 1), 127)]


@pytest.mark.parametrize("length", [1, 8])
def test_profiling_a_step_and_a_prompt(decoder_bundle, length):
    kernels = profile_bundle(decoder_bundle, batch=2, length=length)
    assert sum(one.operator == "GroupQueryAttention" for one in kernels) == 2


def test_bench_reads_prompts(decoder_bundle):
    report = bench(decoder_bundle, batches=(1, 2), lengths=(8,), seconds=0.05)
    assert [(row.batch, row.length) for row in report.rows] == [(1, 8), (2, 8)]
