"""What the tests of the core share: one encoder, judged once, and a few bundles compiled once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import judging
import pytest
import tiny_models

from artifacts.bundle import Bundle
from compiler.compile import compile_model


@pytest.fixture(scope="session", autouse=True)
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test writes into the user's cache, or reads from it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HASTEN_CACHE_DIR", str(tmp_path_factory.mktemp("session-cache")))
        yield


@pytest.fixture(scope="session")
def encoder_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT-shaped sentence encoder as an .onnx file, its tokenizer beside it: texts without torch."""
    return judging.write_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def judged(encoder_file: Path, tmp_path_factory: pytest.TempPathFactory) -> judging.Judged:
    return judging.judge_source(encoder_file, tmp_path_factory.mktemp("judged"))


@pytest.fixture(scope="session")
def encoder_bundle(encoder_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Compiled for cpu and cuda with every change said to be faster: what is kept does not depend on this machine."""
    with judging.faster():
        return compile_model(
            encoder_file,
            tmp_path_factory.mktemp("bundles") / "encoder",
            task="feature-extraction",
            targets=("cpu", "cuda"),
            unproven=True,
            keep_reference=True,
        )


@pytest.fixture(scope="session")
def sentence_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write_sentence_model(tmp_path_factory.mktemp("sentences") / "tiny")


@pytest.fixture(scope="session")
def tiny_bundle(sentence_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A tiny BERT from torch to int8, with every change said to be faster."""
    with judging.faster():
        return compile_model(sentence_folder, tmp_path_factory.mktemp("bundles") / "tiny")
