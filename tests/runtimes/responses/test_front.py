from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from runtimes.responses.front import Front
from runtimes.responses.seal import seal, unseal


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 900), st.booleans())))
def test_memory_is_bounded_and_what_it_holds_is_right(steps: list[tuple[str, int, bool]]) -> None:
    front = Front(4096)
    known: dict[str, bytes] = {}
    for key, size, write in steps:
        if write:
            known[key] = bytes([size % 256]) * size
            front.put(key, known[key], 0.0, 1.0)
        found = front.get(key, 0.0)
        assert found is None or found == known[key]
        assert found is not None or not write or size + 256 > 512
        assert 0 <= front.size <= 4096
    for key in known:
        front.drop(key)
    assert (front.size, len(front)) == (0, 0)


def test_the_least_recently_used_gives_way() -> None:
    front = Front(4 * (1000 + 256) * 2)
    for key in "abcdefgh":
        front.put(key, bytes(1000), 0.0, 1.0)
    assert front.get("a", 0.0) is not None
    front.put("i", bytes(1000), 0.0, 1.0)
    assert front.get("a", 0.0) is not None
    assert front.get("b", 0.0) is None


def test_values_have_their_time() -> None:
    front = Front(4096)
    front.put("a", b"x", 0.0, 1.0)
    assert front.get("a", 0.9) == b"x"
    assert front.get("a", 1.0) is None
    assert len(front) == 0


def test_the_store_hears_of_a_value_once_in_a_while() -> None:
    front = Front(4096)
    front.put("a", b"x", 0.0, 99.0)
    assert [front.unseen("a", now, 5.0) for now in (1.0, 5.0, 6.0, 7.0, 11.5)] == [False, False, True, False, True]


@given(st.text(max_size=9), st.binary(max_size=100), st.floats(0, 1e10), st.integers(0, 10_000), st.integers(1, 255))
def test_what_is_sealed_opens_and_any_change_shows(
    key: str, value: bytes, made: float, place: int, change: int
) -> None:
    sealed = seal(key, value, made)
    assert unseal(key, sealed) == (value, made)
    assert unseal(key, sealed[:-1]) is None
    assert unseal(key + "x", sealed) is None
    broken = bytearray(sealed)
    broken[place % len(sealed)] ^= change
    assert unseal(key, bytes(broken)) is None
