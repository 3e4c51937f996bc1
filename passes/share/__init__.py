"""One weight for several operators. The mathematics is in `common`, which never sees a graph."""

from .share_weights import ShareWeights

__all__ = ["ShareWeights"]
