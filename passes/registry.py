"""Every pass there is, in one explicit tuple, and the pipelines that other packages name."""

from __future__ import annotations

from .base import Pass
from .cleanup import (
    CollapseReshapes,
    Finish,
    FoldConstants,
    HoistShapes,
    InferShapes,
    InlineFunctions,
    MergeDuplicates,
    RaiseOpset,
    RemoveIdentities,
    RemoveUnused,
    ShareInitializers,
    StripMetadata,
)
from .fusion import (
    AbsorbNorm,
    FoldScale,
    FuseAttention,
    FuseBiasGelu,
    FuseGelu,
    FuseLayerNorm,
    FuseSkipLayerNorm,
    FuseTranspose,
    PackProducts,
    UnfuseAttention,
)
from .precision import Float16
from .quantize import DynamicInt8, Int8Embeddings, Int8Products, Smooth, StaticInt8, WeightInt8

REGISTRY: tuple[type[Pass], ...] = (
    InlineFunctions,
    RaiseOpset,
    FoldConstants,
    InferShapes,
    HoistShapes,
    RemoveIdentities,
    MergeDuplicates,
    CollapseReshapes,
    ShareInitializers,
    RemoveUnused,
    StripMetadata,
    Finish,
    FuseAttention,
    UnfuseAttention,
    FuseLayerNorm,
    FuseSkipLayerNorm,
    FuseGelu,
    FuseBiasGelu,
    FoldScale,
    AbsorbNorm,
    PackProducts,
    FuseTranspose,
    Smooth,
    DynamicInt8,
    StaticInt8,
    Int8Products,
    WeightInt8,
    Int8Embeddings,
    Float16,
)

CLEAN: tuple[Pass, ...] = (
    InlineFunctions(),
    RaiseOpset(),
    StripMetadata(),
    FoldConstants(),
    InferShapes(),
    HoistShapes(),
    ShareInitializers(),
    RemoveIdentities(),
    MergeDuplicates(),
    CollapseReshapes(),
    RemoveUnused(),
)
"""Brings any graph into the form the other passes expect. ``finish`` is not among them: it runs last, before saving."""
