"""Fewer bits for weights and activations. The mathematics is in `arithmetic`, which never sees a graph."""

from .dynamic_int8 import DynamicInt8
from .int8_embeddings import Int8Embeddings

__all__ = ["DynamicInt8", "Int8Embeddings"]
