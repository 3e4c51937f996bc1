from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
import pytest
from encoder_graphs import Encoder

from artifacts.target import CPU, CPU_PROVIDER
from compiler.choose import Assignment, Chooser, _run, patterns
from compiler.costs import CostBase
from compiler.lone import lone_model, observing, rewritten
from passes.base import Context, Pass
from passes.pipeline import Pipeline, parse
from passes.quantize import DynamicInt8, StaticInt8, WeightInt8
from passes.sites import linear_sites
from passes.statistics import Activation

STATIC, DYNAMIC, WEIGHT = StaticInt8(), DynamicInt8(), WeightInt8()
WHOLE = StaticInt8(ranges="absmax")


@dataclass(frozen=True)
class Told(CostBase):
    """Costs by the width of the operator's output, in place of measured ones."""

    by_width: Mapping[int, Mapping[Pass | None, float]]

    def milliseconds(
        self, forms: Sequence[Pass | None], shape: tuple[int, int], precision: str
    ) -> dict[Pass | None, tuple[float, ...]]:
        known = self.by_width[shape[1]]
        return {form: (known[form],) for form in forms if form in known}


def told(by_width: Mapping[int, Mapping[Pass | None, float]]) -> Told:
    return Told(CPU, CPU_PROVIDER, 1, (8,), by_width)


def widths(model: ir.Model) -> dict[str, int]:
    return {site.path: site.shape[1] for site in linear_sites(model) if min(site.shape) >= 16}


def test_each_operator_gets_its_cheapest_form() -> None:
    model = Encoder().build()
    (narrow, wide) = sorted(set(widths(model).values()))
    costs = told({narrow: {STATIC: 2.0, DYNAMIC: 1.0, None: 3.0}, wide: {STATIC: 1.0, DYNAMIC: 2.0, None: 3.0}})
    chosen = Chooser(Context(CPU), costs).assign(model, (STATIC, DYNAMIC), "").forms
    assert chosen == {path: STATIC if width == wide else DYNAMIC for path, width in widths(model).items()}


def test_the_earlier_form_wins_a_tie_and_float32_where_nothing_gains() -> None:
    model = Encoder().build()
    tie = {width: {STATIC: 1.0, DYNAMIC: 0.95, None: 3.0} for width in widths(model).values()}
    assert set(Chooser(Context(CPU), told(tie)).assign(model, (STATIC, DYNAMIC), "").forms.values()) == {STATIC}
    slower = {width: {STATIC: 3.0, None: 1.0} for width in widths(model).values()}
    assignment = Chooser(Context(CPU), told(slower)).assign(model, (STATIC, DYNAMIC), "")
    assert set(assignment.forms.values()) == {None}
    assert assignment.pipeline() == Pipeline()


def test_without_measured_costs_the_first_form_is_taken_everywhere() -> None:
    assignment = Chooser(Context(CPU), None).assign(Encoder().build(), (DYNAMIC, STATIC), "")
    assert assignment.pipeline() == Pipeline((DYNAMIC,))


def test_the_pipeline_names_sites_only_where_it_must() -> None:
    paths = [f"layer.{index}.{name}" for index in range(3) for name in ("query", "dense")]
    everywhere = Assignment(dict.fromkeys(paths, STATIC))
    assert str(everywhere.pipeline(parse("remove-unused"))) == "remove-unused; static-int8"
    assert str(everywhere.after([("layer.1.dense", None)]).pipeline()) == "static-int8(skip=[layer.1.dense])"
    mixed = Assignment({path: STATIC if path.endswith("dense") else DYNAMIC for path in paths})
    text = "dynamic-int8(only=[layer.*.query]); static-int8(only=[layer.*.dense])"
    assert mixed.pipeline() == parse(text)
    assert parse(str(mixed.pipeline())) == mixed.pipeline()


def test_patterns_cover_exactly_what_is_meant() -> None:
    among = dict.fromkeys(["a.0.x", "a.1.x", "a.10.x", "b.0.x"])
    assert patterns(["a.0.x", "a.1.x", "a.10.x"], among) == ("a.*.x",)
    assert patterns(["a.0.x", "a.1.x"], among) == ("a.0.x", "a.1.x")
    assert patterns(["b.0.x"], among) == ("b.*.x",)


def spiked() -> tuple[ir.Model, Context]:
    """Two operators; an input with one huge channel is quantized coarsely, so that its reader loses most."""
    rng = np.random.default_rng(0)
    plain = rng.normal(size=(64, 128)).astype(np.float32)
    huge = np.where(np.arange(128) == 3, 200.0, 1.0).astype(np.float32) * plain
    weight = rng.normal(size=(128, 32)).astype(np.float32)
    weight[3] = 0.0
    samples = {"x0": plain, "x1": huge}

    def observe(_: ir.Model, values: Sequence[ir.Value]) -> dict[str, Activation]:
        return {str(v.name): observing(samples[str(v.name)])(_, [v])[str(v.name)] for v in values}

    return lone_model(weight, np.zeros(32, np.float32), copies=2), replace(Context(CPU), observe=observe)


def test_the_most_damaged_operators_step_back_first() -> None:
    model, context = spiked()
    chooser = Chooser(context, None)
    assignment = chooser.assign(model, (STATIC,), "")
    assert chooser.steps_back(model, assignment, (STATIC,), "") == (("site1", None), ("site0", None))
    assert chooser.steps_back(model, assignment.after([("site1", None)]), (STATIC,), "") == (("site0", None),)
    assert Chooser(Context(CPU), None).steps_back(model, assignment, (STATIC,), "") == (
        ("site0", None),
        ("site1", None),
    )


def test_a_step_back_leads_to_a_gentler_form_that_still_gains() -> None:
    """A range for each block of 32 numbers of a row, not one for all: the huge channel spoils its own block only."""
    model, context = spiked()
    forms = (WHOLE, WEIGHT)
    assignment = Assignment(dict.fromkeys(("site0", "site1"), WHOLE))
    gains = Chooser(context, told({32: {WHOLE: 1.0, WEIGHT: 2.0, None: 3.0}}))
    steps = gains.steps_back(model, assignment, forms, "")
    assert steps[0] == ("site1", WEIGHT), "the most damaged one first"
    assert sorted(map(str, steps)) == sorted(map(str, [(s, f) for s in ("site0", "site1") for f in (WEIGHT, None)]))
    for path in ("site0", "site1"):
        assert [form for site, form in steps if site == path] == [WEIGHT, None]
    assert set(assignment.after(steps[:1]).forms.values()) == {WHOLE, WEIGHT}
    assert set(assignment.after(steps).forms.values()) == {None}
    slow = Chooser(context, told({32: {WHOLE: 1.0, WEIGHT: 3.0, None: 3.0}}))
    assert slow.steps_back(model, assignment, forms, "") == (("site1", None), ("site0", None))


def test_a_harsher_form_and_one_that_costs_more_than_a_gentler_one_are_no_steps() -> None:
    model, context = spiked()
    coarse = replace(WHOLE, reduce_range=True)
    costs = told({32: {WHOLE: 2.0, coarse: 1.0, WEIGHT: 1.5, None: 3.0}})
    from_weight = Chooser(context, costs).steps_back(model, Assignment({"site0": WEIGHT}), (WHOLE, coarse, WEIGHT), "")
    assert from_weight == (("site0", None),)
    from_coarse = Chooser(context, costs).steps_back(model, Assignment({"site0": coarse}), (WHOLE, coarse, WEIGHT), "")
    assert from_coarse == (("site0", WEIGHT), ("site0", None)), "8 bits are gentler than 7, but cost more than WEIGHT"


def test_a_lone_operator_in_its_forms_computes_the_same() -> None:
    rng = np.random.default_rng(1)
    weight, bias = rng.normal(size=(32, 16)).astype(np.float32), rng.normal(size=16).astype(np.float32)
    sample = rng.normal(size=(64, 32)).astype(np.float32)
    kinds = {node.op_type for node in lone_model(weight, bias, copies=2).graph}
    assert kinds == {"MatMul", "Add"}
    for form in (STATIC, DYNAMIC):
        model = rewritten(lone_model(weight, bias), form, CPU, sample)
        assert model is not None
        assert "MatMul" not in {node.op_type for node in model.graph}
        exact = sample @ weight + bias
        # Two roundings to 8 bits, each uniform within a step of range / 255: below 1 % of outputs of N(0, 1) inputs.
        assert np.linalg.norm(_run(model, sample) - exact) < 0.02 * np.linalg.norm(exact)


@pytest.mark.parametrize("text", ["static-int8", "static-int8 / dynamic-int8", "smooth; static-int8 / dynamic-int8"])
def test_recipes_write_it_with_a_slash(text: str) -> None:
    from compiler.recipe import PerSite, _alternative

    found = _alternative(text)
    assert isinstance(found, PerSite)
    assert str(found) == text
