"""Masks over the vocabularies of every kind of tokenizer: whatever is drawn from them is a text of the grammar."""

from __future__ import annotations

import json
import re
import threading
import time

import jsonschema_rs
import numpy as np
import pytest
import tiny_tokenizers
from shared_data import SHARED

from artifacts.errors import InstallationError, UsageError
from runtimes.generate import constrain as module
from runtimes.generate.constrain import Constraints
from runtimes.generate.detokenize import detokenize
from runtimes.generate.grammars import form_of
from runtimes.generate.prompts import PromptEncoder

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "size": {"type": "integer", "minimum": -5, "maximum": 500},
        "tags": {"type": "array", "items": {"enum": ["été", "日本", 'a "b"\\']}, "maxItems": 3},
    },
    "required": ["name", "size"],
    "additionalProperties": False,
}
REGEX = r"[a-z ]{2,9}[0-9]?é*/"
LEADING = r"( |a)?la+\n?"
CHOICES = ["la", " la", "co co", "日本", "la la"]
END = 2
BYTES = ["byte-level BPE", "BPE with byte fallback", "stories260k", "pystories_lm"]
WORDS = ["BPE with ends of words", "BPE with insides of words", "WordPiece", "Unigram", "WordLevel"]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    found = {}
    for name, make in tiny_tokenizers.KINDS.items():
        path = folder / f"{name}.json"
        make().save(str(path))
        found[name] = PromptEncoder(path, -1)
    for name in ("stories260k", "pystories_lm"):
        if (path := SHARED / "models" / name / "tokenizer.json").is_file():
            found[name] = PromptEncoder(path, -1)
    return found


@pytest.fixture(scope="module")
def tokenizers(encoders):
    """Constraints by name of the tokenizer; each model has a few logits more than its tokenizer has tokens."""
    made = {name: (Constraints(one, one.plain.get_vocab_size() + 5), one) for name, one in encoders.items()}
    yield made
    for constraints, _ in made.values():
        constraints.close()


def chosen(tokenizers, name):
    if name not in tokenizers:
        pytest.skip("the shared models are absent")
    constraints, encoder = tokenizers[name]
    return constraints, encoder, encoder.plain.get_vocab_size() + 5


def write(matcher, size, seed, limit=400):
    """Draw tokens from random logits: (ids, why it ended)."""
    rng = np.random.default_rng(seed)
    ids = []
    while len(ids) < limit:
        logits = rng.standard_normal(size).astype(np.float32) * 3
        matcher.mask(logits)
        if matcher.done:
            return ids, matcher.finish
        token = int(logits.argmax())
        assert np.isfinite(logits[token])
        if token == END:
            return ids, "stop"
        matcher.accept(token)
        ids.append(token)
        if matcher.done:
            return ids, matcher.finish
    return ids, "length"


def texts(tokenizers, name, count=30, **asked):
    constraints, encoder, size = chosen(tokenizers, name)
    constraint = constraints.constraint(form_of(**asked), [END])
    for seed in range(count):
        ids, finish = write(constraint.start(), size, seed)
        yield detokenize(encoder.vocabulary, ids), finish


@pytest.mark.parametrize("name", BYTES)
def test_a_schema_holds(tokenizers, name):
    for text, finish in texts(tokenizers, name, schema=SCHEMA):
        assert finish == "stop"
        jsonschema_rs.validate(SCHEMA, json.loads(text))


@pytest.mark.parametrize("name", BYTES)
@pytest.mark.parametrize("regex", [REGEX, LEADING])
def test_an_expression_matches_all_of_the_text(tokenizers, name, regex):
    for text, finish in texts(tokenizers, name, regex=regex):
        assert finish == "stop"
        assert re.fullmatch(regex, text)


@pytest.mark.parametrize("name", BYTES)
def test_a_choice_is_one_of_them(tokenizers, name):
    found = list(texts(tokenizers, name, count=60, choices=CHOICES))
    assert {finish for _, finish in found} == {"stop"}
    assert len({text for text, _ in found} & set(CHOICES)) >= 3
    assert {text for text, _ in found} <= set(CHOICES)


@pytest.mark.parametrize("name", WORDS)
def test_a_vocabulary_that_cannot_say_everything_says_what_it_can(tokenizers, name):
    """Where a text cannot go on it ends, and says that it is not complete."""
    found = list(texts(tokenizers, name, choices=["la co", "42"]))
    for text, finish in found:
        assert (finish == "stop") == (text in ("la co", "42"))
    assert any(finish == "stop" for _, finish in found)


@pytest.mark.parametrize("name", WORDS)
def test_what_a_vocabulary_cannot_begin_is_refused(tokenizers, name):
    constraints, *_ = chosen(tokenizers, name)
    with pytest.raises(UsageError, match="no text that this model can write satisfies the schema"):
        constraints.constraint(form_of(schema=SCHEMA), [END])


def test_characters_of_several_tokens_are_whole(tokenizers):
    for name in BYTES[:2]:
        for text, finish in texts(tokenizers, name, regex="[\U00010000-\U0010ffff]{3}"):
            assert (finish, len(text)) == ("stop", 3)


def test_added_tokens_count_as_their_text(tmp_path):
    tokenizer = tiny_tokenizers.byte_level()
    tokenizer.add_tokens(["<tool>", "日本語"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    encoder = PromptEncoder(tmp_path / "tokenizer.json", -1)
    constraints, size = Constraints(encoder, encoder.plain.get_vocab_size()), encoder.plain.get_vocab_size()
    logits = np.zeros(size, np.float32)
    constraints.constraint(form_of(choices=["<tool>x", "日本語"]), [END]).start().mask(logits)
    allowed = set(np.flatnonzero(np.isfinite(logits)))
    assert {encoder.plain.token_to_id("<tool>"), encoder.plain.token_to_id("日本語")} <= allowed
    constraints.close()


def test_control_tokens_are_never_text(tokenizers):
    constraints, encoder, size = chosen(tokenizers, "byte-level BPE")
    logits = np.zeros(size, np.float32)
    constraints.constraint(form_of(regex="(<s>|</s>|.)*"), [END]).start().mask(logits)
    allowed = set(np.flatnonzero(np.isfinite(logits)))
    control = set(encoder.control.values())
    assert allowed & control == {END}
    assert not allowed & set(range(encoder.plain.get_vocab_size(), size))


def test_the_end_of_text_is_allowed_where_the_text_is_complete(tokenizers):
    constraints, encoder, size = chosen(tokenizers, "byte-level BPE")
    matcher = constraints.constraint(form_of(regex="[ab]{2,}"), [END, 3]).start()
    for count in range(4):
        logits = np.zeros(size, np.float32)
        matcher.mask(logits)
        assert np.isfinite(logits[[END, 3]]).all() == (count >= 2)
        matcher.accept(encoder.plain.token_to_id("a"))


def test_what_is_forbidden_stays_so(tokenizers):
    constraints, encoder, size = chosen(tokenizers, "byte-level BPE")
    a, b = map(encoder.plain.token_to_id, "ab")
    matcher = constraints.constraint(form_of(regex="[ab]"), [END], forbidden=[a]).start()
    logits = np.zeros(size, np.float32)
    matcher.mask(logits)
    assert np.flatnonzero(np.isfinite(logits)).tolist() == [b]
    matcher = constraints.constraint(form_of(regex="a"), [END], forbidden=[a]).start()
    matcher.mask(logits)
    assert (matcher.done, matcher.finish) == (True, "constraint")


def test_the_empty_text_is_complete_at_once(tokenizers):
    for name in BYTES[:2]:
        assert set(texts(tokenizers, name, count=3, regex="")) == {("", "stop")}


def test_what_is_forced_is_cut_as_the_tokenizer_cuts_it(tokenizers):
    constraints, encoder, size = chosen(tokenizers, "pystories_lm")
    ids, _ = write(constraints.constraint(form_of(choices=["def hello_world():"]), [END]).start(), size, 0)
    assert ids == encoder.plain.encode("def hello_world():", add_special_tokens=False).ids


# --- looking ahead


def test_masks_that_were_foreseen_are_those_of_each_step(tokenizers):
    constraints, encoder, size = chosen(tokenizers, "byte-level BPE")
    constraint = constraints.constraint(form_of(schema=SCHEMA), [END])
    ids = encoder.plain.encode('{"name":"la co","size":42}', add_special_tokens=False).ids
    plain, ahead = constraint.start(), constraint.start()
    assert ahead.admissible([*ids, END]) == len(ids)
    ahead.foresee(ids[:9])
    for token in ids:
        one, other = np.zeros(size, np.float32), np.zeros(size, np.float32)
        plain.mask(one)
        ahead.mask(other)
        np.testing.assert_array_equal(one, other)
        plain.accept(token)
        ahead.accept(token)
    assert plain.finish == ahead.finish == "stop"


def test_what_was_foreseen_and_did_not_happen_is_forgotten(tokenizers):
    constraints, encoder, size = chosen(tokenizers, "byte-level BPE")
    constraint = constraints.constraint(form_of(regex="(aacc|abdd)c"), [END])
    a, b, c, d = map(encoder.plain.token_to_id, "abcd")
    matcher = constraint.start()
    matcher.foresee([a, a, c, c])
    for token, others in ((a, set()), (b, {a}), (d, set()), (d, set()), (c, set())):
        logits = np.zeros(size, np.float32)
        matcher.mask(logits)
        allowed = set(np.flatnonzero(np.isfinite(logits)))
        assert token in allowed
        assert allowed & {a, b, c, d} == {token} | others
        matcher.accept(token)
    assert matcher.finish == "stop"


def test_texts_of_one_constraint_do_not_disturb_each_other(tokenizers):
    constraints, _, size = chosen(tokenizers, "byte-level BPE")
    constraint = constraints.constraint(form_of(schema=SCHEMA), [END])
    wanted = [write(constraint.start(), size, seed)[0] for seed in range(8)]
    found = [None] * 8

    def run(seed):
        found[seed] = write(constraint.start(), size, seed)[0]

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == wanted


# --- refusals


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"schema": {"type": "integer", "minimum": 5, "maximum": 3}}, "minimum"),
        ({"schema": {"enum": []}}, "Unsatisfiable"),
        ({"schema": {"type": "object", "required": ["a"], "properties": {"a": False}}}, "Unsatisfiable"),
        ({"schema": {"allOf": [{"type": "string"}, {"type": "integer"}]}}, "incompatible types"),
        ({"schema": {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}}, "schema"),
        ({"schema": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"schema": {"not": {"type": "string"}}}, "not"),
        ({"schema": {"type": "strin"}}, "strin"),
        ({"schema": {"$ref": "https://example.org/schema"}}, "not present"),
        ({"schema": {"$ref": "#/nope"}}, "does not exist"),
        ({"schema": {"type": "string", "format": "nope"}}, "nope"),
        ({"regex": "["}, "regex"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": r"(a)\1"}, "backreferences"),
        ({"regex": "(" * 4000 + ")" * 4000}, "regex"),
        ({"regex": r"[^\x00-\x{10FFFF}]"}, "no text"),
        ({"schema": {"type": "object", "properties": {f"k{index}": {"enum": [f"v{index}"]} for index in range(1500)},
                     "allOf": [{"anyOf": [{"pattern": f"^.*{a}{b}"} for a in "abcdef"]} for b in "ghijklm"]}}, "large"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(tokenizers, asked, message):
    constraints, *_ = chosen(tokenizers, "byte-level BPE")
    begin = time.perf_counter()
    with pytest.raises(UsageError, match=message) as caught:
        constraints.constraint(form_of(**asked), [END])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert time.perf_counter() - begin < 6.0


@pytest.mark.parametrize(
    "asked",
    [
        {"regex": "(a{1,1000}){1,1000}"},
        {"regex": "(a|b)*a(a|b){30}"},
        {"schema": {"type": "string", "maxLength": 10**9}},
        {"schema": {"type": "array", "items": {"type": "integer"}, "minItems": 10**5}},
        {"schema": {"enum": [f"value {index}" for index in range(3000)]}},
        {
            "schema": {
                "$defs": {
                    f"d{index}": {"anyOf": [{"$ref": f"#/$defs/d{index + 1}"}] * 2 + [{"type": "null"}]}
                    for index in range(20)
                }
                | {"d20": {"type": "null"}},
                "$ref": "#/$defs/d0",
            }
        },
    ],
)
def test_what_is_hostile_is_bounded(tokenizers, asked):
    """It may be refused; or each step stays a matter of milliseconds, and a text may end as one that cannot go on."""
    constraints, _, size = chosen(tokenizers, "byte-level BPE")
    begin = time.perf_counter()
    ids, _ = write(constraints.constraint(form_of(**asked), [END]).start(), size, 0, limit=40)
    assert time.perf_counter() - begin < 6.0
    assert len(ids) <= 40


def test_what_takes_too_long_lets_the_caller_go(encoders, monkeypatch):
    constraints = Constraints(encoders["byte-level BPE"], 300)
    monkeypatch.setattr(module, "_MOST_SECONDS", 0.05)
    monkeypatch.setattr(module, "_Grammar", lambda *_: time.sleep(0.5))
    with pytest.raises(UsageError, match=r"takes longer than 0\.05 seconds"):
        constraints.constraint(form_of(regex="a"), [END])
    constraints.close()


def test_a_line_break_in_an_expression_ends_nothing(tokenizers):
    """The grammar is lines of text: what is asked for may not add any."""
    assert {text for text, _ in texts(tokenizers, "byte-level BPE", regex='a\nX: "b"')} == {'a\nX: "b"'}
    assert {text for text, _ in texts(tokenizers, "byte-level BPE", choices=['/\nstart: "b"'])} == {'/\nstart: "b"'}
    assert {text for text, _ in texts(tokenizers, "byte-level BPE", regex="/a\\/b/")} == {"/a/b/"}


def test_grammars_are_kept(encoders, monkeypatch):
    monkeypatch.setattr(module, "_KEPT", 2)
    made = []
    grammar = module._Grammar
    monkeypatch.setattr(module, "_Grammar", lambda form, tokens: made.append(form.text) or grammar(form, tokens))
    constraints = Constraints(encoders["byte-level BPE"], 485)
    for regex in "aabaca" + "b":
        constraints.constraint(form_of(regex=regex), [END])
    assert made == ["a", "b", "c", "b"]
    constraints.close()


def test_without_the_library_it_is_told(encoders, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(InstallationError, match="llguidance is not installed"):
        Constraints(encoders["byte-level BPE"], 300).constraint(form_of(regex="a"), [END])
