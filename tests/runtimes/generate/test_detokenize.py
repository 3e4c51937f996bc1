"""Pieces of text: whole characters, and together what decoding at once gives."""

from __future__ import annotations

import random

import pytest
from decoder_graphs import SENTENCES, byte_fallback, byte_level
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_data import SHARED
from task_builders import minilm_tokenizer
from tokenizers import Tokenizer

from runtimes.generate.detokenize import Detokenizer, Vocabulary, detokenize

TEXTS = [*SENTENCES, "👩‍👩‍👧 naïve — “quoted” 𝔘𝔫𝔦", "  two  spaces and\na line\t", "日本語のテキスト", "é", " "]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    found = {"level": byte_level(folder / "level.json"), "fallback": byte_fallback(folder / "fallback.json")}
    found["wordpiece"] = minilm_tokenizer()
    for name in ("stories260k", "pystories_lm"):
        if (file := SHARED / "models" / name / "tokenizer.json").is_file():
            found[name] = file
    loaded = {name: Tokenizer.from_file(str(path)) for name, path in found.items()}
    for one in loaded.values():
        one.no_truncation()
        one.no_padding()
    return loaded


def pieces(tokenizer, ids):
    one = Detokenizer(Vocabulary(tokenizer))
    return [*(one.push(index) for index in ids), one.flush()]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["level", "fallback", "wordpiece", "stories260k", "pystories_lm"])
def test_pieces_of_a_text_add_up_to_it(tokenizers, name, text):
    if name not in tokenizers:
        pytest.skip("the shared models are absent")
    tokenizer = tokenizers[name]
    ids = tokenizer.encode(text).ids
    found = pieces(tokenizer, ids)
    assert "".join(found) == tokenizer.decode(ids, skip_special_tokens=True)
    if name != "wordpiece":
        assert "".join(found) == text
        assert not any("\ufffd" in piece for piece in found)


def test_a_character_comes_out_once_it_is_whole(tokenizers):
    ids = tokenizers["fallback"].encode("東").ids
    found = pieces(tokenizers["fallback"], ids)
    assert found[-2:] == ["東", ""]
    assert set(found[:-2]) <= {"", " "}


def test_half_a_character_at_the_end_is_one_replacement(tokenizers):
    for name in ("level", "fallback"):
        tokenizer = tokenizers[name]
        ids = tokenizer.encode("a 東").ids[:-1]
        assert "".join(pieces(tokenizer, ids)) == "a \ufffd"


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 299), max_size=30))
def test_any_ids_of_a_byte_level_tokenizer_decode_as_at_once(tokenizers, ids):
    tokenizer = tokenizers["level"]
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


def test_any_ids_of_word_pieces_decode_as_at_once(tokenizers):
    tokenizer = tokenizers["wordpiece"]
    draw = random.Random(5)
    for _ in range(30):
        ids = [draw.randrange(tokenizer.get_vocab_size()) for _ in range(12)]
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="the cat東é👩 ,\n", max_size=30))
def test_any_text_survives_byte_fallback(tokenizers, text):
    tokenizer = tokenizers["fallback"]
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_bytes_that_are_no_text_do_not_spoil_their_neighbours(tokenizers):
    tokenizer = tokenizers["fallback"]
    wrong = [tokenizer.token_to_id(name) for name in ("<0xFF>", "<0xE6>", "<0x9D>", "<0xB1>")]
    assert "".join(pieces(tokenizer, wrong)) == "\ufffd東"
    assert tokenizer.decode(wrong) == "\ufffd" * 4


def test_special_tokens_and_ids_that_are_none_say_nothing(tokenizers):
    tokenizer = tokenizers["level"]
    ids = tokenizer.encode("the cat").ids
    mixed = [1, *ids[:2], 2, 3, *ids[2:], 99_999]
    assert detokenize(Vocabulary(tokenizer), mixed) == tokenizer.decode(mixed) == "the cat"


def test_a_text_of_replacement_characters_is_not_held_back_for_ever(tokenizers):
    tokenizer = tokenizers["level"]
    ids = tokenizer.encode("\ufffd" * 5, add_special_tokens=False).ids
    found = pieces(tokenizer, ids)
    assert "".join(found) == "\ufffd" * 5
    assert found[2]


def test_each_push_looks_at_few_tokens(tokenizers, monkeypatch):
    tokenizer = tokenizers["fallback"]
    vocabulary, seen = Vocabulary(tokenizer), []
    monkeypatch.setattr(vocabulary, "decode", lambda ids: seen.append(len(ids)) or tokenizer.decode(ids))
    one = Detokenizer(vocabulary)
    for index in tokenizer.encode("the cat sat on the mat " * 20).ids:
        one.push(index)
    assert max(seen) == 2
