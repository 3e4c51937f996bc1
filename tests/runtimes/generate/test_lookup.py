"""Guesses out of the text itself, and what is remembered of how good they were."""

from __future__ import annotations

import pytest

from runtimes.generate.lookup import LONGEST, Lookup, Odds


def guess(prompt, tokens=(), most=4):
    return Lookup(prompt, Odds()).guess(list(tokens), most)


def test_what_followed_the_longest_match_is_guessed():
    assert guess([1, 2, 3, 4, 5, 9, 2, 3, 6, 7, 1, 2, 3]) == ([4, 5, 9, 2], 3)


def test_of_equal_matches_the_latest_counts():
    assert guess([1, 2, 3, 8, 1, 2, 4, 9, 1, 2])[0][:2] == [4, 9]


def test_two_tokens_have_to_match():
    assert guess([1, 2, 3, 9, 2]) == ([], 0)
    assert guess([1]) == guess([]) == ([], 0)


def test_a_text_that_repeats_itself_goes_on_so():
    assert guess([7, 1, 2, 3, 1, 2, 3, 1, 2], most=8) == ([3, 1, 2, 3, 1, 2, 3, 1], 5)
    assert guess([5, 5, 5, 5], most=5)[0] == [5] * 5


def test_long_matches_are_not_told_apart():
    text = list(range(30))
    assert guess(text + text[:20], most=3) == ([20, 21, 22], LONGEST)


def test_what_was_written_is_found_too():
    lookup = Lookup([1, 2, 3], Odds())
    tokens = [4, 1, 2]
    assert lookup.guess(tokens, 2) == ([3, 4], 2)
    tokens += [3, 4, 1]
    assert lookup.guess(tokens, 2) == ([2, 3], 5)


def test_guesses_are_judged_by_what_came_whether_they_were_checked_or_not():
    usual = Odds()
    lookup = Lookup([1, 2, 3, 4, 5, 6, 1, 2], usual)
    before = [lookup.odds.chance(match) for match in range(LONGEST + 1)]
    tokens = []
    assert lookup.guess(tokens, 4)[0] == [3, 4, 5, 6]
    tokens += [3, 4, 9]
    lookup.guess(tokens, 4)
    after = [lookup.odds.chance(match) for match in range(LONGEST + 1)]
    assert after[2] > before[2]
    assert after[3] > before[3]
    assert after[4] < before[4]
    assert after[5:] == before[5:]
    assert usual.chance(2) > before[2]


@pytest.mark.parametrize("hit", [True, False])
def test_odds_follow_what_happens(hit):
    odds = Odds()
    for _ in range(30):
        odds.note(4, hit)
    assert odds.chance(4) > 0.85 if hit else odds.chance(4) < 0.15
    # Another text is expected to be no better than usual, whatever the last ones were.
    assert Odds(odds).chance(4) == pytest.approx(Odds().chance(4) if hit else odds.chance(4))


def test_the_chances_of_a_guess_are_those_of_ever_longer_matches():
    odds = Odds()
    for match in range(2, LONGEST + 1):
        odds.note(match, match % 2 == 0)
    for match, count in ((2, 0), (2, 3), (5, 16), (LONGEST, 2)):
        assert odds.chances(match, count) == [odds.chance(match + at) for at in range(count)]
