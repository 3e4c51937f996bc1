"""Guesses never change a text: not the likeliest one, not one that is drawn, not one that is held to a form."""

from __future__ import annotations

import inspect
import json
import math
import textwrap
import time

import jsonschema_rs
import numpy as np
import pytest
from decoder_graphs import byte_fallback, byte_level, real_decoder, tiny_llama, write_decoder
from scipy import stats
from shared_data import SHARED

from artifacts.errors import UsageError
from runtimes.generate.decoder import Decoder
from runtimes.generate.lookup import Lookup
from runtimes.generate.loop import Job, Request, Row
from runtimes.generate.sampling import Sampling
from runtimes.generate.speculate import MOST, MOST_ROWS, Costs, Guess, Speculator
from runtimes.load import load
from runtimes.tasks import generate as module

NO_END = {2: -math.inf}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "size": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["name", "size"],
    "additionalProperties": False,
}
# float32 with logits up to about 10: what the order of additions over a few hundred products leaves.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def ids(count, seed=0):
    return np.random.default_rng(seed).integers(5, 300, count).tolist()


@pytest.fixture
def eager(monkeypatch):
    """Whatever is guessed is checked."""
    monkeypatch.setattr(Costs, "check", lambda *_: 1e-6)
    monkeypatch.setattr(Costs, "step", lambda *_: 1.0)


@pytest.fixture
def wild(eager, monkeypatch):
    """Random tokens are guessed too, now and then right ones; how many depends on nothing that a text knows."""
    rng = np.random.default_rng(0)
    found = Lookup.guess

    def guess(self, tokens, most):
        looked, match = found(self, tokens, most)
        if rng.random() < 0.5:
            return looked, match
        return rng.integers(3, 300, rng.integers(0, most + 1)).tolist(), 4

    monkeypatch.setattr(Lookup, "guess", guess)


def both(model, prompt, **options):
    """(plain, with guesses)."""
    return model.generate(prompt, **options), model.generate(prompt, speculate=True, **options)


# --- texts stay what they are


@pytest.mark.parametrize("seed", range(4))
def test_the_likeliest_text_stays(model, wild, seed):
    plain, guessed = both(model, ids(9, seed), max_new_tokens=60, bias=NO_END)
    assert guessed == plain
    assert guessed.drafted >= guessed.accepted
    assert guessed.drafted > 0


def test_most_of_a_text_that_repeats_itself_is_guessed(model, eager):
    plain, guessed = both(
        model, ids(9), max_new_tokens=100, bias={token: -math.inf for token in range(300) if token != 50}
    )
    assert guessed == plain
    assert guessed.accepted > 60


@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_a_drawn_text_stays_for_its_seed(model, wild, temperature):
    options = {"temperature": temperature, "top_p": 0.95, "max_new_tokens": 40, "bias": NO_END}
    for seed in range(6):
        plain, guessed = both(model, ids(9, seed), seed=seed, **options)
        assert guessed == plain


def test_penalties_probabilities_stops_and_ends_stay(model, wild):
    asked = [
        {"repetition_penalty": 1.4, "frequency_penalty": 0.5, "bias": NO_END},
        {"stop": ["th", "a"], "temperature": 1.0, "seed": 3},
        {"stop_ids": list(range(5, 40)), "temperature": 1.0, "seed": 4},
        {"temperature": 1.5, "seed": 5},
    ]
    for options in asked:
        plain, guessed = both(model, ids(12, 7), max_new_tokens=50, **options)
        assert guessed == plain
    plain, guessed = both(model, ids(12, 7), max_new_tokens=50, logprobs=3, bias=NO_END)
    assert guessed.tokens == plain.tokens
    for one, other in zip(guessed.logprobs, plain.logprobs, strict=True):
        assert [token for token, _ in one.top] == [token for token, _ in other.top]
        np.testing.assert_allclose([one.logprob], [other.logprob], **CLOSE)


@pytest.mark.parametrize("limit", [1, 2, 3, 17])
def test_limits_are_kept(model, wild, limit):
    plain, guessed = both(model, ids(9), max_new_tokens=limit, bias=NO_END)
    assert guessed == plain


def test_a_text_grows_to_the_end_of_the_context(model, wild, monkeypatch):
    monkeypatch.setattr(module, "_FIRST_TOKENS", 1)
    plain, guessed = both(model, ids(20, 5), bias=NO_END)
    assert guessed == plain
    assert len(guessed.tokens) == 108


def test_texts_beside_others_stay(model, wild):
    """Rows with guesses of different lengths, and none, in one step."""
    prompts = [ids(5 + 4 * seed, seed) for seed in range(MOST_ROWS + 2)]
    options = {"temperature": 0.5, "seed": 1, "max_new_tokens": 40, "bias": NO_END}
    wanted = [model.generate(prompt, **options) for prompt in prompts]
    assert model.generate(prompts, speculate=True, **options) == wanted
    loop = model.loop(3, 128)
    for number, prompt in enumerate(prompts):
        told = {} if number % 3 == 0 else {"speculate": min(16, 4 * number)}
        (request,) = model.requests(prompt, first=number, **options, **told)
        loop.add(request)
    found = {piece.prompt: piece.result for piece in loop.run([]) if piece.result is not None}
    assert [found[number].tokens for number in range(len(prompts))] == [one.tokens for one in wanted]
    assert loop.stats.drafted >= loop.stats.accepted
    assert loop.stats.drafted > 0
    assert loop.stats.written == sum(len(one.tokens) for one in wanted)


def test_many_texts_are_not_guessed(model, eager):
    found = model.generate(
        [ids(6, seed) for seed in range(MOST_ROWS + 4)], max_new_tokens=5, bias=NO_END, speculate=True
    )
    assert sum(one.drafted for one in found) == 0


def test_conversations_stay(model, wild):
    plain, guessed = model.new_cache(), model.new_cache()
    text = ids(12)
    for _ in range(3):
        one = model.generate(text, cache=plain, max_new_tokens=12, bias=NO_END)
        other = model.generate(text, cache=guessed, max_new_tokens=12, bias=NO_END, speculate=True)
        assert other == one
        assert guessed.tokens == plain.tokens
        text = [*text, *one.tokens, 7, 8]


def test_pieces_of_a_stream_add_up(model, wild):
    pieces = list(model.generate(ids(9), stream=True, max_new_tokens=40, bias=NO_END, speculate=True))
    assert "".join(piece.text for piece in pieces) == pieces[-1].result.text
    assert [piece.result is not None for piece in pieces] == [False] * (len(pieces) - 1) + [True]


# --- constraints


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_constraints_stay(make, tmp_path, wild):
    bundle = write_decoder(tmp_path / "bundle", tiny_llama(3, context=512), make(tmp_path / "tokenizer.json"))
    with load(bundle.path, cache=False) as wide:
        for seed in range(10):
            plain, guessed = both(wide, "the cat", schema=SCHEMA, temperature=1.2, seed=seed)
            assert guessed == plain
            jsonschema_rs.validate(SCHEMA, json.loads(guessed.text))
        plain, guessed = both(wide, "the cat", regex="(ab|ba){3,9}c", max_new_tokens=30)
        assert guessed == plain
        choices = ["a long text that leaves no choice once it began", "another"]
        plain, guessed = both(wide, "the cat", choices=choices)
        assert guessed == plain
        assert guessed.accepted >= len(guessed.tokens) / 2


# --- distribution


def test_what_is_drawn_is_distributed_as_without_guesses(model):
    """Pairs of tokens, drawn where the first is guessed: chi-square against the product of the two distributions."""
    tokens = np.arange(10, 16)
    rng = np.random.default_rng(1)
    logits = np.full((2, 300), -np.inf, np.float32)
    logits[:, tokens] = rng.standard_normal((2, len(tokens)))
    odds = np.exp(logits[:, tokens].astype(np.float64))
    odds /= odds.sum(axis=1, keepdims=True)
    draft, trials = int(tokens[2]), 6000
    firsts, seconds = np.zeros(len(tokens)), np.zeros(len(tokens))
    for seed in range(trials):
        job = Job(Sampling(sample=True, seed=seed), frozenset())
        row = Row(Request((5,), 10, job), 0, model.encoder.vocabulary)
        row.check([draft], logits.copy())
        firsts[row.tokens[0] - tokens[0]] += 1
        assert len(row.tokens) == 1 + (row.tokens[0] == draft)
        assert row.accepted == len(row.tokens) - 1
        for token in row.tokens[1:]:
            seconds[token - tokens[0]] += 1
    assert stats.chisquare(firsts, odds[0] * trials).pvalue > 1e-3
    assert stats.chisquare(seconds, odds[1] * seconds.sum()).pvalue > 1e-3
    # Rejected ones alone: as if the guess had been left out.
    others = np.delete(odds[0], 2) / (1.0 - odds[0][2])
    rejected = np.delete(firsts, 2)
    assert stats.chisquare(rejected, others * rejected.sum()).pvalue > 1e-3
    assert firsts[2] / trials == pytest.approx(odds[0][2], abs=4 * math.sqrt(0.25 / trials))


@pytest.mark.parametrize("width", [2, 3, 5, 9, 17])
def test_logits_of_several_tokens_are_those_of_one_after_the_other(model, width):
    """The reason why a text could differ at all: kernels round differently, by about 1e-6 of the logits here."""
    prompt, tokens = ids(30), ids(width, 3)
    one = Decoder(model._pool.session, model.layout, model.vocabulary, rows=1, capacity=64)
    one.prefill(0, [prompt])
    wanted = [one.step([token], [30 + index])[0].copy() for index, token in enumerate(tokens)]
    one.prefill(0, [prompt])
    np.testing.assert_allclose(one.verify([tokens], [30])[0], wanted, **CLOSE)


# --- whether it pays


def rows_of(model, *prompts, **options):
    rows = [Row(model.requests(prompt, **options)[0], 0, model.encoder.vocabulary) for prompt in prompts]
    for row in rows:
        row.tokens.append(row.request.prompt[2])
    return rows


def planned(check, rows, *, step=1.0):
    """What is checked where a step takes 1 second and a check of w tokens ``check(w)``."""
    one = Speculator()
    one.costs.stepped(len(rows), step)
    for width in range(2, MOST + 2):
        one.costs.checked(width, check(width))
    return one.plan(rows, 1000)


REPEATED = [*range(10, 40), *range(10, 30)]


def test_as_many_are_checked_as_pay(model):
    rows = lambda: rows_of(model, [*REPEATED, 30, 31], speculate=True)  # noqa: E731
    rows_at = rows()
    rows_at[0].tokens[:] = [32]
    free, dear = planned(lambda _: 1.0, rows_at), planned(lambda width: 1.0 + 0.3 * (width - 1), rows_at)
    assert len(free[0]) == 16
    assert 1 <= len(dear[0]) < 16
    assert planned(lambda width: 1.0 + 0.9 * (width - 1), rows_at) == []


def test_nothing_is_checked_before_a_step_was_measured(model):
    rows = rows_of(model, REPEATED, speculate=True)
    assert Speculator().plan(rows, 1000) == []


def test_nothing_is_checked_that_was_not_asked_for(model):
    for told in ({}, {"speculate": False}, {"speculate": 0}):
        rows = rows_of(model, [*REPEATED, 30], **told)
        rows[0].tokens[:] = [31]
        assert planned(lambda _: 1.0, rows) == []


def test_no_more_than_was_asked_for_than_the_limit_and_than_the_slot(model, eager):
    def count(capacity=1000, **told):
        rows = rows_of(model, [*REPEATED, 30], **told)
        rows[0].tokens[:] = [31]
        one = Speculator()
        one.costs.stepped(1, 1.0)
        found = one.plan(rows, capacity)
        return len(found[0]) if found else 0

    assert count(speculate=True) == 16
    assert count(speculate=4) == 4
    assert count(speculate=True, max_new_tokens=4) == 2
    assert count(speculate=True, max_new_tokens=2) == 0
    assert count(speculate=True, capacity=len(REPEATED) + 1 + 3) == 2


def test_a_batch_has_to_gain_as_a_whole(model):
    """Four texts in a step that takes little longer than one: their checks, one after the other, have to beat that."""
    rows = rows_of(model, *([[*REPEATED, 30]] * 4), speculate=True)
    for row in rows:
        row.tokens[:] = [31]
    assert any(planned(lambda _: 1.0, rows))
    assert planned(lambda width: 1.0 + 0.5 * (width - 1), rows, step=1.1) == []


def test_an_end_of_text_is_not_guessed_beyond(model):
    prompt = [10, 11, 12, 13, 2, 14, 15, 16, 10, 11]
    rows = rows_of(model, prompt, speculate=True)
    rows[0].tokens[:] = [12]
    assert planned(lambda _: 1.0, rows) == [[13]]


def test_times_are_medians_of_the_last_ones_and_drawn_through():
    costs = Costs()
    assert costs.step(0) == 0.0
    assert costs.step(1) == math.inf
    for seconds in (5.0, 1.0, 3.0):
        costs.stepped(1, seconds)
    for seconds in (4.0, 5.0, 9.0):
        costs.checked(5, seconds)
    assert costs.step(1) == costs.step(2) == 3.0
    assert costs.check(5) == 5.0
    assert costs.check(3) == pytest.approx(4.0)
    assert costs.check(9) > 5.0
    for _ in range(8):
        costs.checked(5, 4.0)
    assert costs.check(5) == 4.0


def test_what_a_guess_promises():
    guess = Guess([1, 2, 3], [0.5, 0.5, 1.0])
    assert [guess.expected(count) for count in range(4)] == [1.0, 1.5, 1.75, 2.0]


def test_where_checks_are_slow_they_end(model, monkeypatch):
    verify, slow = Decoder.verify, []

    def waits(self, *given):
        slow.append(time.sleep(0.02))
        return verify(self, *given)

    monkeypatch.setattr(Decoder, "verify", waits)
    monkeypatch.setattr(model, "speculator", Speculator())
    bias = {token: -math.inf for token in range(300) if token % 50}
    for _ in range(3):
        model.generate(ids(9), max_new_tokens=100, bias=bias, speculate=True)
    assert 1 <= len(slow) <= 6


def test_where_nothing_is_worth_it_it_looks_less_often_until_something_is(model, monkeypatch):
    looks: list[int] = []
    found = Lookup.guess

    def guess(self, tokens, most):
        looks.append(len(tokens))
        return found(self, tokens, most)

    monkeypatch.setattr(Lookup, "guess", guess)
    (row,) = rows_of(model, range(5, 40), speculate=True)
    speculator = Speculator()
    speculator.costs.stepped(1, 1.0)
    # Nothing is found in a text that never says a token twice.
    for token in range(100, 164):
        row.tokens.append(token)
        assert speculator.plan([row], 1000) == []
    gaps = np.diff(looks)
    assert (gaps[:7] == 1).all()
    assert (gaps[-3:] == 4).all()
    # It begins again: that is seen at the fourth token at the latest, and then nothing is left out.
    row.tokens += range(5, 12)
    plans = [speculator.plan([row], 1000) for _ in range(6)]
    first = next(at for at, plan in enumerate(plans) if plan)
    assert first <= 3
    assert all(plans[first:])


# --- a draft


@pytest.fixture(scope="module")
def drafts(tmp_path_factory, llama):
    """Bundles: the model's own weights, others, and another tokenizer."""
    folder = tmp_path_factory.mktemp("drafts")
    tokenizer = byte_level(folder / "tokenizer.json")
    other = byte_fallback(folder / "other.json")
    return {
        "same": write_decoder(folder / "same", llama, tokenizer).path,
        "small": write_decoder(folder / "small", tiny_llama(9, layers=1, context=96), tokenizer).path,
        "other": write_decoder(folder / "other", tiny_llama(1), other).path,
    }


@pytest.fixture
def no_lookup(monkeypatch):
    monkeypatch.setattr(Lookup, "guess", lambda *_: ([], 0))


@pytest.mark.parametrize("name", ["same", "small"])
def test_a_draft_changes_no_text(decoder_bundle, drafts, eager, no_lookup, name):
    with (
        load(decoder_bundle.path, cache=False) as plain,
        load(decoder_bundle.path, cache=False, draft=drafts[name]) as model,
    ):
        for options in ({}, {"temperature": 0.7, "seed": 3}, {"schema": SCHEMA}, {"regex": "[ab]{30}"}):
            for seed in range(2):
                told = {"max_new_tokens": 40, "bias": NO_END, **options}
                wanted = plain.generate(ids(9, seed), **told)
                found = model.generate(ids(9, seed), **told)
                assert found == wanted
                assert found.drafted > 0 or "regex" in options
                if name == "same" and not options:
                    assert found.accepted >= 15
                    assert found.accepted == found.drafted
                assert model.generate(ids(9, seed), speculate=0, **told).drafted == 0


def test_a_draft_that_does_not_pay_is_tried_now_and_then(decoder_bundle, drafts, no_lookup, monkeypatch):
    with load(drafts["small"], cache=False) as draft, load(decoder_bundle.path, cache=False, draft=draft) as model:
        monkeypatch.setattr(Costs, "check", lambda *_: 1e9)
        found = [model.generate(ids(9, seed), max_new_tokens=60, bias=NO_END).drafted for seed in range(3)]
        assert 1 <= sum(found) <= 3
        draft.generate(ids(4), max_new_tokens=2)


def test_a_text_beyond_the_drafts_context_goes_on_without_it(decoder_bundle, drafts, eager, no_lookup):
    with (
        load(decoder_bundle.path, cache=False) as plain,
        load(decoder_bundle.path, cache=False, draft=drafts["small"]) as model,
    ):
        wanted = plain.generate(ids(80), bias=NO_END)
        assert model.generate(ids(80), bias=NO_END) == wanted


def test_a_draft_of_another_vocabulary_is_refused(decoder_bundle, drafts):
    with pytest.raises(UsageError, match="another vocabulary"):
        load(decoder_bundle.path, cache=False, draft=drafts["other"])


# --- options


@pytest.mark.parametrize("value", [-1, 17, 1.5, "yes"])
def test_numbers_of_guesses_that_make_no_sense(model, value):
    with pytest.raises(UsageError, match="speculate is"):
        model.generate("the cat", speculate=value)


def test_beams_guess_nothing(model):
    with pytest.raises(UsageError, match="beam search guesses nothing"):
        model.generate("the cat", beams=2, speculate=True)
    model.generate("the cat", beams=2, speculate=False, max_new_tokens=2)


def test_a_real_text_that_repeats_its_prompt(tmp_path, eager):
    folder = SHARED / "models" / "pystories_lm"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; HASTEN_SHARED names another place")
    with load(real_decoder(tmp_path / "bundle", folder).path, cache=False) as model:
        code = list(model.encoder.encode(inspect.getsource(textwrap)))[40:240]
        plain, guessed = both(model, [*code, *code[:24]], max_new_tokens=60)
        assert guessed == plain
        assert guessed.accepted > 30
