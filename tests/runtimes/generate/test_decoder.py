"""Prefill and decode against torch: ragged rows, pieces of a long prompt, slots."""

from __future__ import annotations

import numpy as np
import pytest

from artifacts.errors import ProviderError, UsageError
from artifacts.manifest import SessionOptions
from artifacts.target import CPU_PROVIDER
from runtimes.generate import decoder as module
from runtimes.generate.cache import layout_of
from runtimes.generate.decoder import PREFILL_TOKENS, Decoder, grouped, piece_end
from runtimes.generate.feeds import random_feeds
from runtimes.session import Binding, Session

# float32 with logits up to about 10: what the order of additions over a few hundred products leaves.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def reference(llama, ids):
    import torch

    with torch.no_grad():
        return llama(torch.tensor([list(ids)])).logits[0].numpy()


def prompts(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(5, 300, length).tolist() for length in lengths]


@pytest.fixture
def decoder(model):
    return Decoder(model._pool.session, model.layout, model.vocabulary, rows=4, capacity=64)


def test_a_ragged_prefill_and_ragged_steps(decoder, llama):
    rows = prompts(9, 3, 14)
    logits = decoder.prefill(0, rows)
    for _ in range(4):
        for row, found in zip(rows, logits, strict=True):
            np.testing.assert_allclose(found, reference(llama, row)[-1], **CLOSE)
        tokens = logits.argmax(axis=-1).tolist()
        lengths = [len(row) for row in rows]
        for row, token in zip(rows, tokens, strict=True):
            row.append(token)
        logits = decoder.step(tokens, lengths)


def test_a_long_prompt_is_read_in_pieces(decoder, llama, monkeypatch):
    monkeypatch.setattr(module, "PREFILL_TOKENS", 7)
    (row,) = prompts(30)
    np.testing.assert_allclose(decoder.prefill(2, [row])[0], reference(llama, row)[-1], **CLOSE)


@pytest.mark.parametrize("length", range(1, 40))
def test_no_piece_of_a_prompt_is_a_single_token(length):
    for most in (3, 7, 16):
        ends = [0]
        while ends[-1] < length:
            ends.append(piece_end(ends[-1], most, length))
        sizes = np.diff(ends)
        assert sizes.sum() == length
        assert sizes.max() <= most
        assert length == 1 or sizes.min() > 1


def test_a_prompt_goes_on_from_what_the_cache_holds(decoder, llama):
    (row,) = prompts(20)
    decoder.prefill(0, [row[:12]])
    np.testing.assert_allclose(decoder.prefill(0, [row], start=12)[0], reference(llama, row)[-1], **CLOSE)


def test_a_prefill_can_be_stopped(decoder, monkeypatch):
    monkeypatch.setattr(module, "PREFILL_TOKENS", 7)
    asked = []
    assert decoder.prefill(0, prompts(30), stop=lambda: len(asked) == 2 or asked.append(1)) is None


def test_other_slots_are_left_alone(decoder):
    first, second = prompts(8, 5)
    decoder.prefill(0, [first])
    before = {name: array.copy() for name, array in decoder.cache.views(0, 1)[0].items()}
    decoder.prefill(1, [second])
    for name, array in decoder.cache.views(0, 1)[0].items():
        np.testing.assert_array_equal(array, before[name])


def test_a_larger_cache_goes_on_with_the_same_numbers(decoder, llama):
    (row,) = prompts(40)
    token = int(decoder.prefill(0, [row])[0].argmax())
    decoder.grow(100, [40])
    np.testing.assert_allclose(decoder.step([token], [40])[0], reference(llama, [*row, token])[-1], **CLOSE)


def test_a_step_allocates_no_logits_and_binds_once(decoder):
    decoder.prefill(0, prompts(4, 4))
    first = decoder.step([5, 6], [4, 4])
    bindings = dict(decoder._bindings)
    second = decoder.step([7, 8], [5, 5])
    assert np.shares_memory(first, second)
    assert decoder._bindings == bindings


def test_what_a_step_allocates_does_not_grow_with_the_context(decoder):
    import tracemalloc

    def peak(length):
        decoder.prefill(0, prompts(length, length))
        decoder.step([5, 6], [length, length])
        tracemalloc.start()
        decoder.step([7, 8], [length + 1, length + 1])
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    # A few Python objects; one layer's keys of 50 tokens alone would be 3200 bytes a row.
    assert abs(peak(55) - peak(5)) < 1000


def test_several_tokens_a_row_are_those_of_single_steps(decoder, model):
    """Ragged rows: what follows a row's last token is not read, neither now nor later."""
    rows, more = prompts(9, 3, 14, 5), [[5, 6, 7], [8], [9], [10, 11]]
    decoder.prefill(0, rows)
    found = decoder.verify(more, [len(row) for row in rows])
    assert found.shape == (4, 3, model.vocabulary)
    for index, (row, tokens) in enumerate(zip(rows, more, strict=True)):
        single = model.decoder(1, 64)
        single.prefill(0, [row])
        for place, token in enumerate(tokens):
            wanted = single.step([token], [len(row) + place])[0]
            np.testing.assert_allclose(found[index, place], wanted, **CLOSE)
        assert not found[index, len(tokens) :].any()
    # All rows keep one token of theirs only, and go on with another.
    wanted = []
    for row, tokens in zip(rows, more, strict=True):
        wanted.append(model.decoder(1, 64).prefill(0, [[*row, tokens[0], 20]])[0])
    np.testing.assert_allclose(decoder.step([20] * 4, [len(row) + 1 for row in rows]), wanted, **CLOSE)


def test_rows_of_one_token_share_a_call(decoder, monkeypatch):
    rows, calls = prompts(9, 3, 14), []
    decoder.prefill(0, rows)
    run = Decoder._go_on
    monkeypatch.setattr(Decoder, "_go_on", lambda self, slot, *rest: calls.append(slot) or run(self, slot, *rest))
    lengths = [len(row) for row in rows]
    found = decoder.verify([[5], [6], [7, 8]], lengths)
    assert calls == [0, 2]
    np.testing.assert_allclose(decoder.step([5, 6, 7], lengths), found[:, 0], **CLOSE)


def test_any_number_of_tokens_can_be_verified(decoder, model):
    (row,) = prompts(9)
    decoder.prefill(0, [row])
    more = prompts(30, seed=1)[0]
    for width in (1, 3, 30, 4):
        found = decoder.verify([more[:width]], [9])
        assert found.shape == (1, width, model.vocabulary)
        wanted = model.decoder(1, 64).prefill(0, [[*row, *more[:width]]])[0]
        np.testing.assert_allclose(found[0, -1], wanted, **CLOSE)


def test_losses_are_torchs(decoder, llama, monkeypatch):
    import torch

    (row,) = prompts(25)
    monkeypatch.setattr(module, "_SCORED_BYTES", 4 * 300 * 7)
    logits = torch.from_numpy(reference(llama, row)[:-1])
    wanted = torch.nn.functional.cross_entropy(logits, torch.tensor(row[1:]), reduction="none")
    np.testing.assert_allclose(decoder.losses(row), wanted.numpy(), rtol=1e-4, atol=1e-4)


def test_prompts_are_grouped_by_length():
    assert grouped([300, 10, 400, 12]) == [[1, 3], [0], [2]]
    assert grouped([1] * 3) == [[0, 1, 2]]
    assert grouped([]) == []


def test_a_room_of_512_tokens_is_not_overfilled():
    for group in grouped(list(range(1, 200, 3))):
        assert len(group) == 1 or len(group) * max(range(1, 200, 3)[i] for i in group) <= PREFILL_TOKENS


def test_random_feeds_fit_the_graph(model):
    rng = np.random.default_rng(0)
    inputs = model.bundle.manifest.inputs
    for rows, length, held in ((2, 7, 0), (1, 1, 12), (3, 1, 5)):
        outputs = model.run(random_feeds(inputs, 300, rows, length, rng, held=held))
        assert outputs["logits"].shape == (rows, 1, 300)
        assert np.isfinite(outputs["logits"]).all()


# --- Session.bind


def test_bound_arrays_are_read_and_written_in_place(decoder_bundle):
    session = Session(decoder_bundle.path / "cpu-fp32.onnx", CPU_PROVIDER, options=SessionOptions())
    layout = layout_of(decoder_bundle.manifest.inputs)
    feeds = random_feeds(decoder_bundle.manifest.inputs, 300, 1, 3, np.random.default_rng(0))
    outputs = {new: feeds[old] for old, new, *_ in layout.tensors} | {"logits": np.zeros((1, 1, 300), np.float32)}
    wanted = session.run(feeds)["logits"]
    binding = session.bind(feeds, outputs)
    binding.run()
    np.testing.assert_array_equal(outputs["logits"], wanted)
    feeds["input_ids"][...] = (feeds["input_ids"] + 1) % 300
    binding.run()
    assert not np.array_equal(outputs["logits"], wanted)
    np.testing.assert_array_equal(outputs["logits"], session.run(feeds)["logits"])


def test_a_device_takes_the_inputs_anew_for_each_run(decoder_bundle):
    """There, binding copies them."""
    session = Session(decoder_bundle.path / "cpu-fp32.onnx", CPU_PROVIDER, options=SessionOptions())
    feeds = random_feeds(decoder_bundle.manifest.inputs, 300, 1, 3, np.random.default_rng(0))
    caches = {new: feeds[old].copy() for old, new, *_ in layout_of(decoder_bundle.manifest.inputs).tensors}
    outputs = caches | {"logits": np.zeros((1, 1, 300), np.float32)}
    binding = Binding(session._session, CPU_PROVIDER, "cuda", feeds, outputs)
    first = binding._binding
    binding.run()
    assert binding._binding is not first
    np.testing.assert_array_equal(outputs["logits"], session.run(feeds)["logits"])


def test_what_cannot_be_bound_is_told(decoder_bundle):
    session = Session(decoder_bundle.path / "cpu-fp32.onnx", CPU_PROVIDER, options=SessionOptions())
    feeds = random_feeds(decoder_bundle.manifest.inputs, 300, 1, 3, np.random.default_rng(0))
    with pytest.raises(UsageError, match="input_ids is not C-contiguous"):
        session.bind({"input_ids": np.zeros((4, 4), np.int64).T[:2]}, {})
    with pytest.raises(ProviderError, match="do not fit the graph"):
        session.bind({"nothing": np.zeros(3, np.float32)}, {})
    with pytest.raises(ProviderError, match="cannot run"):
        session.bind(feeds, {"logits": np.zeros((7, 1, 300), np.float32)}).run()
    session.close()
    with pytest.raises(ProviderError, match="closed"):
        session.bind(feeds, {})
