"""kv-cache: structure, codes and numbers against a plain oracle, positions that calibration did not see, refusals."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from builders import CONTEXT, Array, evaluate
from observing import Observer
from rotary_graphs import CALLS, CAPACITY, HEADS, KV_HEADS, Attention, Call, Form

from artifacts.target import CPU, CUDA, OPENVINO, TENSORRT, Target
from passes.base import Context, Effect, Purpose
from passes.fusion import FuseRotary, PackAttention, PackProducts
from passes.grammar import check, signature
from passes.pipeline import Pipeline, parse
from passes.precision import Float16, KvCache

PROMPT = CALLS["ragged prompt"]
WHOLE = Call((CAPACITY,), CAPACITY, prompt=True)
EPSILON = float(np.finfo(np.float32).eps)
CACHES = ("past.key", "past.value", "present.key", "present.value")
LARGEST = {"int8": 127, "int4": 7}


def fused(form: Form | None = None) -> ir.Model:
    """An attention that turns its queries and keys itself, where its kernel can."""
    model = Attention(form or Form()).build()
    FuseRotary(2048).run(model, CONTEXT)
    return model


def node_of(model: ir.Model) -> ir.Node:
    return next(node for node in model.graph if node.op_type == "GroupQueryAttention")


def observed(model: ir.Model, call: Call = WHOLE, target: Target = CPU) -> Context:
    """Calibration on that call; the cache of a prompt is as long as the prompt."""
    feeds = call.feeds(model)
    return Context(target, Observer(feeds))


def narrowed(model: ir.Model, dtype: str = "int8", call: Call = WHOLE) -> ir.Model:
    """Hold the pass to its promises; the result."""
    context, before = observed(model, call), signature(model)
    outcome = KvCache(dtype).run(model, context)
    assert (outcome.changed, outcome.refused) == (1, ())
    check(model, CPU)
    kept = [one for one in signature(model) if one[1] not in CACHES]
    assert kept == [one for one in before if one[1] not in CACHES]
    assert [one[:2] for one in signature(model)] == [one[:2] for one in before]
    again = KvCache(dtype).run(model.clone(), Context(CPU))
    assert (again.changed, again.refused) == (0, ())
    return model


def scales_of(model: ir.Model) -> tuple[Array, Array]:
    key, value = (node_of(model).inputs[index].const_value for index in (12, 13))  # type: ignore[union-attr]
    assert key is not None
    assert value is not None
    return key.numpy(), value.numpy()


def decoded(codes: Array, scale: Array) -> Array:
    """The numbers that a cache stands for."""
    if codes.dtype == np.uint8:
        nibbles = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)
        codes = nibbles.astype(np.int8) - 8
    return codes.astype(np.float32) * scale


def feeds_of(model: ir.Model, call: Call, **changed: Array) -> dict[str, Array]:
    """Feeds of a call, an empty cache of what the graph takes among them."""
    taken = {str(value.name): value for value in model.graph.inputs}
    plain = {name: array for name, array in call.feeds(model).items() if name not in CACHES}
    for name in CACHES[:2]:
        dtype, shape = taken[name].dtype, taken[name].shape
        assert dtype is not None
        assert shape is not None
        plain[name] = np.zeros((len(call.lengths), shape[1], CAPACITY, shape[3]), dtype.numpy())  # type: ignore[arg-type]
    return {**plain, **changed}


def test_it_is_lossy_and_for_size() -> None:
    assert (KvCache.effect, KvCache.purpose, KvCache.alters_cache) == (Effect.LOSSY, Purpose.SIZE, True)
    assert parse(str(Pipeline((KvCache("int4"),))), (KvCache,)).passes == (KvCache("int4"),)
    with pytest.raises(ValueError, match="dtype is 'int7', not int8, int4 or float16"):
        KvCache("int7")


@pytest.mark.parametrize(("dtype", "element", "width", "bits"), [("int8", "INT8", 16, 8), ("int4", "UINT8", 8, 4)])
def test_structure(dtype: str, element: str, width: int, bits: int) -> None:
    model = fused()
    before, clone = node_of(model), model.clone()
    untouched = signature(clone)
    narrowed(model, dtype)
    node = node_of(model)
    assert node is before
    assert signature(clone) == untouched, "types are shared with clones"
    caches = [one[2:] for one in signature(model) if one[1] in CACHES]
    assert caches == [(element, f"[batch,{KV_HEADS},capacity,{width}]")] * 4
    assert node.attributes["k_quant_type"].as_string() == node.attributes["v_quant_type"].as_string() == "PER_CHANNEL"
    assert node.attributes["kv_cache_bit_width"].as_int() == bits
    assert [scale.shape for scale in scales_of(model)] == [(KV_HEADS, 1, 16)] * 2


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("packed", [False, True])
def test_what_is_kept_is_the_nearest_code(dtype: str, packed: bool) -> None:
    model = fused()
    for item in (PackProducts(), PackAttention()) if packed else ():
        assert item.run(model, CONTEXT).changed == 1
    wanted = evaluate(model, feeds_of(model, WHOLE))
    found = evaluate(narrowed(model, dtype), feeds_of(model, WHOLE))
    for name, scale in zip(("present.key", "present.value"), scales_of(model), strict=True):
        codes = decoded(found[name], scale)
        reach = scale / 2 * (1 + 64 * EPSILON) + 64 * EPSILON
        assert (np.abs(codes - wanted[name]) <= reach).all(), name
        assert (np.abs(wanted[name]).max(axis=(0, 2)) <= scale[:, 0] * LARGEST[dtype] * (1 + 64 * EPSILON)).all()
    # A value's largest magnitude is its largest code: the scale is not larger than it need be.
    values = np.abs(wanted["present.value"]).max(axis=(0, 2))
    np.testing.assert_allclose(scales_of(model)[1][:, 0] * LARGEST[dtype], values, rtol=1e-6)


def attend(query: Array, key: Array, value: Array, lengths: tuple[int, ...]) -> list[Array]:
    """Plain causal attention of prompts, a row each: ``[tokens, heads * width]``."""
    rows = []
    for row, length in enumerate(lengths):
        width = key.shape[-1]
        q = query[row, :length].reshape(length, HEADS, width).astype(np.float64)
        mixed = np.empty_like(q)
        for head in range(HEADS):
            kept = head // (HEADS // KV_HEADS)
            scores = q[:, head] @ key[row, kept, :length].T * width**-0.5
            scores[np.triu_indices(length, 1)] = -np.inf
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            mixed[:, head] = weights / weights.sum(axis=1, keepdims=True) @ value[row, kept, :length]
        rows.append(mixed.reshape(length, -1))
    return rows


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_the_attention_is_that_of_the_rounded_cache(dtype: str) -> None:
    """Heads of 8: they are turned before the operator, so that its queries can be looked at."""
    model = fused(Form(width=8, turned=8))
    query = node_of(model).inputs[0]
    assert query is not None
    narrowed(model, dtype)
    model.graph.outputs.append(query)
    found = evaluate(model, feeds_of(model, PROMPT))
    caches = [
        decoded(found[f"present.{name}"], scale) for name, scale in zip(("key", "value"), scales_of(model), strict=True)
    ]
    wanted = attend(found[str(query.name)], *caches, PROMPT.lengths)
    for row, (length, expected) in enumerate(zip(PROMPT.lengths, wanted, strict=True)):
        limit = 64 * EPSILON * max(1.0, float(np.abs(expected).max()))
        np.testing.assert_allclose(found["y"][row, :length], expected, rtol=0, atol=limit)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_step_after_a_prompt_reads_what_the_prompt_left(dtype: str) -> None:
    model = narrowed(fused(), dtype)
    lengths, start = (9, 6), (8, 5)
    whole = feeds_of(model, Call(lengths, 9, prompt=True))
    at_once = evaluate(model, whole)
    prompt = feeds_of(model, Call(start, 8, prompt=True)) | {"x": whole["x"][:, :8]}
    kept = evaluate(model, prompt)
    step = feeds_of(model, Call(lengths, 1))
    step |= {"x": np.stack([whole["x"][row, [length - 1]] for row, length in enumerate(lengths)])}
    step |= {f"past.{name}": kept[f"present.{name}"] for name in ("key", "value")}
    found = evaluate(model, step)
    for row, length in enumerate(lengths):
        wanted = at_once["y"][row, length - 1]
        limit = 64 * EPSILON * max(1.0, float(np.abs(wanted).max()))
        np.testing.assert_allclose(found["y"][row, 0], wanted, rtol=0, atol=limit)
        for name in ("present.key", "present.value"):
            assert (found[name][row, :, :length] == at_once[name][row, :, :length]).all()


FORMS = {
    "halves": Form(),
    "neighbours": Form(neighbours=True),
    "a part": Form(width=32, turned=16),
    "before the operator": Form(width=8, turned=8),
    "before the operator, neighbours": Form(width=8, turned=8, neighbours=True),
}


def held_at(positions: int, model: ir.Model) -> tuple[Array, Array]:
    """Keys as a float graph keeps them and as the narrowed one does, of the same tokens at other positions."""
    far = WHOLE.feeds(model)["position_ids"] + positions
    wanted = evaluate(model, feeds_of(model, WHOLE, position_ids=far))["present.key"]
    found = evaluate(narrowed(model), feeds_of(model, WHOLE, position_ids=far))["present.key"]
    return wanted, decoded(found, scales_of(model)[0])


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_scales_hold_at_positions_that_calibration_did_not_reach(form: Form) -> None:
    model = fused(form)
    wanted, found = held_at(1500, model)
    scale = scales_of(model)[0]
    assert (np.abs(found - wanted) <= scale / 2 * (1 + 64 * EPSILON) + 64 * EPSILON).all()


def test_keys_turned_by_nodes_that_are_not_known_have_a_scale_for_each_head() -> None:
    model = Attention(Form()).build()
    wanted, found = held_at(1500, model)
    scale = scales_of(model)[0]
    assert (scale == scale[:, :, :1]).all()
    assert (np.abs(found - wanted) <= scale / 2 * (1 + 64 * EPSILON) + 64 * EPSILON).all()


def test_channels_that_are_always_zero_stay_zero() -> None:
    model = fused()
    weight = model.graph.initializers["v.weight"]
    assert weight.const_value is not None
    array = weight.const_value.numpy().copy()
    array[:, 3] = 0.0
    weight.const_value = ir.tensor(array, name="v.weight")
    found = evaluate(narrowed(model), feeds_of(model, WHOLE))["present.value"]
    assert scales_of(model)[1][0, 0, 3] == 1.0
    assert not found[:, 0, :, 3].any()
    assert found[:, 0, :, 2].any()


def test_for_cuda_the_casts_of_float16_go_and_the_cache_is_read_as_it_is() -> None:
    model = fused()
    assert Float16().run(model, Context(CUDA)).changed
    casts = sum(node.op_type == "Cast" for node in model.graph)
    outcome = KvCache("float16").run(model, Context(CUDA))
    assert (outcome.changed, outcome.refused) == (1, ())
    check(model, CUDA)
    node, inputs = node_of(model), {value.name: value for value in model.graph.inputs}
    assert [value.name for value in model.graph.outputs] == ["y", "present.key", "present.value"]
    assert (node.inputs[3], node.inputs[4]) == (inputs["past.key"], inputs["past.value"])
    assert node.outputs[1:] == tuple(model.graph.outputs[1:])
    assert {one[2] for one in signature(model) if one[1] in CACHES} == {"FLOAT16"}
    assert sum(node.op_type == "Cast" for node in model.graph) == casts - 4
    assert KvCache("float16").run(model, Context(CUDA)).changed == 0


HALF = float(np.finfo(np.float16).eps)


@pytest.mark.parametrize("form", [Form(), Form(width=8, turned=8), Form(neighbours=True)])
def test_float16_on_cpu(form: Form) -> None:
    """Products stay float32; tables, keys and values are rounded to float16, and so is what the attention gives."""
    model = fused(form)
    wanted = {name: call.results(model) for name, call in CALLS.items() if call.prompt}
    products = [node for node in model.graph if node.op_type == "MatMul"]
    narrowed(model, "float16")
    assert [node for node in model.graph if node.op_type == "MatMul"] == products
    assert {one[2] for one in signature(model) if one[1] in CACHES} == {"FLOAT16"}
    assert model.graph.outputs[0].dtype == ir.DataType.FLOAT
    for name, parts in wanted.items():
        found = evaluate(model, feeds_of(model, CALLS[name]))
        for row, length in enumerate(CALLS[name].lengths):
            for part in ("y", "present.key", "present.value"):
                expected = parts[f"{part} {row}"]
                got = found[part][row, :length] if part == "y" else found[part][row, :, :length]
                # A turned key: two products of rounded numbers; an output: an average of values, weights off by scores.
                limit = 8 * HALF * max(1.0, float(np.abs(expected).max()))
                np.testing.assert_allclose(got.astype(np.float32), expected, rtol=0, atol=limit)


def test_for_cuda_a_float32_attention_gets_casts() -> None:
    model = fused()
    context = observed(model, target=CUDA)
    assert KvCache().run(model, context).changed == 1
    check(model, CUDA)
    node = node_of(model)
    assert {value.dtype for value in node.inputs[:3] if value is not None} == {ir.DataType.FLOAT16}
    assert [value.dtype for value in node.outputs] == [ir.DataType.FLOAT16, ir.DataType.INT8, ir.DataType.INT8]
    assert KvCache().run(model, context).changed == 0


def test_for_cuda_int8_beside_float16() -> None:
    model = fused()
    context = observed(model, target=CUDA)
    Float16().run(model, context)
    assert KvCache().run(model, context).changed == 1
    check(model, CUDA)
    assert {one[2] for one in signature(model) if one[1] in CACHES} == {"INT8"}
    assert {scale.dtype for scale in scales_of(model)} == {np.dtype(np.float32)}
    assert KvCache().run(model, context).changed == 0


def shared_cache(model: ir.Model) -> None:
    model.graph.inputs[5].replace_all_uses_with(model.graph.inputs[4])


def unknown_width(model: ir.Model) -> None:
    for value in model.graph.inputs[4:]:
        value.shape = ir.Shape(("batch", KV_HEADS, "capacity", "width"))


def no_cache(model: ir.Model) -> None:
    for index in (3, 4):
        node_of(model).replace_input_with(index, None)


def read_elsewhere(model: ir.Model) -> None:
    node = ir.node("Neg", [node_of(model).outputs[1]], name="reader")
    node.outputs[0].name = "negative"
    model.graph.append(node)
    model.graph.outputs.append(node.outputs[0])


def nothing(model: ir.Model) -> None: ...


@pytest.mark.parametrize(
    ("spoil", "dtype", "target", "reason", "remedy"),
    [
        (nothing, "int8", OPENVINO, "has no GroupQueryAttention", "compile for cpu or cuda"),
        (nothing, "float16", TENSORRT, "has no GroupQueryAttention", "compile for cpu or cuda"),
        (unknown_width, "int8", CPU, "how wide its heads are", ""),
        (shared_cache, "int8", CPU, "not an input and an output", ""),
        (no_cache, "int8", CPU, "keeps no keys and values", ""),
        (read_elsewhere, "int8", CPU, "not an input and an output", ""),
    ],
)
def test_refusals(spoil: Callable[[ir.Model], None], dtype: str, target: Target, reason: str, remedy: str) -> None:
    model = fused()
    context = observed(model, target=target)
    spoil(model)
    before = signature(model)
    outcome = KvCache(dtype).run(model, context)
    assert outcome.changed == 0
    (refusal,) = outcome.refused
    assert reason in refusal.reason
    assert remedy in refusal.remedy
    assert signature(model) == before


def test_without_calibration_data_it_is_refused() -> None:
    (refusal,) = KvCache().run(fused(), CONTEXT).refused
    assert refusal.reason == "calibration data is needed"


def test_a_float16_attention_on_cpu_has_no_kernel_for_few_bits() -> None:
    model = fused()
    Float16().run(model, Context(CUDA))
    (refusal,) = KvCache().run(model, Context(CPU)).refused
    assert "beside float16" in refusal.reason


def test_a_graph_without_attention_is_left() -> None:
    model = Attention(Form()).build()
    for node in list(model.graph):
        if node.op_type == "GroupQueryAttention":
            node.op_type = "Other"
    outcome = KvCache().run(model, CONTEXT)
    assert (outcome.changed, outcome.refused) == (0, ())
