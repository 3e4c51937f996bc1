"""The task text-generation: against transformers' generate, and what its options promise."""

from __future__ import annotations

import json
import math
import threading
import time

import numpy as np
import pytest
import task_graphs
from decoder_graphs import byte_level, real_decoder, write_decoder
from shared_data import SHARED

from artifacts.errors import DataError, UsageError
from runtimes.generate.results import Generated, log_softmax
from runtimes.jsonl import run_records
from runtimes.load import load
from runtimes.tasks import TASKS, Generator
from runtimes.tasks import generate as module


def ids(count, seed=0):
    return np.random.default_rng(seed).integers(5, 300, count).tolist()


def torch_tokens(llama, prompt, count, **options):
    """What transformers writes, without the token that ends it."""
    import torch

    told = {"do_sample": False, "pad_token_id": 0} | options
    found = llama.generate(torch.tensor([prompt]), max_new_tokens=count, **told)[0, len(prompt) :].tolist()
    return tuple(token for token in found if token not in (0, 2))


@pytest.fixture(scope="module")
def prompts():
    return [ids(count, seed) for seed, count in enumerate((9, 2, 17, 5, 12))]


# --- greedy


def test_greedy_tokens_are_those_of_transformers(model, llama, prompts):
    for prompt, found in zip(prompts, model.generate(prompts, max_new_tokens=25), strict=True):
        assert found.tokens == torch_tokens(llama, prompt, 25)
        assert found.prompt_tokens == len(prompt)
        assert found.finish == ("length" if len(found.tokens) == 25 else "stop")


def test_a_batch_gives_what_each_prompt_gives_alone(model, prompts, monkeypatch):
    alone = [model.generate(prompt, max_new_tokens=15).tokens for prompt in prompts]
    assert [one.tokens for one in model.generate(prompts, max_new_tokens=15)] == alone
    monkeypatch.setattr(module, "MAX_ROWS", 2)
    assert [one.tokens for one in model.generate(prompts, max_new_tokens=15)] == alone


def test_penalties_are_those_of_transformers(model, llama, prompts):
    found = model.generate(prompts[0], max_new_tokens=20, repetition_penalty=1.5)
    assert found.tokens == torch_tokens(llama, prompts[0], 20, repetition_penalty=1.5)
    assert found.tokens != model.generate(prompts[0], max_new_tokens=20).tokens


def test_the_end_of_text_ends_it(model, prompts):
    whole = model.generate(prompts[0], max_new_tokens=12).tokens
    found = model.generate(prompts[0], max_new_tokens=12, stop_ids=[whole[6]])
    assert found.tokens == whole[: whole.index(whole[6])]
    assert found.finish == "stop"


def test_a_first_token_that_ends_the_text(model, prompts):
    first = model.generate(prompts[0], max_new_tokens=1).tokens[0]
    found = model.generate(prompts[0], stop_ids=[first])
    assert (found.text, found.tokens, found.finish) == ("", (), "stop")


def test_without_a_number_a_text_ends_with_the_context(model):
    """Room is made as the text grows."""
    prompt = ids(100, 3)
    found = model.generate(prompt, bias={2: -math.inf})
    assert (len(found.tokens), found.finish) == (28, "length")
    assert model.generate(prompt, bias={2: -math.inf}, max_new_tokens=500) == found


def test_room_grows_and_numbers_stay(model, llama, monkeypatch):
    monkeypatch.setattr(module, "_FIRST_TOKENS", 1)
    prompts = [ids(20, 5), ids(31, 6)]
    for prompt, found in zip(prompts, model.generate(prompts, bias={2: -math.inf}), strict=True):
        assert found.tokens[:30] == torch_tokens(llama, prompt, 30, suppress_tokens=[2])
        assert len(prompt) + len(found.tokens) == 128


def test_without_memory_to_grow_a_text_ends(model, monkeypatch):
    from runtimes.generate import loop

    monkeypatch.setattr(module, "_FIRST_TOKENS", 1)
    monkeypatch.setattr(loop, "rows_that_fit", lambda *_: 0)
    found = model.generate(ids(20, 5), bias={2: -math.inf})
    assert found.finish == "length"
    assert 20 + len(found.tokens) == 33


# --- sampling


def test_the_same_seed_gives_the_same_text_whatever_the_batch(model, prompts):
    alone = [model.generate(prompt, temperature=1.2, seed=7, max_new_tokens=12).tokens for prompt in prompts]
    batch = [one.tokens for one in model.generate(prompts, temperature=1.2, seed=7, max_new_tokens=12)]
    assert batch == alone
    again = [one.tokens for one in model.generate(prompts[::-1], temperature=1.2, seed=7, max_new_tokens=12)]
    assert again == alone[::-1]
    assert model.generate(prompts[0], temperature=1.2, seed=8, max_new_tokens=12).tokens != alone[0]


def test_several_texts_of_a_prompt_share_its_reading(model, prompts, monkeypatch):
    from runtimes.generate.decoder import Decoder

    read = []
    call = Decoder.read
    monkeypatch.setattr(Decoder, "read", lambda self, *args: read.append(args) or call(self, *args))
    found = model.generate(prompts[0], n=3, temperature=1.0, seed=1, max_new_tokens=10)
    assert len(read) == 1
    assert len({one.tokens for one in found}) == 3
    assert found[0].tokens == model.generate(prompts[0], temperature=1.0, seed=1, max_new_tokens=10).tokens
    many = model.generate(prompts[:2], n=3, temperature=1.0, seed=1, max_new_tokens=10)
    assert many[0] == found
    assert len(many[1]) == 3


def test_several_texts_take_turns_where_slots_are_few(model, prompts, monkeypatch):
    wanted = model.generate(prompts, n=4, temperature=1.0, seed=1, max_new_tokens=10)
    monkeypatch.setattr(module, "MAX_ROWS", 3)
    assert model.generate(prompts, n=4, temperature=1.0, seed=1, max_new_tokens=10) == wanted


def test_the_models_own_defaults_are_used(llama, tmp_path, prompts):
    tokenizer = byte_level(tmp_path / "tokenizer.json")
    own = {"sample": True, "temperature": 0.8, "top_k": 5}
    with load(write_decoder(tmp_path / "bundle", llama, tokenizer, generation=own).path, cache=False) as model:
        first = model.generate(prompts[0], seed=3, max_new_tokens=8)
        assert first == model.generate(prompts[0], seed=3, max_new_tokens=8, temperature=0.8, top_k=5)
        greedy = model.generate(prompts[0], sample=False, max_new_tokens=8).tokens
        assert greedy == torch_tokens(llama, prompts[0], 8)
        assert first.tokens != greedy


# --- logprobs


def test_logprobs_are_the_models(model, llama, prompts):
    import torch

    found = model.generate(prompts[0], max_new_tokens=6, logprobs=3, repetition_penalty=1.4)
    with torch.no_grad():
        logits = llama(torch.tensor([[*prompts[0], *found.tokens]])).logits[0].numpy()
    logs = log_softmax(logits[len(prompts[0]) - 1 : -1])
    for one, token, row in zip(found.logprobs, found.tokens, logs, strict=True):
        assert one.token == token
        # Logits of up to 10 in float32, compared after a softmax.
        assert math.isclose(one.logprob, row[token], abs_tol=1e-4)
        best = np.argsort(-row)[:3]
        assert [top[0] for top in one.top] == best.tolist()
        np.testing.assert_allclose([top[1] for top in one.top], row[best], atol=1e-4)
    assert model.generate(prompts[0], max_new_tokens=2, logprobs=0).logprobs[0].top == ()
    assert json.loads(json.dumps(found.to_dict()))["logprobs"][0]["token"] == found.tokens[0]


# --- streaming


def test_pieces_add_up_to_the_text(model, prompts):
    whole = model.generate(prompts, max_new_tokens=20, temperature=1.5, seed=2, n=2)
    texts, results = {}, {}
    for piece in model.generate(prompts, max_new_tokens=20, temperature=1.5, seed=2, n=2, stream=True):
        key = piece.prompt, piece.index
        assert key not in results
        texts[key] = texts.get(key, "") + piece.text
        if piece.result is not None:
            results[key] = piece.result
    assert results == {(p, i): one for p, group in enumerate(whole) for i, one in enumerate(group)}
    assert texts == {key: one.text for key, one in results.items()}


def test_the_text_is_what_the_tokens_decode_to(model):
    found = model.generate("the cat", max_new_tokens=30)
    assert found.text == model.encoder.plain.decode(list(found.tokens))


def test_a_closed_stream_ends_the_generation(model, monkeypatch):
    from runtimes.generate.decoder import Decoder

    steps = []
    step = Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda self, *args: steps.append(1) or step(self, *args))
    pieces = model.generate("the cat", stream=True, bias={2: -math.inf})
    next(pieces)
    pieces.close()
    assert len(steps) < 10
    assert list(pieces) == []


def test_errors_of_a_stream_come_before_it_begins(model):
    with pytest.raises(UsageError, match="is empty"):
        model.generate("", stream=True)


# --- where texts end


def test_a_stop_string_across_tokens_is_no_part_of_the_text(model):
    whole = model.generate("the cat", max_new_tokens=30)
    stop = whole.text[5:8]
    found = model.generate("the cat", max_new_tokens=30, stop=stop)
    assert found.text == whole.text[: whole.text.index(stop)]
    assert found.finish == "stop"
    assert found.tokens == whole.tokens[: len(found.tokens)]
    shown = "".join(
        piece.text for piece in model.generate("the cat", max_new_tokens=30, stop=["\0\0", stop], stream=True)
    )
    assert shown == found.text


def test_a_stop_string_that_never_comes_changes_nothing(model):
    wanted = model.generate("the cat", max_new_tokens=20)
    assert model.generate("the cat", max_new_tokens=20, stop=["\0\0\0", wanted.text[-1] + "\0"]) == wanted


def test_time_ends_all_texts_with_what_was_written(model, prompts, monkeypatch):
    from runtimes.generate.decoder import Decoder

    step = Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda self, *args: time.sleep(0.05) or step(self, *args))
    found = model.generate(prompts, seconds=0.3, bias={2: -math.inf})
    assert {one.finish for one in found} == {"time"}
    assert all(0 < len(one.tokens) < 50 for one in found)


def test_cancelling_from_another_thread(model, prompts, monkeypatch):
    from runtimes.generate.decoder import Decoder

    step = Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda self, *args: time.sleep(0.05) or step(self, *args))
    cancel = threading.Event()
    threading.Timer(0.2, cancel.set).start()
    found = model.generate(prompts[:2], cancel=cancel, bias={2: -math.inf})
    assert {one.finish for one in found} == {"cancelled"}
    again = model.generate(prompts[:2], cancel=cancel)
    assert [(one.text, one.tokens, one.finish) for one in again] == [("", (), "cancelled")] * 2


def test_rows_that_wait_are_cancelled_too(model, prompts, monkeypatch):
    monkeypatch.setattr(module, "MAX_ROWS", 1)
    cancel = threading.Event()
    results = {}
    for piece in model.generate(prompts, cancel=cancel, stream=True, max_new_tokens=4):
        cancel.set()
        if piece.result is not None:
            results[piece.prompt] = piece.result.finish
    assert set(results) == set(range(5))
    assert set(results.values()) == {"cancelled"}


# --- a conversation's cache


def test_a_cache_saves_reading_and_changes_nothing(model):
    cache = model.new_cache()
    prompt = ids(20, 1)
    first = model.generate(prompt, max_new_tokens=10, cache=cache)
    assert cache.reused == 0
    assert first.tokens == model.generate(prompt, max_new_tokens=10).tokens
    longer = [*prompt, *first.tokens, *ids(7, 2)]
    second = model.generate(longer, max_new_tokens=40, cache=cache)
    assert cache.reused == 29
    assert second.tokens == model.generate(longer, max_new_tokens=40).tokens
    other = [*prompt[:5], 7, 7]
    assert model.generate(other, max_new_tokens=5, cache=cache).tokens == model.generate(other, max_new_tokens=5).tokens
    assert cache.reused == 5
    assert model.generate(other, max_new_tokens=5, cache=cache).tokens == model.generate(other, max_new_tokens=5).tokens
    assert cache.reused == 6


def test_a_cache_survives_a_stream_that_was_closed(model):
    cache = model.new_cache()
    prompt = ids(20, 1)
    pieces = model.generate(prompt, cache=cache, stream=True, bias={2: -math.inf})
    next(pieces)
    pieces.close()
    assert cache.tokens[:20] == tuple(prompt)
    wanted = model.generate(prompt, max_new_tokens=10)
    assert model.generate(prompt, max_new_tokens=10, cache=cache) == wanted
    assert cache.reused == 19


def test_a_cache_of_another_model_is_not_believed(model, decoder_bundle):
    cache = model.new_cache()
    prompt = ids(20, 1)
    wanted = model.generate(prompt, max_new_tokens=5, cache=cache)
    with load(decoder_bundle.path, cache=False) as other:
        assert other.generate(prompt, max_new_tokens=5, cache=cache) == wanted
        assert cache.reused == 0


# --- perplexity


def test_perplexity_is_torchs(model, llama):
    import torch

    text = ids(150, 4)
    losses = []
    for start in range(0, 150, 64):
        window = torch.tensor([text[start : start + 64]])
        with torch.no_grad():
            logits = llama(window).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="none"))
    wanted = float(torch.cat(losses).double().mean())
    found = model.perplexity(text, window=64)
    assert found.tokens == 63 + 63 + 21
    # A mean of float32 losses of about 10.
    assert math.isclose(found.loss, wanted, rel_tol=1e-5)
    assert found.value == math.exp(found.loss)
    assert model.perplexity(text, window=10_000) == model.perplexity(text, window=128)


def test_perplexity_of_texts_is_over_all_their_tokens(model):
    one, two = model.perplexity("the cat"), model.perplexity(["a dog ran"])
    both = model.perplexity(iter(["the cat", "a dog ran"]))
    assert both.tokens == one.tokens + two.tokens
    assert math.isclose(both.loss * both.tokens, one.loss * one.tokens + two.loss * two.tokens)


@pytest.mark.parametrize("texts", [[], "", [[]], [5]])
def test_nothing_to_predict(model, texts):
    with pytest.raises(UsageError):
        model.perplexity(texts)


def test_impossible_windows_and_ids(model):
    for window in (1, 0, -3, 2.5):
        with pytest.raises(UsageError, match="window is"):
            model.perplexity("the cat", window=window)
    with pytest.raises(UsageError, match="token id 300"):
        model.perplexity([5, 300])


# --- bad input


@pytest.mark.parametrize(("prompt", "match"), [
    ("", "the prompt is empty"),
    (["a", ""], "prompt 1 is empty"),
    ([["a"]], "list of texts"),
    (3, "a prompt is int"),
    (None, "a prompt is NoneType"),
    (b"a", "a prompt is bytes"),
    ({"role": "user"}, "a prompt is dict"),
    ([5, "a"], "something else than messages or token ids"),
    ([300], "token id 300"),
    ([-1], "token id -1"),
    ([True], "something else|list"),
    ("the cat " * 200, r"the prompt has \d+ tokens; the model takes 128, the answer included"),
    (["a", "the cat " * 200], r"prompt 1 has \d+ tokens; the model takes 128"),
])  # fmt: skip
def test_prompts_that_cannot_be(model, prompt, match):
    with pytest.raises(UsageError, match=match) as raised:
        model.generate(prompt)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("options", "match"), [
    ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
    ({"n": 0}, "n is 0"),
    ({"n": 2}, "all texts are the same"),
    ({"n": 2, "sample": True, "temperature": 0}, "temperature of 0"),
    ({"temperature": -1}, "temperature is -1"),
    ({"top_p": 2}, "top_p is 2"),
    ({"beams": 0}, "beams is 0"),
    ({"beams": 2, "temperature": 0.5}, "beam search draws nothing"),
    ({"beams": 2, "stream": True}, "cannot stream"),
    ({"beams": 2, "stop": "a"}, "beam search has no stop"),
    ({"beams": 2, "logprobs": 1}, "beam search has no logprobs"),
    ({"beams": 2, "n": 3}, "n is 3, and there are 2 beams"),
    ({"beams": 2, "length_penalty": math.nan}, "length_penalty is nan"),
    ({"logprobs": -1}, "logprobs is -1"),
    ({"logprobs": 101}, "logprobs is 101"),
    ({"seconds": 0}, "seconds is 0"),
    ({"seconds": math.nan}, "seconds is nan"),
    ({"stop": [""]}, "stop holds ''"),
    ({"stop_ids": [300]}, "stop_ids holds 300"),
    ({"bias": {300: 1.0}}, "token 300"),
    ({"bias": {7: 1e39}}, r"the bias of token 7 is 1e\+39"),
    ({"bias": {7: -(10**400)}}, "the bias of token 7 is -1000"),
    ({"bias": {7: math.nan}}, "the bias of token 7 is nan"),
    ({"seed": -1}, "seed is -1"),
    ({"warmth": 1}, "no option 'warmth'"),
])  # fmt: skip
def test_options_that_make_no_sense(model, options, match):
    with pytest.raises(UsageError, match=match) as raised:
        model.generate("the cat", **options)
    assert "\n" not in str(raised.value)


def test_a_cache_is_for_one_text(model):
    with pytest.raises(UsageError, match="one prompt"):
        model.generate(["a", "b"], cache=model.new_cache())
    with pytest.raises(UsageError, match="n=1"):
        model.generate("a", n=2, temperature=1.0, cache=model.new_cache())


def test_a_cache_that_does_not_fit_is_told_before_it_is_made(model, monkeypatch):
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", type("Memory", (), {"available": 10_000}))
    with pytest.raises(UsageError, match=r"KV cache of 102 tokens for 1 text takes .* GB") as raised:
        model.generate(ids(2), max_new_tokens=100)
    # 0.9 of the memory, over 2 layers of keys and values of 2 heads of 8 float32.
    assert f"At most {9_000 // 256} tokens fit" in raised.value.remedy


def test_no_prompts_no_texts(model):
    assert model.generate([]) == []
    assert list(model.generate([], stream=True)) == []
    assert model.generate([], beams=2) == []


def test_a_closed_model_says_so(decoder_bundle):
    loaded = load(decoder_bundle.path, cache=False)
    loaded.close()
    with pytest.raises(UsageError, match="closed"):
        loaded.generate("the cat")
    with pytest.raises(UsageError, match="closed"):
        loaded.perplexity("the cat")


def test_other_methods_name_the_right_one(model):
    with pytest.raises(UsageError, match=r"Use \.generate\(prompt\)"):
        model.embed(["a"])


@pytest.fixture(scope="module")
def embedder_bundle(tmp_path_factory):
    return task_graphs.write_bundle(
        tmp_path_factory.mktemp("embedder") / "bundle", "feature-extraction", task_graphs.embedder()
    )


def test_other_tasks_do_not_generate(embedder_bundle):
    with load(embedder_bundle.path, cache=False) as embedder:
        with pytest.raises(UsageError, match=r"no \.generate\(\)"):
            embedder.generate("a")
        with pytest.raises(UsageError, match=r"no \.perplexity\(\)"):
            embedder.perplexity("a")


def test_a_manifest_without_generation_is_told(embedder_bundle, model):
    from artifacts.errors import BundleError

    assert TASKS["text-generation"] is Generator
    with pytest.raises(BundleError, match="does not say how to generate"):
        Generator(embedder_bundle, model._pool)


# --- hasten run


def test_rows_of_records(model):
    records = [
        "the cat",
        {"text": "a dog", "max_new_tokens": 3},
        {"prompt": "the cat", "max_new_tokens": 3, "id": 7},
        {"messages": [{"role": "user", "content": "hello"}], "max_new_tokens": 4},
        {"prompt": "the cat", "temperature": 1.0, "seed": 1, "n": 2, "max_new_tokens": 3},
    ]
    rows = list(run_records(model, enumerate(records, 1)))
    assert rows[0]["text"] == model.generate("the cat").text
    assert rows[1]["tokens"] == 3
    assert rows[2]["id"] == 7
    assert rows[3]["text"] == model.generate(records[3]["messages"], max_new_tokens=4).text
    assert len(rows[4]["texts"]) == 2
    assert rows == list(run_records(model, enumerate(records, 1), max_tokens=1))
    json.dumps(rows)


@pytest.mark.parametrize(("record", "match"), [
    ({}, "line 3: a record has no prompt; it has nothing"),
    ({"txt": "a"}, "it has txt"),
    ({"prompt": ""}, 'line 3: field "prompt" is no prompt'),
    ({"prompt": ["a", "b"]}, 'field "prompt" is no prompt'),
    ({"prompt": 5}, 'field "prompt" is no prompt'),
    ({"messages": "a"}, 'field "messages" is no prompt'),
    ({"messages": []}, 'field "messages" is no prompt'),
    ({"prompt": "a", "temperature": "hot"}, "line 3: temperature is hot"),
    ({"prompt": "a", "stop": 3}, "line 3: stop is int"),
    ({"prompt": "a", "n": 3}, "line 3: n is 3"),
])  # fmt: skip
def test_records_that_cannot_be(model, record, match):
    with pytest.raises(DataError, match=match):
        list(run_records(model, [(3, record)]))


# --- threads


def test_several_threads_at_once(model, prompts):
    wanted = [model.generate(prompt, max_new_tokens=15) for prompt in prompts]
    found: dict[int, Generated] = {}

    def work(index):
        found[index] = model.generate(prompts[index], max_new_tokens=15)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[index] for index in range(5)] == wanted


# --- trained models


@pytest.mark.parametrize(("name", "prompt"), [
    ("stories260k", "Once upon a time"),
    pytest.param("pystories_lm", "def main(", marks=pytest.mark.slow),
])  # fmt: skip
def test_trained_models_write_as_in_torch(name, prompt, tmp_path):
    folder = SHARED / "models" / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; HASTEN_SHARED names another place")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    llama = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    read = tokenizer(prompt).input_ids
    told = {"attention_mask": torch.ones(1, len(read), dtype=torch.int64), "pad_token_id": 0}
    written = llama.generate(torch.tensor([read]), max_new_tokens=30, do_sample=False, **told)[0]
    with load(real_decoder(tmp_path / "bundle", folder).path, cache=False) as model:
        found = model.generate(prompt, max_new_tokens=30)
        assert list(found.tokens) == [one for one in written[len(read) :].tolist() if one not in model.generation.eos]
        assert prompt + found.text == tokenizer.decode(written, skip_special_tokens=True)
        again = torch.tensor([model.encoder.encode(prompt + found.text)])
        with torch.no_grad():
            wanted = float(llama(again, labels=again).loss)
        # A mean of float32 losses of about 2.
        assert math.isclose(model.perplexity(prompt + found.text).loss, wanted, rel_tol=1e-4)
