"""Vocabulary trimming: the tokenizer, the rows of the embedding and the columns of the head keep the same tokens."""

from __future__ import annotations

from .lists import Vocabulary, read_vocabulary, tokens_of, write_vocabulary
from .trim import Trimmed, trim

__all__ = ["Trimmed", "Vocabulary", "read_vocabulary", "tokens_of", "trim", "write_vocabulary"]
