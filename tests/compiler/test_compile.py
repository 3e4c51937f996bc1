from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from bundle_builders import leftovers, tree
from judging import Judged, faster

from artifacts.bundle import Bundle, open_bundle
from artifacts.errors import FidelityError, OutputError, PassError, ProviderError, UsageError
from compiler.compile import CompileOptions, compile_model, compile_model_with
from compiler.plan import load_plan
from passes.base import Context, Outcome
from passes.quantize import DynamicInt8
from runtimes.providers import probe

TASK = "feature-extraction"
QUICK = """schema = 1
name = "quick"
description = "Quantize and nothing else."
tune = false
[stages]
default = ["unfuse-attention", "clean", "dynamic-int8", "finish"]
"""


@pytest.fixture
def quick(tmp_path: Path) -> str:
    (tmp_path / "quick.toml").write_text(QUICK)
    return str(tmp_path / "quick.toml")


def content(bundle: Bundle) -> dict[str, bytes]:
    """Every file but the evidence."""
    return {path: data for path, data in tree(bundle.path).items() if path not in ("proof.json", "report.html")}


def test_the_bundle_holds_what_it_lists_and_nothing_else(encoder_bundle: Bundle) -> None:
    assert open_bundle(encoder_bundle.path) == encoder_bundle
    files = tree(encoder_bundle.path)
    assert not [path for path in files if "trial" in path]
    weights = {path for path in files if path.startswith("weights/")}
    assert weights == {path for variant in encoder_bundle.manifest.variants for path in variant.weights}
    assert {"plan.toml", "golden.npz", "report.html", "processor/tokenizer.json", "cpu-int8.onnx"} < set(files)
    assert dict(encoder_bundle.manifest.toolchain)["hasten"] == "0.1.0"
    assert encoder_bundle.manifest.name == "encoder"
    for variant in encoder_bundle.manifest.variants:
        onnx.checker.check_model(
            str(encoder_bundle.path / variant.model), full_check=False, skip_opset_compatibility_check=True
        )


def test_a_plan_makes_the_same_bytes(encoder_bundle: Bundle, encoder_file: Path, tmp_path: Path) -> None:
    """From another place, with another seed and recipe, and with nothing timed to decide."""
    other = tmp_path / "elsewhere" / "encoder.onnx"
    shutil.copytree(encoder_file.parent, other.parent)
    with faster(0.5, proof=0.9):
        options = {"plan": str(encoder_bundle.path), "seed": 3, "recipe": "safe", "unproven": True}
        again = compile_model(other, tmp_path / "again", **options)
    assert content(again) == content(encoder_bundle)
    assert again.digest == encoder_bundle.digest
    assert load_plan(again.path) == load_plan(encoder_bundle.path)
    plan = load_plan(encoder_bundle.path)
    assert plan.variants[0].session.disabled_optimizers, "the plan holds session options too"


def test_a_plan_calibrated_on_other_data_is_refused(encoder_bundle: Bundle, encoder_file: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("the cat\na dog\nthe man is here\na woman\n")
    options = {"plan": encoder_bundle.path, "data": tmp_path / "other.txt", "unproven": True, "max_drop": 0.5}
    with pytest.raises(UsageError, match="calibrated on other data"):
        compile_model(encoder_file, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_target_that_does_not_work_here_is_compiled_only_when_asked(encoder_file: Path, tmp_path: Path) -> None:
    if probe("cuda").ok:
        pytest.skip("a GPU is here")
    with pytest.raises(ProviderError, match=r"the target cuda does not work here.*--unproven"):
        compile_model(encoder_file, tmp_path / "out", task=TASK, targets=("cpu", "cuda"))
    assert leftovers(tmp_path) == []


def test_a_plan_of_another_model_or_task_is_refused(encoder_bundle: Bundle, encoder_file: Path, tmp_path: Path) -> None:
    model = ir.load(encoder_file)
    value = model.graph.initializers["encoder.layer.0.beta"]
    value.const_value = ir.tensor(value.const_value.numpy() + 1e-3, name=value.name)
    shutil.copytree(encoder_file.parent, tmp_path / "other")
    ir.save(model, tmp_path / "other" / "encoder.onnx")
    plan = encoder_bundle.path / "plan.toml"
    with pytest.raises(UsageError, match="the plan was made for another model"):
        compile_model(tmp_path / "other" / "encoder.onnx", tmp_path / "out", plan=plan, unproven=True)
    other = tmp_path / "plan.toml"
    other.write_text(plan.read_text().replace('task = "feature-extraction"', 'task = "fill-mask"'))
    with pytest.raises(UsageError, match="the plan was made for fill-mask, and this is feature-extraction"):
        compile_model(encoder_file, tmp_path / "out", plan=other, task=TASK, unproven=True)
    assert not (tmp_path / "out").exists()
    assert leftovers(tmp_path / "out") == []


def test_progress_and_the_document_for_machines(encoder_file: Path, tmp_path: Path, quick: str) -> None:
    heard: list[tuple[str, float]] = []
    options = CompileOptions(task=TASK, recipe=quick, targets=("cpu",), name="my encoder")
    with faster():
        compiled = compile_model_with(
            str(encoder_file), tmp_path / "out", options, lambda text, share: heard.append((text, share))
        )
    shares = [share for _, share in heard]
    assert shares == sorted(shares)
    assert shares[0] == 0.0
    assert shares[-1] < 1.0
    assert heard[0][0] == "reading the source"
    assert "cpu: dynamic-int8" in [text for text, _ in heard]
    document = json.loads(json.dumps(compiled.to_dict()))
    assert document["digest"] == compiled.bundle.digest
    assert document["manifest"]["name"] == "my encoder"
    assert document["proof"]["variants"][0]["status"] == "proven"
    kept = [step["reason"] for step in document["proof"]["variants"][0]["steps"] if step["kept"]]
    assert kept
    assert all(reason.startswith("the recipe quick takes it as it is") for reason in kept)


def test_a_failing_pass_leaves_a_reproducer_beside_the_output(
    encoder_file: Path, tmp_path: Path, quick: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: DynamicInt8, model: ir.Model, context: Context) -> Outcome:
        raise KeyError("scale")

    monkeypatch.setattr(DynamicInt8, "run", fail)
    out = tmp_path / "out"
    with pytest.raises(PassError) as raised, faster():
        compile_model(encoder_file, out, task=TASK, recipe=quick)
    assert "pass dynamic-int8: KeyError: 'scale'" in str(raised.value)
    assert str(raised.value).endswith(f"A reproducer is in {out}-reproducer")
    assert (tmp_path / "out-reproducer" / "pipeline.txt").read_text() == "dynamic-int8\n"
    assert not out.exists()
    assert leftovers(out) == []
    reproduced = ir.load(tmp_path / "out-reproducer" / "before.onnx")
    assert reproduced.graph.initializers["encoder.layer.0.query.weight"].const_value is not None


def test_a_wrong_export_is_refused_and_the_old_bundle_stays(
    judged: Judged, encoder_file: Path, encoder_bundle: Bundle, tmp_path: Path, quick: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from compiler import export

    def altered(source: object, *, seed: int) -> export.Exported:
        exported = export.export_model(source, seed=seed)  # type: ignore[arg-type]
        value = exported.model.graph.initializers["encoder.layer.0.gamma"]
        value.const_value = ir.tensor(value.const_value.numpy()[::-1] * 1.1, name=value.name)
        weight = exported.model.graph.initializers["encoder.layer.0.output.weight"]
        weight.const_value = ir.tensor(weight.const_value.numpy()[:, ::-1].copy(), name=weight.name)
        return exported

    monkeypatch.setattr("compiler.compile.export_model", altered)
    out = tmp_path / "out"
    shutil.copytree(encoder_bundle.path, out)
    with pytest.raises(ProviderError, match="computes the unoptimized model wrongly"):
        compile_model(encoder_file, out, task=TASK, recipe=quick)
    assert open_bundle(out) == type(encoder_bundle)(
        out, encoder_bundle.manifest, encoder_bundle.proof, encoder_bundle.digest
    )
    assert leftovers(out) == []


def test_a_budget_that_cannot_be_met(encoder_file: Path, tmp_path: Path, quick: str) -> None:
    with pytest.raises(FidelityError, match="nearest miss: dynamic-int8: cosine_mean drops by"), faster():
        compile_model(encoder_file, tmp_path / "out", task=TASK, recipe=quick, max_drop=0.0)
    assert not (tmp_path / "out").exists()


def test_options_that_make_no_sense(encoder_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(TypeError, match="speed"):
        compile_model(encoder_file, out, speed="fast")
    for options, told in (
        ({"targets": ()}, "there is no target"),
        ({"targets": ("tpu",)}, "unknown target 'tpu'"),
        ({"recipe": "fastest"}, "no recipe 'fastest'"),
        ({"plan": str(tmp_path / "nothing")}, "no plan at"),
    ):
        with pytest.raises(UsageError, match=told):
            compile_model(encoder_file, out, **options)
    with pytest.raises(OutputError):
        compile_model(encoder_file, tmp_path / "missing" / "out")
    assert list(tmp_path.iterdir()) == []
