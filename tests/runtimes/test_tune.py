"""Tuning: what is tried, what is taken, how it is kept, and when a load does it by itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from session_graphs import linear
from task_graphs import embedder, write_bundle

from artifacts.bundle import Bundle
from artifacts.errors import ProviderError, UsageError
from artifacts.target import CPU_PROVIDER, OPENVINO_PROVIDER
from runtimes import remember, tune
from runtimes.client import Ratio, Worker
from runtimes.decide import decide, start
from runtimes.load import load
from runtimes.settings import Settings, default_settings
from runtimes.tune import Trial, TuneReport, tune_bundle

DEFAULT = default_settings(CPU_PROVIDER)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_bundle(tmp_path / "b", "feature-extraction", embedder())


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine of four cores."""
    monkeypatch.setattr("runtimes.settings.physical_cores", lambda: 4)


@pytest.fixture
def races(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Settings, bool]]:
    """No timing: a contestant's cost is what the test says. Records who was entered: settings, and whether wide."""
    entered: list[tuple[Settings, bool]] = []
    costs: dict[Settings, float] = {}
    enter = tune._Search._enter

    def record(self, settings: Settings, wide: bool):
        entered.append((settings, wide))
        contestant = enter(self, settings, wide)
        costs[contestant.worker] = self.cost(settings)
        return contestant

    def race(champion, challenger) -> Ratio:
        ratio = costs[champion.worker] / costs[challenger.worker]
        return Ratio(ratio, ratio, ratio)

    monkeypatch.setattr(tune._Search, "_enter", record)
    monkeypatch.setattr(tune._Search, "cost", lambda self, settings: 1.0, raising=False)
    monkeypatch.setattr(tune, "_race", race)
    return entered


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "_ROUNDS", 2)
    monkeypatch.setattr(tune, "_BLOCK_SECONDS", 0.0)


@pytest.mark.usefixtures("quick")
def test_a_bundle_is_tuned_and_a_later_load_knows(bundle: Bundle, own_cache: Path) -> None:
    with load(bundle.path) as model:
        assert "tokens a batch (the defaults, not tuned on this machine)" in model.explain()
    report = tune_bundle(bundle.path)
    assert isinstance(report, TuneReport)
    assert (report.name, report.variant, report.provider, report.device) == ("tiny", "cpu-fp32", CPU_PROVIDER, "cpu")
    assert (report.default, report.settings.tuned) == (DEFAULT, True)
    assert all(trial.ratio is not None and trial.ratio > 0.0 and trial.reason == "" for trial in report.trials)
    assert {"no spinning", "no arena"} <= {trial.change for trial in report.trials}
    assert json.loads(json.dumps(report.to_dict()))["settings"]["threads"] == report.settings.threads
    with load(bundle.path) as model:
        assert f"settings   {report.settings.describe(text=True)} (tuned on this machine)" in model.explain()
    with load(bundle.path, cache=False) as model:
        assert "not tuned" in model.explain()
    with load(bundle.path, threads=1) as model:
        assert "not tuned" in model.explain()
    assert [path.parent.name for path in own_cache.rglob("*.json")] == ["settings"]


@pytest.mark.usefixtures("four_cores")
def test_what_gains_is_taken_and_the_next_change_starts_from_it(bundle: Bundle, races, monkeypatch) -> None:
    lanes = {4: 1.0, 2: 0.8, 1: 1.2}
    threads = {4: 1.0, 2: 0.8, 1: 1.3}
    tokens = {512: 1.0, 1024: 1.1, 256: 0.8, 128: 0.79}

    def cost(_: object, settings: Settings) -> float:
        place = lanes[settings.lanes] * threads[settings.threads] * tokens[settings.max_tokens]
        return place * (1.0 if settings.arena else 0.99)

    monkeypatch.setattr(tune._Search, "cost", cost)
    best, trials = tune.tune(bundle, "cpu-fp32", CPU_PROVIDER, "cpu", 0, seconds=60.0)
    assert best == Settings(2, lanes=2, max_tokens=256, run_tokens=24, tuned=True)
    assert [(trial.change, trial.taken) for trial in trials] == [
        ("1 lane", False),
        ("2 lanes", True),
        ("1024 tokens a batch", False),
        ("256 tokens a batch", True),
        ("128 tokens a batch", False),
        ("2 threads", True),
        ("1 thread", False),
        ("no spinning", False),
        ("no arena", False),  # 1 % better: not worth leaving the default
    ]
    assert [wide for _, wide in races] == sorted((wide for _, wide in races), reverse=True)


@pytest.mark.usefixtures("races", "four_cores")
def test_nothing_is_taken_where_nothing_gains(bundle: Bundle) -> None:
    best, trials = tune.tune(bundle, "cpu-fp32", CPU_PROVIDER, "cpu", 0, seconds=60.0)
    assert best == Settings(4, lanes=4, max_tokens=512, run_tokens=24, tuned=True)
    assert [trial.change for trial in trials] == [
        *("1 lane", "2 lanes", "1024 tokens a batch", "256 tokens a batch", "2 threads"),
        *("no spinning", "no arena"),
    ]
    assert not any(trial.taken for trial in trials)


@pytest.mark.usefixtures("races")
def test_threads_that_were_asked_for_stay(bundle: Bundle) -> None:
    best, trials = tune.tune(bundle, "cpu-fp32", CPU_PROVIDER, "cpu", 3, seconds=60.0)
    assert best.threads == 3
    assert not any("thread" in trial.change for trial in trials)


@pytest.mark.usefixtures("races")
def test_tensors_have_no_lanes(make_bundle, recipe) -> None:
    _, trials = tune.tune(make_bundle({"only": recipe(linear)}), "only", CPU_PROVIDER, "cpu", 2, seconds=60.0)
    assert [trial.change for trial in trials] == ["no spinning", "no arena"]


@pytest.mark.usefixtures("races")
def test_a_challenger_that_fails_is_told_and_the_search_goes_on(bundle: Bundle, monkeypatch) -> None:
    init = Worker.__init__

    def refuse(self, *arguments, settings, **options) -> None:
        if not settings.spinning:
            raise ProviderError("the child died with signal 9 (SIGKILL)")
        init(self, *arguments, settings=settings, **options)

    monkeypatch.setattr(Worker, "__init__", refuse)
    _, trials = tune.tune(bundle, "cpu-fp32", CPU_PROVIDER, "cpu", 1, seconds=60.0)
    assert trials[-2] == Trial("no spinning", False, None, None, None, "the child died with signal 9 (SIGKILL)")
    assert trials[-1].ratio == 1.0


def test_no_challenger_starts_after_the_time(bundle: Bundle, races) -> None:
    _, trials = tune.tune(bundle, "cpu-fp32", CPU_PROVIDER, "cpu", 0, seconds=-1.0)
    assert {trial.reason for trial in trials} == {"there was no time left"}
    assert races == []


@pytest.mark.parametrize("wish", [{"threads": -1}, {"seconds": 0.0}, {"variant": "none"}, {"device": "abacus"}])
def test_impossible_wishes(bundle: Bundle, wish: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        tune_bundle(bundle.path, **wish)  # type: ignore[arg-type]


# --- what is kept


def test_settings_are_kept_for_this_machine_and_these_wishes(own_cache: Path, monkeypatch) -> None:
    about = ("sha256:" + "0" * 64, "v", CPU_PROVIDER, "cpu", 0)
    kept = Settings(3, spinning=False, lanes=2, max_tokens=77, tuned=True)
    assert remember.recall_settings(*about) is None
    remember.remember_settings(*about, kept)
    assert remember.recall_settings(*about) == kept
    for place, other in enumerate(("sha256:" + "1" * 64, "w", OPENVINO_PROVIDER, "gpu", 1)):
        assert remember.recall_settings(*about[:place], other, *about[place + 1 :]) is None
    (file,) = (own_cache / "settings").iterdir()
    whole = json.loads(file.read_text())
    for wrong in ({"threads": 0}, {"threads": 5000}, {"threads": "3"}, {"lanes": 0}, {"max_tokens": -1}, {"more": 1}):
        file.write_text(json.dumps(whole | {"settings": whole["settings"] | wrong}))
        assert remember.recall_settings(*about) is None
    for text in ("", "[]", "{", json.dumps(whole | {"schema": 99})):
        file.write_text(text)
        assert remember.recall_settings(*about) is None
    file.write_text(json.dumps(whole))
    assert remember.recall_settings(*about) == kept
    monkeypatch.setattr(remember, "fingerprint", lambda: "another machine")
    assert remember.recall_settings(*about) is None


def test_a_load_without_tuned_settings_does_not_ask_which_machine_this_is(bundle: Bundle, monkeypatch) -> None:
    def refuse() -> str:
        raise AssertionError("fingerprinted")

    monkeypatch.setattr(remember, "fingerprint", refuse)
    with load(bundle.path) as model:
        assert "not tuned" in model.explain()


def test_tuned_settings_reach_the_session(bundle: Bundle) -> None:
    kept = Settings(1, spinning=False, arena=False, lanes=3, max_tokens=99, tuned=True)
    remember.remember_settings(bundle.digest, "cpu-fp32", CPU_PROVIDER, "cpu", 0, kept)
    _, session = start(bundle)
    assert session.settings == kept
    with load(bundle.path, lanes=1) as model:
        assert "1 thread, no spinning, no arena, 99 tokens a batch (tuned on this machine)" in model.explain()


# --- at a load


@pytest.fixture
def tuned_at_load(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which variants a load tunes; nothing is measured."""
    tuned: list[str] = []

    def fake(bundle: Bundle, variant: str, *_: object, seconds: float) -> tuple[Settings, tuple[Trial, ...]]:
        assert seconds == tune.LOAD_SECONDS
        tuned.append(variant)
        return Settings(1, max_tokens=123, tuned=True), ()

    monkeypatch.setattr(tune, "tune", fake)
    monkeypatch.setattr(tune, "_LEAST_MS", 0.0)
    monkeypatch.setattr(tune, "is_busy", lambda: False)
    monkeypatch.setattr("runtimes.decide._ROUNDS", 2)
    monkeypatch.setattr("runtimes.decide._BLOCK_SECONDS", 0.0)
    return tuned


def two(tmp_path: Path) -> Bundle:
    return write_bundle(tmp_path / "two", "feature-extraction", embedder(), variants=("one", "two"))


def test_a_load_that_compares_tunes_the_chosen_one_once(tmp_path: Path, tuned_at_load: list[str]) -> None:
    bundle = two(tmp_path)
    with load(bundle.path) as model:
        assert "123 tokens a batch (tuned on this machine)" in model.explain()
    assert len(tuned_at_load) == 1
    with load(bundle.path) as model:
        assert "123 tokens a batch (tuned on this machine)" in model.explain()
    assert decide(bundle).variant == tuned_at_load[0]
    assert len(tuned_at_load) == 1


def test_a_lone_candidate_and_a_load_without_cache_are_not_tuned(
    tmp_path: Path, bundle: Bundle, tuned_at_load: list[str]
) -> None:
    for options in ({}, {"cache": False}):
        with load(bundle.path, **options) as model:  # type: ignore[arg-type]
            assert "not tuned" in model.explain()
    with load(two(tmp_path).path, cache=False) as model:
        assert "not tuned" in model.explain()
    assert tuned_at_load == []


@pytest.mark.parametrize(("name", "value"), [("is_busy", lambda: True), ("_LEAST_MS", 1e9), ("LOAD_SECONDS", 0.0)])
def test_a_busy_machine_or_a_tiny_model_is_not_tuned(
    tmp_path: Path, tuned_at_load: list[str], monkeypatch, name: str, value: object
) -> None:
    monkeypatch.setattr(tune, name, value)
    with load(two(tmp_path).path) as model:
        assert "not tuned" in model.explain()
    assert tuned_at_load == []


def test_busy_is_more_than_half_of_the_cores_just_now(monkeypatch) -> None:
    shares = iter((51.0, 49.0))
    monkeypatch.setattr("psutil.cpu_percent", lambda seconds: next(shares) if seconds > 0.0 else 100.0)
    assert tune.is_busy()
    assert not tune.is_busy()
