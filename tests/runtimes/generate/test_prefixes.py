"""The prefix cache: what the tree holds, what it forgets, and that no text can tell."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from bundle_builders import decoder_specs
from hypothesis import given, settings
from hypothesis import strategies as st

from artifacts.errors import UsageError
from runtimes.generate.cache import KVCache, layout_of
from runtimes.generate.decoder import PREFILL_TOKENS, Decoder
from runtimes.generate.loop import Loop, Pace
from runtimes.generate.prefixes import BLOCK, PrefixCache
from runtimes.generate.results import Generated

LAYOUT = layout_of(decoder_specs(layers=2, heads=2, size=8)[0])
BLOCK_BYTES = BLOCK * LAYOUT.token_bytes
CAPACITY = 6 * BLOCK


def slot_of(tokens: list[int]) -> KVCache:
    """A cache whose first slot holds, for each token, a number that all tokens up to it decide."""
    cache = KVCache(LAYOUT, 2, CAPACITY)
    for number, array in enumerate(cache.views(0, 1)[0].values()):
        for place in range(len(tokens)):
            array[0, :, place] = hash((number, *tokens[: place + 1])) % 1000
    return cache


def assert_restored(prefixes: PrefixCache, prompt: list[int], wanted: int) -> None:
    cache = KVCache(LAYOUT, 2, CAPACITY)
    assert prefixes.longest(prompt) == wanted
    assert prefixes.restore(prompt, cache, 1) == wanted
    expected = slot_of(prompt)
    for found, right in zip(cache.views(0, 2)[0].values(), expected.views(0, 1)[0].values(), strict=True):
        np.testing.assert_array_equal(found[1, :, :wanted], right[0, :, :wanted])
        assert not found[1, :, wanted:].any()
        assert not found[0].any()


def keep(prefixes: PrefixCache, tokens: list[int]) -> None:
    prefixes.keep(tokens, slot_of(tokens), 0)


def ids(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(5, 300, count).tolist()


# --- the tree


def test_whole_blocks_come_back_and_never_the_last_tokens():
    prefixes, tokens = PrefixCache(LAYOUT, 100 * BLOCK_BYTES), ids(100)
    keep(prefixes, tokens)
    assert prefixes.nbytes == 3 * BLOCK_BYTES
    assert_restored(prefixes, tokens, 96)
    assert_restored(prefixes, tokens[:98], 96)
    assert_restored(prefixes, tokens[:97], 64)
    assert_restored(prefixes, [*tokens[:70], *ids(60, 1)], 64)
    assert_restored(prefixes, tokens[:31], 0)
    assert_restored(prefixes, ids(100, 1), 0)
    assert (prefixes.asked, prefixes.hits, prefixes.saved) == (6, 4, 96 + 96 + 64 + 64)


def test_what_prompts_share_is_kept_once():
    prefixes, shared = PrefixCache(LAYOUT, 100 * BLOCK_BYTES), ids(64)
    for seed in range(4):
        keep(prefixes, [*shared, *ids(40, seed + 1)])
    assert prefixes.nbytes == (2 + 4) * BLOCK_BYTES
    for seed in range(4):
        assert_restored(prefixes, [*shared, *ids(40, seed + 1)], 96)
    keep(prefixes, [*shared, *ids(40, 1)])
    assert prefixes.nbytes == (2 + 4) * BLOCK_BYTES


def test_blocks_of_the_same_tokens_behind_others_are_not_the_same():
    prefixes, same = PrefixCache(LAYOUT, 100 * BLOCK_BYTES), ids(32)
    keep(prefixes, [*ids(32, 1), *same])
    keep(prefixes, [*ids(32, 2), *same])
    assert prefixes.nbytes == 4 * BLOCK_BYTES
    assert_restored(prefixes, [*same, 7], 0)
    assert_restored(prefixes, [*ids(32, 2), *same, 7, 7], 64)


def test_a_prompt_grows_piece_by_piece():
    prefixes, tokens = PrefixCache(LAYOUT, 100 * BLOCK_BYTES), ids(150)
    for end in (10, 40, 100, 150):
        keep(prefixes, tokens[:end])
        assert prefixes.nbytes == end // BLOCK * BLOCK_BYTES
    assert_restored(prefixes, tokens, 128)


def test_what_was_not_used_for_longest_is_forgotten_from_its_end():
    prefixes = PrefixCache(LAYOUT, 5 * BLOCK_BYTES)
    first, second, third = ids(70, 1), ids(70, 2), ids(70, 3)
    keep(prefixes, first)
    keep(prefixes, second)
    assert_restored(prefixes, first, 64)
    keep(prefixes, third)
    assert prefixes.nbytes == 5 * BLOCK_BYTES
    assert_restored(prefixes, second, 32)
    assert_restored(prefixes, first, 64)
    assert_restored(prefixes, third, 64)
    keep(prefixes, ids(160, 4))
    assert prefixes.nbytes == 5 * BLOCK_BYTES
    assert [prefixes.longest(one) for one in (first, second, third)] == [0, 0, 0]


def test_a_prefix_larger_than_the_limit_is_kept_as_far_as_it_goes():
    prefixes, tokens = PrefixCache(LAYOUT, 2 * BLOCK_BYTES + 1), ids(150)
    for _ in range(2):
        keep(prefixes, tokens)
        assert prefixes.nbytes == 2 * BLOCK_BYTES
        assert_restored(prefixes, tokens, 64)
    nothing = PrefixCache(LAYOUT, BLOCK_BYTES - 1)
    keep(nothing, tokens)
    assert nothing.nbytes == 0
    assert_restored(nothing, tokens, 0)


def test_it_can_be_cleared():
    prefixes = PrefixCache(LAYOUT, 5 * BLOCK_BYTES)
    keep(prefixes, ids(70))
    prefixes.clear()
    assert prefixes.nbytes == 0
    assert_restored(prefixes, ids(70), 0)


def test_a_limit_below_nothing():
    with pytest.raises(UsageError, match="prefix cache of -1 bytes"):
        PrefixCache(LAYOUT, -1)


def reachable(node: Any) -> int:
    return sum(1 + reachable(child) for child in node.children.values())


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 7),
    st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 2), max_size=5), st.integers(0, BLOCK - 1)), max_size=30),
)
def test_any_history(limit, history):
    """Against a plain list of prefixes in the order of their use."""
    prefixes = PrefixCache(LAYOUT, limit * BLOCK_BYTES)
    used: list[tuple[int, ...]] = []

    def touch(path):
        for prefix in reversed(path):
            if prefix in used:
                used.remove(prefix)
            used.append(prefix)

    for put, digits, rest in history:
        tokens = [digit for digit in digits for _ in range(BLOCK)] + [9] * rest
        path = [tuple(digits[: count + 1]) for count in range(len(digits))]
        if put:
            keep(prefixes, tokens)
            path = path[:limit]
            touch([one for one in path if one in used])
            for one in path:
                if one not in used:
                    others = [other for other in used if other not in path]
                    if len(used) == limit:
                        used.remove(others[0])
                    used.append(one)
        else:
            there = 0
            while there < len(path) and path[there] in used and (there + 1) * BLOCK + 1 < len(tokens):
                there += 1
            assert_restored(prefixes, tokens, there * BLOCK)
            path = path[:there]
        touch(path)
        assert prefixes.nbytes == len(used) * BLOCK_BYTES <= prefixes.limit
        assert reachable(prefixes._root) == len(used)


# --- texts


def drain(loop: Loop) -> dict[tuple[int, int], Generated]:
    found = {}
    while loop.busy:
        found |= {(one.prompt, one.index): one.result for one in loop.step() if one.result is not None}
    return found


def ask(model: Any, loop: Loop, prompt: list[int], **options: Any) -> Generated:
    (request,) = model.requests(prompt, **options)
    loop.add(request)
    return drain(loop)[0, 0]


def test_a_shared_prompt_is_read_once_and_texts_are_the_same(model):
    loop, system = model.loop(2, 128, prefix_bytes=10**6), ids(70)
    for seed in range(4):
        prompt = [*system, *ids(10, seed + 1)]
        for options in ({}, {"temperature": 1.1, "seed": seed}):
            found = ask(model, loop, prompt, max_new_tokens=12, **options)
            assert found == model.generate(prompt, max_new_tokens=12, **options)
    assert (loop.stats.hits, loop.stats.saved) == (7, 7 * 64)
    assert loop.stats.read == 8 * 80 - 7 * 64


def test_turns_of_a_chat_go_on_where_the_last_one_ended(model):
    loop, turns = model.loop(2, 128, prefix_bytes=10**6), ids(30)
    for seed in range(3):
        before = loop.stats.saved
        answer = ask(model, loop, turns, max_new_tokens=12, bias={2: -np.inf})
        assert answer.tokens == model.generate(turns, max_new_tokens=12, bias={2: -np.inf}).tokens
        assert loop.stats.saved - before == (0, 32, 64)[seed]
        turns = [*turns, *answer.tokens, *ids(20, seed + 1)]


def test_prompts_that_come_together_share_too(model):
    """All but the first: the prompt is longer than what is read in one go."""
    loop, system = model.loop(4, 128, pace=Pace(pause=1e-9, share=1e-6), prefix_bytes=10**6), ids(70)
    prompts = [[*system, *ids(10, seed + 1)] for seed in range(4)]
    (first,) = model.requests(ids(3), first=9, max_new_tokens=40, bias={2: -np.inf})
    loop.add(first)
    loop.step()
    loop.step()
    for request in model.requests(prompts, max_new_tokens=5):
        loop.add(request)
    results = drain(loop)
    assert [results[number, 0] for number in range(4)] == model.generate(prompts, max_new_tokens=5)
    assert loop.stats.saved == 3 * 64


def test_what_was_read_of_a_cancelled_prompt_stays(model):
    loop, prompt = model.loop(2, 128, pace=Pace(pause=1e-9, share=1e-6), prefix_bytes=10**6), ids(100)
    (first,) = model.requests(ids(3), first=9, max_new_tokens=30, bias={2: -np.inf})
    loop.add(first)
    loop.step()
    (request,) = model.requests(prompt)
    loop.add(request)
    for _ in range(5):
        loop.step()
    request.job.cancel.set()
    (piece,) = [one for one in loop.step() if one.prompt == 0]
    assert piece.result.finish == "cancelled"
    assert ask(model, loop, prompt, max_new_tokens=5) == model.generate(prompt, max_new_tokens=5)
    assert loop.stats.saved == 64


def test_a_list_of_prompts_that_begin_alike_is_not_read_in_full(model, monkeypatch):
    system, read = ids(70), []
    call = Decoder.read
    monkeypatch.setattr(Decoder, "read", lambda self, *args: read.append(sum(map(len, args[1]))) or call(self, *args))
    prompts = [[*system, *ids(10, seed + 1)] for seed in range(8)]
    alone = [model.generate(prompt, max_new_tokens=5) for prompt in prompts]
    assert sum(read) == 8 * 80
    read.clear()
    assert model.generate(prompts, max_new_tokens=5) == alone
    # As many as one call takes were read together, before anything was known.
    first = max(1, PREFILL_TOKENS // 80)
    assert sum(read) == first * 80 + (8 - first) * 16
    read.clear()
    model.generate([ids(50, seed) for seed in range(5)], max_new_tokens=1)
    assert len(read) == -(-5 // (PREFILL_TOKENS // 50))


def test_several_texts_of_a_prompt_count_once(model):
    loop, prompt = model.loop(4, 128, prefix_bytes=10**6), ids(70)
    for _ in range(2):
        (request,) = model.requests(prompt, n=3, temperature=1.0, seed=1, max_new_tokens=8)
        loop.add(request)
        found = drain(loop)
        assert [found[0, index] for index in range(3)] == model.generate(
            prompt, n=3, temperature=1.0, seed=1, max_new_tokens=8
        )
    assert (loop.stats.hits, loop.stats.saved) == (1, 64)


@pytest.mark.parametrize("seed", range(4))
def test_under_a_small_limit_texts_stay_the_same(model, seed):
    """Prefixes come and go while prompts that share them are read and written."""
    rng = np.random.default_rng(seed)
    limit = int(rng.integers(1, 8)) * BLOCK * model.layout.token_bytes
    loop = model.loop(3, 64, pace=Pace(pause=1e-9, share=1e-6), prefix_bytes=limit)
    parts = [ids(32, number) for number in range(3)]
    asked, results = {}, {}
    while len(asked) < 25 or loop.busy:
        if len(asked) < 25 and rng.random() < 0.5:
            prompt = [one for part in rng.integers(0, 3, rng.integers(0, 4)) for one in parts[part]]
            prompt += ids(int(rng.integers(1, 9)), len(asked) + 10)
            asked[len(asked)] = prompt
            for request in model.requests(prompt, first=len(asked) - 1, max_new_tokens=6):
                loop.add(request)
        results |= {one.prompt: one.result for one in loop.step() if one.result is not None}
        assert loop.stats.prefix_bytes <= limit
    assert loop.stats.hits
    for number, prompt in asked.items():
        assert results[number] == model.generate(prompt, max_new_tokens=6)
