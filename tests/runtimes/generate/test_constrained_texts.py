"""schema, regex and choices of generate: every text of random models is what was asked for, alone and beside others."""

from __future__ import annotations

import json
import math
import re

import jsonschema_rs
import pytest
from decoder_graphs import byte_fallback, byte_level, real_decoder, tiny_llama, write_decoder
from shared_data import SHARED

from artifacts.errors import UsageError
from runtimes.jsonl import run_records
from runtimes.load import load
from runtimes.tasks import generate as module

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["été", "日本", None]},
    },
    "required": ["name", "size", "kind"],
    "additionalProperties": False,
}
ENDLESS = {2: -math.inf}


def is_valid(text, schema=SCHEMA):
    return jsonschema_rs.is_valid(schema, json.loads(text))


@pytest.fixture(scope="module", params=["level", "fallback"])
def wide(request, tmp_path_factory):
    """A random model whose context no text of these tests fills."""
    folder = tmp_path_factory.mktemp("wide")
    make = byte_level if request.param == "level" else byte_fallback
    bundle = write_decoder(folder / "bundle", tiny_llama(3, context=512), make(folder / "tokenizer.json"))
    with load(bundle.path, cache=False) as loaded:
        yield loaded


def test_a_hundred_of_a_hundred_drawn_texts_are_valid(wide):
    prompts = [f"the cat {number}" for number in range(25)]
    found = wide.generate(prompts, n=4, temperature=1.5, seed=0, schema=SCHEMA)
    texts = [one for some in found for one in some]
    assert len(texts) == 100
    assert [one.finish for one in texts] == ["stop"] * 100
    assert all(is_valid(one.text) for one in texts)
    assert len({one.text for one in texts}) > 90


def test_greedy_texts_are_valid(wide):
    for found in wide.generate(["the cat", "a dog", "grüße"], schema=json.dumps(SCHEMA)):
        assert found.finish == "stop"
        assert is_valid(found.text)


def test_any_object(wide):
    found = wide.generate("the cat", schema=True, temperature=1.0, seed=3, max_new_tokens=400)
    if found.finish == "stop":
        assert isinstance(json.loads(found.text), dict)
    assert found.text.startswith("{")


@pytest.mark.parametrize("regex", ["[a-z]{3,9}( [a-z]+){1,2}\\.", " ?日本+\n"])
def test_an_expression(wide, regex):
    for found in wide.generate(["the cat", "a dog"], n=5, temperature=1.5, seed=1, regex=regex, max_new_tokens=150):
        for one in found:
            assert re.fullmatch(regex, one.text) if one.finish == "stop" else one.finish == "length"


def test_choices(wide):
    choices = ["yes", "yes, but", "no", " maybe", "東京"]
    found = wide.generate("the cat", n=40, temperature=3.0, seed=1, choices=choices)
    assert {one.text for one in found} <= set(choices)
    assert len({one.text for one in found}) >= 3
    assert {one.finish for one in found} == {"stop"}


def test_a_text_beside_others_is_the_one_that_it_is_alone(wide):
    """Neighbours with another constraint, or none, change nothing, and are not changed."""
    asked = [
        {"schema": SCHEMA},
        {},
        {"choices": ["yes", "no"]},
        {"regex": "[ab]{4,}"},
        {"schema": SCHEMA, "logprobs": 3},
    ]
    common = {"temperature": 1.2, "seed": 5, "max_new_tokens": 60}
    alone = [wide.generate("the cat sat", **common, **one) for one in asked]
    loop = wide.loop(3, 128)
    for number, one in enumerate(asked):
        for request in wide.requests("the cat sat", first=number, **common, **one):
            loop.add(request)
    found = {}
    while loop.busy:
        found |= {piece.prompt: piece.result for piece in loop.step() if piece.result is not None}
    assert [found[number].tokens for number in range(len(asked))] == [one.tokens for one in alone]


def test_probabilities_are_those_of_the_model(wide):
    """They are told as they were before the mask."""
    (free,) = wide.generate("the cat", max_new_tokens=1, logprobs=5, bias=ENDLESS).logprobs
    held = wide.generate("the cat", max_new_tokens=1, logprobs=5, choices=["yes"]).logprobs[0]
    assert held.top == free.top
    assert held.logprob <= free.logprob


def test_the_first_token_is_the_likeliest_that_is_allowed(model):
    free = model.generate("the cat", max_new_tokens=1, logprobs=100).logprobs[0]
    held = model.generate("the cat", max_new_tokens=1, logprobs=0, regex="[a-z]{9}").logprobs[0]
    letters = [token for token, _ in free.top if re.fullmatch("[a-z]+", model.encoder.plain.decode([token]))]
    assert held.token == letters[0]


def test_a_text_that_reaches_its_limit_says_so(wide):
    found = wide.generate("the cat", schema=SCHEMA, max_new_tokens=3)
    assert (found.finish, len(found.tokens)) == ("length", 3)


def test_stop_strings_and_penalties_go_with_it(wide):
    found = wide.generate("the cat", regex="[ab]{3}x[ab]{9}", stop="x", repetition_penalty=1.5, frequency_penalty=0.5)
    assert (found.finish, len(found.text)) == ("stop", 3)


def test_what_bias_forbids_stays_forbidden(wide):
    ids = [wide.encoder.plain.encode(text, add_special_tokens=False).ids[-1] for text in "ab"]
    bias = {ids[0]: -math.inf, ids[1]: 3.0}
    assert wide.generate("the cat", regex="[ab]{5}", bias=bias).text == "bbbbb"
    found = wide.generate("the cat", regex="a", bias=bias)
    assert (found.text, found.finish) == ("", "constraint")


def test_a_model_that_ends_no_text_ends_complete_ones(tmp_path):
    tokenizer = byte_level(tmp_path / "tokenizer.json")
    bundle = write_decoder(tmp_path / "bundle", tiny_llama(), tokenizer, generation={"eos": ()})
    with load(bundle.path, cache=False) as model:
        assert model.generate("the cat", choices=["yes"]).finish == "stop"
        found = model.generate("the cat", regex="a+", max_new_tokens=5)
        assert set(found.text) == {"a"}
        assert found.finish == "length"


def test_conversations_go_on(wide):
    cache = wide.new_cache()
    first = wide.generate("the cat sat on", cache=cache, choices=[" yes", " no"])
    found = wide.generate("the cat sat on" + first.text, cache=cache, schema=SCHEMA)
    assert cache.reused > 0
    assert is_valid(found.text)


def test_slots_that_are_few_take_turns(wide, monkeypatch):
    asked = {"n": 6, "temperature": 1.0, "seed": 2, "schema": SCHEMA}
    wanted = wide.generate(["the cat", "a dog"], **asked)
    monkeypatch.setattr(module, "MAX_ROWS", 3)
    assert wide.generate(["the cat", "a dog"], **asked) == wanted


def test_records(wide):
    records = [
        {"prompt": "the cat", "schema": SCHEMA},
        {"prompt": "the cat", "regex": "[ab]{3}"},
        {"prompt": "the cat", "choices": ["yes", "no"]},
        {"prompt": "the cat", "schema": SCHEMA},
    ]
    rows = list(run_records(wide, enumerate(records, 1), max_tokens=None))
    texts = [row["text"] for row in rows]
    assert is_valid(texts[0])
    assert texts[0] == texts[3]
    assert re.fullmatch("[ab]{3}", texts[1])
    assert texts[2] in ("yes", "no")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schema": {}, "regex": "a"}, "both given"),
        ({"schema": {"not": {}}}, "not"),
        ({"schema": {"type": "integer", "minimum": 2, "maximum": 1}}, "minimum"),
        ({"regex": "("}, "regex"),
        ({"choices": []}, "empty"),
        ({"choices": ["a"], "beams": 2}, "beam search has no choices"),
        ({"schema": {}, "beams": 2}, "beam search has no schema"),
    ],
)
def test_what_makes_no_sense_is_refused(model, options, message):
    with pytest.raises(UsageError, match=message) as caught:
        model.generate("the cat", **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["pystories_lm", "stories260k"])
def test_real_models(name, tmp_path):
    folder = SHARED / "models" / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; HASTEN_SHARED names another place")
    with load(real_decoder(tmp_path / "bundle", folder).path, cache=False) as model:
        for seed in range(5):
            found = model.generate("Once upon a time", schema=SCHEMA, temperature=1.0, seed=seed, max_new_tokens=200)
            assert found.finish == "stop"
            assert is_valid(found.text)
        assert model.generate("Once upon a time", choices=["Lily", " Ben"]).text in ("Lily", " Ben")
        assert re.fullmatch("[A-Z][a-z ]+\\.", model.generate("Once", regex="[A-Z][a-z ]{2,30}\\.").text)
