"""Contenders in turn, by real processes that only sleep; and the plots of what came of it."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET

import numpy as np
import plot
import pytest
from catalogue import HERE
from measure import Goal
from quality import Sts, compare_vectors, spearman, write_lines
from race import SHAPES, Contender, Plan, Race, Texts

SLEEPER = f"""
import os, sys, time
sys.path.append({str(HERE)!r})
import numpy as np
import protocol

class Sleeps(protocol.Setting):
    batches = (0,)
    def vectors(self, ids, mask):
        if os.environ["KIND"] == "dies" and len(ids) > 1:
            os._exit(3)
        time.sleep(float(os.environ["PAUSE"]))
        return np.ones((len(ids), 2), np.float32)
    def embed(self, texts, batch):
        time.sleep(float(os.environ["PAUSE"]))
        return np.array([[len(text), 1] for text in texts], np.float32)

class Sleeper(protocol.Peer):
    def load(self, model, texts, work):
        return {{"asleep": lambda: 1 / 0 if os.environ["KIND"] == "broken" else Sleeps()}}
    def vocabulary(self, model):
        return 100

protocol._TRIAL_SECONDS = 0.001
protocol.serve(protocol.Server(Sleeper()))
"""


@pytest.fixture(scope="module")
def race(tmp_path_factory: pytest.TempPathFactory) -> Race:
    """Ours, two peers, one that cannot be loaded, one that dies, and one that is not there."""
    folder = tmp_path_factory.mktemp("race")
    script = folder / "sleeper.py"
    script.write_text(SLEEPER)
    lines = write_lines(folder / "lines.txt", ["a", "bb", "two\nlines"])
    (folder / "vectors").mkdir()

    def contender(name: str, pause: float, *, ours: bool = False) -> Contender:
        settings = {"PAUSE": str(pause), "KIND": name}
        return Contender(name, (sys.executable, str(script)), folder, settings, ours)

    contenders = [
        contender("hasten cpu", 0.003, ours=True),
        *(
            contender(name, pause)
            for name, pause in (("fast", 0.006), ("slow", 0.03), ("broken", 1.0), ("dies", 0.001))
        ),
        Contender("gone", ("no-such-program",), folder, {}),
    ]
    texts = Texts(lines, lines, lines, 3, folder / "vectors")
    found = Race(contenders, Plan(restarts=2, rounds=2, seconds=0.01, text_rounds=2), texts, folder / "work")
    found.run()
    return found


def test_every_round_of_every_start_is_kept(race: Race) -> None:
    assert set(race.results) == {"hasten cpu", "fast", "slow", "dies"}
    for name, pause in (("hasten cpu", 3.0), ("fast", 6.0), ("slow", 30.0)):
        result = race.results[name]
        assert list(result.ms) == [f"{batch}x{length}" for batch, length in SHAPES]
        for rounds in result.ms.values():
            assert len(rounds) == 4
            assert all(pause <= ms for ms in rounds)
        assert result.chosen["1x32"] == ["asleep", "asleep"]
        assert (race._texts.vectors / f"{name}.npy").exists()
    assert len(race.results["fast"].per_second) == 4


def test_a_peer_far_behind_need_not_embed_again(race: Race) -> None:
    assert len(race.results["slow"].per_second) == 1


def test_who_falls_out_says_why(race: Race) -> None:
    assert set(race.failed) == {"broken", "dies", "gone"}
    assert "no setting works" in race.failed["broken"]
    assert "ended with exit code 3" in race.failed["dies"]
    assert race.results["dies"].chosen == {"1x32": ["asleep"], "1x128": ["asleep"]}
    assert race.results["dies"].ms == {}
    assert "was not found" in race.failed["gone"]


def test_ratios_are_to_the_best_peer_within_a_round(race: Race) -> None:
    for measure in ("1x32", "16x128", "texts"):
        assert race.best_peer(measure) == "fast"
        ratio = race.ratio("hasten cpu", "fast", measure)
        assert ratio is not None
        assert 1.2 < ratio.median < 3.0  # 6 ms over 3 ms, and what waking from sleep adds
        assert ratio.low <= ratio.median <= ratio.high
    assert race.ratio("hasten cpu", "broken", "1x32") is None
    assert race.best_peer("7x7") is None


def test_vectors_are_compared_with_the_reference() -> None:
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((8, 16)).astype(np.float32)
    reference /= np.linalg.norm(reference, axis=1, keepdims=True)
    cosines = (reference[:4] * reference[4:]).sum(1)
    dev = Sts(["a"] * 4, ["b"] * 4, [float(value) for value in cosines])
    assert spearman(reference, dev.scores) == pytest.approx(1.0)
    same = compare_vectors(3.0 * reference, reference, dev)
    assert (same["cosine_mean"], same["cosine_min"]) == (pytest.approx(1.0), pytest.approx(1.0))
    assert same["drop_points"] == pytest.approx(0.0)
    flipped = compare_vectors(np.concatenate([-reference[:4], reference[4:]]), reference, dev)
    assert flipped["drop_points"] == pytest.approx(200.0)
    assert flipped["cosine_min"] == pytest.approx(-1.0)


def test_a_goal_says_whether_it_is_met() -> None:
    assert str(Goal("speed", 1.15, True, "x", 1.2)) == "met    speed: 1.2 x (goal ≥ 1.15 x)"
    assert str(Goal("ratio", 1.0015, False, "x", 1.00123)) == "met    ratio: 1.0012 x (goal ≤ 1.0015 x)"
    assert str(Goal("cosine", 0.95, True, "", 0.9)) == "SHORT  cosine: 0.9 (goal ≥ 0.95)"
    assert str(Goal("memory", 512.0, False, "MB", None)) == "SHORT  memory: not measured (goal ≤ 512 MB)"


def test_plots_are_svg_and_the_same_for_the_same_figures(race: Race) -> None:
    figures = {"race": race.to_dict(), "machine": "a machine <of tests>"}
    picture = plot.draw(plot.contenders(figures), figures["machine"])
    assert picture == plot.draw(plot.contenders(figures), figures["machine"])
    texts = [element.text for element in ET.fromstring(picture).iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count("hasten cpu") == len(SHAPES) + 1
    assert texts.index("hasten cpu") < texts.index("fast") < texts.index("slow")
    assert "a machine <of tests>" in texts


def test_a_waterfall_ends_where_the_ratios_lead() -> None:
    steps = [{"name": "int8", "ratio": 2.0}, {"name": "gelu", "ratio": 0.8}, {"name": "pack", "ratio": 1.25}]
    proof = {"batch": 16, "length": 128, "reference_ms": 200.0, "ms": 100.0, "ratio": 2.0, "steps": steps}
    panel = plot.waterfall("cpu-int8", proof)
    assert [(bar.start, bar.end) for bar in panel.bars] == [
        (0.0, 200.0), (100.0, 200.0), (100.0, 125.0), (100.0, 125.0), (0.0, 100.0)
    ]  # fmt: skip
    assert [bar.kind for bar in panel.bars] == ["peer", "gain", "loss", "gain", "ours"]
    ET.fromstring(plot.draw([panel], "m"))
