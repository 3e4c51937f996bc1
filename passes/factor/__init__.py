"""Products and convolutions as chains of smaller ones. The mathematics is in modules that never see a graph."""

from .factor import Factor
from .factor_convolutions import FactorConvolutions

__all__ = ["Factor", "FactorConvolutions"]
