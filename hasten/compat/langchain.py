"""LangChain's `Embeddings`, over a bundle."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .source import Source, lead

if TYPE_CHECKING:

    class _Embeddings:
        """What LangChain's class is to the checker of types."""
else:
    try:
        from langchain_core.embeddings import Embeddings as _Embeddings
    except ImportError:
        _Embeddings = object


class HastenEmbeddings(_Embeddings):
    """Vectors of documents and queries; a `langchain_core.embeddings.Embeddings` where LangChain is installed."""

    def __init__(
        self, model: object, *, device: object = None, query_prompt: str = "", document_prompt: str = ""
    ) -> None:
        """Load a bundle, or take what is loaded.

        Args:
            model: Folder of a bundle, a loaded model, or an engine. An asynchronous engine has the a-methods only.
            device: ``cpu``, ``cuda``, ``cuda:1`` …; None: the fastest.
            query_prompt: Text put before each query, for models that were trained with one.
            document_prompt: Text put before each document.

        Raises:
            UsageError: The bundle is of another task, or there is no such device.
            BundleError: Not a bundle, or a damaged one.
            ProviderError: Nothing here runs it correctly.
        """
        self._source = Source(model, device=device, task="feature-extraction")
        self._query, self._document = query_prompt, document_prompt

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """A vector for each document.

        Raises:
            UsageError: An element is not a str, or the engine must be awaited.
            ProviderError: ONNX Runtime failed.
        """
        return _lists(self._source.embed(lead(self._document, texts, "embed_documents")))

    def embed_query(self, text: str) -> list[float]:
        """The vector of a query.

        Raises:
            UsageError: It is not a str, or the engine must be awaited.
            ProviderError: ONNX Runtime failed.
        """
        return _lists(self._source.embed(lead(self._query, [text], "embed_query")))[0]

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """`embed_documents`, on an engine or in a thread."""
        return _lists(await self._aembed(lead(self._document, texts, "aembed_documents")))

    async def aembed_query(self, text: str) -> list[float]:
        """`embed_query`, on an engine or in a thread."""
        return _lists(await self._aembed(lead(self._query, [text], "aembed_query")))[0]

    def close(self) -> None:
        """Free the model, if it was loaded here."""
        self._source.close()

    async def _aembed(self, texts: list[str]) -> NDArray[np.float32]:
        model: Any = self._source.model
        found: NDArray[np.float32] = (
            await model.embed(texts) if self._source.waits else await asyncio.to_thread(model.embed, texts)
        )
        return found


def _lists(vectors: NDArray[np.float32]) -> list[list[float]]:
    found: list[list[float]] = vectors.tolist()
    return found
