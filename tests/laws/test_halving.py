"""Successive halving: who goes on, on planted curves and on the exact recursion of SGD."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from rightbatch.laws.halving import REDUCTION, Arm, make_rungs, promote, rank
from rightbatch.laws.linear_regression import LinearRegression, expected_loss, initial_loss

NAN = math.nan
Array = NDArray[np.float64]


def arms_at(batch: int, rates: Sequence[float]) -> list[Arm]:
    return [Arm(batch_size=batch, learning_rate=rate) for rate in rates]


NINE = arms_at(8, [2.0**k for k in range(9)])

# ----------------------------------------------------------------------------------------- rungs


def test_on_a_rung_all_trainings_cost_the_same_until_they_end() -> None:
    updates, costs = {1: 9000, 10: 900, 1000: 9}, {1: 90.0, 10: 12.0, 1000: 6.0}
    rungs = make_rungs(updates, costs, 27)
    assert [rung[1] for rung in rungs] == pytest.approx([1 / 27, 1 / 9, 1 / 3, 1])
    for rung in rungs:
        spent = {size: rung[size] * costs[size] for size in costs}
        assert all(
            rung[size] == 1.0 or cost == pytest.approx(max(spent.values()))
            for size, cost in spent.items()
        )


def test_with_equal_costs_each_goes_the_same_share_and_enough_updates() -> None:
    updates = {1: 900, 25: 36}
    rungs = make_rungs(updates, dict.fromkeys(updates, 1.0), 100)
    assert [rung[25] for rung in rungs] == pytest.approx([1 / 9, 1 / 3, 1])  # 36/27 is too few
    assert all(rung[1] == rung[25] for rung in rungs)
    assert make_rungs({1: 2}, {1: 1.0}, 100) == [{1: 1.0}]
    assert make_rungs(updates, dict.fromkeys(updates, 1.0), 2) == [dict.fromkeys(updates, 1.0)]


# ------------------------------------------------------------------------------------- decisions


def test_the_best_third_goes_on_and_the_rates_beside_the_best() -> None:
    exact = [[abs(k - 5.4)] * 3 for k in range(9)]  # 5, 6, 4 are best
    # A third of 2⁵ is between 2³ and 2⁴: the first that is lower by that is 2³.
    assert promote(exact, NINE, {8: 1 / 3}) == [5, 6, 4, 3]
    assert promote(exact, NINE, {8: 1 / 27}) == [5, 6, 4, 3, 2, 1, 0]
    assert promote(exact, NINE, {8: 1.0}) == [5, 6, 4]
    falling = [[float(-k)] * 3 for k in range(9)]
    assert promote(falling, NINE, {8: 1 / 3}) == [8, 7, 6]
    rising = [[float(k)] * 3 for k in range(9)]
    assert promote(rising, NINE, {8: 1 / 3}) == [0, 1, 2]


def test_a_rate_that_is_exactly_a_third_is_the_last_one_below() -> None:
    arms = arms_at(8, [float(f"{3.0**k:.12g}") for k in range(-8, 1)])
    scores = [[abs(k - 5)] for k in range(9)]
    assert promote(scores, arms, {8: 1 / 3}) == [5, 4, 6]
    assert promote(scores, arms, {8: 1 / 9}) == [5, 4, 6, 3]


def test_cells_that_cannot_be_told_from_the_last_one_go_on_while_there_is_room() -> None:
    spread = np.array([-1.0, 0.0, 1.0])
    far = [Arm(batch_size=2**k, learning_rate=1.0) for k in range(9)]
    # Differences seed by seed are 0.1, surely: chance that all have in common tells nothing.
    shares = {2**k: 1 / 3 for k in range(9)}
    assert promote([0.1 * k + spread for k in range(9)], far, shares) == [0, 1, 2]
    mixed = [0.1 * k + np.roll(spread, k) for k in range(9)]
    # 9/3 cells, and room for half as many again.
    assert promote(mixed, far, shares) == [0, 1, 2, 3, 4]
    assert len(promote([row[:1] for row in mixed], far, shares)) == 3  # one seed tells no chance


def test_a_cell_that_diverged_on_a_seed_comes_last_and_on_all_seeds_nowhere() -> None:
    scores = [[1.0, 1.0], [0.0, NAN], [NAN, NAN], [2.0, 2.0]]
    arms = arms_at(8, [1.0, 2.0, 4.0, 0.5])
    assert rank(scores) == [0, 3, 1]
    assert promote(scores, arms, {8: 1 / 3}) == [0, 3, 1]
    assert promote([[NAN]] * 4, arms, {8: 1 / 3}) == []
    assert promote([[3.0], [NAN], [NAN], [NAN]], arms, {8: 1 / 3}) == [0]


@given(st.integers(1, 40), st.integers(1, 4), st.integers(0, 2**20))
def test_what_goes_on_is_neither_too_much_nor_too_little(cells: int, seeds: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    arms = [Arm(batch_size=2 ** (i % 5), learning_rate=2.0 ** (i // 5)) for i in range(cells)]
    scores = np.where(rng.random((cells, seeds)) < 0.1, NAN, rng.normal(size=(cells, seeds)))
    shares = {2**k: 1 / 3 for k in range(5)}
    kept, ranked = promote(scores, arms, shares), rank(scores)
    quota = math.ceil(cells / REDUCTION)
    assert kept[:quota] == ranked[:quota]
    assert len(kept) == len(set(kept)) <= math.ceil(1.5 * quota) + 3
    order = rng.permutation(cells)
    again = promote(scores[order], [arms[i] for i in order], shares)
    assert {int(order[i]) for i in again} == set(kept)


# ---------------------------------------------------------------------------------- whole races


def race(
    arms: Sequence[Arm],
    updates: dict[int, int],
    costs: dict[int, float],
    score: Callable[[Arm, int], Sequence[float]],
) -> tuple[Arm, float]:
    """The winner, and the cost over that of all arms to their end, each rung begun anew."""
    alive, spent = list(arms), 0.0
    done: dict[Arm, float] = {}
    rungs = make_rungs(updates, costs, len(arms))
    table: list[Sequence[float]] = []
    for number, rung in enumerate(rungs):
        if number:
            alive = [alive[i] for i in promote(table, alive, rungs[number - 1])]
        for arm in alive:
            share = rung[arm.batch_size]
            if done.get(arm) != share:  # one that has come to its end is not run again
                spent += share * costs[arm.batch_size]
                done[arm] = share
        table = [
            score(arm, max(1, round(rung[arm.batch_size] * updates[arm.batch_size])))
            for arm in alive
        ]
    return alive[rank(table)[0]], spent / sum(costs[arm.batch_size] for arm in arms)


@pytest.mark.parametrize("seed", range(5))
def test_curves_that_cross_on_every_rung_do_not_mislead_it(seed: int) -> None:
    """Loss = e^(−ηt) + η/40: the rate that is best falls as ln(t)/t, by less than the way left."""
    rates = [2.0**k for k in range(-8, 2)]

    def score(arm: Arm, steps: int) -> list[float]:
        loss = math.exp(-arm.learning_rate * steps) + arm.learning_rate / 40
        noise = np.random.default_rng((seed, steps, round(1e3 * arm.learning_rate))).normal(size=3)
        return [math.log(loss) + 0.02 * x for x in noise]

    arms = arms_at(1, rates)
    exact = min(rates, key=lambda r: math.exp(-r * 270) + r / 40)
    early = min(rates, key=lambda r: math.exp(-r * 10) + r / 40)
    assert early >= 8 * exact
    winner, cost = race(arms, {1: 270}, {1: 1.0}, score)
    assert winner.learning_rate == exact
    assert cost < 0.8  # ten cells of one size are few: four or five are left on the last rung


def problem(smallest: float, noise: float) -> LinearRegression:
    values = np.geomspace(2.0, smallest, 8)
    return LinearRegression(
        eigenvalues=tuple(values.tolist()),
        offsets=tuple((values**-0.5).tolist()),
        noise_variance=noise,
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("smallest", "noise", "examples"),
    [(0.02, 0.3, 200_000), (0.02, 5.0, 100_000), (0.3, 5.0, 50_000), (0.005, 20.0, 400_000)],
)
@pytest.mark.parametrize("knee", [None, 1, 100])
def test_on_exact_sgd_it_finds_the_grid_s_best_for_a_part_of_its_cost(
    smallest: float, noise: float, examples: int, knee: int | None, seed: int
) -> None:
    """At equal examples (knee None), and at equal seconds where t(B) = 1 + B/knee."""
    about, rng = problem(smallest, noise), np.random.default_rng(seed)
    sizes, rates = (1, 4, 16, 64, 256), [2.0**k for k in range(-9, 1)]
    arms = [arm for size in sizes for arm in arms_at(size, rates)]
    updates = {size: examples // size for size in sizes}
    costs = {size: 1.0 if knee is None else updates[size] * (1 + size / knee) for size in sizes}
    pace = {(arm, s): math.exp(0.03 * rng.normal()) for arm in arms for s in range(3)}

    def loss(arm: Arm, steps: Sequence[float]) -> Array:
        excess = expected_loss(
            about, learning_rates=[arm.learning_rate], global_batch=arm.batch_size, steps=steps
        )[0]
        return excess + noise / 2

    def score(arm: Arm, steps: int) -> list[float]:
        found = loss(arm, [steps * pace[arm, s] for s in range(3)])
        return [NAN if x > 2 * initial_loss(about) + noise else math.log(x) for x in found]

    winner, cost = race(arms, updates, costs, score)
    final = {arm: loss(arm, [updates[arm.batch_size]])[0] for arm in arms}
    assert final[winner] <= 1.05 * min(final.values())
    assert cost <= 0.45
