"""From logits to a token: against transformers' processors, and against what the numbers must be."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from artifacts.errors import ProviderError, UsageError
from artifacts.manifest import Generation
from runtimes.generate.sampling import Sampler, Sampling, distribution, sampling_of

DEFAULTS = Generation((2,), 1, "", ())


def logits(size: int = 1000, seed: int = 0) -> np.ndarray:
    return (3.0 * np.random.default_rng(seed).standard_normal(size)).astype(np.float32)


def dense(values: np.ndarray, sampling: Sampling) -> np.ndarray:
    tokens, probabilities = distribution(values, sampling)
    found = np.zeros(len(values))
    found[tokens] = probabilities
    return found


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(("top_k", "top_p", "min_p"), [
    (0, 1.0, 0.0), (7, 1.0, 0.0), (0, 0.6, 0.0), (0, 1.0, 0.05),
    (40, 0.8, 0.02), (5000, 0.99, 0.0), (0, 0.0, 0.0), (1, 1.0, 0.0),
])  # fmt: skip
def test_the_distribution_is_that_of_transformers(temperature, top_k, top_p, min_p):
    import torch
    from transformers.generation import logits_process as theirs

    values = logits()
    scores = torch.from_numpy(values[None].astype(np.float64))
    chain = [theirs.TemperatureLogitsWarper(temperature)]
    chain += [theirs.TopKLogitsWarper(top_k)] if top_k else []
    chain += [theirs.TopPLogitsWarper(top_p)] if top_p < 1.0 else []
    chain += [theirs.MinPLogitsWarper(min_p)] if min_p else []
    for one in chain:
        scores = one(None, scores)
    wanted = torch.softmax(scores, -1)[0].numpy()
    found = dense(values, Sampling(True, temperature, top_k, top_p, min_p))
    np.testing.assert_array_equal(found > 0, wanted > 0)
    np.testing.assert_allclose(found, wanted, rtol=1e-9)


def test_a_flat_distribution_is_cut_exactly():
    """More tokens are needed than are looked at first."""
    values = logits(5000) * np.float32(0.01)
    found = dense(values, Sampling(True, top_p=0.9))
    order = np.argsort(-values)
    weights = np.exp(values[order].astype(np.float64))
    count = int(np.searchsorted(np.cumsum(weights) / weights.sum(), 0.9)) + 1
    assert set(np.flatnonzero(found)) == set(order[:count])


def test_of_equal_logits_the_lower_ids_stay():
    assert distribution(np.zeros(9, np.float32), Sampling(True, top_k=3))[0].tolist() == [0, 1, 2]


def test_the_likeliest_stays_where_the_exponential_makes_all_equal():
    values = np.array([0.0, 1.4e-45], np.float32)
    for sampling in (Sampling(True, 0.7, top_p=0.0), Sampling(True, 0.7, top_k=1)):
        assert distribution(values, sampling)[0].tolist() == [1]


@given(
    st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=40),
    st.integers(0, 50),
    st.floats(0, 1),
    st.floats(0, 1),
)
@settings(max_examples=200, deadline=None)
def test_something_always_stays_and_it_is_a_distribution(values, top_k, top_p, min_p):
    tokens, probabilities = distribution(np.array(values, np.float32), Sampling(True, 0.7, top_k, top_p, min_p))
    assert len(tokens) >= 1
    assert math.isclose(probabilities.sum(), 1.0, rel_tol=1e-9)
    assert (probabilities >= 0).all()
    assert int(np.argmax(values)) in tokens or max(values) == values[tokens[0]]


def test_draws_have_the_frequencies_of_the_distribution():
    values = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    sampler = Sampler(Sampling(True, seed=1), ())
    drawn = np.bincount([sampler.choose(values.copy()) for _ in range(4000)], minlength=4) / 4000
    # Four standard deviations of a binomial share.
    assert (np.abs(drawn - [0.5, 0.3, 0.15, 0.05]) < 4 * np.sqrt(0.25 / 4000)).all()


def test_a_seed_says_what_is_drawn_and_the_index_too():
    def draw(seed, index):
        sampler = Sampler(Sampling(True, seed=seed), (), index)
        return [sampler.choose(logits()) for _ in range(8)]

    assert draw(3, 0) == draw(3, 0)
    assert draw(3, 0) != draw(3, 1)
    assert draw(3, 0) != draw(4, 0)
    assert draw(None, 0) != draw(None, 0)


def test_a_temperature_of_zero_takes_the_likeliest():
    values = logits()
    assert Sampler(Sampling(True, temperature=0.0), ()).choose(values.copy()) == values.argmax()


def test_the_repetition_penalty_is_that_of_transformers():
    import torch
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    values, prompt, text = logits(50), [3, 4, 4, 9], [11, 3]
    wanted = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([prompt + text]), torch.from_numpy(values[None].copy()))
    sampler = Sampler(Sampling(repetition_penalty=1.3), prompt)
    for token in text:
        sampler.add(token)
    found = values.copy()
    sampler.adjust(found)
    np.testing.assert_array_equal(found, wanted[0].numpy())


def test_frequency_and_presence_penalties_count_the_text_and_not_the_prompt():
    sampler = Sampler(Sampling(frequency_penalty=0.5, presence_penalty=2.0), [1, 1, 1])
    for token in (5, 5, 7):
        sampler.add(token)
    found = np.zeros(9, np.float32)
    sampler.adjust(found)
    assert found.tolist() == [0, 0, 0, 0, 0, -3.0, 0, -2.5, 0]


def test_bias_is_added_and_forbids():
    values = np.array([0.0, 3.0, 1.0], np.float32)
    assert Sampler(Sampling(bias={1: -math.inf}), ()).choose(values.copy()) == 2
    assert Sampler(Sampling(bias={0: 10.0}), ()).choose(values.copy()) == 0
    tokens = {Sampler(Sampling(True, bias={1: -math.inf}, seed=s), ()).choose(values.copy()) for s in range(50)}
    assert tokens == {0, 2}


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_told(sample, wrong):
    values = logits(20)
    values[4] = wrong
    with pytest.raises(ProviderError, match="not finite"):
        Sampler(Sampling(sample), ()).choose(values)


def test_defaults_are_the_models_own():
    own = Generation(
        (2,), 1, "", (), temperature=0.6, top_k=20, top_p=0.95, min_p=0.01, repetition_penalty=1.1, sample=True
    )
    assert sampling_of(own, {}) == Sampling(True, 0.6, 20, 0.95, 0.01, 1.1)
    assert sampling_of(own, {"top_k": 0, "seed": 4}) == Sampling(True, 0.6, 0, 0.95, 0.01, 1.1, seed=4)
    assert sampling_of(own, {"temperature": 0}).greedy
    assert sampling_of(own, {"sample": False}).greedy


def test_who_gives_a_temperature_wants_to_sample():
    assert sampling_of(DEFAULTS, {}).greedy
    assert sampling_of(DEFAULTS, {"seed": 1, "repetition_penalty": 1.2}).greedy
    for name, value in (("temperature", 0.5), ("top_k", 3), ("top_p", 0.9), ("min_p", 0.1)):
        assert not sampling_of(DEFAULTS, {name: value}).greedy
        assert sampling_of(DEFAULTS, {name: value, "sample": False}).greedy
    with pytest.raises(UsageError, match="temperature of 0"):
        sampling_of(DEFAULTS, {"sample": True, "temperature": 0})


@pytest.mark.parametrize(("name", "value", "match"), [
    ("temperature", -1, "temperature is -1"),
    ("temperature", math.nan, "temperature is nan"),
    ("temperature", "hot", "temperature is hot"),
    ("temperature", True, "temperature is True"),
    ("top_k", -1, "top_k is -1"),
    ("top_k", 2.5, "top_k is 2.5"),
    ("top_p", 1.1, "top_p is 1.1"),
    ("min_p", -0.1, "min_p is -0.1"),
    ("repetition_penalty", 0, "repetition_penalty is 0"),
    ("frequency_penalty", math.inf, "frequency_penalty is inf"),
    ("presence_penalty", None, "presence_penalty is None"),
    ("seed", -1, "seed is -1"),
    ("seed", 1.5, "seed is 1.5"),
    ("seed", True, "seed is True"),
    ("bias", {100: 1.0}, "bias is given for token 100"),
    ("bias", {"a": 1.0}, "bias is given for token a"),
    ("bias", {1: math.nan}, "bias of token 1 is nan"),
    ("bias", {1: math.inf}, "bias of token 1 is inf"),
    ("bias", [1], "bias is list"),
    ("bias", dict.fromkeys(range(100), -math.inf), "forbids every token"),
])  # fmt: skip
def test_impossible_parameters_are_refused_in_one_line(name, value, match):
    with pytest.raises(UsageError, match=match) as raised:
        Sampling(**{name: value}).check(100)
    assert "\n" not in str(raised.value)
    assert raised.value.remedy
