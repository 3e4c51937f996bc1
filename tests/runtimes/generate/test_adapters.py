"""Texts with adapters: alone, beside texts with others and with none, in caches, and held to PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundle_builders import entry_of, reseal
from decoder_graphs import byte_level, tiny_llama, write_decoder
from lora_folders import with_lora, write_lora

from artifacts.errors import BundleError, ProviderError, UsageError
from compiler.adapters import add_adapter
from runtimes.generate.adapters import AdaptedSession
from runtimes.load import load
from runtimes.tasks import Generator

PROMPTS = ["the cat sat", "once upon a time there was", "grüße aus"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {"rank": 4, "seed": 1},
    "wide": {"rank": 7, "seed": 2, "use_rslora": True},
    "query": {"targets": ("q_proj", "v_proj"), "rank": 2, "seed": 3, "lora_alpha": 3},
}
NEW = 10


def write_adapted(folder: Path, model: Any) -> Path:
    """A bundle of the model with the adapters."""
    out = write_decoder(folder / "bundle", model, byte_level(folder / "tokenizer.json")).path
    for name, options in ADAPTERS.items():
        add_adapter(out, write_lora(folder / name, model, **options), name)
    return out


@pytest.fixture(scope="module")
def adapted(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapted(tmp_path_factory.mktemp("adapted"), llama)


@pytest.fixture(scope="module")
def styled(adapted: Path) -> Iterator[Generator]:
    with load(adapted, cache=False) as loaded:
        assert isinstance(loaded, Generator)
        yield loaded


@pytest.fixture(scope="module")
def expected(llama: Any, styled: Generator) -> Callable[[str, str], tuple[int, ...]]:
    """(adapter, prompt) -> the tokens that PEFT's torch model takes greedily."""
    import torch

    wrapped = {name: with_lora(llama, **options) for name, options in ADAPTERS.items()} | {"": llama}

    @cache
    def tokens(name: str, prompt: str) -> tuple[int, ...]:
        ids = styled.encoder.encode(prompt)
        with torch.inference_mode():
            found = wrapped[name].generate(
                input_ids=torch.tensor([list(ids)]), max_new_tokens=NEW, do_sample=False, pad_token_id=0
            )
        return tuple(token for token in found[0, len(ids) :].tolist() if token != 2)

    return tokens


def greedy(model: Generator, prompt: Any, **options: Any) -> Any:
    return model.generate(prompt, max_new_tokens=NEW, temperature=0, **options)


@pytest.mark.parametrize("name", ["", *ADAPTERS])
def test_greedy_texts_are_those_of_peft(styled: Generator, expected: Any, name: str):
    for prompt in PROMPTS:
        found = greedy(styled, prompt, adapter=name) if name else greedy(styled, prompt)
        assert found.tokens == expected(name, prompt), prompt
    assert len({expected(other, PROMPTS[0]) for other in ("", *ADAPTERS)}) == 1 + len(ADAPTERS)


def test_logits_are_those_of_peft(llama: Any, styled: Generator):
    """Within the rounding of float32: 2 layers of products of at most 48 numbers, 1e-6 each, some of it cancelled."""
    import torch

    ids = list(styled.encoder.encode(PROMPTS[1]))
    for name, options in ADAPTERS.items():
        greedy(styled, "x", adapter=name)
        decoder = styled.decoder(1, 64)
        found = decoder.read(0, [ids], 0, [name])[0]
        with torch.inference_mode():
            wanted = with_lora(llama, **options)(input_ids=torch.tensor([ids])).logits[0, -1].numpy()
        plain = styled.decoder(1, 64).read(0, [ids], 0)[0]
        scale = np.linalg.norm(wanted)
        assert np.linalg.norm(found - wanted) < 1e-5 * scale
        assert np.linalg.norm(plain - wanted) > 0.05 * scale


def test_texts_of_one_batch_have_adapters_of_their_own(styled: Generator, expected: Any):
    """Ranks differ, one adapter leaves most products alone, and some texts have none."""
    loop = styled.loop(5, 64)
    asked = [(name, prompt) for prompt in PROMPTS for name in ("", *ADAPTERS)]
    for number, (name, prompt) in enumerate(asked):
        options = {"adapter": name} if name else {}
        (request,) = styled.requests(prompt, first=number, max_new_tokens=NEW, temperature=0, **options)
        loop.add(request)
    found = {piece.prompt: piece.result for piece in loop.run([]) if piece.result is not None}
    for number, (name, prompt) in enumerate(asked):
        assert found[number].tokens == expected(name, prompt), (name, prompt)


def test_prefixes_are_those_of_an_adapter(styled: Generator, expected: Any):
    prompt = "the cat sat on the mat and " * 4
    loop = styled.loop(2, 128, prefix_bytes=1 << 20)
    for number, name in enumerate(("all", "", "all", "query", "")):
        options = {"adapter": name} if name else {}
        requests = styled.requests(prompt, first=number, max_new_tokens=NEW, temperature=0, **options)
        found = [piece.result for piece in loop.run(requests) if piece.result is not None]
        assert found[0].tokens == expected(name, prompt), number
    assert loop.stats.hits == 2


def test_a_conversation_forgets_what_another_adapter_read(styled: Generator, expected: Any):
    cache = styled.new_cache()
    for name in ("all", "", "query", "query"):
        options = {"adapter": name} if name else {}
        assert greedy(styled, PROMPTS[1], cache=cache, **options).tokens == expected(name, PROMPTS[1])
    assert cache.reused > 0


def test_beams(styled: Generator, llama: Any):
    import torch

    found = greedy(styled, PROMPTS[0], beams=3, adapter="all")
    ids = torch.tensor([list(styled.encoder.encode(PROMPTS[0]))])
    with torch.inference_mode():
        wanted = with_lora(llama, **ADAPTERS["all"]).generate(
            input_ids=ids, max_new_tokens=NEW, num_beams=3, do_sample=False, pad_token_id=0, early_stopping=False
        )
    assert found.tokens == tuple(token for token in wanted[0, ids.shape[1] :].tolist() if token != 2)


def test_texts_that_are_guessed_ahead(styled: Generator, expected: Any):
    prompt = "the cat sat on the mat and the cat sat on the mat and the cat sat"
    for name in ("", "all"):
        options = {"adapter": name} if name else {}
        assert greedy(styled, prompt, speculate=True, **options).tokens == expected(name, prompt)


def test_a_record_names_its_adapter(styled: Generator):
    told = {"prompt": PROMPTS[0], "max_new_tokens": NEW, "temperature": 0}
    rows = styled.rows([{**told, "adapter": name} for name in (None, "all")])
    texts = [greedy(styled, PROMPTS[0]).text, greedy(styled, PROMPTS[0], adapter="all").text]
    assert [row["text"] for row in rows] == texts
    assert texts[0] != texts[1]


def test_copies_of_few_sets_are_kept(styled: Generator):
    """Bound calls and stacks hold copies of the adapters of a set: those of sets that went are let go of."""
    adapted = styled._opened().adapted()
    decoder = styled.decoder(3, 32)
    sets = [("all", "wide", ""), ("all", "query", "wide"), ("query", "wide", ""), ("all", "", ""), ("wide", "all", "")]
    for names in sets:
        decoder.step([5, 6, 7], [0, 0, 0], names)
    assert [len(names) for names in adapted._weights._stacks].count(2) <= 2
    assert [key[2] for key in decoder._bindings] == [sets[3], sets[4]]
    found = decoder.step([5, 6, 7], [0, 0, 0], sets[4])[0].copy()
    alone = styled.decoder(1, 32).step([5], [0], ["wide"])[0]
    np.testing.assert_allclose(found, alone, atol=1e-4 * float(np.abs(alone).max()))


def test_unknown_adapters_are_refused_with_those_that_there_are(styled: Generator, model: Generator):
    with pytest.raises(UsageError, match=r"no adapter 'other'. It has all, query, wide"):
        greedy(styled, "x", adapter="other")
    with pytest.raises(UsageError, match="no adapter 7"):
        greedy(styled, "x", adapter=7)
    with pytest.raises(UsageError, match=r"no adapter 'all'. Add one with"):
        greedy(model, "x", adapter="all")
    decoder = model.decoder(1, 32)
    decoder._adapt = None
    with pytest.raises(UsageError, match="takes no adapters"):
        decoder.step([1], [0], ["all"])


def test_the_graph_that_takes_adapters_is_loaded_when_one_is_asked_for(adapted: Path):
    with load(adapted, cache=False) as model:
        assert isinstance(model, Generator)
        before = greedy(model, PROMPTS[0])
        assert not isinstance(model._opened().session, AdaptedSession)
        old = model.decoder(1, 32)
        greedy(model, PROMPTS[0], adapter="all")
        assert isinstance(model._opened().session, AdaptedSession)
        assert greedy(model, PROMPTS[0]) == before
        assert old.read(0, [[5, 6]], 0).shape == (1, 300)
        outputs = model.run(_golden(adapted))
        assert outputs["logits"].shape[0] == 2


def _golden(path: Path) -> dict[str, Any]:
    with np.load(path / "golden.npz") as arrays:
        return {name.removeprefix("input."): arrays[name] for name in arrays if name.startswith("input.")}


def test_numbers_that_are_not_finite_are_refused_before_anything_is_written(llama: Any, tmp_path: Path):
    out = write_decoder(tmp_path / "bundle", llama, byte_level(tmp_path / "tokenizer.json")).path
    add_adapter(out, write_lora(tmp_path / "lora", llama), "all")
    numbers = np.fromfile(out / "adapters/all.bin", "<f4")
    numbers[3] = np.nan
    (out / "adapters/all.bin").unlink()
    numbers.tofile(out / "adapters/all.bin")
    document = json.loads((out / "manifest.json").read_bytes())
    files = [entry for entry in document["files"] if entry["path"] != "adapters/all.bin"]
    document["files"] = sorted([*files, entry_of(out, "adapters/all.bin")], key=lambda entry: entry["path"])
    (out / "manifest.json").write_text(json.dumps(document))
    reseal(out)
    with load(out, cache=False) as model:
        assert isinstance(model, Generator)
        assert greedy(model, PROMPTS[0]).tokens
        with pytest.raises(BundleError, match="not finite"):
            greedy(model, PROMPTS[0], adapter="all")
        assert greedy(model, PROMPTS[0]).tokens


def test_a_graph_that_computes_something_else_is_refused(llama: Any, tmp_path: Path):
    """The golden test, without an adapter, holds the graph that takes adapters too."""
    tokenizer = byte_level(tmp_path / "tokenizer.json")
    out = write_decoder(tmp_path / "bundle", llama, tokenizer).path
    add_adapter(out, write_lora(tmp_path / "lora", llama), "all")
    other = write_decoder(tmp_path / "other", tiny_llama(9), tokenizer).path
    add_adapter(other, tmp_path / "lora", "all", any_base=True)
    (out / "cpu-fp32.adapters.onnx").unlink()
    (other / "cpu-fp32.adapters.onnx").rename(out / "cpu-fp32.adapters.onnx")
    document = json.loads((out / "manifest.json").read_bytes())
    document["files"] = [entry_of(out, entry["path"]) for entry in document["files"]]
    (out / "manifest.json").write_text(json.dumps(document))
    reseal(out)
    with load(out, cache=False) as model, pytest.raises(ProviderError, match="with adapters computes wrong results"):
        model.generate("x", adapter="all")
