"""Texts that quote their prompts, and a constraint that holds a model to them without a word to those who guess."""

from __future__ import annotations

import numpy as np
import quoting

SOURCE = """import os

def count(words):
    # words, not letters
    return len(words)
"""


def test_an_edit_renames_the_commonest_name():
    prompt, text = quoting.edited(SOURCE)
    assert prompt.startswith(SOURCE)
    assert "words renamed" in prompt
    assert text == SOURCE.replace("words", "renamed_words")


def test_a_summary_quotes_what_is_imported_and_defined():
    prompt, text = quoting.summarized(SOURCE)
    assert prompt.startswith(SOURCE)
    assert text == "import os\ndef count(words):\n"


def test_modules_are_taken_evenly():
    every, some = quoting.modules(1), quoting.modules(10)
    assert len(every) // 10 <= len(some) <= len(every) // 10 + 1
    assert some == every[5::10]


def test_a_text_is_said_whatever_is_guessed():
    said = quoting.Said([3, 1])
    for _ in range(2):
        matcher = said.start()
        for wanted in (3, 1):
            logits = np.arange(5, dtype=np.float32)
            matcher.mask(logits)
            assert np.flatnonzero(np.isfinite(logits)).tolist() == [wanted]
            assert matcher.forced() == []
            assert matcher.admissible([7, 7, 7]) == 3
            matcher.accept(wanted)
