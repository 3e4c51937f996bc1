"""Calibration: what the values of a graph are on data, within a cap on memory.

batches = text_batches(encoder.encode(texts), names, processor)
calibrator = Calibrator(batches, folder, memory=10**9)
context = Context(target, observe=calibrator.observe, moments=calibrator.moments)
"""

from __future__ import annotations

from .batches import Batch, Batches, Feeds, survey, tensor_batches, text_batches, token_batches
from .calibrator import Calibrator

__all__ = ["Batch", "Batches", "Calibrator", "Feeds", "survey", "tensor_batches", "text_batches", "token_batches"]
