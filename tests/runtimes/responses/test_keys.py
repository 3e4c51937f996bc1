from __future__ import annotations

import string

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifacts.errors import UsageError
from runtimes.responses import request_key

DIGEST = "sha256:" + "0" * 64
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def key(**payload: object) -> str:
    return request_key(DIGEST, "embed", payload)


def test_a_key_is_a_hash() -> None:
    found = key(items=["a"])
    assert len(found) == 64
    assert set(found) <= set(string.hexdigits.lower())


def test_keys_stay_what_they_are() -> None:
    """Of another process, and of tomorrow: what is kept would never be found again otherwise."""
    assert key(items=["naïve", "\ud800"], top_k=3) == "01ea46498c0bf6148b0ea6f32d657a3b2a8470000714aaf41ffad0cbcab1dfc4"


@given(st.dictionaries(st.text(), JSON, max_size=4), st.randoms())
def test_the_order_of_fields_does_not_count(payload: dict[str, object], random: object) -> None:
    names = list(payload)
    random.shuffle(names)  # type: ignore[attr-defined]
    assert key(**payload) == key(**{name: payload[name] for name in names})


def test_what_differs_has_another_key() -> None:
    requests = [
        {"items": ["a", "b"]},
        {"items": ["b", "a"]},
        {"items": ["a b"]},
        {"items": ["a"], "k": 1},
        {"items": ["a"], "k": 1.0},
        {"items": ["a"], "k": True},
        {"items": ["a"], "k": "1"},
        {"items": ["caf\u00e9"]},
        {"items": ["cafe\u0301"]},
        {"items": ["\ud800"]},
        {"items": ["\ufffd"]},
        {"items": [{"array": ["<f4", [2]]}]},
        {"items": [np.zeros(2, np.float32)]},
        {"items": [np.zeros(2, np.int32)]},
        {"items": [np.zeros((1, 2), np.float32)]},
        {"items": [np.ones(2, np.float32)]},
        {"items": [np.array(["a", "b"], object)]},
        {"items": [np.array(["a", "c"], object)]},
    ]
    keys = {key(**request) for request in requests}
    assert len(keys) == len(requests)
    assert len({request_key(digest, method, requests[0]) for digest in "ab" for method in ("embed", "rows")}) == 4


def test_equal_requests_have_one_key() -> None:
    assert key(items=("a",), stop={2, 1}, bias=None) == key(items=["a"], stop=[1, 2])
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert key(x=array.T) == key(x=np.ascontiguousarray(array.T))
    assert key(k=np.int64(3)) == key(k=3)
    assert key(x=np.array([np.nan], np.float32)) == key(x=np.array([np.nan], np.float32))


def test_defaults_are_left_out() -> None:
    defaults = {"n": 1, "temperature": 1.0, "parse": False}
    bare = request_key(DIGEST, "generate", {"prompt": "a"}, defaults)
    assert (
        request_key(DIGEST, "generate", {"prompt": "a", "n": 1, "temperature": 1.0, "parse": False}, defaults) == bare
    )
    assert request_key(DIGEST, "generate", {"prompt": "a", "n": 2}, defaults) != bare
    assert request_key(DIGEST, "generate", {"prompt": "a", "n": True}, defaults) != bare


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), b"bytes", {1: "a", "b": 2}])
def test_what_is_no_json_has_no_key(value: object) -> None:
    with pytest.raises(UsageError, match="the request has no key"):
        key(items=[value])


def test_a_request_without_end_has_no_key() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(UsageError, match="the request has no key"):
        key(items=deep)
