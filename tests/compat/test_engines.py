"""The drop-ins over an engine: the same results as over a loaded model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import serving
import task_graphs
from task_builders import processor

import hasten
from hasten.compat import HastenEmbeddings, SentenceTransformer, pipeline

TEXTS = ["the cat eats fish", "", "john lives in london", "the cat eats fish", "mary ! and a [MASK] in paris"]
GRAPHS: dict[str, Callable[[], task_graphs.Graph]] = {
    "feature-extraction": lambda: task_graphs.embedder("last_hidden_state"),
    "text-classification": task_graphs.classifier,
    "token-classification": task_graphs.token_head,
    "question-answering": task_graphs.spans,
    "fill-mask": lambda: task_graphs.token_head(45),
}
CALLS: dict[str, Any] = {
    "feature-extraction": TEXTS,
    "text-classification": TEXTS,
    "token-classification": TEXTS,
    "question-answering": [{"question": "where ?", "context": text} for text in TEXTS],
    "fill-mask": TEXTS[4:],
}


def same(found: Any, wanted: Any) -> None:
    """Equal but for rounding: an engine batches and threads as it likes."""
    if isinstance(wanted, dict):
        assert list(found) == list(wanted)
        for name, value in wanted.items():
            same(found[name], value)
    elif isinstance(wanted, list):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            same(one, other)
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, abs=1e-5)
    else:
        assert found == wanted


@pytest.mark.parametrize("task", list(GRAPHS))
def test_pipelines(tmp_path: Path, task: str) -> None:
    mask = "[MASK]" if task == "fill-mask" else ""
    text = processor(labels=task_graphs.LABELS.get(task, ()), mask_token=mask)
    bundle = task_graphs.write_bundle(tmp_path / "bundle", task, GRAPHS[task](), text=text)
    with pipeline(task, model=bundle.path, device="cpu") as alone:
        wanted = alone(CALLS[task])
    with hasten.serve_engine(bundle.path, workers=1) as engine:
        over = pipeline(task, model=engine)
        same(over(CALLS[task]), wanted)
        over.close()
        # The engine is the caller's.
        assert engine.ready


def test_sentences_and_langchain(tmp_path: Path) -> None:
    bundle = serving.write_encoder(tmp_path / "bundle")
    with hasten.load(bundle.path, device="cpu") as loaded:
        wanted = loaded.embed(TEXTS)
    with hasten.serve_engine(bundle.path, workers=1) as engine:
        np.testing.assert_allclose(SentenceTransformer(engine).encode(TEXTS), wanted, atol=1e-6)
        np.testing.assert_allclose(HastenEmbeddings(engine).embed_documents(TEXTS), wanted, atol=1e-6)

    async def wait() -> None:
        async with hasten.serve_engine(bundle.path, workers=1) as engine:
            embeddings = HastenEmbeddings(engine)
            np.testing.assert_allclose(await embeddings.aembed_documents(TEXTS), wanted, atol=1e-6)
            np.testing.assert_allclose(await embeddings.aembed_query(TEXTS[0]), wanted[0], atol=1e-6)

    asyncio.run(wait())


def test_writing(tmp_path: Path) -> None:
    bundle = serving.write_decoder(tmp_path / "decoder")
    asked = {"max_new_tokens": 8, "do_sample": False}
    chat = [{"role": "user", "content": "hello"}]
    with pipeline("text-generation", model=bundle.path, device="cpu") as alone:
        wanted = [alone("the cat", **asked), alone(["a", "b"], **asked), alone(chat, **asked)]
    with hasten.serve_engine(bundle.path, workers=1) as engine:
        over = pipeline("text-generation", model=engine)
        assert [over("the cat", **asked), over(["a", "b"], **asked), over(chat, **asked)] == wanted
