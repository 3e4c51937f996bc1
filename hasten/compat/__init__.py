"""Drop-ins for code that was written for other libraries: one line changes.

from hasten.compat import SentenceTransformer     # from sentence_transformers import SentenceTransformer
from hasten.compat import HastenEmbeddings        # a LangChain Embeddings
from hasten.compat import pipeline                # from transformers import pipeline

Each takes the folder of a bundle, a model that `hasten.load` gave, or an engine (``with hasten.serve_engine(OUT)``).
Arguments and results are those of the other library; what hasten cannot do is refused with a UsageError that says so.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

_HOMES = {"SentenceTransformer": "sentences", "HastenEmbeddings": "langchain", "pipeline": "pipelines"}

__all__ = ["HastenEmbeddings", "SentenceTransformer", "pipeline"]

if TYPE_CHECKING:
    from .langchain import HastenEmbeddings
    from .pipelines import pipeline
    from .sentences import SentenceTransformer


def __getattr__(name: str) -> object:
    """A name when it is first used: only who wants the LangChain one pays for the import of langchain_core."""
    if name not in _HOMES:
        raise AttributeError(f"module 'hasten.compat' has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
