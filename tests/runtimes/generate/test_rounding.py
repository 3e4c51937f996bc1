"""What company does to the numbers of a text: nothing with most kernels of the CPU provider, a last bit with some.

Logits of trained models with float32, int8 and int4 weights (accuracy_level 4, blocks of 32) are compared bit by bit.
Of larger blocks the kernels take rows in pairs, and round one that is left over otherwise. What changes logits, and by
how much, is stated here and in docs/generation.md.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from decoder_graphs import llama_graph, real_decoder
from shared_data import SHARED

from artifacts.bundle import Bundle, BundleWriter
from artifacts.proof import Proof
from artifacts.target import CPU
from passes.base import Context
from passes.quantize.prompt_int8 import PromptInt8
from passes.quantize.weight_only import WeightOnly
from runtimes.generate.decoder import Decoder
from runtimes.generate.loop import Pace
from runtimes.generate.speculate import Costs
from runtimes.load import load

MODELS = SHARED / "models"
INT4 = WeightOnly(bits=4, block_size=32)
PASSES = {
    "float32": (),
    "int8": (WeightOnly(bits=8, block_size=32),),
    "int4": (INT4,),
    "int4, prompts in int8": (INT4, PromptInt8()),
    "int4, prompts and many texts in int8": (INT4, PromptInt8(texts=6)),
    "int4 in float32": (WeightOnly(bits=4, block_size=32, accuracy_level=0),),
    "int4 in blocks of 128": (WeightOnly(bits=4, block_size=128),),
}
EXACT = ("float32", "int8", "int4", "int4, prompts in int8")
"""Company changes nothing, bit by bit."""
ALIKE = tuple(name for name in PASSES if "prompts" not in name)
"""Steps and prompts are computed in one form: prompts of a single token too, which the loop never reads in company."""
ROUNDED = dict.fromkeys(PASSES, 0.2) | {"float32": 1e-4, "int4 in float32": 1e-3}
"""Of a standard deviation of the logits: twice the most that was measured, which docs/generation.md tells, or more.
Where products round what they read to int8, a last bit becomes a 127th of the largest number of its block."""
LENGTHS = (40, 9, 23, 60, 1, 5, 31, 2)


def quantized(base: Bundle, out: Path, model: Any, methods: tuple[WeightOnly | PromptInt8, ...]) -> Bundle:
    graph = ir.serde.deserialize_model(llama_graph(model))
    assert all(method.run(graph, Context(CPU)).changed for method in methods)
    (variant,) = base.manifest.variants
    with BundleWriter(out) as writer:
        for entry in base.manifest.files:
            if entry.path != variant.model:
                writer.add_bytes(entry.path, (base.path / entry.path).read_bytes())
        writer.add_bytes(variant.model, ir.to_proto(graph).SerializeToString())
        manifest = replace(base.manifest, variants=(replace(variant, tolerance=1.0),), files=())
        return writer.commit(manifest, Proof("sha256:" + "0" * 64, (), ()))


@pytest.fixture(scope="module", params=PASSES)
def trained(request, tmp_path_factory):
    """(name of its weights, the model loaded)."""
    # The rows of its weights are longer than such a block.
    source = MODELS / ("pystories_lm" if request.param.endswith("128") else "stories260k")
    if not source.is_dir():
        pytest.skip(f"{source} is absent; HASTEN_SHARED names another place")
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("trained")
    bundle, methods = real_decoder(folder / "float32", source), PASSES[request.param]
    if methods:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        bundle = quantized(bundle, folder / "quantized", model, methods)
    with load(bundle.path, cache=False) as loaded:
        yield request.param, loaded


@pytest.fixture(scope="module")
def prompts(trained):
    rng = np.random.default_rng(0)
    return [rng.integers(5, trained[1].vocabulary, length).tolist() for length in LENGTHS]


def assert_same(name: str, found: Any, wanted: Any) -> None:
    if name in EXACT:
        np.testing.assert_array_equal(found, wanted)
    else:
        np.testing.assert_allclose(found, wanted, atol=ROUNDED[name] * np.std(wanted))


def filled(model: Any, prompts: list[list[int]]) -> Decoder:
    decoder = model.decoder(len(prompts), 128)
    for slot, prompt in enumerate(prompts):
        decoder.prefill(slot, [prompt])
    return decoder


@pytest.mark.parametrize("rows", [2, 3, 5, 8])
def test_a_step_of_many_rows_is_that_of_each_alone(trained, prompts, rows):
    name, model = trained
    found = filled(model, prompts[:rows]).step([7] * rows, LENGTHS[:rows])
    for prompt, logits in zip(prompts, found, strict=False):
        assert_same(name, logits, filled(model, [prompt]).step([7], [len(prompt)])[0])


def test_prompts_that_are_read_together_are_those_of_each_alone(trained, prompts):
    name, model = trained
    found = model.decoder(8, 128).read(0, prompts, 0)
    for prompt, logits in zip(prompts, found, strict=True):
        if len(prompt) > 1 or name in ALIKE:
            assert_same(name, logits, model.decoder(1, 128).read(0, [prompt], 0)[0])


@pytest.mark.parametrize("piece", [2, 3, 16, 32, 64, 256])
def test_the_pieces_of_a_prompt_do_not_matter(trained, piece):
    name, model = trained
    prompt = np.random.default_rng(1).integers(5, model.vocabulary, 192).tolist()
    wanted = model.decoder(1, 256).read(0, [prompt], 0)
    decoder = model.decoder(1, 256)
    for start in range(0, 192, piece):
        found = decoder.read(0, [prompt[start : start + piece]], start)
    assert_same(name, found, wanted)


def test_a_single_token_is_rounded_otherwise_than_several(trained, prompts):
    """Attention has a path of its own for it: an answer that is read again, in a prompt, moves its logits a little."""
    name, model = trained
    prompt = prompts[0]
    single = filled(model, [prompt]).step([7], [len(prompt)])[0]
    several = model.decoder(1, 128).read(0, [[*prompt, 7]], 0)[0]
    np.testing.assert_allclose(single, several, atol=ROUNDED[name] * np.std(several))


@pytest.mark.parametrize("trained", EXACT, indirect=True)
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}])
def test_texts_do_not_depend_on_company_pieces_or_prefixes(trained, options):
    """Twenty prompts, some of which begin alike, join at random; each is the text that it is alone."""
    _, model = trained
    rng = np.random.default_rng(5)
    shared = rng.integers(5, model.vocabulary, 70).tolist()
    prompts = [[*shared[: rng.choice([0, 70])], *rng.integers(5, 300, rng.integers(1, 40)).tolist()] for _ in range(20)]
    requests = model.requests(prompts, max_new_tokens=30, **options)
    loop = model.loop(5, 64, pace=Pace(pause=1e-9, share=1e-6), prefix_bytes=10**7)
    results = {}
    while requests or loop.busy:
        if requests and rng.random() < 0.3:
            loop.add(requests.pop(0))
        results |= {piece.prompt: piece.result for piece in loop.step() if piece.result is not None}
    assert loop.stats.hits > 3
    for number, prompt in enumerate(prompts):
        assert results[number] == model.generate(prompt, max_new_tokens=30, **options)


# --- where company or guesses do change something: how much, and what a text may make of it


def in_steps(model: Any, prompt: list[int], tokens: list[int]) -> Any:
    """Logits behind each of the tokens, written one by one; float32 [tokens, vocabulary]."""
    decoder = filled(model, [prompt])
    return np.stack([decoder.step([token], [len(prompt) + at])[0].copy() for at, token in enumerate(tokens)])


def margin(logits: Any) -> Any:
    """Of the likeliest token over the next one; float32 [...]."""
    second, first = np.moveaxis(np.partition(logits, -2)[..., -2:], -1, 0)
    return first - second


def assert_close(name: str, found: Any, wanted: Any) -> None:
    """Within the tolerance; so that the likeliest token is the same wherever its margin is more than twice that."""
    most = ROUNDED[name] * np.std(wanted)
    np.testing.assert_allclose(found, wanted, atol=most, rtol=0)
    clear = margin(wanted) > 2 * most
    assert clear.any()
    np.testing.assert_array_equal(found.argmax(-1)[clear], wanted.argmax(-1)[clear])


@pytest.fixture(scope="module")
def said(trained):
    """A prompt, and what the model writes behind it."""
    _, model = trained
    prompt = np.random.default_rng(2).integers(5, 300, 24).tolist()
    written = model.generate(prompt, max_new_tokens=64, sample=False, bias={1: -np.inf, 2: -np.inf})
    return prompt, list(written.tokens)


@pytest.mark.parametrize("width", [2, 3, 5, 9, 17])
def test_tokens_that_are_checked_at_once_are_those_of_single_steps(trained, said, width):
    name, model = trained
    prompt, tokens = said
    decoder = filled(model, [prompt])
    pieces = [(at, tokens[at : at + width]) for at in range(0, len(tokens), width)]
    found = [decoder.verify([piece], [len(prompt) + at])[0].copy() for at, piece in pieces]
    assert_close(name, np.concatenate(found), in_steps(model, prompt, tokens))


def test_a_text_in_the_company_of_seven_is_that_of_one_alone(trained, said, prompts):
    """Throughout the text: what was rounded otherwise is read again in every later step."""
    name, model = trained
    prompt, tokens = said
    decoder, found = filled(model, [prompt, *prompts[1:]]), []
    for at, token in enumerate(tokens):
        lengths = [len(prompt) + at, *(length + at for length in LENGTHS[1:])]
        found.append(decoder.step([token] * 8, lengths)[0].copy())
    wanted = in_steps(model, prompt, tokens)
    assert_close(name, np.stack(found), wanted)
    if name in EXACT:
        np.testing.assert_array_equal(np.stack(found), wanted)


@pytest.mark.parametrize("company", [True, False], ids=["company", "guesses"])
def test_texts_part_only_where_two_tokens_are_nearly_equally_likely(trained, prompts, company, monkeypatch):
    """Greedy ones: beside six others against alone, and with every guess checked against none."""
    name, model = trained
    # Whatever is guessed is checked.
    monkeypatch.setattr(Costs, "check", lambda *_: 1e-6)
    monkeypatch.setattr(Costs, "step", lambda *_: 1.0)
    options: dict[str, Any] = {"max_new_tokens": 48, "sample": False}
    several = [prompt for prompt in prompts if len(prompt) > 1]
    plain = [model.generate(prompt, **options) for prompt in several]
    if company:
        found = model.generate(several, **options)
    else:
        found = [model.generate(prompt, speculate=True, **options) for prompt in several]
        assert sum(one.accepted for one in found) > 0
    for prompt, one, wanted in zip(several, found, plain, strict=True):
        if one.tokens == wanted.tokens:
            continue
        assert not (company and name in EXACT)
        pairs = enumerate(zip(one.tokens, wanted.tokens, strict=False))
        parted = next((at for at, pair in pairs if pair[0] != pair[1]), min(len(one.tokens), len(wanted.tokens)))
        logits = in_steps(model, prompt[:-1], [prompt[-1], *wanted.tokens])[parted]
        assert margin(logits) <= 2 * ROUNDED[name] * np.std(logits)
