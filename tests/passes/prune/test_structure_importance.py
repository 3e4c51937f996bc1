"""Which channels go and how the others make up for them, against least squares on the data themselves."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest

from passes.prune.importance import allocated, plain_removal, repaired, repaired_removal

RNG = np.random.default_rng(5)
ROWS, K, N = 200, 12, 7
INPUTS = RNG.normal(size=(ROWS, K)) @ RNG.normal(size=(K, K))
WEIGHT = RNG.normal(size=(K, N)).astype(np.float32)
SECOND = INPUTS.T @ INPUTS / ROWS
EPS = float(np.finfo(np.float64).eps)


def channels(parts: np.ndarray | list[int] | tuple[int, ...], count: int) -> np.ndarray:
    width = K // count
    return (np.asarray(parts)[:, None] * width + np.arange(width)).reshape(-1)


def least(gone: np.ndarray) -> float:
    """Mean squared error of the best fit without these channels, by least squares on the rows."""
    kept = np.setdiff1d(np.arange(K), gone)
    wanted = INPUTS @ WEIGHT.astype(np.float64)
    fitted = np.linalg.lstsq(INPUTS[:, kept], wanted, rcond=None)[0]
    return float(np.square(wanted - INPUTS[:, kept] @ fitted).sum() / ROWS)


def plain(gone: np.ndarray) -> float:
    """The same where nothing makes up for them."""
    return float(np.square(INPUTS[:, gone] @ WEIGHT[gone].astype(np.float64)).sum() / ROWS)


def close(one: float, other: float) -> bool:
    # Inverting H loses as many digits as its condition number has; sums of K N terms.
    return abs(one - other) <= 8 * K * EPS * np.linalg.cond(SECOND) * abs(plain(np.arange(K)))


def test_rows_that_stay_are_the_least_squares_fit() -> None:
    kept = np.array([0, 2, 3, 7, 8, 11])
    wanted = np.linalg.lstsq(INPUTS[:, kept], INPUTS @ WEIGHT.astype(np.float64), rcond=None)[0]
    found = repaired(SECOND, WEIGHT, kept)
    assert found.dtype == np.float32
    bound = 2.0**-24 * np.abs(wanted) + 8 * K * EPS * np.linalg.cond(SECOND) * np.abs(wanted).max()
    assert (np.abs(found - wanted) <= bound).all()


@pytest.mark.parametrize(("count", "clusters"), [(12, 1), (4, 1), (6, 2), (6, 3)])
def test_damage_is_the_error_of_the_best_fit(count: int, clusters: int) -> None:
    removal = repaired_removal(SECOND, WEIGHT, count, count // clusters - 1, clusters)
    assert removal.order.shape == (count // clusters - 1, clusters)
    assert removal.damage[0] == 0.0
    for rounds in range(1, len(removal.damage)):
        assert close(float(removal.damage[rounds]), least(channels(removal.order[:rounds].reshape(-1), count)))
        kept = removal.kept(rounds, count)
        assert len(kept) == count - rounds * clusters
        each = count // clusters
        assert [int((kept // each == cluster).sum()) for cluster in range(clusters)] == [each - rounds] * clusters


@pytest.mark.parametrize(("count", "clusters"), [(12, 1), (4, 1), (6, 2)])
def test_damage_without_repair_is_what_goes_missing(count: int, clusters: int) -> None:
    removal = plain_removal(SECOND, WEIGHT, count, count // clusters - 1, clusters)
    for rounds in range(1, len(removal.damage)):
        gone = channels(removal.order[:rounds].reshape(-1), count)
        assert removal.damage[rounds] == pytest.approx(plain(gone), rel=1e-10)


@pytest.mark.parametrize("count", [12, 4])
def test_the_first_to_go_costs_least_of_all(count: int) -> None:
    removal = repaired_removal(SECOND, WEIGHT, count, 1)
    costs = [least(channels([part], count)) for part in range(count)]
    assert removal.order[0, 0] == int(np.argmin(costs))
    assert close(float(removal.damage[1]), min(costs))


def test_the_order_is_nearly_as_good_as_the_best_of_all_sets() -> None:
    removal = repaired_removal(SECOND, WEIGHT, K, 4)
    best = min(least(np.array(gone)) for gone in combinations(range(K), 4))
    without = min(plain(np.array(gone)) for gone in combinations(range(K), 4))
    assert best <= removal.damage[4] * (1 + 1e-9)
    assert removal.damage[4] < 0.5 * (best + without)


def test_what_others_make_up_for_goes_first_and_costs_nothing() -> None:
    inputs = INPUTS.copy()
    inputs[:, 5] = inputs[:, [1, 8]] @ [0.7, -1.3]
    second = inputs.T @ inputs / ROWS
    second[np.diag_indices(K)] += 1e-9 * np.trace(second) / K
    removal = repaired_removal(second, WEIGHT, K, 2)
    assert removal.order[0, 0] in (1, 5, 8)
    assert removal.damage[1] < 1e-6 * removal.damage[2]


def test_several_go_at_once_where_there_are_very_many() -> None:
    many, width = 1536, 3
    inputs = RNG.normal(size=(3 * many, many)).astype(np.float32)
    weight = (RNG.normal(size=(many, width)) * np.linspace(0.1, 1, many)[:, None]).astype(np.float32)
    second = inputs.T.astype(np.float64) @ inputs / len(inputs)
    removal = repaired_removal(second, weight, many, 10)
    assert removal.order.shape == (10, 1)
    assert len(np.unique(removal.order)) == 10
    assert (np.diff(removal.damage) >= 0).all()
    gone = np.sort(removal.order[:9, 0])
    kept = np.setdiff1d(np.arange(many), gone)
    block = second[np.ix_(gone, gone)] - second[np.ix_(gone, kept)] @ np.linalg.solve(
        second[np.ix_(kept, kept)], second[np.ix_(kept, gone)]
    )
    exact = float(np.einsum("kn,kj,jn->", weight[gone], block, weight[gone]))
    assert removal.damage[9] == pytest.approx(exact, rel=1e-8)


@pytest.mark.parametrize("wanted", [0.0, 2.0, 4.0, 7.0, 100.0])
def test_steps_are_allocated_where_they_damage_least(wanted: float) -> None:
    curves = [np.array([0.0, 1, 3, 7, 20]), np.array([0.0, 4, 9, 15]), np.array([0.0, 0.1, 0.2, 5])]
    counts = allocated(curves, [2.0] * 3, 2 * wanted)
    assert sum(counts) == min(wanted, 10)
    damage = sum(float(curve[count]) for curve, count in zip(curves, counts, strict=True))
    for other in product(*(range(len(curve)) for curve in curves)):
        if sum(other) >= sum(counts):
            assert sum(float(curve[count]) for curve, count in zip(curves, other, strict=True)) >= damage


def test_sizes_of_steps_count() -> None:
    assert allocated([np.array([0.0, 1, 2]), np.array([0.0, 1.5, 3])], [1.0, 2.0], 2.0) == [0, 1]
    assert allocated([np.array([0.0, 1, 2]), np.array([0.0, 2.5, 6])], [1.0, 2.0], 2.0) == [2, 0]


def test_a_matrix_that_is_not_definite_is_an_error() -> None:
    with pytest.raises(np.linalg.LinAlgError):
        repaired_removal(-SECOND, WEIGHT, K, 1)
