"""prompt-int8 on a whole decoder: steps as before bit by bit, one cache for both forms, pieces and company, torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from decoder_graphs import llama_graph, llama_specs, tiny_llama
from numpy.typing import NDArray

from artifacts.manifest import SessionOptions
from artifacts.target import CPU, CPU_PROVIDER
from compiler.adapters.graph import adapt, modules_of
from compiler.graphs import GraphFolder
from compiler.integer_kernels import integer_kernel_note, quantized_products
from passes.base import Context
from passes.quantize.prompt_int8 import PromptInt8
from passes.quantize.weight_only import WeightOnly
from runtimes.client import Worker
from runtimes.generate.bandwidth import weight_bytes
from runtimes.generate.cache import layout_of
from runtimes.generate.decoder import Decoder, piece_end
from runtimes.generate.feeds import step_feeds
from runtimes.session import Session

HERE = Context(CPU)
LAYERS, PRODUCTS = 2, 7
LENGTHS = (40, 9, 23, 60, 5, 31, 2)
CAPACITY = 96


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_llama(layers=LAYERS)


@pytest.fixture(scope="module")
def graphs(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """In 8 bits, with and without a form for prompts, as a compile saves them."""
    folder, found = GraphFolder(tmp_path_factory.mktemp("graphs")), {}
    model = ir.serde.deserialize_model(llama_graph(llama))
    assert WeightOnly(8, 32).run(model, HERE).changed == LAYERS * PRODUCTS + 1
    found["steps"] = folder.save(model.clone()).path
    assert PromptInt8().run(model, HERE).changed == LAYERS * PRODUCTS
    assert PromptInt8().run(model, HERE).changed == 0
    found["both"] = folder.save(model).path
    return found


@pytest.fixture(scope="module")
def sessions(graphs: dict[str, Path]) -> dict[str, Session]:
    return {name: Session(path, CPU_PROVIDER, options=SessionOptions(), threads=1) for name, path in graphs.items()}


def decoder(session: Session, llama: Any, rows: int = 1) -> Decoder:
    inputs, _ = llama_specs(llama.config)
    return Decoder(session, layout_of(inputs), llama.config.vocab_size, rows=rows, capacity=CAPACITY)


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(5, 300, length).tolist() for length in LENGTHS]


def reference(llama: Any, ids: list[int]) -> NDArray[np.float32]:
    import torch

    with torch.no_grad():
        found: NDArray[np.float32] = llama(torch.tensor([ids])).logits[0, -1].numpy()
    return found


def test_a_ragged_batch_reads_as_torch_does_and_goes_on(sessions: dict[str, Session], llama: Any) -> None:
    """An activation is off by at most 1/254 of the largest of its row, a weight by as much of its column: with 32 of
    either and uniform errors, 1/254 * 2.2 / sqrt(3) * sqrt(2) = 0.7 % of a product; 15 of them, one behind another."""
    rows, found = prompts(), decoder(sessions["both"], llama, len(LENGTHS))
    logits = found.read(0, rows, 0)
    for _ in range(3):
        wanted = np.stack([reference(llama, row) for row in rows])
        assert np.linalg.norm(logits - wanted) / np.linalg.norm(wanted) < 0.007 * 15
        tokens, lengths = logits.argmax(-1).tolist(), [len(row) for row in rows]
        rows = [[*row, token] for row, token in zip(rows, tokens, strict=True)]
        logits = found.step(tokens, lengths).copy()


def test_a_step_is_as_before_bit_by_bit(sessions: dict[str, Session], llama: Any) -> None:
    """Both graphs on the cache that one of them wrote."""
    plain, both = (decoder(sessions[name], llama, 3) for name in ("steps", "both"))
    lengths = list(LENGTHS[:3])
    both.read(0, prompts()[:3], 0)
    written = both.cache.views(0, 3)[0]
    for name, array in plain.cache.views(0, 3)[0].items():
        array[...] = written[name]
    for _ in range(4):
        np.testing.assert_array_equal(both.step([7, 8, 9], lengths), plain.step([7, 8, 9], lengths))
        lengths = [length + 1 for length in lengths]
    for name, array in plain.cache.views(0, 3)[0].items():
        np.testing.assert_array_equal(array, written[name])


def test_prompts_are_in_int8_and_steps_are_not(sessions: dict[str, Session], llama: Any) -> None:
    prompt = prompts()[0]
    read = [decoder(sessions[name], llama).read(0, [prompt], 0)[0] for name in ("steps", "both")]
    assert 1e-4 < np.linalg.norm(read[0] - read[1]) / np.linalg.norm(read[0]) < 0.1
    alone = [decoder(sessions[name], llama).read(0, [prompt[:1]], 0)[0] for name in ("steps", "both")]
    np.testing.assert_array_equal(*alone)


@pytest.mark.parametrize("piece", [3, 7, 32])
def test_neither_company_nor_pieces_matter_bit_by_bit(sessions: dict[str, Session], llama: Any, piece: int) -> None:
    rows = prompts()
    together = decoder(sessions["both"], llama, len(rows)).read(0, rows, 0)
    for row, wanted in zip(rows, together, strict=True):
        one, start = decoder(sessions["both"], llama), 0
        while start < len(row):
            end = piece_end(start, piece, len(row))
            found = one.read(0, [row[start:end]], start)[0]
            start = end
        np.testing.assert_array_equal(found, wanted)


def test_a_step_reads_the_weights_of_its_own_form_only(graphs: dict[str, Path]) -> None:
    # And the index and the number of tokens that Greater compares with.
    assert weight_bytes(graphs["both"]) == weight_bytes(graphs["steps"]) + 8


def test_a_product_of_two_forms_counts_once(graphs: dict[str, Path]) -> None:
    model, prompt = ir.load(graphs["both"]), prompts()[0]
    assert quantized_products(model) == LAYERS * PRODUCTS + 1
    feeds: dict[str, Any] = {**step_feeds([prompt], 0, np.array([[39]]))}
    for value in model.graph.inputs[len(feeds) :]:
        feeds[str(value.name)] = np.zeros((1, value.shape[1], 40, value.shape[3]), np.float32)
    with Worker(graphs["both"], CPU_PROVIDER, options=SessionOptions()) as worker:
        assert integer_kernel_note(model, worker, feeds) == "15 of 15 quantized products ran in integer kernels"


def test_products_of_two_forms_take_adapters_as_others_do(graphs: dict[str, Path]) -> None:
    models = [ir.load(graphs[name]) for name in ("steps", "both")]
    found = [modules_of(model) for model in models]
    assert found[0] == found[1]
    assert len(found[0]) >= LAYERS * PRODUCTS
    modules = [path for path in found[0] if path.endswith(("q_proj", "down_proj"))]
    assert adapt(models[0], modules) == adapt(models[1], modules)
    assert len(models[1].graph.inputs) == len(ir.load(graphs["both"]).graph.inputs) + 3 * len(modules)
