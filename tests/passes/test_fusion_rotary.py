"""fuse-rotary: structure, numbers over ragged prompts and decodes, what is refused, what is left, idempotence."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from builders import CONTEXT, Array, apply, operators
from rotary_graphs import HEADS, KV_HEADS, Attention, Form, held_equal

from passes.base import Effect, Purpose
from passes.fusion import FuseRotary
from passes.fusion.fuse_rotary import CONTEXT_LENGTH

LENGTH = 32
REACH = 64 * float(np.finfo(np.float32).eps)
"""Scores are sums over at most 48 products of numbers turned once more or less: a few roundings each, sqrt(48) < 8."""
KERNEL = {
    "halves": Form(),
    "neighbours": Form(neighbours=True),
    "wide heads": Form(width=48, turned=48),
    "first third": Form(width=48, turned=16),
    "first third, neighbours": Form(width=48, turned=16, neighbours=True),
    "scaled": Form(factor=1.3),
    "biased": Form(biased=True),
    "norm before": Form(norm="before"),
    "norm behind": Form(norm="behind"),
    "clipped": Form(norm="clip"),
    "looked up": Form(rows=40),
}
OPERATOR = {
    "narrow heads": Form(width=8, turned=8),
    "narrow heads, neighbours": Form(width=8, turned=8, neighbours=True),
    "a quarter": Form(width=32, turned=8),
    "a quarter, neighbours": Form(width=32, turned=8, neighbours=True),
    "keys of other angles": Form(other_keys=True),
    "growing queries": Form(growing=True),
}


def attention_of(model: ir.Model) -> ir.Node:
    return next(node for node in model.graph if node.op_type == "GroupQueryAttention")


def cosines(form: Form) -> Array:
    pairs = form.turned // 2
    frequencies = 100.0 ** -(np.arange(pairs) / pairs)
    return form.factor * np.cos(np.outer(np.arange(LENGTH), frequencies))


def test_it_is_exact_and_for_speed() -> None:
    assert (FuseRotary.effect, FuseRotary.purpose) == (Effect.EXACT, Purpose.SPEED)


@pytest.mark.parametrize("name", KERNEL)
def test_the_attention_turns_them_itself(name: str) -> None:
    form = KERNEL[name]
    model = Attention(form).build()
    held_equal(model, lambda: apply(FuseRotary(LENGTH), model), REACH)
    node = attention_of(model)
    assert node.attributes["do_rotary"].as_int() == 1
    assert node.attributes["rotary_interleaved"].as_int() == int(form.neighbours)
    assert node.inputs[9] is model.graph.inputs[1]
    table = node.inputs[7]
    assert table is not None
    assert table.const_value is not None
    assert tuple(table.const_value.shape) == (LENGTH, form.turned // 2)
    np.testing.assert_allclose(table.const_value.numpy(), cosines(form), rtol=0, atol=LENGTH * 2.0**-23)
    normed = {"RMSNormalization": 2, "Reshape": 4} if form.norm else {}
    if form.norm == "clip":
        normed = {"Clip": 2, "Reshape": 4, "Transpose": 4}
    added = {"Add": 3} if form.biased else {}
    counts = operators(model)
    kept = {key: counts[key] for key in counts if key not in ("Shape", "Concat")}
    assert kept == {"GroupQueryAttention": 1, "MatMul": 3, **added, **normed}
    makers = [value.producer() for value in node.inputs[:3] if value is not None]
    wanted = ["Reshape", "Reshape", "MatMul"] if form.norm else ["Add" if form.biased else "MatMul"] * 3
    assert [maker.op_type for maker in makers if maker is not None] == wanted


@pytest.mark.parametrize("name", OPERATOR)
def test_an_operator_of_its_own_turns_what_the_kernel_does_not(name: str) -> None:
    form = OPERATOR[name]
    model = Attention(form).build()
    held_equal(model, lambda: apply(FuseRotary(LENGTH), model), REACH)
    assert operators(model) == {"GroupQueryAttention": 1, "MatMul": 3, "RotaryEmbedding": 2}
    embeddings = [node for node in model.graph if node.op_type == "RotaryEmbedding"]
    assert [node.attributes["num_heads"].as_int() for node in embeddings] == [HEADS, KV_HEADS]
    assert [node.domain for node in embeddings] == ["com.microsoft"] * 2
    assert "do_rotary" not in attention_of(model).attributes
    tables = [value for value in model.graph.initializers if value.startswith("rotary")]
    assert len(tables) == (4 if form.other_keys or form.growing else 2)


def test_attentions_share_their_tables() -> None:
    model = Attention(Form()).build()
    apply(FuseRotary(LENGTH), model)
    floats = [value for value in model.graph.initializers.values() if str(value.name).startswith("rotary")]
    assert [value.name for value in floats] == ["rotary.cos.32.16", "rotary.sin.32.16"]


def test_the_length_is_read_from_the_metadata() -> None:
    model = Attention(Form()).build()
    (refusal,) = apply(FuseRotary(), model).refused
    assert "max_positions" in refusal.remedy
    model.metadata_props[CONTEXT_LENGTH] = "40"
    assert apply(FuseRotary(), model).changed == 1
    assert "rotary.cos.40.16" in model.graph.initializers


def edited(op_type: str, becomes: str) -> ir.Model:
    """A graph in which an operator of every rotary embedding is another one."""
    model = Attention(Form()).build()
    for node in [node for node in model.graph if node.op_type == op_type]:
        node.op_type = becomes
    return model


@pytest.mark.parametrize(("op_type", "becomes"), [("Add", "Sub"), ("Cos", "Sin")])
def test_every_table_is_taken(op_type: str, becomes: str) -> None:
    """Angles of the other sign, and what no angle gives: the operator multiplies by whatever its tables hold."""
    model = edited(op_type, becomes)
    held_equal(model, lambda: apply(FuseRotary(LENGTH), model), REACH)
    assert attention_of(model).attributes["do_rotary"].as_int() == 1


@pytest.mark.parametrize(
    ("op_type", "becomes", "reason"), [("Neg", "Identity", "no rotation"), ("Neg", "Cos", "not linear")]
)
def test_what_is_no_rotation_is_refused(op_type: str, becomes: str, reason: str) -> None:
    outcome = apply(FuseRotary(LENGTH), edited(op_type, becomes))
    assert outcome.changed == 0
    assert [reason in refusal.reason for refusal in outcome.refused] == [True]


def test_tables_that_are_too_short_are_refused() -> None:
    (refusal,) = apply(FuseRotary(LENGTH), Attention(Form(rows=LENGTH - 1)).build()).refused
    assert "all positions" in refusal.reason


def test_angles_that_depend_on_other_positions_are_refused_or_left() -> None:
    (refusal,) = apply(FuseRotary(LENGTH), Attention(Form(relative="first")).build()).refused
    assert "other positions" in refusal.reason
    model = Attention(Form(relative="largest")).build()
    before = operators(model)
    assert apply(FuseRotary(LENGTH), model).changed == 0
    assert operators(model) == before


def test_attentions_that_turn_already_or_never_are_left() -> None:
    model = Attention(Form()).build()
    node = attention_of(model)
    for index in (0, 1):
        product = next(item for item in model.graph if item.name == f"{'qk'[index]}.product")
        node.replace_input_with(index, product.outputs[0])
    outcome = FuseRotary(LENGTH).run(model, CONTEXT)
    assert (outcome.changed, outcome.refused) == (0, ())


def test_float16_is_refused() -> None:
    model = Attention(Form()).build()
    for value in {item for node in model.graph for item in node.outputs if item.dtype == ir.DataType.FLOAT}:
        value.dtype = ir.DataType.FLOAT16
    (refusal,) = FuseRotary(LENGTH).run(model, CONTEXT).refused
    assert "float32" in refusal.reason
