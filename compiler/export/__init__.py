"""From a source to a graph: Hugging Face folders through torch, .onnx files as they are."""

from __future__ import annotations

from ..source import ModelSource
from ..tasks import GENERATION
from .exported import Arrays, Exported, Reference

__all__ = ["Arrays", "Exported", "Reference", "export_model"]


def export_model(source: ModelSource, *, seed: int = 0) -> Exported:
    """The graph of a source, with its reference and processor.

    Raises:
        SourceError: The source is incomplete or corrupt.
        UnsupportedError: It cannot be compiled.
        InstallationError: The ``compile`` extra is not installed.
    """
    if source.kind == "onnx":
        from .onnx_import import import_onnx

        return import_onnx(source)
    if source.task == GENERATION:
        from .decoder import export_decoder

        return export_decoder(source, seed=seed)
    from .torch_export import export_torch

    return export_torch(source, seed=seed)
