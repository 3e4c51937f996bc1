from __future__ import annotations

import json
from pathlib import Path

import pytest

from artifacts.errors import ProviderError
from artifacts.target import CPU, CPU_PROVIDER
from compiler import costs
from compiler.costs import CostBase
from passes.fusion import FuseGelu
from passes.quantize import DynamicInt8, StaticInt8, WeightOnly

SHAPE = (32, 48)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HASTEN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "costs"


def base(**changes: object) -> CostBase:
    known = {"target": CPU, "provider": CPU_PROVIDER, "threads": 1, "rows": (2, 8)}
    return CostBase(**{**known, **changes})  # type: ignore[arg-type]


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(CostBase, "_measure", measured)


def test_every_form_is_measured_once_and_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forms = (StaticInt8(), DynamicInt8(), None)
    found = base().milliseconds(forms, SHAPE, "")
    assert set(found) == set(forms)
    assert all(len(ms) == 2 and min(ms) > 0.0 for ms in found.values())
    entries = [json.loads(path.read_text()) for path in cache.glob("*.json")]
    assert {entry["form"] for entry in entries} == {"static-int8", "dynamic-int8", costs.FLOAT}
    assert all(entry["shape"] == list(SHAPE) and entry["rows"] == [2, 8] for entry in entries)
    forbid(monkeypatch)
    assert base().milliseconds(forms, SHAPE, "") == found


def test_another_shape_provider_option_or_thread_count_is_another_cost(cache: Path) -> None:
    known = base()
    keys = {
        known._key(None, SHAPE, ""),
        known._key(None, (48, 32), ""),
        known._key(DynamicInt8(), SHAPE, ""),
        known._key(DynamicInt8(reduce_range=True), SHAPE, ""),
        base(threads=2)._key(None, SHAPE, ""),
        base(rows=(2, 9))._key(None, SHAPE, ""),
        known._key(None, SHAPE, "bf16"),
    }
    assert len(keys) == 7


def test_how_codes_are_chosen_is_no_cost(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (64, 32)
    quick, slow = WeightOnly(method="mse"), WeightOnly(method="gptq", ordered=True)
    known = base().milliseconds((quick, None), shape, "")
    forbid(monkeypatch)
    assert base().milliseconds((slow, None), shape, "") == {slow: known[quick], None: known[None]}
    assert "method=rtn" in "".join(entry.read_text() for entry in cache.glob("*.json"))


def test_a_form_that_the_pass_refuses_is_left_out_and_remembered(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = FuseGelu()
    assert set(base().milliseconds((refused, None), SHAPE, "")) == {None}
    forbid(monkeypatch)
    assert set(base().milliseconds((refused, None), SHAPE, "")) == {None}


@pytest.mark.parametrize("damage", ["", "{}", '{"ms": [1.0]}', '{"ms": [-1.0, 2.0]}', '{"ms": "fast"}', "[" * 9])
def test_a_damaged_entry_is_measured_again(cache: Path, damage: str) -> None:
    base().milliseconds((None,), SHAPE, "")
    (entry,) = cache.glob("*.json")
    entry.write_text(damage)
    assert len(base().milliseconds((None,), SHAPE, "")[None]) == 2
    assert json.loads(entry.read_text())["ms"]


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("HASTEN_CACHE_DIR", str(tmp_path / "file"))
    assert base().milliseconds((None,), SHAPE, "")[None]


def test_a_provider_that_runs_nothing_is_an_error(cache: Path) -> None:
    with pytest.raises(ProviderError):
        base(provider="CUDAExecutionProvider").milliseconds((None,), SHAPE, "")
