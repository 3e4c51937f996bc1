"""``python -m hasten``, and what the ``hasten`` command calls."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from hasten import interrupts

_OURS = ("artifacts", "passes", "runtimes", "compiler")
_NOT_INSTALLED = 10


def main() -> None:
    """Run the command line, unless another package hides one of ours: then say which, before anything breaks."""
    home = Path(__file__).resolve().parent.parent
    for name in _OURS:
        spec = find_spec(name)
        places = list(spec.submodule_search_locations or [spec.origin or ""]) if spec is not None else ["nowhere"]
        if Path(places[0]).resolve() != home / name:
            remedy = f"Take {Path(places[0]).parent} off PYTHONPATH, or install hasten in an environment of its own"
            sys.stderr.write(f"hasten: the package {name!r} comes from {places[0]}, not from {home}. {remedy}\n")
            sys.exit(_NOT_INSTALLED)
    interrupts.install()
    import_module("hasten.cli").main()


if __name__ == "__main__":
    main()
