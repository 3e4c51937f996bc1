"""Engines over real bundles, in worker processes of their own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import task_graphs
from decoder_graphs import byte_level, tiny_llama, write_decoder
from onnx import helper

from artifacts.bundle import Bundle
from runtimes.engine.calls import EngineOptions
from runtimes.engine.engine import Engine

SECONDS = 60.0


@pytest.fixture(scope="session")
def decoder_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("engine-decoder")
    return write_decoder(folder / "bundle", tiny_llama(), byte_level(folder / "tokenizer.json"))


@pytest.fixture(scope="session")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A sentence encoder that takes no time, in two variants."""
    folder = tmp_path_factory.mktemp("engine-sentences")
    return task_graphs.write_bundle(folder / "b", "feature-extraction", task_graphs.embedder(), variants=("one", "two"))


@pytest.fixture(scope="session")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same, with products that a text takes about half a millisecond for."""
    rng = np.random.default_rng(5)
    ballast = rng.normal(size=(2048, 2048)).astype(np.float32) / 64
    wide = rng.normal(size=(task_graphs.WIDTH, 2048)).astype(np.float32)
    plain = task_graphs.embedder()
    last = plain.model.graph.node.pop()
    weights = {"ballast": ballast, "wide": wide, "narrow": wide.T.copy()}
    nodes = [
        *plain.model.graph.node,
        helper.make_node("MatMul", ["pooled", "wide"], ["x0"]),
        *(helper.make_node("MatMul", [f"x{n}", "ballast"], [f"x{n + 1}"]) for n in range(8)),
        helper.make_node("MatMul", ["x8", "narrow"], [last.output[0]]),
    ]
    weights |= {one.name: onnx.numpy_helper.to_array(one) for one in plain.model.graph.initializer}

    def oracle(feeds: Any) -> Any:
        (pooled,) = plain.oracle(feeds).values()
        return {last.output[0]: pooled @ wide @ np.linalg.matrix_power(ballast, 8) @ wide.T}

    graph = task_graphs._graph(nodes, plain.outputs, weights, oracle)
    return task_graphs.write_bundle(tmp_path_factory.mktemp("engine-slow") / "b", "feature-extraction", graph)


@pytest.fixture
def serve() -> Callable[..., Any]:
    """``serve(bundle, work, **options)``: what ``work(engine)`` gives, in a loop of its own that must not hang."""

    def run(bundle: Bundle | Path, work: Callable[[Engine], Coroutine[Any, Any, Any]], **options: Any) -> Any:
        cache = options.pop("responses", None)
        path = bundle.path if isinstance(bundle, Bundle) else bundle

        async def inside() -> Any:
            async with Engine(path, options=EngineOptions(**{"workers": 1, **options}), cache=cache) as engine:
                return await work(engine)

        async def bounded() -> Any:
            return await asyncio.wait_for(inside(), SECONDS)

        return asyncio.run(bounded())

    return run
