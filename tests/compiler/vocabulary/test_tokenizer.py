"""Tokenizers with fewer tokens: the same tokens for every text that needs no others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shared_data import SHARED
from tiny_tokenizers import KINDS, SPECIAL, sentences
from tokenizers import Tokenizer, models

from artifacts.errors import UnsupportedError
from compiler.vocabulary.tokenizer import Kept, keep_tokens


def content_of(tokenizer: Tokenizer) -> bytes:
    return tokenizer.to_str().encode()


def assert_same_tokens(before: bytes, kept: Kept, texts: tuple[str, ...]) -> tuple[int, int]:
    """Texts that need only kept tokens, and others; each of the former gives the same tokens, under the new ids."""
    old, new = Tokenizer.from_buffer(before), Tokenizer.from_buffer(kept.content)
    old.no_padding(), new.no_padding()
    left, counts = set(kept.ids.tolist()), [0, 0]
    for text in texts:
        wanted, got = old.encode(text), new.encode(text)
        inside = left.issuperset(wanted.ids)
        counts[not inside] += 1
        if inside:
            assert (got.tokens, got.offsets, got.type_ids) == (wanted.tokens, wanted.offsets, wanted.type_ids), text
            assert kept.ids[got.ids].tolist() == wanted.ids
            assert new.decode(got.ids) == old.decode(wanted.ids)
    return counts[0], counts[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.5, 0.8])
def test_texts_of_kept_tokens_stay_as_they_are(kind: str, share: float) -> None:
    tokenizer = KINDS[kind]()
    content = content_of(tokenizer)
    rng = np.random.default_rng(int(10 * share))
    used = sorted({token for text in sentences() for token in tokenizer.encode(text).tokens} - set(SPECIAL))
    for _ in range(3):
        chosen = [token for token in used if tokenizer.token_to_id(token) is not None and rng.random() < share]
        kept = keep_tokens(content, chosen)
        assert len(kept.ids) < tokenizer.get_vocab_size()
        assert len(set(kept.ids.tolist())) == len(kept.ids)
        inside, outside = assert_same_tokens(content, kept, (*sentences(), *sentences(200, 1), "Ω unseen", ""))
        assert inside > 5
        assert outside > 5


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_text_needs_is_enough_for_it(kind: str) -> None:
    tokenizer = KINDS[kind]()
    content = content_of(tokenizer)
    for text in (*sentences()[::40], "zebra 🙂 quux", "naïve été"):
        needed = {tokenizer.id_to_token(index) for index in tokenizer.encode(text, add_special_tokens=False).ids}
        assert assert_same_tokens(content, keep_tokens(content, needed), (text,)) == (1, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_keep_their_order_and_special_tokens_their_place(kind: str) -> None:
    tokenizer = KINDS[kind]()
    kept = keep_tokens(content_of(tokenizer), [tokenizer.id_to_token(tokenizer.get_vocab_size() - 1)])
    assert (np.diff(kept.ids) > 0).all()
    made = Tokenizer.from_buffer(kept.content)
    assert {token for token in SPECIAL if made.token_to_id(token) is not None} == set(SPECIAL)
    assert made.padding is not None
    assert made.padding["pad_id"] == made.token_to_id("<pad>")
    assert made.encode("").tokens == ["<s>", "</s>"]
    assert made.get_vocab_size() == len(kept.ids)


@pytest.mark.parametrize("kind", KINDS)
def test_keeping_everything_again_changes_nothing(kind: str) -> None:
    tokenizer = KINDS[kind]()
    first = keep_tokens(content_of(tokenizer), [tokenizer.id_to_token(tokenizer.get_vocab_size() - 1)])
    second = keep_tokens(first.content, Tokenizer.from_buffer(first.content).get_vocab())
    assert second.ids.tolist() == list(range(len(first.ids)))
    assert second.content == first.content


@pytest.mark.parametrize("kind", ["byte-level BPE", "BPE with byte fallback"])
def test_all_bytes_stay(kind: str) -> None:
    tokenizer = KINDS[kind]()
    made = Tokenizer.from_buffer(keep_tokens(content_of(tokenizer), ["<s>"]).content)
    for text in ("naïve 🙂", "\x00\x7f", "Ω"):
        assert made.decode(made.encode(text).ids).strip() == text.strip()
        assert "<unk>" not in made.encode(text).tokens


@pytest.mark.parametrize("kind", ["WordPiece", "Unigram", "BPE with ends of words", "BPE with insides of words"])
def test_words_that_lost_their_token_are_spelled(kind: str) -> None:
    tokenizer = KINDS[kind]()
    word = next(token for token in sorted(tokenizer.get_vocab(), key=len, reverse=True) if token.strip("▁#").isalpha())
    plain = word.removesuffix("</w>").strip("▁#")
    others = [token for token in tokenizer.get_vocab() if set(token) <= set(word) and len(token) < 3]
    made = Tokenizer.from_buffer(
        keep_tokens(content_of(tokenizer), [token for token in others if token != word]).content
    )
    assert made.token_to_id(word) is None
    found = made.encode(plain, add_special_tokens=False)
    assert "<unk>" not in found.tokens
    assert len(found.tokens) > 1


def test_merges_are_those_on_the_way() -> None:
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(["a", "b", "c", "d", "ab", "bc", "cd", "abc", "abcd"])},
            # As converters of tiktoken write them: every split of each token.
            merges=[("a", "b"), ("b", "c"), ("c", "d"), ("ab", "c"), ("a", "bc"), ("abc", "d"), ("ab", "cd")],
        )
    )
    kept = keep_tokens(content_of(tokenizer), ["abcd"])
    model = json.loads(kept.content)["model"]
    assert list(model["vocab"]) == ["a", "b", "c", "d", "ab", "cd", "abcd"]
    assert model["merges"] == [["a", "b"], ["c", "d"], ["ab", "cd"]]
    assert Tokenizer.from_buffer(kept.content).encode("abcdabcd").tokens == ["abcd", "abcd"]


def test_old_files_write_a_merge_as_one_text() -> None:
    document = {"version": "1.0", "added_tokens": [], "model": {"vocab": {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4}}}
    document["model"]["merges"] = ["a b", "ab c"]  # type: ignore[index]
    kept = keep_tokens(json.dumps(document).encode(), ["ab"])
    assert json.loads(kept.content)["model"]["merges"] == ["a b"]
    assert kept.ids.tolist() == [0, 1, 3]


def test_tokens_that_no_merge_reaches_need_none() -> None:
    vocabulary = {token: index for index, token in enumerate(["a", "b", "ab", "ba"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")], ignore_merges=True))
    kept = keep_tokens(content_of(tokenizer), ["ba"])
    assert kept.ids.tolist() == [0, 1, 3]
    assert Tokenizer.from_buffer(kept.content).encode("ba").tokens == ["ba"]


def test_the_score_of_unknown_text_stays() -> None:
    """Of two ways to cut a text, the one with fewer unknown parts wins by the least score of all tokens, minus 10."""
    pieces = [("<unk>", 0.0), ("a", -1.0), ("xa", -14.0), ("rare", -30.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    content = content_of(tokenizer)
    kept = keep_tokens(content, ["xa", "a"])
    assert kept.ids.tolist() == [0, 1, 2, 3]
    assert_same_tokens(content, kept, ("xaa", "xya", "xxa"))


def test_added_tokens_behind_the_vocabulary_stay_behind_it() -> None:
    tokenizer = KINDS["byte-level BPE"]()
    tokenizer.add_tokens(["<tool>", "<call>"])
    content = content_of(tokenizer)
    kept = keep_tokens(content, ["Ġ"])
    made = Tokenizer.from_buffer(kept.content)
    assert [made.id_to_token(len(kept.ids) - place) for place in (2, 1)] == ["<tool>", "<call>"]
    assert kept.ids[-2:].tolist() == [tokenizer.token_to_id("<tool>"), tokenizer.token_to_id("<call>")]
    assert_same_tokens(content, kept, ("<call> <tool>",))


def test_ids_that_something_names_stay() -> None:
    tokenizer = KINDS["WordPiece"]()
    plain = tokenizer.token_to_id("##a")
    beyond = tokenizer.get_vocab_size() + 7
    kept = keep_tokens(content_of(tokenizer), ["<s>"], (beyond, plain))
    assert plain in kept.ids
    assert kept.ids[-1] == beyond
    assert Tokenizer.from_buffer(kept.content).id_to_token(len(kept.ids) - 1) is None


@pytest.mark.parametrize("kind", ["BertProcessing", "RobertaProcessing"])
def test_other_post_processors_are_renumbered(kind: str) -> None:
    tokenizer = KINDS["WordPiece"]()
    document = json.loads(content_of(tokenizer))
    pair = {"sep": ["##a", tokenizer.token_to_id("##a")], "cls": ["<s>", tokenizer.token_to_id("<s>")]}
    more = {"trim_offsets": True, "add_prefix_space": False} if kind == "RobertaProcessing" else {}
    document["post_processor"] = {"type": "Sequence", "processors": [{"type": kind, **pair, **more}]}
    content = json.dumps(document).encode()
    kept = keep_tokens(content, ["<s>"])
    made = Tokenizer.from_buffer(kept.content)
    found = made.encode("")
    assert kept.ids[found.ids].tolist() == [pair["cls"][1], pair["sep"][1]]
    assert found.ids == [made.token_to_id("<s>"), made.token_to_id("##a")]


def changed(content: bytes, **parts: Any) -> bytes:
    return json.dumps({**json.loads(content), **parts}).encode()


def test_what_is_not_known_is_refused() -> None:
    content = content_of(KINDS["WordPiece"]())
    with pytest.raises(UnsupportedError, match="Novel tokenizer cannot be trimmed"):
        keep_tokens(changed(content, model={"type": "Novel"}), ["<s>"])
    with pytest.raises(UnsupportedError, match="with Novel behind it"):
        keep_tokens(changed(content, post_processor={"type": "Novel"}), ["<s>"])


def test_two_tokens_of_one_id_are_refused() -> None:
    document = json.loads(content_of(KINDS["WordLevel"]()))
    document["model"]["vocab"] |= {"a": 0, "b": 0}
    with pytest.raises(UnsupportedError, match="tokens share the id 0"):
        keep_tokens(json.dumps(document).encode(), ["a", "b"])


@pytest.mark.parametrize("name", ["minilm_sst2", "stories260k", "pystories_lm"])
def test_real_tokenizers(name: str) -> None:
    path = SHARED / "models" / name / "tokenizer.json"
    if not path.is_file():
        pytest.skip(f"{path} is absent; HASTEN_SHARED names another place")
    content = path.read_bytes()
    texts = Path(__file__).read_text(encoding="utf-8").split("\n\n")
    tokenizer = Tokenizer.from_buffer(content)
    needed = {index for text in texts[:12] for index in tokenizer.encode(text).ids}
    kept = keep_tokens(content, {tokenizer.id_to_token(index) for index in needed})
    assert len(kept.ids) < tokenizer.get_vocab_size()
    inside, _ = assert_same_tokens(content, kept, tuple(texts))
    assert inside >= 12
