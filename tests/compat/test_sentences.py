"""`SentenceTransformer` and `HastenEmbeddings` over a bundle, against sentence-transformers and LangChain."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore
from real_command import environment

import hasten
from artifacts.bundle import Bundle
from artifacts.errors import InstallationError, UsageError
from hasten import compat
from hasten.compat import HastenEmbeddings, SentenceTransformer

TEXTS = [
    "a man is playing the guitar",
    "the dog is sleeping in the house",
    "a red ball",
    "",
    "a man is playing the guitar",
]


@pytest.fixture(scope="module")
def model(tiny_bundle: Bundle) -> Any:
    with SentenceTransformer(tiny_bundle.path, device="cpu") as opened:
        yield opened


@pytest.fixture(scope="module")
def peer(sentence_folder: Path) -> Any:
    from sentence_transformers import SentenceTransformer as Peer

    return Peer(str(sentence_folder), device="cpu")


SHAPES: list[dict[str, Any]] = [
    {},
    {"convert_to_tensor": True},
    {"convert_to_numpy": False},
    {"normalize_embeddings": True},
    {"truncate_dim": 7},
    {"truncate_dim": 7, "normalize_embeddings": True},
    {"prompt": "the "},
]


@pytest.mark.parametrize("options", SHAPES, ids=str)
@pytest.mark.parametrize("inputs", [TEXTS, TEXTS[0], TEXTS[:1], tuple(TEXTS)], ids=["several", "one", "list", "tuple"])
def test_encode_has_the_peers_forms(model: Any, peer: Any, inputs: Any, options: dict[str, Any]) -> None:
    found, wanted = (
        model.encode(inputs, **options),
        peer.encode(list(inputs) if isinstance(inputs, tuple) else inputs, **options),
    )
    assert type(found) is type(wanted)
    if isinstance(wanted, list):
        assert all(isinstance(one, torch.Tensor) for one in found)
        found, wanted = torch.stack(found), torch.stack(wanted)
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    # The bundle is int8: near, not equal; what the vectors are worth is tested where bundles are compiled.
    a, b = (np.asarray(one, np.float64).reshape(-1, wanted.shape[-1]) for one in (found, wanted))
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert cosines.min() > 0.9


def test_encode_is_embed(model: Any, tiny_bundle: Bundle) -> None:
    with hasten.load(tiny_bundle.path, device="cpu") as loaded:
        wanted = loaded.embed(TEXTS)
        np.testing.assert_array_equal(SentenceTransformer(loaded).encode(TEXTS), wanted)
        np.testing.assert_array_equal(SentenceTransformer(loaded).encode(text for text in TEXTS), wanted)
        np.testing.assert_array_equal(SentenceTransformer(loaded).encode(inputs=TEXTS), wanted)
        half = SentenceTransformer(loaded, truncate_dim=16)
        np.testing.assert_array_equal(half.encode(TEXTS), wanted[:, :16])
        assert half.get_sentence_embedding_dimension() == 16
    assert model.get_embedding_dimension() == 32
    assert model.max_seq_length == 64


def test_no_texts(model: Any) -> None:
    assert model.encode([]).shape == (0, 32)
    assert model.encode([], convert_to_tensor=True).shape == (0, 32)


def test_progress(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    found = model.encode(TEXTS * 3, batch_size=4, show_progress_bar=True)
    assert found.shape == (15, 32)
    told = capsys.readouterr()
    assert "Batches" in told.err
    assert told.out == ""


def test_prompts(tiny_bundle: Bundle) -> None:
    prompts = {"query": "who ", "passage": "the "}
    with hasten.load(tiny_bundle.path, device="cpu") as loaded:
        model = SentenceTransformer(loaded, prompts=prompts, default_prompt_name="passage")
        text = "playing the guitar"

        def embedded(one: str) -> Any:
            return loaded.embed([one])[0]

        np.testing.assert_array_equal(model.encode(text), embedded("the " + text))
        np.testing.assert_array_equal(model.encode(text, prompt_name="query"), embedded("who " + text))
        np.testing.assert_array_equal(model.encode(text, prompt_name="query", prompt=""), embedded(text))
        np.testing.assert_array_equal(model.encode_query(text), embedded("who " + text))
        np.testing.assert_array_equal(model.encode_document(text), embedded("the " + text))
        np.testing.assert_array_equal(model.encode_query(text, prompt="a "), embedded("a " + text))
        with pytest.raises(UsageError, match=r"no prompt 'code'. There are query, passage"):
            model.encode(text, prompt_name="code")
        with pytest.raises(UsageError, match="no prompt 'code'"):
            SentenceTransformer(loaded, prompts=prompts, default_prompt_name="code")


@pytest.mark.parametrize("name", ["cosine", "dot", "euclidean", "manhattan"])
def test_similarity_is_the_peers(tiny_bundle: Bundle, peer: Any, name: Any) -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(4, 32)).astype(np.float32), rng.normal(size=(3, 32)).astype(np.float32)
    with SentenceTransformer(tiny_bundle.path, similarity_fn_name=name, device="cpu") as model:
        peer.similarity_fn_name = name
        wanted = peer.similarity(first, second)
        found = model.similarity(first, second)
        assert isinstance(found, np.ndarray)
        np.testing.assert_allclose(found, wanted.numpy(), atol=2e-5)
        tensor = model.similarity(torch.from_numpy(first), second)
        assert isinstance(tensor, torch.Tensor)
        torch.testing.assert_close(tensor, wanted, atol=2e-5, rtol=0)
        pairs = model.similarity_pairwise(first[:3], second)
        np.testing.assert_allclose(pairs, peer.similarity_pairwise(first[:3], second).numpy(), atol=2e-5)
        assert model.similarity(first[0], second).shape == (1, 3)
        with pytest.raises(UsageError, match="vectors of the shapes"):
            model.similarity(first, second[:, :5])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_value": "token_embeddings"}, "no output_value 'token_embeddings'"),
        ({"output_value": None}, "no output_value None"),
        ({"precision": "int8"}, "no vectors of int8"),
        ({"device": "cuda"}, "does not support device"),
        ({"pool": {}}, "does not support pool"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"truncate_dim": 0}, "truncate_dim is 0"),
    ],
)
def test_what_encode_refuses(model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        model.encode(TEXTS, **options)


def test_what_is_no_text(model: Any) -> None:
    for wrong in (3, None, [3], [None], {"a": "b"}, b"bytes"):
        with pytest.raises(UsageError, match="encode"):
            model.encode(wrong)


def test_what_the_constructor_refuses(tiny_bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="does not support trust_remote_code"):
        SentenceTransformer(tiny_bundle.path, trust_remote_code=True)
    with pytest.raises(UsageError, match="no similarity 'angle'"):
        SentenceTransformer(tiny_bundle.path, similarity_fn_name="angle")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="the model is a object"):
        SentenceTransformer(object())


def test_without_torch(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert model.encode(TEXTS).shape == (5, 32)
    assert isinstance(model.similarity(model.encode(TEXTS), model.encode(TEXTS)), np.ndarray)
    with pytest.raises(InstallationError, match="torch is not installed"):
        model.encode(TEXTS, convert_to_tensor=True)


# --- LangChain


class Waiting:
    """An engine whose methods are awaited."""

    def __init__(self, task: Any) -> None:
        self.task = task
        self.bundle = task.bundle

    async def run(self, feeds: Any) -> Any:
        raise NotImplementedError

    async def rows(self, records: Any) -> Any:
        raise NotImplementedError

    async def embed(self, texts: Any) -> Any:
        await asyncio.sleep(0)
        return self.task.embed(texts)

    async def close(self) -> None:
        """Nothing to close."""


def test_langchain(tiny_bundle: Bundle) -> None:
    with hasten.load(tiny_bundle.path, device="cpu") as loaded:
        embeddings = HastenEmbeddings(loaded)
        assert isinstance(embeddings, Embeddings)
        assert embeddings.embed_documents(TEXTS) == loaded.embed(TEXTS).tolist()
        assert embeddings.embed_query(TEXTS[0]) == loaded.embed(TEXTS[:1])[0].tolist()
        assert embeddings.embed_documents([]) == []
        assert asyncio.run(embeddings.aembed_documents(TEXTS)) == embeddings.embed_documents(TEXTS)
        assert asyncio.run(embeddings.aembed_query(TEXTS[0])) == embeddings.embed_query(TEXTS[0])
        store = InMemoryVectorStore(embeddings)
        store.add_texts(TEXTS[:3])
        assert store.similarity_search(TEXTS[1], k=1)[0].page_content == TEXTS[1]
        prompted = HastenEmbeddings(loaded, query_prompt="who ", document_prompt="the ")
        assert prompted.embed_query("ball") == embeddings.embed_query("who ball")
        assert prompted.embed_documents(["ball"]) == embeddings.embed_documents(["the ball"])
        for wrong in ("one text", [3]):
            with pytest.raises(UsageError, match="embed_documents"):
                embeddings.embed_documents(wrong)  # type: ignore[arg-type]


def test_langchain_over_an_asynchronous_engine(tiny_bundle: Bundle) -> None:
    with hasten.load(tiny_bundle.path, device="cpu") as loaded:
        embeddings = HastenEmbeddings(Waiting(loaded))
        assert asyncio.run(embeddings.aembed_documents(TEXTS)) == loaded.embed(TEXTS).tolist()
        with pytest.raises(UsageError, match="this engine is asynchronous"):
            embeddings.embed_query("a")
        with pytest.raises(UsageError, match="this engine is asynchronous"):
            SentenceTransformer(Waiting(loaded))
        with pytest.raises(UsageError, match="this engine is asynchronous"):
            compat.pipeline("feature-extraction", model=Waiting(loaded))


# --- imports


def test_names() -> None:
    assert dir(compat) == sorted(compat.__all__)
    with pytest.raises(AttributeError, match=r"hasten.compat' has no attribute 'encode'"):
        _ = compat.encode


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import hasten.compat", {"langchain_core", "torch", "numpy"}),
        ("from hasten.compat import SentenceTransformer, pipeline", {"langchain_core", "torch", "transformers"}),
        ("from hasten.compat import HastenEmbeddings", {"torch", "transformers"}),
        (
            "import sys; sys.modules['langchain_core'] = None\nfrom hasten.compat import HastenEmbeddings\n"
            "assert HastenEmbeddings.__mro__[1] is object; del sys.modules['langchain_core']",
            {"langchain_core"},
        ),
    ],
)
def test_who_imports_pays_for_what_is_used(code: str, absent: set[str]) -> None:
    told = f"{code}\nimport sys\nprint(sorted({absent!r} & {{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, env=environment(), timeout=60)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
