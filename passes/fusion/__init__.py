"""Fusion: chains of operators that a runtime has one kernel for, and the way back for runtimes that have none."""

from __future__ import annotations

from .absorb_norm import AbsorbNorm
from .fold_batch_norm import FoldBatchNorm
from .fold_scale import FoldScale
from .fuse_attention import FuseAttention
from .fuse_bias_gelu import FuseBiasGelu
from .fuse_gelu import FuseGelu
from .fuse_layer_norm import FuseLayerNorm
from .fuse_qkv_attention import FuseQkvAttention
from .fuse_rms_norm import FuseRmsNorm
from .fuse_rotary import FuseRotary
from .fuse_silu import FuseSilu
from .fuse_skip_layer_norm import FuseSkipLayerNorm
from .fuse_transpose import FuseTranspose
from .hoist_gather import HoistGather
from .order_columns import OrderColumns
from .pack_attention import PackAttention
from .pack_products import PackProducts
from .unfuse_attention import UnfuseAttention

__all__ = [
    "AbsorbNorm",
    "FoldBatchNorm",
    "FoldScale",
    "FuseAttention",
    "FuseBiasGelu",
    "FuseGelu",
    "FuseLayerNorm",
    "FuseQkvAttention",
    "FuseRmsNorm",
    "FuseRotary",
    "FuseSilu",
    "FuseSkipLayerNorm",
    "FuseTranspose",
    "HoistGather",
    "OrderColumns",
    "PackAttention",
    "PackProducts",
    "UnfuseAttention",
]
