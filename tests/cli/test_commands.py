"""Every command on small real models: what it prints, writes and computes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from real_command import ROOT, Finished, assert_refused, cold, is_progress, listing, ok, warm

from artifacts.bundle import open_bundle
from runtimes.providers import probe

Sources = dict[str, Path]
BundleOf = Callable[[str], tuple[Path, Finished]]
TEXTS = ["the man is playing guitar", "a dog runs in the park", "where is London ?", "good"]


def rows_of(done: Finished) -> list[dict[str, object]]:
    return [json.loads(line) for line in ok(done).out.splitlines()]


def write_row(folder: Path) -> Path:
    """A record for the MLP."""
    path = folder / "row.jsonl"
    path.write_text(json.dumps({"x": [[0.5] * 64]}))
    return path


# A sentence encoder -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory, sources: Sources) -> tuple[Path, Finished]:
    """For a target that is here and one that is not, with the unoptimized graph beside them."""
    out = tmp_path_factory.mktemp("compiled") / "a place with spaces, ünï [bold]" / "[" / "bundle"
    out.parent.mkdir(parents=True)
    targets = ("--target", "cpu", "--target", "cuda", "--unproven")
    options = (*targets, "--recipe", "safe", "--keep-reference", "--seed", "7")
    return out, warm("compile", sources["sentence"], "-o", out, *options, "--json")


@pytest.fixture(scope="module")
def encoder(compiled: tuple[Path, Finished]) -> Path:
    ok(compiled[1])
    return compiled[0]


@pytest.fixture(scope="module")
def expected(sources: Sources) -> np.ndarray:
    """Mean-pooled, normalized vectors of TEXTS by transformers."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = (
        AutoTokenizer.from_pretrained(sources["sentence"]),
        AutoModel.from_pretrained(sources["sentence"]),
    )
    tokens = tokenizer(TEXTS, padding=True, return_tensors="pt")
    tokens.pop("token_type_ids", None)
    with torch.inference_mode():
        states = model(**tokens).last_hidden_state.numpy()
    mask = tokens["attention_mask"].numpy()[..., None]
    pooled = (states * mask).sum(1) / mask.sum(1)
    return pooled / np.linalg.norm(pooled, axis=1, keepdims=True)


def test_compile_says_in_json_what_it_made(compiled: tuple[Path, Finished]) -> None:
    out, done = compiled
    assert done.err == ""
    bundle = open_bundle(out)
    document = done.document
    assert document["digest"] == bundle.digest
    assert document["manifest"] == json.loads(bundle.manifest.to_json())
    status = {proof["variant"]: proof["status"] for proof in document["proof"]["variants"]}
    assert status == {"cpu-fp32": "proven", "cuda-fp32": "unproven", "reference": "proven"}
    assert any("cuda-fp32 is unproven: run `hasten prove`" in note for note in document["notes"])
    assert bundle.proof.variant("cuda-fp32").speed == ()
    assert bundle.proof.variant("cpu-fp32").speed != ()
    assert "cuda does not work here" in bundle.proof.variant("cuda-fp32").reason
    assert [path.name for path in out.parent.iterdir()] == ["bundle"]


def test_graphs_load_without_hasten_and_share_weights(encoder: Path) -> None:
    bundle = open_bundle(encoder)
    weights = [set(bundle.variant(name).weights) for name in ("cpu-fp32", "reference")]
    assert weights[0] & weights[1]
    session = ort.InferenceSession(encoder / "cpu-fp32.onnx", providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_outputs()] == ["sentence_embedding"]


def test_run_arguments(encoder: Path, expected: np.ndarray) -> None:
    done = cold("run", encoder, *TEXTS, "--explain")
    vectors = np.array([row["embedding"] for row in rows_of(done)])
    np.testing.assert_allclose(vectors, expected, atol=2e-5)
    assert "cpu-fp32" in done.err


def test_run_stdin_and_files(encoder: Path, expected: np.ndarray, tmp_path: Path) -> None:
    lines = "".join(f"{text}\n" for text in TEXTS)
    piped = cold("run", encoder, stdin=lines)
    assert piped.err == ""
    np.testing.assert_allclose([row["embedding"] for row in rows_of(piped)], expected, atol=2e-5)
    source, output = tmp_path / "in put.jsonl", tmp_path / "out put.jsonl"
    source.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)))
    done = ok(warm("run", encoder, "--input", source, "--output", output, "--max-tokens", "16"))
    assert done.out == ""
    assert done.err == f"{output}: 4 records\n"
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["id"] for row in rows] == [0, 1, 2, 3]
    np.testing.assert_allclose([row["embedding"] for row in rows], expected, atol=2e-5)


@pytest.mark.parametrize(
    "texts",
    [
        [""],
        ["the dog " * 131072],
        ["x" * (1 << 20)],
        ["🙂🙃🫠"],
        ["", "the dog " * 20000, "🙂", "good", " ", "\u202e\u0000", "日本"],
    ],
    ids=["empty", "1 MB of words", "1 MB word", "emoji", "mixed"],
)
def test_odd_texts(encoder: Path, texts: list[str]) -> None:
    done = cold("run", encoder, stdin="".join(json.dumps({"text": text}) + "\n" for text in texts))
    vectors = np.array([row["embedding"] for row in rows_of(done)])
    assert vectors.shape == (len(texts), 32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)


def test_an_empty_argument_is_a_text(encoder: Path) -> None:
    assert len(rows_of(warm("run", encoder, "", "🙂"))) == 2


def test_inspect(encoder: Path) -> None:
    done = ok(cold("inspect", encoder, "--json"))
    bundle = open_bundle(encoder)
    assert done.document["digest"] == bundle.digest
    assert {variant["id"] for variant in done.document["manifest"]["variants"]} == {
        "cpu-fp32",
        "cuda-fp32",
        "reference",
    }
    shown = ok(warm("inspect", encoder))
    for part in ("sentence_embedding float32", bundle.digest, "at most 64 tokens", "unproven", "cosine_mean", "torch"):
        assert part in shown.out, part


def test_verify(encoder: Path) -> None:
    findings = ok(cold("verify", encoder, "--json")).document
    status = {finding["name"]: finding["status"] for finding in findings}
    assert status["files"] == "ok"
    assert status["grammar of cpu-fp32.onnx"] == status["grammar of cuda-fp32.onnx"] == "ok"
    assert status["cpu-fp32 on CPUExecutionProvider"] == "ok"
    if not probe("CUDAExecutionProvider").ok:
        assert status["cuda-fp32 on CUDAExecutionProvider"] == "skipped"
    assert "failed" not in status.values()
    assert ok(warm("verify", encoder)).out.startswith("ok ")


def test_pack_and_unpack(encoder: Path, tmp_path: Path) -> None:
    packed = tmp_path / "a b.hasten"
    assert str(packed) in ok(cold("pack", encoder, packed)).out.replace("\n", "")
    ok(warm("unpack", packed, cwd=tmp_path))
    assert listing(tmp_path / "a b") == listing(encoder)
    ok(warm("unpack", packed, f"{tmp_path}/again/"))
    again = tmp_path / "again.hasten"
    ok(warm("pack", "again", cwd=tmp_path))
    assert again.read_bytes() == packed.read_bytes()


def test_bench_against_reference(encoder: Path) -> None:
    quick = ("--variant", "cpu-fp32", "--batches", "1,2", "--lengths", "8", "--seconds", "0.05")
    report = ok(warm("bench", encoder, "--against", "reference", *quick, "--json")).document
    assert report["variant"] == "cpu-fp32"
    assert [(row["batch"], row["length"]) for row in report["rows"]] == [(1, 8), (2, 8)]
    for row in report["rows"]:
        assert 0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
        assert row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
    shown = ok(cold("bench", encoder, "--against", "reference", *quick))
    assert "the speed of reference" in shown.out
    assert "1 × 8" in shown.out


def test_doctor(encoder: Path) -> None:
    done = cold("doctor", encoder, "--json")
    checks = {check["name"]: check for check in ok(done).document}
    assert checks["bundle"]["status"] == checks["decision"]["status"] == checks["provider cpu"]["status"] == "ok"
    assert checks["proof of cuda-fp32"]["status"] == "warn"
    assert "cpu-fp32" in checks["decision"]["detail"]
    assert ok(warm("doctor")).out.startswith("ok ")


@pytest.mark.skipif("probe('CUDAExecutionProvider').ok")
def test_prove_of_what_is_not_here(encoder: Path, mlp: Path, tmp_path: Path) -> None:
    digest = open_bundle(encoder).digest
    rows = ok(warm("prove", encoder, "--json")).document
    status = {row["variant"]: row["status"] for row in rows}
    assert status == {"cpu-fp32": "proven", "cuda-fp32": "unproven", "reference": "proven"}
    assert "CUDAExecutionProvider" in next(row["reason"] for row in rows if row["variant"] == "cuda-fp32")
    assert open_bundle(encoder).digest == digest
    assert "nothing to prove" not in ok(warm("prove", encoder)).out


@pytest.mark.skipif("probe('CUDAExecutionProvider').ok")
def test_a_bundle_for_cuda_alone(mlp: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shown = ok(warm("compile", mlp, "-o", out, "--target", "cuda", "--unproven", "--recipe", "safe")).out
    assert "cuda-fp32 unproven" in shown
    assert "run `hasten prove` on the target machine" in shown
    assert_refused(warm("prove", out), 8, "no variant could be proven here", "target's provider")
    done = warm("prove", out, "--json")
    assert_refused(done, 8, "no variant could be proven here")
    assert done.document[0]["status"] == "unproven"
    # Its graph runs on the CPU all the same, and the loader says that nobody measured it.
    done = warm("run", out, "-i", write_row(tmp_path), "--explain")
    assert np.array(rows_of(done)[0]["y"]).shape == (1, 8)
    assert "unproven" in done.err


def content(out: Path) -> dict[str, bytes | None]:
    return {name: data for name, data in listing(out).items() if name not in ("proof.json", "report.html")}


def test_plan_gives_the_same_bytes(encoder: Path, sources: Sources, tmp_path: Path) -> None:
    out = tmp_path / "replayed"
    done = ok(warm("compile", sources["sentence"], "-o", out, "--plan", encoder / "plan.toml", "--unproven", "--json"))
    assert content(out) == content(encoder)
    assert done.document["digest"] == open_bundle(encoder).digest


# Every task -------------------------------------------------------------------------------------------------------


def test_features(bundle_of: BundleOf) -> None:
    path, done = bundle_of("feature-extraction")
    assert done.document["manifest"]["task"] == "feature-extraction"
    assert len(rows_of(warm("run", path, *TEXTS))) == 4


def test_classes(bundle_of: BundleOf) -> None:
    path, _ = bundle_of("text-classification")
    rows = rows_of(warm("run", path, *TEXTS))
    for row in rows:
        assert set(row["scores"]) == {"negative", "neutral", "positive"}
        assert row["label"] == max(row["scores"], key=row["scores"].get)
        assert abs(sum(row["scores"].values()) - 1) < 1e-6
    pair = rows_of(cold("run", path, stdin='{"text": "good", "text_pair": "bad"}\n'))
    assert pair[0]["scores"] != rows[3]["scores"]


def test_tags(bundle_of: BundleOf) -> None:
    path, _ = bundle_of("token-classification")
    texts = ["Paris lives in London .", "🙂", ""]
    for text, row in zip(texts, rows_of(warm("run", path, *texts)), strict=True):
        for entity in row["entities"]:
            assert entity["label"] in ("PER", "LOC")
            assert entity["text"] == text[entity["start"] : entity["end"]]


def test_answers(bundle_of: BundleOf) -> None:
    path, _ = bundle_of("question-answering")
    context = "The man works in Paris . The woman lives in London ."
    record = {"id": "q1", "question": "Who lives in London ?", "context": context}
    row = rows_of(cold("run", path, stdin=json.dumps(record)))[0]
    assert row["id"] == "q1"
    assert row["text"] == context[row["start"] : row["end"]]
    assert_refused(warm("run", path, "a question alone"), 4, "question")


def test_fillings(bundle_of: BundleOf) -> None:
    path, _ = bundle_of("fill-mask")
    row = rows_of(warm("run", path, "the [MASK] is red ."))[0]
    assert len(row["fillings"]) == 5
    scores = [filling["score"] for filling in row["fillings"]]
    assert scores == sorted(scores, reverse=True)
    assert_refused(warm("run", path, "no mask"), 4, "[MASK]")


def test_tensors(bundle_of: BundleOf, sources: Sources) -> None:
    path, _ = bundle_of("mlp")
    x = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    row = rows_of(cold("run", path, stdin=json.dumps({"x": x.tolist()})))[0]
    session = ort.InferenceSession(sources["mlp"], providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(row["y"], session.run(None, {"x": x})[0], atol=1e-5)


# Ways to compile --------------------------------------------------------------------------------------------------


def test_what_compile_shows(mlp: Path, tmp_path: Path) -> None:
    done = ok(warm("compile", mlp, "-o", "out/", "--recipe", "balanced", "--max-drop", "5%", cwd=tmp_path))
    assert all(is_progress(line) for line in done.lines)
    assert [line[:4] for line in done.lines] == sorted(line[:4] for line in done.lines)
    for part in ("dynamic-int8", "quality", "relative_l2", "Next: hasten run out"):
        assert part in done.out
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_recipe_from_a_file_and_a_bundle_replaced(mlp: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "int8.toml"
    recipe.write_text(
        'schema = 1\nname = "mine"\ndescription = "cleans"\ntune = false\n[stages]\ndefault = ["clean", "finish"]\n'
    )
    out = tmp_path / "ou t"
    for name in ("one", "two"):
        ok(warm("compile", mlp, "-o", out, "--recipe", recipe, "--quiet", "--name", name))
        assert open_bundle(out).manifest.name == name
    assert 'recipe = "mine"' in (out / "plan.toml").read_text()


def test_force_replaces_a_folder(mlp: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("old")
    done = ok(warm("compile", mlp, "-o", tmp_path / "out", "--recipe", "reference", "--quiet", "--force"))
    assert done.out == done.err == ""
    assert open_bundle(tmp_path / "out").manifest.name == "mlp"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_out_inside_the_source(sources: Sources, tmp_path: Path) -> None:
    """The digest of the source does not count what is compiled into it."""
    source = Path(shutil.copytree(sources["text-classification"], tmp_path / "model"))
    before = listing(source)
    ok(warm("compile", source, "-o", source / "out", "--recipe", "reference", "--quiet"))
    bundle = open_bundle(source / "out")
    assert {name: data for name, data in listing(source).items() if not name.startswith("out")} == before
    ok(warm("compile", source, "-o", tmp_path / "out", "--plan", source / "out", "--quiet"))
    assert open_bundle(tmp_path / "out").digest == bundle.digest


@pytest.mark.skipif("not probe('OpenVINOExecutionProvider').ok")
def test_openvino_beside_cpu(mlp: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ok(warm("compile", mlp, "-o", out, "--target", "cpu", "--target", "openvino", "--recipe", "safe", "--quiet"))
    targets = {variant.target: variant for variant in open_bundle(out).manifest.variants}
    assert set(targets) == {"cpu", "openvino"}
    assert targets["openvino"].providers[0] == "OpenVINOExecutionProvider"
    row = write_row(tmp_path)
    here = [rows_of(warm("run", out, "-i", row, "--provider", name))[0]["y"] for name in ("cpu", "openvino")]
    np.testing.assert_allclose(here[0], here[1], rtol=0.05, atol=0.05)


def test_quality_budget_that_cannot_be_met(mlp: Path, tmp_path: Path) -> None:
    done = warm("compile", mlp, "-o", tmp_path / "out", "--recipe", "balanced", "--max-drop", "0.000001%")
    assert_refused(done, 7, "quality budget", "nearest miss", "--max-drop")
    assert list(tmp_path.iterdir()) == []


# Lists ------------------------------------------------------------------------------------------------------------


def test_recipes() -> None:
    rows = ok(cold("recipes", "--json")).document
    assert [row["name"] for row in rows] == ["reference", "safe", "balanced", "int8", "int4", "int4-fast", "int4-serve"]
    shown = ok(warm("recipes")).out
    assert all(row["name"] in shown for row in rows)


def test_passes() -> None:
    assert ok(cold("passes", "--markdown")).out == (ROOT / "docs" / "passes.md").read_text()
    told = ok(warm("passes")).out
    assert "dynamic-int8" in told
    assert "[K, r]" in told, "brackets are no markup"


def test_version() -> None:
    assert ok(cold("--version")).out.startswith("hasten, version ")
