"""A tiny random language model, its bundle, and the same loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from decoder_graphs import byte_level, tiny_llama, write_decoder

from artifacts.bundle import Bundle
from runtimes.load import load
from runtimes.tasks import Generator


@pytest.fixture(scope="session")
def llama() -> Any:
    return tiny_llama()


@pytest.fixture(scope="session")
def decoder_bundle(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("decoder")
    return write_decoder(folder / "bundle", llama, byte_level(folder / "tokenizer.json"))


@pytest.fixture(scope="session")
def model(decoder_bundle: Bundle) -> Iterator[Generator]:
    with load(decoder_bundle.path, cache=False) as loaded:
        assert isinstance(loaded, Generator)
        yield loaded
