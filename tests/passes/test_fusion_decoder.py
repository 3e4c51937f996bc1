"""The fusions for decoders, one after the other, on graphs as the exporter leaves them: what is left, the numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from builders import CONTEXT, Array, evaluate, operators
from tiny_decoders import CONTEXT as POSITIONS
from tiny_decoders import VOCABULARY, write_decoder

from passes.base import Pass
from passes.fusion.fuse_rotary import CONTEXT_LENGTH
from passes.grammar import check, signature
from passes.pipeline import parse
from passes.registry import CLEAN

CAPACITY = 24
REACH = 512 * float(np.finfo(np.float32).eps)
"""Two layers of a dozen sums over at most 128 products each, every one rounded otherwise: 2 * 12 * sqrt(128) < 512."""
FUSIONS = (
    "raise-opset(minimum=23); unflatten-products; fuse-rms-norm; fuse-layer-norm; fuse-gelu; fuse-silu; fuse-rotary; "
    "fold-scale; order-columns; pack-products; pack-attention; fuse-skip-layer-norm; fuse-bias-gelu; hoist-shapes; "
    "static-reshapes; merge-duplicates; remove-unused; finish"
)
AROUND = Counter({"Gather": 1, "RMSNormalization": 1, "Unsqueeze": 1, "GatherND": 1, "MatMul": 1})
LAYER = Counter(
    {"MatMul": 4, "GroupQueryAttention": 1, "SkipSimplifiedLayerNormalization": 2, "Split": 1, "QuickGelu": 1, "Mul": 1}
)
QK_NORM = Counter({"Split": 1, "Reshape": 4, "RMSNormalization": 2})
LAYERS = {"Llama": LAYER, "Phi-3": LAYER, "Qwen3": LAYER + QK_NORM}
"""Operators of one layer."""


def fused(folder: Path, name: str) -> tuple[ir.Model, ir.Model]:
    """The graph of a tiny model as it is exported, and with the fusions."""
    export = pytest.importorskip("compiler.export")
    from compiler.source import read_source

    folder = write_decoder(folder / "model", name, hidden_size=64, head_dim=16)
    exported: ir.Model = export.export_model(read_source(str(folder))).model
    model = exported.clone()
    passes: tuple[Pass, ...] = (*CLEAN, *parse(FUSIONS).passes)
    for item in passes:
        if item.name == "fuse-rotary":
            model.metadata_props[CONTEXT_LENGTH] = str(POSITIONS)
        item.run(model, CONTEXT)
        check(model, CONTEXT.target)
    return exported, model


def feeds(model: ir.Model, lengths: tuple[int, ...], sequence: int, *, prompt: bool) -> dict[str, Array]:
    """One call: rows of these lengths after it, of which ``sequence`` tokens are new."""
    rng, rows = np.random.default_rng(0), len(lengths)
    ends = np.array(lengths)
    starts = np.zeros(rows, np.int64) if prompt else ends - sequence
    made: dict[str, Array] = {
        "input_ids": rng.integers(3, VOCABULARY, (rows, sequence)),
        "position_ids": starts[:, None] + np.arange(sequence, dtype=np.int64),
        "seqlens_k": (ends - 1).astype(np.int32),
        "total_sequence_length": np.array(sequence if prompt else ends.max(), np.int32),
        "logits_index": (ends[:, None] - 1 if prompt else np.full((rows, 1), sequence - 1)).astype(np.int64),
    }
    for value in model.graph.inputs:
        if str(value.name).startswith("past"):
            _, heads, _, width = tuple(value.shape or ())
            assert isinstance(heads, int)
            assert isinstance(width, int)
            made[str(value.name)] = rng.standard_normal((rows, heads, CAPACITY, width)).astype(np.float32)
    return made


def valid(outputs: Mapping[str, Array], lengths: tuple[int, ...]) -> dict[str, Array]:
    """The logits, and of the caches what lies before the end of each row."""
    found = {"logits": outputs["logits"]}
    for name in outputs:
        if name.startswith("present"):
            found |= {f"{name} {row}": outputs[name][row, :, :length] for row, length in enumerate(lengths)}
    return found


@pytest.mark.parametrize(
    "name", ["Llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("Qwen3", "Phi-3"))]
)
def test_ten_nodes_a_layer(tmp_path: Path, name: str) -> None:
    exported, model = fused(tmp_path, name)
    assert signature(model) == signature(exported)
    layer = LAYERS[name]
    assert Counter(operators(model)) == AROUND + layer + layer
    assert layer.total() == 10 + 7 * (name == "Qwen3")
    attentions = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    assert {node.inputs[9] for node in attentions} == {model.graph.inputs[1]}
    assert [node.inputs[1] is None for node in attentions] == [name != "Qwen3"] * 2
    for lengths, sequence, prompt in (((7, 3, 5), 7, True), ((8, 20, 1), 1, False), ((13,), 4, False)):
        given = feeds(model, lengths, sequence, prompt=prompt)
        expected, found = (valid(evaluate(graph, given), lengths) for graph in (exported, model))
        for part, array in expected.items():
            limit = REACH * max(1.0, float(np.abs(array).max()))
            np.testing.assert_allclose(found[part], array, rtol=0, atol=limit, err_msg=f"{lengths}: {part}")
