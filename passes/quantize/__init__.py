"""Fewer bits for weights and activations. The mathematics is in `arithmetic`, which never sees a graph."""

from .awq import Awq
from .block_embeddings import BlockEmbeddings
from .dynamic_int8 import DynamicInt8
from .int8_additions import Int8Additions
from .int8_embeddings import Int8Embeddings
from .int8_products import Int8Products
from .prompt_int8 import PromptInt8
from .smooth import Smooth
from .static_int8 import StaticInt8
from .weight_int8 import WeightInt8
from .weight_only import WeightOnly

__all__ = [
    "Awq",
    "BlockEmbeddings",
    "DynamicInt8",
    "Int8Additions",
    "Int8Embeddings",
    "Int8Products",
    "PromptInt8",
    "Smooth",
    "StaticInt8",
    "WeightInt8",
    "WeightOnly",
]
