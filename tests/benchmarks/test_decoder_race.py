"""The decoders' protocol and race, by real processes that only sleep."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from catalogue import HERE
from decoder import MEASURES, OURS, judge_speed, lines
from gguf_file import _interleave
from quality import write_lines
from race import Contender, Measure, Plan, Race, Texts

from artifacts.target import CPU
from compiler.recipe import load_recipe

SLEEPER = f"""
import os, sys, time
sys.path.append({str(HERE)!r})
import decoder_protocol
from protocol import serve

class Sleeps(decoder_protocol.DecoderSetting):
    batches = (1,) if os.environ["KIND"] == "alone" else (1, 8)
    def __init__(self, factor):
        self.pause = factor * float(os.environ["PAUSE"])
    def prefill(self, ids):
        self.rows = len(ids)
        time.sleep(self.pause)
    def step(self):
        time.sleep(self.pause * (1 if self.rows == 1 else 2))

class Sleeper(decoder_protocol.DecoderPeer):
    def load(self, model, texts, work):
        return {{"slow": lambda: Sleeps(3), "quick": lambda: Sleeps(1), "broken": lambda: 1 / 0}}
    def vocabulary(self, model):
        return 100

decoder_protocol._TRIAL_STEPS = 2
serve(decoder_protocol.DecoderServer(Sleeper()))
"""


@pytest.fixture(scope="module")
def race(tmp_path_factory: pytest.TempPathFactory) -> Race:
    """Ours, two peers, and one that decodes one row at a time only."""
    folder = tmp_path_factory.mktemp("race")
    script = folder / "sleeper.py"
    script.write_text(SLEEPER)
    nothing = write_lines(folder / "nothing.txt", [])

    def contender(name: str, pause: float, *, kind: str = "", ours: bool = False) -> Contender:
        return Contender(name, (sys.executable, str(script)), folder, {"PAUSE": str(pause), "KIND": kind}, ours)

    contenders = [
        contender(OURS, 0.01, ours=True),
        contender("near", 0.03),
        contender("far", 0.1),
        contender("single", 0.001, kind="alone"),
    ]
    measures = (
        Measure("prefill 512", "prefill", {"tokens": 8}),
        Measure("decode 1", "decode", {"prompt": 4, "steps": 4, "batch": 1}),
        Measure("decode 8", "decode", {"prompt": 4, "steps": 4, "batch": 8}),
    )
    plan = Plan(restarts=1, rounds=2, seconds=0.01, text_rounds=0, measures=measures)
    found = Race(contenders, plan, Texts(nothing, nothing, nothing, 0, folder), folder / "work")
    found.run()
    return found


def test_the_fastest_setting_is_measured_and_a_broken_one_left_out(race: Race) -> None:
    result = race.results["near"]
    assert result.loaded["settings"] == ["slow", "quick"]
    assert "ZeroDivisionError" in result.loaded["failed"]["broken"]
    for measure in MEASURES:
        assert result.chosen[measure.name] == ["quick"]
        assert all(ms >= 30.0 for ms in result.ms[measure.name])


def test_who_cannot_decode_a_batch_falls_out(race: Race) -> None:
    assert "does not decode 8 rows" in race.failed["single"]


def test_the_lines_are_those_of_the_issue(race: Race) -> None:
    table = lines(race)
    assert table["decode 1"]["best"] == "near"
    assert table["decode 1"]["ratio"]["median"] == pytest.approx(3.0, rel=0.4)
    assert table["batch gain"] == pytest.approx(4.0, rel=0.4)
    goals = judge_speed("tiny", {"lines": table, "first_token": 0.5})
    assert [goal.met for goal in goals] == [True, True, True, True]


def test_a_recipe_of_the_benchmark_is_one() -> None:
    for path in (HERE.parent / "recipes").glob("*.toml"):
        assert load_recipe(str(path)).stages_for(CPU, "text-generation")


def test_gguf_rotates_neighbours() -> None:
    rows = np.arange(8)[:, None]
    found = _interleave(rows, {"num_attention_heads": 1}, "self_attn.q_proj")
    assert found[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
