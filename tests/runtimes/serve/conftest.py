from __future__ import annotations

from collections.abc import Iterator

import pytest
import serving
from task_builders import VOCABULARY
from task_graphs import embedder, spans, token_head, write_bundle


@pytest.fixture(scope="session")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Iterator[serving.Server]:
    """A server with a model of each task: sentences, sentiment, places, mask, answers, plain and stories."""
    folder = tmp_path_factory.mktemp("everything")
    serving.write_encoder(folder / "sentences")
    serving.write_classifier(folder / "sentiment")
    write_bundle(folder / "places", "token-classification", token_head())
    write_bundle(folder / "mask", "fill-mask", token_head(len(VOCABULARY)))
    write_bundle(folder / "answers", "question-answering", spans())
    write_bundle(folder / "plain", "tensors", embedder())
    stories = serving.write_decoder(folder / "decoder").path
    names = ("sentences", "sentiment", "places", "mask", "answers", "plain")
    words = [word for name in names for word in ("--name", f"{name}={folder / name}")]
    with serving.serving("--name", f"stories={stories}", *words, "--workers", "1", "--watch", "0") as server:
        yield server
