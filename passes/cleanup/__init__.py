"""Clean-up: bring any graph into the plain form that the other passes expect, without changing what it computes."""

from __future__ import annotations

from .collapse_reshapes import CollapseReshapes
from .finish import Finish
from .fold_constants import FoldConstants
from .hoist_shapes import HoistShapes
from .infer_shapes import InferShapes
from .inline_functions import InlineFunctions
from .merge_duplicates import MergeDuplicates
from .raise_opset import RaiseOpset
from .remove_identities import RemoveIdentities
from .remove_unused import RemoveUnused
from .share_initializers import ShareInitializers
from .static_reshapes import StaticReshapes
from .strip_metadata import StripMetadata
from .unflatten_products import UnflattenProducts

__all__ = [
    "CollapseReshapes",
    "Finish",
    "FoldConstants",
    "HoistShapes",
    "InferShapes",
    "InlineFunctions",
    "MergeDuplicates",
    "RaiseOpset",
    "RemoveIdentities",
    "RemoveUnused",
    "ShareInitializers",
    "StaticReshapes",
    "StripMetadata",
    "UnflattenProducts",
]
