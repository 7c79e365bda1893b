"""Orders of sizes: closed forms, an independent τ, and intervals that hold the truth."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rightbatch.laws.estimate import Estimate
from rightbatch.laws.ranks import (
    as_regret,
    best_rate_of,
    draw_least_scores,
    estimate_best_size,
    estimate_excess,
    estimate_rank_agreement,
    kendall_tau,
    least_scores,
)

INF, NAN = math.inf, math.nan
RATES = np.arange(-2, 3)


def planted(means: list[float], seeds: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Sizes whose best rate is the middle one; seeds move all of a study, and each cell alone."""
    shared = 0.3 * rng.normal(size=seeds)
    return [
        mean + 0.15 * RATES[:, None] ** 2 + shared + 0.15 * rng.normal(size=(len(RATES), seeds))
        for mean in means
    ]


def certain(*means: float) -> list[list[list[float]]]:
    return [[[mean, mean, mean]] for mean in means]


@pytest.mark.parametrize(
    ("first", "second", "tau"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 3, 4], [2, 1, 3, 4], 4 / 6),  # 5 pairs alike, 1 not
        ([1, 2, INF, INF], [1, 2, 3, 4], 5 / math.sqrt(5 * 6)),  # the last two are tied
        ([1, 2, INF, NAN], [5, 6, INF, INF], 1.0),
        ([1, 2], [2, 2], None),
        ([INF, INF], [1, 2], None),
        ([1], [1], None),
    ],
)
def test_tau_of_known_orders(first: list[float], second: list[float], tau: float | None) -> None:
    assert kendall_tau(first, second) == (None if tau is None else pytest.approx(tau))


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=9))
def test_tau_is_that_of_scipy(pairs: list[tuple[int, int]]) -> None:
    first, second = map(list, zip(*pairs, strict=True))
    peer: Any = stats.kendalltau(first, second)
    found, other = kendall_tau(first, second), peer.statistic
    assert math.isnan(other) if found is None else found == pytest.approx(other)


def test_a_rate_that_missed_on_a_seed_is_worth_less_than_a_slow_one() -> None:
    tables = [[[1.0, INF], [5.0, 5.0]], [[2.0, NAN], [2.0, INF]]]
    assert least_scores(tables).tolist() == [5.0, INF]
    assert (best_rate_of(tables[0]), best_rate_of(tables[1])) == (1, None)


def test_agreement_is_sure_where_nothing_varies() -> None:
    ups, downs = certain(1, 2, 3, 4), certain(4, 3, 2, 1)
    for other, tau in ((ups, 1.0), (downs, -1.0)):
        found = estimate_rank_agreement(ups, other)
        assert (found.value, found.low, found.high, found.n) == (tau, tau, tau, 3)
    nothing = estimate_rank_agreement(ups, certain(INF, INF, INF, INF))
    assert nothing.value is None and "tied" in nothing.method
    one = estimate_rank_agreement([[[1.0]], [[2.0]]], [[[1.0]], [[2.0]]])
    assert (one.value, one.low, one.n) == (1.0, None, 1)


def test_draws_of_one_mean_are_as_wide_as_students_interval() -> None:
    scores = np.array([1.0, 1.4, 0.7])
    low, high = np.quantile(draw_least_scores([scores[None]])[:, 0], [0.025, 0.975])
    half = stats.t.ppf(0.975, 2) * scores.std(ddof=1) / math.sqrt(3)
    assert (high - low) / 2 == pytest.approx(half, rel=0.25)


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("gap", [0.1, 0.5])
def test_intervals_hold_the_truth(seeds: int, gap: float) -> None:
    rng = np.random.default_rng((seeds, int(10 * gap)))
    first, second = [0, gap, 2 * gap, 3 * gap], [gap, 0, 2 * gap, 3 * gap]
    held = {"tau": 0, "excess": 0, "none": 0, "best": 0}
    rounds = 100
    for _ in range(rounds):
        a, b = planted(first, seeds, rng), planted(second, seeds, rng)
        tau = estimate_rank_agreement(a, b)
        held["tau"] += (tau.low or -1) <= kendall_tau(first, second) <= (tau.high or 1)  # type: ignore[operator]
        for what, size in (("excess", 0), ("none", 1)):
            excess = estimate_excess(b, size)
            truth = gap if size == 0 else 0.0
            held[what] += (excess.low or 0.0) <= truth <= (excess.high or 0.0)
        best = estimate_best_size([8, 16, 32, 64], b)
        held["best"] += (best.low or 0) <= 16 <= (best.high or 99)
    assert min(held.values()) >= 0.91 * rounds, held


def test_a_difference_that_is_there_is_seen() -> None:
    rng = np.random.default_rng(0)
    b = planted([1.0, 0.0, 2.0], 5, rng)
    assert (estimate_excess(b, 0).low or 0) > 0.5
    assert estimate_best_size([8, 16, 32], b).low == 16
    assert estimate_rank_agreement(b, b).low == 1.0


def test_the_excess_of_the_best_measured_is_0_up_to_what_cannot_be_told_apart() -> None:
    rng = np.random.default_rng(1)
    near = estimate_excess(planted([0.0, 0.02], 4, rng), 0)
    assert near.low == 0 and near.value is not None and near.high is not None and near.high > 0.05


def test_a_choice_that_did_not_arrive_has_a_lower_bound() -> None:
    tables = [[[INF, INF]], [[1.0, 1.2]]]
    found = estimate_excess(tables, 0, gave_up=3.1)
    assert (found.value, found.high) == (None, None) and found.low == pytest.approx(2.0)
    assert estimate_excess(tables, 0).low is None
    assert not estimate_excess([[[INF, INF]]], 0).resolved
    assert not estimate_best_size([1], [[[INF, INF]]]).resolved


def test_a_carried_rate_is_judged_at_that_rate() -> None:
    tables = [[[2.0, 2.0], [1.0, 1.0]], [[5.0, 5.0], [6.0, NAN]]]
    assert [estimate_excess(tables, 0, rate).value for rate in (None, 0)] == [0.0, 1.0]
    assert estimate_excess(tables, 1, 1).value is None


def test_regret_is_the_ratio_less_1() -> None:
    excess = Estimate(value=math.log(2), low=0.0, high=math.log(3), n=4)
    regret = as_regret(excess)
    assert (regret.value, regret.low, regret.high) == pytest.approx((1.0, 0.0, 2.0))
    assert as_regret(Estimate(value=None, low=math.log(2), n=1)).low == pytest.approx(1.0)
