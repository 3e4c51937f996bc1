"""The tasks: what a bundle's outputs mean, and the method that a user calls."""

from __future__ import annotations

from ..generate.results import Generated, Perplexity, Piece
from ..pool import Runner
from .answer import Answer, Answerer
from .base import Record, Task, TextTask
from .classify import Classification, Classifier
from .embed import Embedder
from .fill import Filler, Filling
from .generate import Generator
from .tag import Entity, Tagger
from .tensors import TensorRunner

TASKS: dict[str, type[Task]] = {
    kind.task: kind for kind in (Embedder, Classifier, Tagger, Answerer, Filler, Generator, TensorRunner)
}
"""The class that serves each task of a manifest."""

__all__ = [
    "TASKS",
    "Answer",
    "Answerer",
    "Classification",
    "Classifier",
    "Embedder",
    "Entity",
    "Filler",
    "Filling",
    "Generated",
    "Generator",
    "Perplexity",
    "Piece",
    "Record",
    "Runner",
    "Tagger",
    "Task",
    "TensorRunner",
    "TextTask",
]
