"""Beam search against transformers' generate(num_beams=…)."""

from __future__ import annotations

import math
import threading

import numpy as np
import pytest
from decoder_graphs import byte_level, tiny_llama, write_decoder

from runtimes.load import load
from runtimes.tasks import generate as module

END = (2, *range(7, 270, 20))


@pytest.fixture(scope="module")
def ending(tmp_path_factory):
    """(torch model, the same loaded): many tokens end a text, so that some texts end."""
    folder = tmp_path_factory.mktemp("ending")
    llama = tiny_llama(4, vocabulary=270)
    tokenizer = byte_level(folder / "tokenizer.json")
    with load(write_decoder(folder / "bundle", llama, tokenizer, generation={"eos": END}).path, cache=False) as model:
        yield llama, model


def theirs(llama, prompt, **options):
    import torch

    found = llama.generate(
        torch.tensor([prompt]),
        do_sample=False,
        pad_token_id=0,
        eos_token_id=list(END),
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    texts = [tuple(one for one in row[len(prompt) :].tolist() if one not in (0, *END)) for row in found.sequences]
    return texts, found.sequences_scores.tolist()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("beams", "n", "power"), [(2, 1, 1.0), (3, 3, 1.0), (4, 2, 2.0), (4, 4, 0.0), (5, 2, -1.0)])
def test_beams_are_those_of_transformers(ending, seed, beams, n, power):
    llama, model = ending
    prompt = np.random.default_rng(seed).integers(5, 270, 4 + seed).tolist()
    texts, scores = theirs(
        llama, prompt, num_beams=beams, num_return_sequences=n, length_penalty=power, max_new_tokens=14
    )
    found = model.generate(prompt, beams=beams, n=n, length_penalty=power, max_new_tokens=14)
    found = found if n > 1 else [found]
    assert [one.tokens for one in found] == texts
    # Sums of up to 14 log-probabilities of about 5 in float32.
    np.testing.assert_allclose([one.score for one in found], scores, rtol=1e-4, atol=1e-4)


def test_some_of_those_texts_end(ending):
    _, model = ending
    finishes = set()
    for seed in range(6):
        prompt = np.random.default_rng(seed).integers(5, 270, 4 + seed).tolist()
        finishes |= {one.finish for one in model.generate(prompt, beams=4, n=4, length_penalty=0.0, max_new_tokens=14)}
    assert finishes == {"stop", "length"}


def test_a_penalty_counts_for_beams_too(ending):
    llama, model = ending
    prompt = np.random.default_rng(1).integers(5, 270, 6).tolist()
    texts, _ = theirs(llama, prompt, num_beams=3, repetition_penalty=1.6, max_new_tokens=10)
    assert model.generate(prompt, beams=3, repetition_penalty=1.6, max_new_tokens=10).tokens == texts[0]


def test_a_beam_is_no_worse_than_greedy(model):
    greedy = model.generate("the cat", max_new_tokens=8, logprobs=0)
    beam = model.generate("the cat", beams=6, max_new_tokens=8)
    assert beam.score * len(beam.tokens) >= sum(one.logprob for one in greedy.logprobs) - 1e-3


def test_prompts_are_searched_one_by_one(model):
    alone = [model.generate(text, beams=3, max_new_tokens=6) for text in ("the cat", "a dog")]
    assert model.generate(["the cat", "a dog"], beams=3, max_new_tokens=6) == alone


def test_room_grows_with_the_beams(model, monkeypatch):
    wanted = model.generate("the cat", beams=3, bias={2: -math.inf})
    assert wanted.prompt_tokens + len(wanted.tokens) == 128
    monkeypatch.setattr(module, "_FIRST_TOKENS", 1)
    assert model.generate("the cat", beams=3, bias={2: -math.inf}) == wanted


def test_beams_can_be_cancelled_and_timed(model):
    cancel = threading.Event()
    cancel.set()
    found = model.generate("the cat", beams=3, cancel=cancel)
    assert (found.tokens, found.finish) == ((), "cancelled")
    found = model.generate("the cat", beams=3, seconds=1e-9, bias={2: -math.inf})
    assert found.finish == "time"
