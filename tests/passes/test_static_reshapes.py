"""static-reshapes: structure, numbers, what is left, idempotence."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from builders import GraphBuilder, apply, apply_equal, operators, random

from passes.base import Effect, Purpose
from passes.cleanup import StaticReshapes

INT64 = ir.DataType.INT64
X = {"x": random(0, 2, 5, 12)}


def reshape(target: tuple[str | int, ...], shape: tuple[str | int, ...], *, allowzero: int = 1) -> ir.Model:
    """A Reshape of ``[batch, sequence, 12]`` whose target is put together of the input's lengths, as exporters do."""
    g = GraphBuilder()
    x = g.input("x", ("batch", "sequence", 12))
    names = {"batch": 0, "sequence": 1}
    parts = [
        g.add("Shape", x, start=names[item], end=names[item] + 1, dtype=INT64, shape=(1,))
        if isinstance(item, str)
        else g.constant([item])
        for item in target
    ]
    wanted = g.add("Concat", *parts, axis=0, dtype=INT64, shape=(len(target),))
    return g.finish(g.add("Reshape", x, wanted, allowzero=allowzero, shape=shape))


def test_it_is_exact_and_for_speed() -> None:
    assert (StaticReshapes.effect, StaticReshapes.purpose) == (Effect.EXACT, Purpose.SPEED)


@pytest.mark.parametrize(
    ("target", "constant"),
    [
        (("batch", "sequence", 3, 4), [0, 0, 3, 4]),
        (("batch", "sequence", -1, 4), [0, 0, -1, 4]),
        (("batch", 3, "sequence", 4), [0, 3, -1, 4]),
        (("sequence", "batch", 12), None),
        (("sequence", -1, 12), None),
    ],
)
def test_structure_and_numbers(target: tuple[str | int, ...], constant: list[int] | None) -> None:
    model = reshape(target, tuple(dim if dim != -1 else 3 for dim in target))
    before = operators(model)
    outcome = apply_equal(StaticReshapes(), model, X, exact=True)
    if constant is None:
        assert outcome.changed == 0
        assert operators(model) == before
        return
    assert outcome.changed == 1
    (node,) = model.graph
    assert node.inputs[0] is model.graph.inputs[0]
    tensor = node.inputs[1].const_value if node.inputs[1] is not None else None
    assert tensor is not None
    np.testing.assert_array_equal(tensor.numpy(), constant)
    assert "allowzero" not in node.attributes


def test_constant_targets_are_left() -> None:
    g = GraphBuilder()
    x = g.input("x", ("batch", "sequence", 12))
    model = g.finish(g.add("Reshape", x, g.constant([0, 0, 3, 4]), shape=("batch", "sequence", 3, 4)))
    assert apply(StaticReshapes(), model).changed == 0
