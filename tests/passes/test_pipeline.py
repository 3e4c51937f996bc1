"""Pipelines: text form, running, observers, reproducers; the documents made from the registry."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest
from builders import CONTEXT, GraphBuilder, evaluate, random
from hypothesis import given, settings
from hypothesis import strategies as st

from artifacts.errors import OutputError, PassError, UnsupportedError, UsageError
from passes.base import Context, Effect, Outcome, Pass, Purpose
from passes.cleanup import FoldConstants, RaiseOpset, RemoveUnused
from passes.document import markdown
from passes.observers import DumpOnChange, Reproducer, Timing, Verifying, write_model
from passes.pipeline import Pipeline, parse
from passes.registry import CLEAN, REGISTRY

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Everything:
    """A pass with an option of every kind."""

    name: ClassVar[str] = "everything"
    effect: ClassVar[Effect] = Effect.LOSSY
    purpose: ClassVar[Purpose] = Purpose.SIZE

    flag: bool = False
    number: int = 3
    real: float = 0.5
    word: str = ""
    words: tuple[str, ...] = ()

    def run(self, model: ir.Model, context: Context) -> Outcome:
        return Outcome(0)


@dataclass(frozen=True)
class Bad:
    """A pass that breaks the promise it is told to."""

    name: ClassVar[str] = "bad"
    effect: ClassVar[Effect] = Effect.EXACT
    purpose: ClassVar[Purpose] = Purpose.FORM

    how: str = "raise"

    def run(self, model: ir.Model, context: Context) -> Outcome:
        graph = model.graph
        if self.how == "raise":
            raise ValueError("something inside")
        if self.how == "unsupported":
            raise UnsupportedError("node 'n' is odd", "Export it anew")
        if self.how == "rename":
            graph.outputs[0].name = "renamed"
        if self.how == "undefined":
            next(iter(graph)).replace_input_with(0, ir.Value(name="ghost"))
        return Outcome(1 if self.how == "again" else 0)


KNOWN = (*REGISTRY, Everything, Bad)


def model() -> ir.Model:
    g = GraphBuilder()
    x = g.input("x", ("n", 4))
    g.add("Exp", x)
    return g.finish(g.add("Neg", g.add("Mul", x, g.constant(2.0)), shape=("n", 4)))


def test_names_are_unique_and_every_pass_is_a_pass() -> None:
    names = [kind.name for kind in REGISTRY]
    assert len(set(names)) == len(names)
    for kind in REGISTRY:
        made = kind()
        assert isinstance(made, Pass)
        assert dataclasses.is_dataclass(kind)
        assert kind.__doc__
        assert parse(str(Pipeline((made,)))) == Pipeline((made,))
    assert {type(item) for item in CLEAN} <= set(REGISTRY)


def test_text_form() -> None:
    words = Everything(words=("a.*", "b c", ""))
    pipeline = Pipeline((RemoveUnused(), FoldConstants(maximum_elements=8), words, RaiseOpset()))
    text = 'remove-unused; fold-constants(maximum_elements=8); everything(words=[a.*, "b c", ""]); raise-opset'
    assert str(pipeline) == text
    assert parse(text, KNOWN) == pipeline
    assert parse("") == Pipeline()
    assert parse(" remove-unused ;\n raise-opset( minimum = 21 ) ; ") == Pipeline((RemoveUnused(), RaiseOpset(21)))


@given(
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
    st.lists(st.text(max_size=8), max_size=3),
)
@settings(max_examples=200, deadline=None)
def test_text_form_round_trips(flag: bool, number: int, real: float, word: str, words: list[str]) -> None:
    pipeline = Pipeline((Everything(flag, number, real, word, tuple(words)), RemoveUnused()))
    assert parse(str(pipeline), KNOWN) == pipeline


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("remove-unusd", "remove-unused"),
        ("remove-unused(minimum=3)", "no option 'minimum'"),
        ("raise-opset(minimun=3)", "minimum"),
        ("raise-opset(minimum=high)", "high"),
        ("raise-opset(minimum=[20])", "no list"),
        ("everything(words=a)", "is a list"),
        ("everything(flag=yes)", "true or false"),
        ("everything(real=inf)", "finite"),
        ("everything(flag=true, flag=true)", "twice"),
        ("raise-opset(minimum=20", "the end"),
        ("raise-opset(minimum 20)", "'='"),
        ("raise-opset minimum", "';'"),
        (";", "name of a pass"),
        ("remove-unused; §", "§"),
        ('everything(word="open)', "open"),
        ('everything(word="\\q")', "bad string"),
    ],
)
def test_bad_text_is_told(text: str, told: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse(text, KNOWN)
    assert told in str(raised.value)


@given(st.text(alphabet='remove-unused();=[]",\\ 1.x', max_size=24))
@settings(max_examples=300, deadline=None)
def test_any_text_is_a_pipeline_or_a_usage_error(text: str) -> None:
    try:
        parse(text, KNOWN)
    except UsageError:
        return


def test_runs_in_order_and_observers_see_it(tmp_path: Path) -> None:
    graph = model()
    timing = Timing()
    pipeline = parse("remove-unused; everything; fold-constants", KNOWN)
    outcomes = pipeline.run(graph, CONTEXT, (Verifying(CONTEXT), timing, DumpOnChange(tmp_path / "dump")))
    assert [(item.name, outcome.changed > 0) for item, outcome in outcomes] == [
        ("remove-unused", True),
        ("everything", False),
        ("fold-constants", False),
    ]
    assert [name for name, _ in timing.seconds] == ["remove-unused", "everything", "fold-constants"]
    assert all(seconds >= 0 for _, seconds in timing.seconds)
    assert [path.name for path in (tmp_path / "dump").glob("*.onnx")] == ["01-remove-unused.onnx"]


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("raise", "ValueError: something inside"),
        ("rename", "inputs or outputs"),
        ("undefined", "ghost"),
        ("again", "second run changed 1"),
    ],
)
def test_a_broken_promise_names_the_pass_and_leaves_a_reproducer(tmp_path: Path, how: str, told: str) -> None:
    graph = model()
    expected = evaluate(graph, {"x": random(0, 2, 4)})
    folder = tmp_path / "reproducer"
    pipeline = Pipeline((RemoveUnused(), Bad(how), RaiseOpset(minimum=22)))
    with pytest.raises(PassError) as raised:
        pipeline.run(graph, CONTEXT, (Verifying(CONTEXT), Reproducer(folder)))
    text = str(raised.value)
    assert text.startswith("pass bad: ")
    assert told in text
    assert str(folder) in text
    rest = (folder / "pipeline.txt").read_text(encoding="utf-8").strip()
    assert parse(rest, KNOWN) == Pipeline(pipeline.passes[1:])
    assert "Traceback" in (folder / "error.txt").read_text(encoding="utf-8")
    before = ir.load(folder / "before.onnx")
    assert [node.op_type for node in before.graph] == ["Mul", "Neg"]
    for name, array in evaluate(before, {"x": random(0, 2, 4)}).items():
        np.testing.assert_array_equal(array, expected[name])


def test_our_own_errors_keep_their_kind() -> None:
    with pytest.raises(UnsupportedError, match=r"pass bad: node 'n' is odd\. Export it anew"):
        Pipeline((Bad("unsupported"),)).run(model(), CONTEXT)


def test_a_reproducer_that_cannot_be_written_does_not_hide_the_failure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(PassError) as raised:
        Pipeline((Bad(),)).run(model(), CONTEXT, (Reproducer(tmp_path / "file" / "folder"),))
    assert "something inside" in str(raised.value)
    assert "No reproducer" in str(raised.value)
    with pytest.raises(OutputError):
        write_model(model(), tmp_path / "file" / "x.onnx")


def test_the_page_of_passes_is_current() -> None:
    page = (ROOT / "docs" / "passes.md").read_text(encoding="utf-8")
    assert page == markdown(), "run python -m passes.document > docs/passes.md"
    for kind in REGISTRY:
        assert f"## {kind.name}\n" in page


def test_the_example_pass_runs() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", str(ROOT / "examples" / "my_pass.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "remove-ones: 1 changed, 0 refused"
    assert done.stdout.splitlines()[-1] == "['Neg']"
    assert "examples/my_pass.py" in (ROOT / "docs" / "writing_a_pass.md").read_text(encoding="utf-8")
