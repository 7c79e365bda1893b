"""Means and best rates over seeds: what they should be, and how often their intervals hold it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rightbatch.laws.seeds import (
    best_of_rates,
    draw_best_rates,
    exponent_over_sizes,
    geometric_mean_over_seeds,
    mean_over_seeds,
    rate_interval,
)

RATES = tuple(2.0**k for k in range(-6, 4))


def test_one_value_has_no_interval_and_none_no_value() -> None:
    one, nothing = mean_over_seeds([0.5, None]), mean_over_seeds([None])
    assert (one.value, one.low, one.high, one.n) == (0.5, None, None, 1)
    assert not nothing.resolved and nothing.n == 0


@pytest.mark.parametrize("count", [2, 5])
def test_means_lie_in_their_intervals_95_times_in_100(count: int) -> None:
    rng = np.random.default_rng(3)
    found = [mean_over_seeds((rng.normal(size=count) + 7).tolist()) for _ in range(1000)]
    held = np.mean([(e.low or -9) <= 7 <= (e.high or 99) for e in found])
    assert 0.93 <= held <= 0.97


def test_a_geometric_mean_is_not_moved_by_units_and_is_open_where_a_seed_missed() -> None:
    plain, scaled = (geometric_mean_over_seeds([2.0, 8.0, 4.0], scale) for scale in (1.0, 10.0))
    assert plain.value == pytest.approx(4) and scaled.value == pytest.approx(40)
    assert scaled.low == pytest.approx(10 * (plain.low or 0))
    missed = geometric_mean_over_seeds([2.0, None, 4.0])
    assert (missed.value, missed.low, missed.high) == (None, 2.0, None)
    assert not geometric_mean_over_seeds([]).resolved


def test_a_rate_that_fails_on_a_seed_is_worse_than_one_that_is_slow() -> None:
    nan = math.nan
    assert best_of_rates([[1.0, nan, 1.0], [900.0, 900.0, 900.0]]) == 1
    assert best_of_rates([[nan, nan], [5.0, nan], [4.0, nan]]) == 2
    assert best_of_rates([[-3.0, -3.0], [-1.0, -1.0]]) == 0


def valley(best: float, noise: float, rng: np.random.Generator, seeds: int = 5) -> np.ndarray:
    """ln steps that rise from a best rate on both sides, and differ between seeds."""
    distance = np.log2(np.array(RATES)) - math.log2(best)
    shared = rng.normal(size=(1, seeds)) * 0.3
    return distance[:, None] ** 2 * 0.2 + shared + noise * rng.normal(size=(len(RATES), seeds))


def test_the_interval_of_the_best_rate_holds_it() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        best = 2.0 ** rng.uniform(-4, 1)
        scores = valley(best, 0.15, rng)
        found = rate_interval(RATES, best_of_rates(scores), draw_best_rates(scores), 5)
        held += (found.low or 0) <= best <= (found.high or math.inf)
    assert held >= 0.91 * 200  # the grid is coarse: more than 95 % is honest too


@pytest.mark.parametrize("noise", [0.1, 0.4, 1.0])
def test_few_seeds_do_not_claim_more_than_they_know(noise: float) -> None:
    rng, held = np.random.default_rng(0), 0
    for _ in range(200):
        best = 2.0 ** rng.uniform(-4, 1)
        scores = valley(best, noise, rng, seeds=2)
        found = rate_interval(RATES, best_of_rates(scores), draw_best_rates(scores), 2)
        held += (found.low or 0) <= best <= (found.high or math.inf)
    assert held >= 0.91 * 200
    one = valley(0.5, noise, rng, seeds=1)
    alone = rate_interval(RATES, best_of_rates(one), draw_best_rates(one), 1)
    assert (alone.low, alone.high, alone.n) == (None, None, 1)


def test_at_the_ends_of_what_was_tried_the_interval_is_open() -> None:
    scores = np.arange(4.0)[:, None] * np.ones((1, 3))
    low = rate_interval(RATES[:4], best_of_rates(scores), draw_best_rates(scores), 3)
    high = rate_interval(RATES[:4], best_of_rates(-scores), draw_best_rates(-scores), 3)
    assert low.low is None and low.high is not None
    assert high.high is None and high.low is not None


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_the_exponent_of_a_planted_law_is_recovered(exponent: float) -> None:
    rng = np.random.default_rng(5)
    sizes = (4, 16, 64, 256)
    held = 0
    for _ in range(100):
        tables = [valley(0.1 * (B / 32) ** exponent, 0.1, rng) for B in sizes]
        found = exponent_over_sizes(
            sizes,
            [RATES] * len(sizes),
            [draw_best_rates(table) for table in tables],
            [best_of_rates(table) for table in tables],
        )
        held += (found.low or 0) <= exponent <= (found.high or 0)
        assert found.value == pytest.approx(exponent, abs=0.3)
    assert held >= 91
