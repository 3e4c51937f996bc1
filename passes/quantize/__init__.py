"""Fewer bits for weights and activations. The mathematics is in `arithmetic`, which never sees a graph."""

from .dynamic_int8 import DynamicInt8
from .int8_embeddings import Int8Embeddings
from .int8_products import Int8Products
from .smooth import Smooth
from .static_int8 import StaticInt8
from .weight_int8 import WeightInt8

__all__ = ["DynamicInt8", "Int8Embeddings", "Int8Products", "Smooth", "StaticInt8", "WeightInt8"]
