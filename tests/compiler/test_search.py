from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir
import onnxruntime as ort
import pytest
from encoder_graphs import Encoder
from judging import Judged, Refuse, Rename, Scale, ScaleExactly, crafted

from artifacts.errors import FidelityError, HastenError, PassError
from artifacts.target import CPU, CPU_PROVIDER, TENSORRT
from compiler.candidate import Candidate, Trial, Verdict
from compiler.choose import Chooser
from compiler.costs import CostBase
from compiler.recipe import PerSite
from compiler.search import LOAD_TIME_FUSIONS, Search
from passes.base import Context, Effect, Outcome, Pass, Purpose
from passes.observers import Verifying
from passes.pipeline import Pipeline, parse
from passes.quantize import DynamicInt8
from passes.registry import CLEAN
from passes.sites import linear_sites


@dataclass(frozen=True)
class Raises:
    """Fail."""

    name: ClassVar[str] = "raises"
    effect: ClassVar[Effect] = Effect.EXACT
    purpose: ClassVar[Purpose] = Purpose.FORM

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Leave the graph half changed, and fail."""
        model.graph.outputs[0].name = "half done"
        raise ZeroDivisionError("the moon is full")


@dataclass(frozen=True)
class Breaks(Raises):
    """Leave an initializer without data."""

    name: ClassVar[str] = "breaks"

    def run(self, model: ir.Model, context: Context) -> Outcome:
        model.graph.initializers["encoder.layer.0.gamma"].const_value = None
        return Outcome(1)


@dataclass(frozen=True)
class ChangesOutputs(Raises):
    """Rename an output."""

    name: ClassVar[str] = "changes-outputs"

    def run(self, model: ir.Model, context: Context) -> Outcome:
        model.graph.outputs[0].name = "other"
        return Outcome(1)


@dataclass(frozen=True)
class Restless(Raises):
    """Change one more place at every run."""

    name: ClassVar[str] = "restless"

    def run(self, model: ir.Model, context: Context) -> Outcome:
        return Outcome(1)


@dataclass(frozen=True)
class Exhausts(Raises):
    """Ask for what the target has not."""

    name: ClassVar[str] = "exhausts"

    def run(self, model: ir.Model, context: Context) -> Outcome:
        next(node for node in model.graph if node.op_type == "Gelu").op_type = "Gelu2"
        return Outcome(1)


FAILING = {
    Raises(): "ZeroDivisionError: the moon is full",
    Breaks(): "initializer 'encoder.layer.0.gamma' has no data",
    ChangesOutputs(): "it changed the inputs or outputs of the graph",
    Restless(): "a second run changed 1 more places (the first: 1)",
    Exhausts(): "there is no operator Gelu2 in opset 21",
}


def one(*passes: Pass) -> tuple[Pipeline, ...]:
    return (Pipeline(passes),)


@pytest.mark.parametrize("item", FAILING, ids=lambda item: item.name)
def test_a_failing_pass_leaves_a_reproducer_and_is_named(judged: Judged, tmp_path: Path, item: Pass) -> None:
    search = judged.search(judged.judge(), tmp_path / "reproducer")
    with pytest.raises(HastenError) as raised:
        search.walk(judged.candidate(), [one(Rename(), item, Refuse())], tune=False)
    assert str(raised.value).startswith(f"pass {item.name}: ")
    assert FAILING[item] in str(raised.value)
    assert str(raised.value).endswith(f"A reproducer is in {tmp_path / 'reproducer'}")
    assert raised.value.exit_code == (3 if isinstance(item, Exhausts) else 9)

    rest = (tmp_path / "reproducer" / "pipeline.txt").read_text().strip()
    registry = (Rename, type(item), Refuse)
    assert parse(rest, registry) == Pipeline((item, Refuse()))
    assert FAILING[item].split(": ")[-1] in (tmp_path / "reproducer" / "error.txt").read_text()
    model = ir.load(tmp_path / "reproducer" / "before.onnx")
    assert {node.name for node in model.graph} == {f"x{index}" for index in range(len(model.graph))}
    session = ort.InferenceSession(tmp_path / "reproducer" / "before.onnx", providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["sentence_embedding"]
    with pytest.raises(HastenError):
        parse(rest, registry).run(model, Context(CPU), (Verifying(Context(CPU)),))


@pytest.fixture
def quick(judged: Judged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Search]:
    """A search in which every change is faster."""
    monkeypatch.setattr("compiler.judge.interleave", crafted(1.5))
    with judged.judge() as judge:
        judge.enthrone(judged.candidate())
        yield judged.search(judge, tmp_path / "reproducer")
    assert not (tmp_path / "reproducer").exists()


def told(search: Search) -> list[tuple[str, bool, str]]:
    return [(step.name, step.kept, step.reason) for step in search.steps]


def test_the_second_alternative_is_tried_where_the_first_does_not_stand(judged: Judged, quick: Search) -> None:
    announced: list[str] = []
    quick.announce = announced.append
    best = quick.walk(judged.candidate(), [(*one(Scale(40.0)), *one(Scale(1.01)), *one(Scale(1.02)))], tune=False)
    assert str(best.pipeline) == "scale(factor=1.01)"
    assert announced == ["scale(factor=40.0)", "scale(factor=1.01)"]
    first, second = quick.steps
    assert (first.kept, second.kept) == (False, True)
    assert first.reason.startswith("quality: cosine_mean drops by")
    assert second.reason == "1.50x"
    assert second.error == best.error > first.error / 1000
    assert (second.changed, second.refused) == (1, 0)
    assert second.size == best.graph.size
    assert quick.misses == [f"scale(factor=40.0): {first.reason.removeprefix('quality: ')}"]


def test_the_second_alternative_is_tried_where_the_first_finds_nothing_to_change(judged: Judged, quick: Search) -> None:
    best = quick.walk(judged.candidate(), [(*one(Refuse()), *one(Rename()))], tune=False)
    assert str(best.pipeline) == "rename"
    assert [(name, kept) for name, kept, _ in told(quick)] == [("refuse", False), ("rename", True)]


def test_what_missed_steps_back_though_a_later_alternative_finds_nothing(judged: Judged, quick: Search) -> None:
    stage = (*one(Rename(), ScaleExactly(1.1)), *one(Refuse()))
    best = quick.walk(judged.candidate(), [stage], tune=False)
    assert str(best.pipeline) == "rename"


def test_no_lossy_pass_stands(judged: Judged, quick: Search) -> None:
    stages = [one(Rename()), (*one(Scale(40.0)), *one(Scale(60.0)))]
    with pytest.raises(FidelityError) as raised:
        quick.walk(judged.candidate(), stages, tune=False)
    assert "nearest miss: scale(factor=40.0): cosine_mean drops by " in str(raised.value)
    assert "allowed 0.0100. Raise --max-drop" in str(raised.value)
    assert [step.kept for step in quick.steps] == [True, False, False]


def test_a_stage_that_does_not_stand_as_a_whole_is_tried_pass_by_pass(judged: Judged, quick: Search) -> None:
    best = quick.walk(judged.candidate(), [one(Rename(), ScaleExactly(1.1))], tune=False)
    assert str(best.pipeline) == "rename"
    assert [(name, kept) for name, kept, _ in told(quick)] == [
        ("rename; scale-exactly(factor=1.1)", False),
        ("rename", True),
        ("scale-exactly(factor=1.1)", False),
    ]
    assert best.error <= best.tolerance


def test_what_ran_in_a_kept_stage_is_what_is_recorded(judged: Judged, quick: Search) -> None:
    """Also a pass that says it changed nothing: shapes that it annotated may have let a later one act."""
    best = quick.walk(judged.candidate(), [one(Refuse(), Rename()), one(Refuse()), one()], tune=False)
    assert str(best.pipeline) == "refuse; rename"
    assert [(name, kept) for name, kept, _ in told(quick)] == [("refuse; rename", True), ("refuse", False), ("", False)]
    whys = [reason for _, _, reason in told(quick)]
    assert "1.50x" in whys[0]
    assert "some node: it is not what it seems" in whys[0]
    assert whys[1].startswith("nothing changed; ")
    assert "some node: it is not what it seems" in whys[1]
    assert whys[2] == "nothing to change"
    assert [step.refused for step in quick.steps] == [1, 1, 0]


def test_a_slower_stage_leaves_the_graph_as_it_was(
    judged: Judged, quick: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = judged.candidate()
    monkeypatch.setattr("compiler.judge.interleave", crafted(0.8))
    best = quick.walk(base, [one(Rename()), one(DynamicInt8())], tune=False)
    assert best is base
    assert all(reason.startswith("0.80x: slower") for _, _, reason in told(quick))
    assert base.graph.path.read_bytes() == judged.candidate().graph.path.read_bytes()


def test_a_clean_graph_stays_though_it_is_timed_slower(
    judged: Judged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compiler.judge.interleave", crafted(0.9))
    base = judged.candidate()
    with judged.judge() as judge:
        judge.enthrone(base)
        search = judged.search(judge, tmp_path / "reproducer")
        best = search.walk(base, [one(*CLEAN), one(Rename())], tune=False)
    assert set(best.pipeline.passes) <= set(CLEAN)
    assert best is not base
    assert [reason for _, _, reason in told(search)] == ["0.90x: part of the reference", "0.90x: slower"]


def test_load_time_fusions_are_judged_where_they_show(judged: Judged, quick: Search) -> None:
    best = quick.walk(judged.candidate(), [one(Rename())], tune=True)
    off = best.session.disabled_optimizers
    assert "SkipLayerNormFusion" in off
    assert set(off) < set(LOAD_TIME_FUSIONS)
    assert "DynamicQuantizeMatMulFusion" not in off, "nothing was quantized, so it did nothing"
    assert [name for name, kept, _ in told(quick) if kept][1:] == [f"without ORT {name}" for name in off]
    assert not {"SkipLayerNormalization", "BiasGelu"} & quick.judge.operators_at_load()


def test_load_time_fusions_stay_where_they_are_faster(
    judged: Judged, quick: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compiler.judge.interleave", crafted(0.9))
    best = quick.walk(judged.candidate(), [], tune=True)
    assert best.session.disabled_optimizers == ()
    assert told(quick)
    assert all(reason.endswith("not faster") for _, _, reason in told(quick))


@pytest.fixture
def no_fusions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compiler.search.LOAD_TIME_FUSIONS", {})


@dataclass(frozen=True)
class Told(CostBase):
    """The same cost for every shape, in place of measured ones."""

    known: Mapping[Pass | None, float]

    def milliseconds(
        self, forms: Sequence[Pass | None], shape: tuple[int, int], precision: str
    ) -> dict[Pass | None, tuple[float, ...]]:
        return {form: (self.known[form],) for form in forms}


def products(candidate: Candidate) -> Counter[str]:
    return Counter(node.op_type for node in candidate.model.graph if node.op_type.startswith("MatMul"))


@pytest.mark.parametrize(("allowed", "most", "left"), [(5, 12, (5, 7)), (0, 4, (0, 4))])
def test_operators_step_back_to_a_gentler_form_and_then_to_float32(
    judged: Judged,
    quick: Search,
    monkeypatch: pytest.MonkeyPatch,
    allowed: int,
    most: int,
    left: tuple[int, int],
) -> None:
    forms = parse("static-int8(ranges=absmax, correct_bias=false)"), parse("weight-int8")
    costs = Told(CPU, CPU_PROVIDER, 1, (8,), {forms[0].passes[0]: 1.0, forms[1].passes[0]: 2.0, None: 3.0})
    # All steps start from the same graph, so one calibration serves them.
    base = judged.candidate()
    seen = judged.observe(base.model, [site.input for site in linear_sites(base.model)])
    quick.context = replace(quick.context, observe=lambda model, values: seen)
    quick.chooser = Chooser(quick.context, costs)
    tried: list[Counter[str]] = []

    def shortfall(candidate: Candidate) -> str:
        tried.append(products(candidate))
        integer = products(candidate)["MatMulIntegerToFloat"]
        return f"{integer} of static ranges" if integer > allowed or products(candidate)["MatMulNBits"] > most else ""

    def judge(trial: Trial) -> Verdict:
        missed = shortfall(trial.candidate)
        return Verdict(not missed, missed or "it stands", trial.candidate, miss=missed)

    monkeypatch.setattr(quick.judge, "shortfall", shortfall)
    monkeypatch.setattr(quick.judge, "judge", judge)
    stage = (PerSite(Pipeline(), tuple(form.passes[0] for form in forms)),)
    best = quick.walk(base, [stage, one(Rename()), one(Scale(1.01))], tune=False)
    found = products(best)
    assert (found["MatMulIntegerToFloat"], found["MatMulNBits"]) == left
    assert found.total() == 12 + 4, "two layers of six operators, and of two products of activations"
    # The first trial, the bisection of at most 24 steps, what it found, and the two stages after it.
    assert len(tried) <= 1 + 5 + 1 + 2


@pytest.mark.usefixtures("no_fusions")
def test_a_narrower_compute_type_is_tried_only_by_recipes_that_may_lose(judged: Judged, quick: Search) -> None:
    base = judged.candidate()
    strict = replace(base, session=replace(base.session, precision="fp32"))
    assert quick.walk(strict, [one(Rename())], tune=True).session.precision == "fp32"
    best = quick.walk(strict, [one(Rename()), one(Scale(1.01))], tune=True)
    assert (best.session.precision, best.precision) == ("bf16", "bf16")
    assert quick.walk(base, [one(Scale(1.01))], tune=True).session.precision == ""
    assert quick.walk(strict, [one(Scale(1.01))], tune=False).session.precision == "fp32"


@pytest.mark.usefixtures("no_fusions")
def test_a_miss_is_forgiven_where_the_narrower_compute_type_stands(judged: Judged, quick: Search) -> None:
    base = judged.candidate()
    strict = replace(base, session=replace(base.session, precision="fp32"))
    best = quick.walk(strict, [one(Scale(40.0))], tune=True)
    assert (best.session.precision, str(best.pipeline)) == ("bf16", "")


def test_nothing_is_tuned_where_nothing_is_measured(judged: Judged, tmp_path: Path) -> None:
    base = judged.candidate()
    strict = replace(base, session=replace(base.session, precision="fp32"))
    with judged.judge(unmeasured="not here") as judge:
        judge.enthrone(strict)
        best = judged.search(judge, tmp_path / "r").walk(strict, [one(DynamicInt8())], tune=True)
    assert str(best.pipeline) == "dynamic-int8"
    assert best.session == strict.session


def test_what_the_target_needs_stays_though_slower(
    judged: Judged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compiler.judge.interleave", crafted(0.5))
    encoder = Encoder()
    monkeypatch.setattr(encoder, "_attend", encoder._attend_fused)
    model = encoder.build()
    for value in (value for node in model.graph for value in node.outputs):
        if str(value.name).endswith((".query", ".key", ".value")):
            value.shape = ir.Shape(["batch", "sequence", 64])
        elif str(value.name).endswith(".keys"):
            value.shape = ir.Shape(["batch", "sequence"])
    base = judged.candidate(model)
    with judged.judge() as judge:
        judge.enthrone(base)
        search = judged.search(judge, tmp_path / "r", Context(TENSORRT))
        best = search.walk(base, [(parse("unfuse-attention"),), one(Rename())], tune=False)
    assert str(best.pipeline) == "unfuse-attention"
    assert [reason for _, _, reason in told(search)] == ["the target needs it", "0.50x: slower"]
    assert all(node.domain == "" for node in best.model.graph)


def test_replay(judged: Judged, quick: Search) -> None:
    base = judged.candidate()
    session = replace(base.session, disabled_optimizers=("SkipLayerNormFusion",))
    best = quick.replay(base, Pipeline((Rename(), Scale(1.01))), session)
    assert str(best.pipeline) == "rename; scale(factor=1.01)"
    assert best.session == session
    assert len(quick.steps) == 1
    assert quick.replay(base, Pipeline(), session).session == session
    with pytest.raises(FidelityError, match="the plan misses the quality budget: cosine_mean drops by"):
        quick.replay(base, Pipeline((Scale(40.0),)), session)
    with pytest.raises(PassError, match="the plan does not hold here: numbers: relative error"):
        quick.replay(base, Pipeline((ScaleExactly(1.1),)), session)
