"""Stop strings, however the text is cut into pieces."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from artifacts.errors import UsageError
from runtimes.generate.stopping import StopStrings, check_stop_ids, check_stops


def told(pieces, stops):
    one, shown = StopStrings(stops), []
    for piece in pieces:
        shown.append(one.push(piece))
        if one.found:
            return "".join(shown), True
    return "".join([*shown, one.flush()]), False


@pytest.mark.parametrize(("pieces", "stops", "text", "found"), [
    (["one ", "EN", "D two"], ["END"], "one ", True),
    (["one EN", "X"], ["END"], "one ENX", False),
    (["aaa", "ab"], ["aab"], "aa", True),
    (["END"], ["END"], "", True),
    (["ab", "cd"], ["cd", "bc"], "a", True),
    (["ab"], ["abc", "b"], "a", True),
    (["x", ""], [], "x", False),
    (["東", "京"], ["東京"], "", True),
])  # fmt: skip
def test_examples(pieces, stops, text, found):
    assert told(pieces, stops) == (text, found)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text("ab", max_size=3), max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_cuts_do_not_matter(pieces, stops):
    """The text up to the first piece in which a stop string is complete, as if it had come at once."""
    whole = ""
    for piece in pieces:
        whole += piece
        places = [place for stop in stops if (place := whole.find(stop)) >= 0]
        if places:
            assert told(pieces, stops) == (whole[: min(places)], True)
            return
    assert told(pieces, stops) == (whole, False)


def test_no_more_is_held_back_than_may_become_a_stop_string():
    one = StopStrings(["abc"])
    assert [one.push(piece) for piece in ("xa", "b", "x", "ab", "a")] == ["x", "", "abx", "", "ab"]
    assert one.flush() == "a"


@pytest.mark.parametrize("stop", ["", [""], [3], 7, ["x" * 5000], ["x"] * 65, b"x", {"a": 1}])
def test_impossible_stop_strings(stop):
    with pytest.raises(UsageError):
        check_stops(stop)


def test_stops_as_given():
    assert check_stops(None) == ()
    assert check_stops("a") == ("a",)
    assert check_stops(["a", "b"]) == ("a", "b")
    assert check_stop_ids([1, 2], 5) == {1, 2}
    assert check_stop_ids(None, 5) == frozenset()


@pytest.mark.parametrize("ids", [[5], [-1], [True], ["a"], 3, "ab"])
def test_impossible_stop_ids(ids):
    with pytest.raises(UsageError, match="stop_ids"):
        check_stop_ids(ids, 5)
