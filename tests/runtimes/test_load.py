"""Loading real bundles: choice, golden test, explanation, wrong wishes, and that nothing heavy is imported."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.external_data_helper import set_external_data
from task_graphs import classifier, embedder, spans, token_head, write_bundle

from artifacts.bundle import BundleWriter, WeightStore
from artifacts.errors import BundleError, HastenError, IntegrityError, ProviderError, UsageError
from artifacts.proof import Fidelity, Machine, Speed, VariantProof
from artifacts.target import CPU_PROVIDER, OPENVINO_PROVIDER
from runtimes.decide import CandidateResult, Decision
from runtimes.load import explain, load
from runtimes.session import Session
from runtimes.tasks import Answerer, Classifier, Embedder, Tagger, TensorRunner

ROOT = Path(__file__).parents[2]
MACHINE = Machine("A CPU", 2, 24.0, "Linux", "3.11", "1.31", ())


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HASTEN_CACHE_DIR", str(tmp_path / "cache"))


def proof(variant: str = "cpu-fp32", status: str = "proven") -> VariantProof:
    return VariantProof(
        variant=variant,
        status=status,
        provider=CPU_PROVIDER,
        machine=MACHINE,
        golden_error=1e-6,
        fidelity=(Fidelity("cosine", 0.998, 1.0, 0.002, 0.01, 100, "built-in"),),
        speed=(Speed(1, 32, 4.0, 2.0, 2.0, 1.9, 2.1), Speed(16, 128, 80.0, 10.0, 8.0, 7.9, 8.1)),
        steps=(),
        size=100,
        reason="",
    )


@pytest.mark.parametrize(
    ("task", "graph", "kind"),
    [
        ("feature-extraction", embedder(), Embedder),
        ("text-classification", classifier(), Classifier),
        ("token-classification", token_head(), Tagger),
        ("question-answering", spans(), Answerer),
        ("tensors", embedder(), TensorRunner),
    ],
)
def test_a_bundle_becomes_its_task(tmp_path: Path, task: str, graph: object, kind: type[object]) -> None:
    write_bundle(tmp_path / "b", task, graph)  # type: ignore[arg-type]
    with load(str(tmp_path / "b"), threads=1) as model:
        assert type(model) is kind


def test_a_loaded_model_embeds_and_explains(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b", "feature-extraction", embedder(), proofs=(proof(),))
    with load(tmp_path / "b", threads=1) as model:
        assert model.embed(["hello", "world"]).shape == (2, 8)
        text = model.explain()
    first, *lines = text.splitlines()
    assert first.startswith(f"tiny: feature-extraction, {bundle.digest[:19]}")
    assert any("cpu-fp32 (fp32) on cpu" in line for line in lines)
    assert any("because" in line and "only candidate" in line and "decided at this load" in line for line in lines)
    (told,) = (line for line in lines if line.startswith("  proof"))
    assert "proven on cpu, A CPU; 4.00 times as fast as the reference; cosine 0.998, reference 1" in told
    assert any(line.split()[:4] == ["chosen", "cpu-fp32", "on", "cpu"] and "proven" in line for line in lines)


def test_an_unproven_variant_says_so(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", "feature-extraction", embedder())
    with load(tmp_path / "b") as model:
        assert "hasten prove" in model.explain()
        assert "nobody measured this variant" in model.explain()


def test_a_variant_can_be_asked_for(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", "feature-extraction", embedder(), variants=("one", "two"))
    with load(tmp_path / "b", variant="two", threads=1) as model:
        assert "runs       two (fp32)" in model.explain()


def test_several_variants_are_measured_once_and_remembered(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", "feature-extraction", embedder(), variants=("one", "two"))
    with load(tmp_path / "b", threads=1) as model:
        first = model.explain()
    with load(tmp_path / "b", threads=1) as model:
        second = model.explain()
    assert "decided at this load" in first
    assert "remembered from an earlier load" in second
    assert {line.split()[0] for line in first.splitlines()[-2:]} == {"chosen", "slower"}
    assert first.count(" ms") >= 2


def test_every_fallback_node_is_named(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b", "feature-extraction", embedder())
    nodes = tuple(f"node{i} (Gather)" for i in range(5))
    chosen = CandidateResult("cpu-fp32", OPENVINO_PROVIDER, "cpu", "chosen", False, 1e-5, 2.5, nodes, "2.5 ms")
    slow = replace(chosen, provider=CPU_PROVIDER, status="failed", ms=None, error=None, reason="no such thing")
    decision = Decision("cpu-fp32", OPENVINO_PROVIDER, "cpu", "it is the fastest", (chosen, slow), cached=False)
    text = explain(bundle, decision)
    assert "5 nodes run on another provider" in text
    assert all(node in text for node in nodes)
    assert "no such thing" in text


def test_a_wrong_golden_output_is_refused(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", "feature-extraction", embedder(), golden_error=0.5)
    with pytest.raises(ProviderError, match="golden error"):
        load(tmp_path / "b", threads=1)


def test_a_refused_variant_is_never_loaded(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", "feature-extraction", embedder(), proofs=(proof(status="refused"),))
    with pytest.raises(ProviderError, match="refuses"):
        load(tmp_path / "b")


@pytest.mark.parametrize(
    "wish", [{"device": "toaster"}, {"provider": "toaster"}, {"variant": "toaster"}, {"threads": -1}]
)
def test_impossible_wishes_are_usage_errors(tmp_path: Path, wish: dict[str, object]) -> None:
    write_bundle(tmp_path / "b", "feature-extraction", embedder())
    with pytest.raises(UsageError):
        load(tmp_path / "b", **wish)  # type: ignore[arg-type]


def test_what_is_no_bundle_is_a_bundle_error(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path, __file__):
        with pytest.raises(BundleError):
            load(path)


def test_an_altered_byte_is_found_unless_hashes_are_not_wanted(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", "feature-extraction", embedder())
    path = tmp_path / "b" / "plan.toml"
    path.write_bytes(b"schema = 2\n")
    with pytest.raises(IntegrityError, match=r"plan\.toml"):
        load(tmp_path / "b")
    with load(tmp_path / "b", verify=False) as model:
        assert np.isfinite(model.embed(["a"])).all()


def with_weights(out: Path) -> Path:
    """A bundle whose table is a weight of its own; the file of that weight."""
    plain = write_bundle(out.parent / "plain", "feature-extraction", embedder())
    graph = onnx.load(plain.path / "cpu-fp32.onnx")
    table = max(graph.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    with BundleWriter(out) as writer:
        entry = WeightStore(writer.staging / "weights").put(table.raw_data)
        set_external_data(table, entry.path, 0, entry.size)
        table.ClearField("raw_data")
        writer.add_bytes("cpu-fp32.onnx", graph.SerializeToString())
        for name in ("golden.npz", "plan.toml", "processor/tokenizer.json"):
            writer.add_file(name, plain.path / name)
        (variant,) = plain.manifest.variants
        manifest = replace(plain.manifest, variants=(replace(variant, weights=(entry.path,)),), files=())
        writer.commit(manifest, plain.proof)
    return out / entry.path


@pytest.mark.parametrize("flip", [0x01, 0x80], ids=["too little for the golden test", "the golden test fails"])
def test_altered_weights_are_the_error_whatever_they_compute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flip: int
) -> None:
    path = with_weights(tmp_path / "b")
    with load(tmp_path / "b") as model:
        assert np.isfinite(model.embed(["a"])).all()
    data = np.frombuffer(path.read_bytes(), np.uint8).copy()
    # The lowest byte of a float32 that is read, or the highest of all.
    if flip == 1:
        data[0] ^= flip
    else:
        data[3::4] ^= flip
    path.write_bytes(data.tobytes())
    opened: list[Session] = []
    kept = Session.__init__

    def remembered(self: Session, *arguments: object, **options: object) -> None:
        opened.append(self)
        kept(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Session, "__init__", remembered)
    with pytest.raises(IntegrityError, match=rf"{path.name} was altered"):
        load(tmp_path / "b")
    (session,) = opened
    with pytest.raises(ProviderError, match="closed"):
        session.run({})
    if flip == 1:
        load(tmp_path / "b", verify=False).close()


def test_a_damaged_tokenizer_frees_the_session_and_says_so(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", "feature-extraction", embedder())
    path = tmp_path / "b" / "processor" / "tokenizer.json"
    path.write_bytes(b" " * path.stat().st_size)
    with pytest.raises(HastenError, match="tokenizer"), load(tmp_path / "b", verify=False) as model:
        model.embed(["a"])


def test_loading_imports_nothing_heavy(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", "feature-extraction", embedder(), proofs=(proof(),))
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from runtimes.load import load
model = load({str(tmp_path / "b")!r})
assert model.embed(["hello"]).shape == (1, 8)
heavy = {{"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "optimum", "scipy", "requests", "rich", "click"}}
print(sorted(heavy & set(sys.modules)))
import os
print(os.environ["ORT_DISABLE_TELEMETRY"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("[]\n1\n", "")
