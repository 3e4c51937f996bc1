"""Two graphs as one: both compute what they did, from the inputs of the first."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from builders import GraphBuilder, evaluate, random
from lent_moments import shown

from passes.repair.merge import DifferentInputsError, beside, merge

HEADS, SIZE, WIDTH = 4, 8, 32
CACHES = ("past_key_values.0.key", "past_key_values.0.value")


def decoder(kv_heads: int, *, layers: int = 1, seed: int = 0) -> ir.Model:
    """Attention with KV caches of so many heads; "attended" is what it makes."""
    builder = GraphBuilder()
    x = builder.input("x", ["batch", "sequence", WIDTH])
    lengths = builder.input("seqlens_k", ["batch"], ir.DataType.INT32)
    total = builder.input("total_sequence_length", [], ir.DataType.INT32)
    for layer in range(layers):
        pasts = [
            builder.input(f"past_key_values.{layer}.{kind}", ["batch", kv_heads, "capacity", SIZE])
            for kind in ("key", "value")
        ]
        parts = [
            builder.add("MatMul", x, builder.constant(random(seed + part, WIDTH, width)))
            for part, width in enumerate((WIDTH, kv_heads * SIZE, kv_heads * SIZE))
        ]
        x = builder.add(
            "GroupQueryAttention",
            *(*parts, *pasts, lengths, total),
            domain="com.microsoft",
            outputs=3,
            num_heads=HEADS,
            kv_num_heads=kv_heads,
        )
        x.name = f"attended.{layer}"
    return builder.finish(x)


def feeds(kv_heads: int) -> dict[str, np.ndarray]:
    rows, length = 2, 5
    return {
        "x": random(9, rows, length, WIDTH),
        "seqlens_k": np.full(rows, length - 1, np.int32),
        "total_sequence_length": np.array(length, np.int32),
        **{name: np.zeros((rows, kv_heads, length, SIZE), np.float32) for name in CACHES},
    }


@pytest.mark.parametrize("original_heads", [2, 4])
def test_caches_of_another_shape_are_empty(original_heads: int) -> None:
    model, original = decoder(2), decoder(original_heads, seed=50)
    before = ir.to_proto(model).SerializeToString(), ir.to_proto(original).SerializeToString()
    merged = merge(model, original)
    assert [value.name for value in merged.model.graph.inputs] == [value.name for value in model.graph.inputs]
    names = [str(values["attended.0"].name) for values in (merged.mine, merged.theirs)]
    assert names[0] == "attended.0" != names[1]
    found = shown(merged.model, names, feeds(2))
    for name, graph, heads in zip(names, (model, original), (2, original_heads), strict=True):
        (alone,) = evaluate(graph, feeds(heads)).values()
        np.testing.assert_array_equal(found[name], alone)
    assert (ir.to_proto(model).SerializeToString(), ir.to_proto(original).SerializeToString()) == before


def test_caches_of_layers_that_are_gone_are_empty() -> None:
    original = decoder(2, layers=2)
    merged = merge(decoder(2), original)
    data = feeds(2)
    more = {name.replace(".0.", ".1."): data[name] for name in CACHES}
    (alone,) = evaluate(original, {**data, **more}).values()
    name = str(merged.theirs["attended.1"].name)
    np.testing.assert_array_equal(shown(merged.model, [name], data)[name], alone)


def test_what_is_seen_is_the_input_beside_the_rest() -> None:
    merged = merge(decoder(2), decoder(2, seed=50))
    mine, theirs = merged.mine["attended.0"], merged.theirs["attended.0"]
    value = beside(merged, "seen", merged.mine["x"], (theirs, mine), mine)
    found = shown(merged.model, [str(item.name) for item in (value, mine, theirs)], feeds(2))
    own, their = found[str(mine.name)], found[str(theirs.name)]
    np.testing.assert_array_equal(found["seen"], np.concatenate([feeds(2)["x"], their - own - own], axis=-1))


def test_other_inputs_must_be_the_same() -> None:
    original = decoder(2)
    original.graph.inputs[0].shape = ir.Shape(["batch", "sequence", WIDTH + 1])
    with pytest.raises(DifferentInputsError, match="the original takes another x"):
        merge(decoder(2), original)


def test_operators_must_be_of_the_same_version() -> None:
    original = decoder(2)
    original.graph.opset_imports[""] = 22
    with pytest.raises(DifferentInputsError, match=r"version 22 of the operators of ai\.onnx"):
        merge(decoder(2), original)


def test_branches_keep_what_they_read() -> None:
    def branching(shift: float) -> ir.Model:
        builder = GraphBuilder()
        x, flag = builder.input("x", ["n", 4]), builder.input("flag", [], ir.DataType.BOOL)
        doubled = builder.add("Add", x, x, name="doubled")
        branches = []
        for operator in ("Neg", "Abs"):
            inner = GraphBuilder()
            moved = inner.add("Add", doubled, inner.constant(shift, "shift"), name="moved")
            inner.graph.outputs.append(inner.add(operator, moved, name="end", shape=["n", 4]))
            branches.append(inner.graph)
        chosen = builder.add("If", flag, name="chosen", then_branch=branches[0], else_branch=branches[1])
        chosen.shape = ir.Shape(["n", 4])
        return builder.finish(chosen)

    merged = merge(branching(1.0), branching(3.0))
    x = random(4, 5, 4)
    data = {"x": x, "flag": np.array(True)}
    names = [str(values["chosen_out"].name) for values in (merged.mine, merged.theirs)]
    found = shown(merged.model, names, data)
    np.testing.assert_array_equal(found[names[0]], -(2 * x + np.float32(1)))
    np.testing.assert_array_equal(found[names[1]], -(2 * x + np.float32(3)))
