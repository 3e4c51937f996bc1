"""How scales and codes are chosen: against exhaustive search and the error written down, on plain arrays."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from passes.quantize.blocks import Grid, Steps, cut, decode, encode, nearest_steps
from passes.quantize.clipping import clipped_steps
from passes.quantize.gptq import damped, descend, feedback, gptq, refit
from passes.quantize.hqq import half_quadratic_steps
from passes.quantize.methods import Method, round_weight

RNG = np.random.default_rng(3)
GRIDS = [Grid(bits, 16, symmetric) for bits in (2, 4, 8) for symmetric in (True, False)]
MATRICES = arrays(
    np.float32, (40, 3), elements=st.floats(-100, 100, width=32).map(lambda x: x if abs(x) > 1e-30 else 0.0)
)


def squared(blocks: np.ndarray, steps: Steps, grid: Grid, importance: np.ndarray | float = 1.0) -> np.ndarray:
    difference = decode(encode(blocks, steps, grid), steps).astype(np.float64) - blocks
    return (importance * difference**2).sum(-1)


def correlated(rows: int, count: int = 400, rank: int | None = None) -> np.ndarray:
    """Inputs whose channels differ in size and go together, float64 [count, rows]."""
    mixing = RNG.normal(size=(rank or rows, rows)) * np.geomspace(0.1, 3, rows)
    return RNG.normal(size=(count, rank or rows)) @ mixing + 0.3


def moment(x: np.ndarray) -> np.ndarray:
    return x.T @ x / len(x)


def loss(weight: np.ndarray, rounded: np.ndarray, second: np.ndarray) -> float:
    """Mean squared error of the products, summed over columns: trace(E^T H E)."""
    error = weight.astype(np.float64) - rounded
    return float(np.einsum("kn,kj,jn->", error, second, error))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@settings(max_examples=15, deadline=None)
@given(MATRICES)
def test_rtn_is_within_half_a_step_or_the_end_of_its_codes(grid, weight):
    blocks = cut(weight, grid.block)
    steps = nearest_steps(blocks, grid)
    codes = encode(blocks, steps, grid)
    assert ((steps.zero >= 0) & (steps.zero <= grid.top)).all()
    error = np.abs(decode(codes, steps).astype(np.float64) - blocks) / np.abs(steps.scale[..., None])
    ends = (codes == 0) | (codes == grid.top)
    slack = 512 * np.finfo(np.float32).eps
    assert (error <= np.where(ends, 1.0, 0.5) + slack).all()
    assert (decode(codes, steps)[blocks == 0] == 0).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_element_gets_the_code_without_a_counterpart(sign):
    block = sign * np.linspace(-0.5, 1, 16, dtype=np.float32)[None]
    steps = nearest_steps(block, Grid(4, 16))
    assert steps.scale[0] == -sign / 8
    assert encode(block, steps, Grid(4, 16))[0, -1] == 0


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@settings(max_examples=15, deadline=None)
@given(MATRICES)
def test_clipping_is_never_worse_than_rtn(grid, weighted, weight):
    blocks = cut(weight, grid.block)
    importance = np.geomspace(0.01, 1, grid.block).astype(np.float32) if weighted else None
    steps = clipped_steps(blocks, grid, importance)
    used = 1.0 if importance is None else importance
    found, plain = squared(blocks, steps, grid, used), squared(blocks, nearest_steps(blocks, grid), grid, used)
    total = (used * blocks.astype(np.float64) ** 2).sum(-1)
    assert (found <= plain + 64 * np.finfo(np.float32).eps * total).all()


@pytest.mark.parametrize(("symmetric", "excess"), [(True, 1.1), (False, 1.15)])
def test_clipping_comes_near_exhaustive_search(symmetric, excess):
    grid = Grid(4, 16, symmetric)
    blocks = RNG.normal(size=(1, 40, 16)).astype(np.float32)
    span = np.abs(blocks).max(-1)
    least = np.full(span.shape, np.inf)
    zeros = [8] if symmetric else range(16)
    for part, zero, sign in itertools.product(np.linspace(0.05, 0.2, 151), zeros, (1, -1)):
        steps = Steps((sign * part * span).astype(np.float32), np.full(span.shape, zero, np.float32))
        least = np.minimum(least, squared(blocks, steps, grid))
    found = squared(blocks, clipped_steps(blocks, grid), grid)
    assert found.sum() <= excess * least.sum()
    assert found.sum() < 0.95 * squared(blocks, nearest_steps(blocks, grid), grid).sum()


def test_important_rows_are_clipped_less():
    grid = Grid(2, 16)
    block = RNG.normal(size=(1, 200, 16)).astype(np.float32)
    importance = np.where(np.arange(16) < 4, 1.0, 0.01).astype(np.float32)
    error = [
        np.square(decode(encode(block, steps, grid), steps) - block)[..., :4].mean()
        for steps in (clipped_steps(block, grid), clipped_steps(block, grid, importance))
    ]
    assert error[1] < 0.6 * error[0]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_hqq_forgives_outliers(grid):
    blocks = RNG.normal(size=(4, 50, 16)).astype(np.float32)
    blocks[..., 0] *= 4

    def norm(steps: Steps) -> np.ndarray:
        return (np.abs(decode(encode(blocks, steps, grid), steps) - blocks) ** 0.7).sum(-1)

    found, plain = norm(half_quadratic_steps(blocks, grid)), norm(nearest_steps(blocks, grid))
    assert (found <= plain * (1 + 1e-5)).all()
    if grid.bits == 4:
        assert found.sum() < 0.98 * plain.sum()


def test_feedback_factors_the_moment():
    second = damped(moment(correlated(24)))
    upper = feedback(second).astype(np.float64)
    np.testing.assert_array_equal(np.tril(upper, -1), 0)
    np.testing.assert_array_equal(np.diagonal(upper), 1)
    inverse = np.linalg.inv(upper)
    diagonal = inverse @ second @ inverse.T
    assert np.abs(diagonal - np.diag(np.diagonal(diagonal))).max() < 1e-5 * np.abs(second).max()


def as_published(weight: np.ndarray, second: np.ndarray, steps: Steps, grid: Grid) -> np.ndarray:
    """Algorithm 1 of the paper with given steps, column by column of W^T, the inverse written out; float64 [K, N]."""
    rows, _ = weight.shape
    left = weight.T.astype(np.float64).copy()
    inverse = np.linalg.cholesky(np.linalg.inv(second)).T
    rounded = np.empty_like(left)
    for k in range(rows):
        scale, zero = steps.scale[:, k // grid.block].astype(np.float64), steps.zero[:, k // grid.block]
        rounded[:, k] = (np.clip(np.rint(left[:, k] / scale) + zero, 0, grid.top) - zero) * scale
        error = (left[:, k] - rounded[:, k]) / inverse[k, k]
        left[:, k:] -= error[:, None] * inverse[k, k:]
    return rounded.T


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_is_that_of_the_paper(symmetric, ordered):
    """Three panels of rows; given the steps that it chose, the codes are the published ones."""
    grid = Grid(4, 32, symmetric)
    weight = RNG.normal(size=(320, 6)).astype(np.float32)
    second = moment(correlated(320))
    made = gptq(weight, second, grid, ordered=ordered, sweeps=0)
    zero = np.full(made.scale.shape, 8.0) if made.zero_point is None else made.zero_point.astype(np.float64)
    order = np.argsort(-np.diagonal(second), kind="stable") if ordered else np.arange(320)
    full = damped(second)[np.ix_(order, order)]
    each = Grid(4, 16, symmetric)
    # One step for each row, so that the order does not matter to the oracle.
    single = Steps(np.repeat(made.scale, 32, 1)[:, order], np.repeat(zero, 32, 1)[:, order])
    expected = np.empty((320, 6))
    stretched = Steps(single.scale, single.zero)
    object.__setattr__(each, "block", 1)
    expected[order] = as_published(weight[order], full, stretched, each)
    found = made.dequantize(320)
    # Ties of float32 and float64 may fall either way, and what follows such a row differs; nearly all agree.
    assert np.mean(np.abs(found - expected) < 1e-5) > 0.97
    assert loss(weight, found, second) == pytest.approx(loss(weight, expected, second), rel=0.02)


@pytest.mark.parametrize("grid", [Grid(2, 32), Grid(4, 32), Grid(4, 64, False), Grid(8, 32)], ids=str)
@pytest.mark.parametrize("ordered", [False, True])
def test_gptq_loses_less_than_rounding_each_element(grid, ordered):
    weight = RNG.normal(size=(200, 40)).astype(np.float32)
    second = moment(correlated(200, rank=150))
    plain = min(
        loss(weight, round_weight(weight, grid, method, second).dequantize(200), second)
        for method in (Method.RTN, Method.MSE, Method.WEIGHTED, Method.HQQ)
    )
    without = loss(weight, gptq(weight, second, grid, ordered=ordered, sweeps=0).dequantize(200), second)
    found = loss(weight, gptq(weight, second, grid, ordered=ordered).dequantize(200), second)
    assert found < without < 0.85 * plain


def test_refit_is_the_least_squares_solution():
    grid = Grid(4, 16, symmetric=False)
    weight = RNG.normal(size=(48, 5)).astype(np.float32)
    x = correlated(48)
    blocks = cut(weight, 16)
    steps = nearest_steps(blocks, grid)
    codes = encode(blocks, steps, grid)
    found = refit(blocks, codes, steps, moment(x).astype(np.float32))
    for n in range(5):
        spread = np.stack([x[:, b * 16 : b * 16 + 16] @ (codes[n, b] - steps.zero[n, b]) for b in range(3)], axis=1)
        expected, *_ = np.linalg.lstsq(spread, x @ weight[:, n], rcond=None)
        np.testing.assert_allclose(found.scale[n], expected, rtol=1e-3)
    np.testing.assert_array_equal(found.zero, steps.zero)


def test_descend_puts_each_code_where_the_error_is_least():
    """One pass of coordinate descent, written down with the error itself, over more rows than a panel holds."""
    grid = Grid(4, 32)
    weight = RNG.normal(size=(160, 3)).astype(np.float32)
    second = damped(moment(correlated(160)))
    blocks = cut(weight, 32)
    steps = nearest_steps(blocks, grid)
    codes = encode(blocks, steps, grid)
    found = descend(blocks, codes, steps, second.astype(np.float32), grid)
    flat, expected = weight.T.astype(np.float64), codes.reshape(3, -1).astype(np.int64)
    scale = np.repeat(steps.scale, 32, 1)
    for n, k in itertools.product(range(3), range(160)):
        trials = np.repeat(expected[n][None], 16, 0)
        trials[:, k] = np.arange(16)
        error = flat[n] - (trials - 8) * scale[n]
        expected[n, k] = np.einsum("tk,kj,tj->t", error, second, error).argmin()
    assert np.mean(found.reshape(3, -1) == expected) > 0.98
    before, after = (loss(weight, decode(c, steps).reshape(3, -1).T, second) for c in (codes, found))
    assert after < 0.6 * before


def test_a_large_weight_in_parts_is_the_same(monkeypatch):
    weight = RNG.normal(size=(72, 50)).astype(np.float32)
    second = moment(correlated(72))
    whole = {method: round_weight(weight, Grid(4, 32), method, second) for method in Method}
    monkeypatch.setattr("passes.quantize.methods._ELEMENTS", 72 * 7)
    monkeypatch.setattr("passes.quantize.gptq._ELEMENTS", 96 * 7)
    for method, expected in whole.items():
        found = round_weight(weight, Grid(4, 32), method, second)
        same = np.mean(found.values == expected.values)
        # Matrix products of another width are summed in another order.
        assert same == 1 if method is not Method.GPTQ else same > 0.97


@pytest.mark.parametrize("second", [np.zeros((48, 48)), np.diag(np.arange(48.0))], ids=["nothing", "a dead channel"])
@pytest.mark.parametrize("method", [Method.WEIGHTED, Method.GPTQ])
def test_moments_without_full_rank(second, method):
    weight = RNG.normal(size=(48, 20)).astype(np.float32)
    weight[:, 3] = 0
    made = round_weight(weight, Grid(4, 32), method, second)
    assert np.isfinite(made.scale).all()
    assert (made.dequantize(48)[:, 3] == 0).all()
    assert np.linalg.norm(made.dequantize(48) - weight) < 0.2 * np.linalg.norm(weight)


def test_a_method_needs_its_moment():
    with pytest.raises(ValueError, match="gptq needs the second moment"):
        round_weight(np.ones((32, 16), np.float32), Grid(), Method.GPTQ)


@pytest.mark.parametrize("method", [Method.RTN, Method.MSE])
def test_a_large_weight_is_rounded_in_a_part_of_its_memory(method, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    weight = RNG.normal(size=(1024, 4096)).astype(np.float32)
    tracemalloc.start()
    try:
        made = round_weight(weight, Grid(4, 32), method)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # A quarter for the codes, a sixteenth for scales and zeros, and parts of a sixteenth on two threads.
    assert made.values.nbytes + 2 * made.scale.nbytes < peak < 1.1 * weight.nbytes
    assert made.packed().nbytes == weight.nbytes // 8
