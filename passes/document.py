"""docs/passes.md, made from the registry. Run ``python -m passes.document > docs/passes.md``."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Sequence

from .base import Pass
from .pipeline import format_pass
from .registry import CLEAN, REGISTRY

_HEAD = """# The passes

Made from the registry by `python -m passes.document`; a test holds it current. Each pass rewrites a graph in place,
counts the places it changed, tells where it refused to act and why, and changes nothing when run again.

*Effect*: `exact` passes leave the numbers as they are up to rounding, `lossy` ones are held by the quality budget.
*Purpose*: `speed` passes are kept only where they make the model faster on the target, `size` and `form` passes unless
they make it slower.
"""


def markdown(registry: Sequence[type[Pass]] = REGISTRY) -> str:
    """The page: one section a pass, with its docstring and its options."""
    clean = "; ".join(format_pass(item) for item in CLEAN)
    sections = [
        _HEAD,
        f"Clean-up runs `{clean}`. As a whole it is part of the reference, and stays whatever its speed.\n",
        *(_section(kind) for kind in registry),
    ]
    return "\n".join(sections)


def _section(kind: type[Pass]) -> str:
    text = inspect.cleandoc(kind.__doc__ or "")
    body, _, attributes = text.partition("\nAttributes:\n")
    lines = [f"## {kind.name}", "", f"*{kind.effect.value}, {kind.purpose.value}*", "", body.strip(), ""]
    described = _described(attributes)
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        kind_and_default = f"`{field.type}`, default `{_default(field.default)}`"
        lines.append(f"- `{field.name}` ({kind_and_default}): {described.get(field.name, '')}".rstrip(": "))
    if lines[-1]:
        lines.append("")
    return "\n".join(lines)


def _described(attributes: str) -> dict[str, str]:
    """Descriptions of an ``Attributes:`` section, by name."""
    found: dict[str, str] = {}
    name = ""
    for line in inspect.cleandoc(f"\n{attributes}").splitlines():
        if line and not line.startswith(" "):
            name, _, text = line.partition(": ")
            found[name] = text.strip()
        elif name:
            found[name] = f"{found[name]} {line.strip()}".strip()
    return found


def _default(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "[]" if value == () else str(value)


if __name__ == "__main__":
    sys.stdout.write(markdown())
