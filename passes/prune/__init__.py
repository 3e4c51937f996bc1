"""Weights with zeros, and graphs with fewer of them. The mathematics is in modules that never see a graph."""

from .prune import Prune
from .prune_channels import PruneChannels
from .prune_heads import PruneHeads
from .prune_kv_heads import PruneKvHeads
from .prune_layers import PruneLayers
from .prune_neurons import PruneNeurons

__all__ = ["Prune", "PruneChannels", "PruneHeads", "PruneKvHeads", "PruneLayers", "PruneNeurons"]
