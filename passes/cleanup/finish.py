"""finish."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from artifacts.errors import UnsupportedError
from passes.base import Context, Effect, Outcome, Purpose
from passes.grammar import IR_VERSION, MAXIMUM_OPSET, schema_of
from passes.surgery import opset


@dataclass(frozen=True)
class Finish:
    """Make the graph shippable: pin ir_version and opset, give every node a name of its own, spell ai.onnx as "".

    An opset above the highest one that all supported runtimes load is lowered by relabelling, which is exact if every
    operator used has the same definition in both.
    """

    name: ClassVar[str] = "finish"
    effect: ClassVar[Effect] = Effect.EXACT
    purpose: ClassVar[Purpose] = Purpose.FORM

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Finish the graph.

        Raises:
            UnsupportedError: An operator was redefined after the highest opset allowed; names the node.
        """
        changed = _spell_domain(model) + _name_nodes(model)
        version = opset(model)
        if version > MAXIMUM_OPSET:
            _check_same_meaning(model, version)
            model.graph.opset_imports[""] = MAXIMUM_OPSET
            changed += 1
        if model.ir_version != IR_VERSION:
            model.ir_version = IR_VERSION
            changed += 1
        return Outcome(changed)


def _spell_domain(model: ir.Model) -> int:
    changed = 0
    for node in model.graph.all_nodes():
        if node.domain == "ai.onnx":
            node.domain = ""
            changed += 1
    for graph in model.graphs():
        if "ai.onnx" in graph.opset_imports:
            graph.opset_imports.setdefault("", graph.opset_imports.pop("ai.onnx"))
            changed += 1
    return changed


def _name_nodes(model: ir.Model) -> int:
    seen: set[str] = set()
    changed = 0
    nodes = list(model.graph.all_nodes())
    reserved = {node.name for node in nodes}
    for node in nodes:
        if not node.name or node.name in seen:
            base = node.outputs[0].name if node.outputs and node.outputs[0].name else node.op_type
            node.name = _free_name(str(base), seen, reserved)
            changed += 1
        seen.add(str(node.name))
    return changed


def _free_name(base: str, seen: set[str], reserved: set[str | None]) -> str:
    name, number = base, 1
    while name in seen or name in reserved:
        number += 1
        name = f"{base}.{number}"
    return name


def _check_same_meaning(model: ir.Model, version: int) -> None:
    for node in model.graph.all_nodes():
        if node.domain != "":
            continue
        now, then = schema_of(node.op_type, version), schema_of(node.op_type, MAXIMUM_OPSET)
        if now is None or then is None or now.since_version != then.since_version:
            raise UnsupportedError(
                f"node {node.name!r} ({node.op_type}) means something else in opset {version} than in {MAXIMUM_OPSET}",
                f"Export the model with opset {MAXIMUM_OPSET} or lower",
            )
