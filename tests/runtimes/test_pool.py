"""The two sessions of a model: when the second is opened, when it is used, what its failure costs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from task_graphs import embedder, write_bundle

from artifacts.errors import ProviderError, UsageError
from artifacts.manifest import TensorSpec
from artifacts.target import CPU_PROVIDER, CUDA_PROVIDER, OPENVINO_PROVIDER
from runtimes.client import Worker
from runtimes.load import load
from runtimes.pool import WIDEN_AFTER, SessionPool
from runtimes.session import Session
from runtimes.settings import Settings, default_settings


class Counted:
    """The thinnest session."""

    inputs = (TensorSpec("x", "int64", ("n",)),)

    def __init__(self) -> None:
        self.closed = 0

    def run(self, feeds: object) -> dict[str, np.ndarray]:
        return {}

    def close(self) -> None:
        self.closed += 1


def test_the_wide_session_is_opened_once_when_there_was_work_for_it() -> None:
    opened: list[Counted] = []
    narrow = Counted()
    pool = SessionPool(narrow, lanes=2, widen=lambda: opened.append(Counted()) or opened[-1])
    for _ in range(1000):
        assert pool.choose(1) == (narrow, 1)
    for _ in range(WIDEN_AFTER // 16):
        assert pool.choose(16) == (narrow, 1)
    assert (opened, pool.explain()) == ([], "")
    assert pool.choose(16) == (opened[0], 2)
    assert pool.explain() == "2 lanes are open"
    assert pool.choose(7) == pool.choose(1) == (narrow, 1)
    assert pool.choose(10_000) == (opened[0], 2)
    pool.close()
    assert (len(opened), opened[0].closed, narrow.closed) == (1, 1, 1)


def test_a_wide_session_that_does_not_open_costs_nothing_but_speed() -> None:
    tries: list[int] = []

    def widen() -> Counted:
        tries.append(1)
        raise ProviderError("out of memory")

    narrow = Counted()
    pool = SessionPool(narrow, lanes=2, widen=widen)
    assert [pool.choose(100)[1] for _ in range(3)] == [1, 1, 1]
    assert (tries, pool.explain()) == ([1], "no lanes are used: out of memory")


def test_one_lane_is_no_lanes() -> None:
    def widen() -> Counted:
        raise AssertionError("opened")

    assert SessionPool(Counted(), lanes=1, widen=widen).choose(10_000)[1] == 1
    assert SessionPool(Counted(), lanes=4).choose(10_000)[1] == 1


# --- real sessions

_RANDOM = np.random.default_rng(7)
TEXTS = [" ".join(_RANDOM.choice(["cat", "dog", "city", "paris"], n % 23)) for n in range(900)]
"""Hardly two of them equal: equal texts are computed once."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("HASTEN_CACHE_DIR", str(tmp_path / "cache"))
    write_bundle(tmp_path / "b", "feature-extraction", embedder())
    return tmp_path / "b"


def test_a_loaded_model_opens_its_lanes_for_long_inputs_and_computes_the_same(folder: Path) -> None:
    with load(folder, lanes=3) as model, load(folder, lanes=1) as plain:
        assert "3 lanes, 512 tokens a batch (the defaults" in model.explain()
        wanted = plain.embed(TEXTS, max_tokens=64)
        found = model.embed(TEXTS, max_tokens=64)
        assert "now        3 lanes are open" in model.explain()
        assert "lanes" not in plain.explain()
        # A mean of at most 24 vectors in float32, whatever the batch.
        np.testing.assert_allclose(found, wanted, rtol=0, atol=24 * 2**-24 * np.abs(wanted).max())
        np.testing.assert_array_equal(np.array(list(model.embed_iter(TEXTS, max_tokens=64))), found)
        np.testing.assert_allclose(model.embed(TEXTS[5:6])[0], wanted[5], rtol=0, atol=1e-6)
    with pytest.raises(UsageError, match="was closed"):
        model.embed(TEXTS)


def test_a_bundle_that_is_gone_when_lanes_are_wanted_still_answers(folder: Path) -> None:
    with load(folder, lanes=2) as model:
        (folder / "golden.npz").unlink()
        assert model.embed(TEXTS, max_tokens=64).shape == (900, 8)
        assert "no lanes are used: " in model.explain()
        assert "golden.npz" in model.explain()


def test_closing_while_a_long_input_runs_is_a_usage_error(folder: Path) -> None:
    with load(folder, lanes=2) as model:
        vectors = model.embed_iter(TEXTS, max_tokens=16)
        next(vectors)
        model.close()
        with pytest.raises((UsageError, ProviderError), match="closed"):
            list(vectors)


# --- settings


def test_the_defaults() -> None:
    assert default_settings(CPU_PROVIDER, "cpu", 4) == Settings(4, lanes=4, max_tokens=512, run_tokens=24)
    assert default_settings(OPENVINO_PROVIDER, "cpu", 4) == Settings(4, lanes=4, max_tokens=1024, run_tokens=24)
    assert default_settings(OPENVINO_PROVIDER, "gpu", 4).lanes == 1
    assert default_settings(CUDA_PROVIDER, "cuda:1", 4).lanes == 1
    assert default_settings(CPU_PROVIDER, "cpu", 1).lanes == 1
    assert default_settings(CPU_PROVIDER, "cpu", 500).lanes == 32
    assert default_settings(CPU_PROVIDER).threads >= 1
    # Threads share the arithmetic of a run and not its reading of the weights.
    assert default_settings(CPU_PROVIDER, "cpu", 4).padding == 96
    assert default_settings(CUDA_PROVIDER, "cuda:1", 4).padding > 1 << 20


def test_settings_in_words() -> None:
    assert Settings(1).describe(text=False) == "1 thread"
    assert Settings(1).describe(text=True) == "1 thread, 1024 tokens a batch"
    odd = Settings(3, spinning=False, arena=False, lanes=2, max_tokens=64)
    assert odd.describe(text=True) == "3 threads, no spinning, no arena, long inputs in 2 lanes, 64 tokens a batch"


@pytest.mark.parametrize("settings", [Settings(1), Settings(2, spinning=False), Settings(2, arena=False), Settings(2)])
@pytest.mark.parametrize("wide", [False, True])
def test_no_setting_changes_a_result(folder: Path, settings: Settings, wide: bool) -> None:
    from artifacts.bundle import open_bundle
    from runtimes.golden import check_golden, load_golden

    bundle = open_bundle(folder)
    variant = bundle.manifest.variants[0]
    path = bundle.path / variant.model
    options = variant.session
    session = Session(path, CPU_PROVIDER, options=options, settings=settings, wide=wide)
    assert (session.settings, session.threads) == (settings, settings.threads)
    check_golden(session, load_golden(bundle), 1e-6, "it")
    with Worker(path, CPU_PROVIDER, options=options, settings=settings, wide=wide) as worker:
        check_golden(worker, load_golden(bundle), 1e-6, "the child")
        assert len(worker.time(load_golden(bundle).feeds, repeats=3)) == 3


@pytest.mark.usefixtures("needs_openvino")
def test_lanes_on_openvino_compute_the_same(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", "feature-extraction", embedder(), providers=(OPENVINO_PROVIDER,))
    with load(tmp_path / "b", lanes=2, cache=False) as model, load(tmp_path / "b", lanes=1, cache=False) as plain:
        found = model.embed(TEXTS, max_tokens=64)
        assert "2 lanes are open" in model.explain()
        # The bundle's tolerance: OpenVINO may compute in bfloat16 here.
        wanted = plain.embed(TEXTS, max_tokens=64)
        assert np.linalg.norm(found - wanted) <= 1e-2 * np.linalg.norm(wanted)
