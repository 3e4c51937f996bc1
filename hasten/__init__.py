"""hasten compiles trained models into the fastest ONNX Runtime artifact inside a quality budget, with proof.

import hasten
hasten.compile_model("path/to/model", "bundle")        # needs the extra: pip install hasten[compile]
model = hasten.load("bundle")                          # needs neither torch nor transformers
vectors = model.embed(["some text"])
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOMES = {
    "compile_model": "compiler.compile",
    "load": "runtimes.load",
    "serve_engine": "runtimes.engine.open",
    "open_bundle": "artifacts.bundle",
    "pack": "artifacts.pack",
    "unpack": "artifacts.pack",
    "Bundle": "artifacts.bundle",
    "Target": "artifacts.target",
    "HastenError": "artifacts.errors",
}
"""Where each public name lives; it is imported when it is first used, so that loading never pays for compiling."""

__all__ = ["Bundle", "HastenError", "Target", "compile_model", "load", "open_bundle", "pack", "serve_engine", "unpack"]

if TYPE_CHECKING:
    from artifacts.bundle import Bundle, open_bundle
    from artifacts.errors import HastenError
    from artifacts.pack import pack, unpack
    from artifacts.target import Target
    from compiler.compile import compile_model
    from runtimes.engine.open import serve_engine
    from runtimes.load import load


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'hasten' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
