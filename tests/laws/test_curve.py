"""Learning curves against ones that are known exactly: steps to a loss, how far, how slow."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from rightbatch.laws.curve import (
    LossCurve,
    compare_steps,
    crossing,
    log_of_loss,
    loss_of_log,
    make_loss_curve,
)

Array = NDArray[np.float64]


def power_law(
    slope: float, *, slower: float = 1.0, first: float = 1.0, last: float = 100.0, num: int = 60
) -> LossCurve:
    """ℓ = 5 (n / slower)^−slope, evaluated at steps spaced evenly in logarithm."""
    steps = np.geomspace(first, last, num)
    return make_loss_curve(list(steps), list(5.0 * (steps / slower) ** -slope))


def straight(num: int = 21, *, stretched: float = 1.0) -> LossCurve:
    """ln ℓ = −n / stretched at steps 1 × stretched, 2 × stretched, …"""
    at = np.arange(1.0, num + 1)
    return make_loss_curve(list(stretched * at), list(np.exp(-at)))


# ---------------------------------------------------------------------------------- steps to a loss


def test_steps_to_a_loss_are_interpolated_between_evaluations() -> None:
    """Where ln loss is straight, the mean over three neighbours leaves it as it is."""
    curve = straight()
    for steps in (2.0, 2.25, 7.5, 19.0):
        assert curve.steps_to(-steps) == pytest.approx(steps, rel=1e-12)


def test_a_loss_that_was_never_seen_takes_infinitely_many_steps() -> None:
    assert straight().steps_to(-30.0) == math.inf


def test_a_loss_above_the_first_is_met_at_the_first_evaluation() -> None:
    assert straight().steps_to(5.0) == 1.0


def test_the_running_minimum_never_rises_and_the_first_visit_counts() -> None:
    """Down to e^−3, up again, down to e^−6: a loss between is met the first time only."""
    ln_loss = [0.0, -1.0, -2.0, -3.0, -3.0, -3.0, -1.0, -1.0, -1.0, -5.0, -6.0, -6.0, -6.0]
    curve = make_loss_curve(list(range(1, 14)), [math.exp(x) for x in ln_loss])
    np.testing.assert_array_equal(curve.falling, np.minimum.accumulate(curve.smooth))
    assert (np.diff(curve.falling) <= 0).all()
    assert curve.steps_to(-2.0) == pytest.approx(3.0)
    assert curve.steps_to(-3.0) == pytest.approx(5.0)
    assert 9 < curve.steps_to(-3.5) < 11


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=30), st.floats(-14.0, 14.0))
def test_lower_losses_never_take_fewer_steps(losses: list[float], ln_loss: float) -> None:
    curve = make_loss_curve(list(range(1, len(losses) + 1)), losses)
    steps = curve.steps_to(ln_loss)
    assert steps >= 1
    assert curve.steps_to(ln_loss - 1.0) >= steps
    if math.isfinite(steps):
        assert steps <= len(losses)


# -------------------------------------------------------------------------------------- at a step


def test_the_loss_at_a_step_is_the_mean_of_the_last_fifth_before_it() -> None:
    curve = make_loss_curve(list(range(1, 21)), [math.exp(-n) for n in range(1, 21)])
    assert curve.log_loss_at(20) == pytest.approx(-(16 + 17 + 18 + 19 + 20) / 5)
    assert curve.log_loss_at(10) == pytest.approx(-(8 + 9 + 10) / 3)
    assert curve.log_loss_at(3) == pytest.approx(-3)


def test_between_distant_evaluations_the_last_one_before_is_taken() -> None:
    curve = make_loss_curve([1, 10, 100], [math.e, 1.0, 1 / math.e])
    assert curve.log_loss_at(60) == pytest.approx(0.0)
    assert curve.log_loss_at(0.5) == math.inf


def test_a_loss_that_was_no_number_makes_its_window_infinite_and_no_other() -> None:
    curve = make_loss_curve(list(range(1, 12)), [1.0] * 9 + [None, None])
    assert curve.log_loss_at(11) == math.inf
    assert curve.log_loss_at(10) == math.inf
    assert curve.log_loss_at(9) == pytest.approx(0.0)


# ------------------------------------------------------------------------------------------ how far


@pytest.mark.parametrize("slope", [0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_on_a_power_law_the_share_of_the_way_is_exact(slope: float, share: float) -> None:
    curve = power_law(slope)
    target = math.log(5.0) - slope * math.log(100.0 / share)
    assert curve.share_of_way(target) == pytest.approx(share, rel=1e-6)


def test_a_target_that_was_passed_is_the_whole_way() -> None:
    assert power_law(0.5).share_of_way(math.log(4.0)) == 1.0


@pytest.mark.parametrize("losses", [[2.0] * 20, [2.0 * 1.05**n for n in range(20)]])
def test_a_curve_that_does_not_fall_is_far_from_a_lower_loss_and_not_infinitely(
    losses: list[float],
) -> None:
    share = make_loss_curve(list(range(1, 21)), losses).share_of_way(math.log(1.5))
    assert 0.0 < share < 0.01


def test_too_few_evaluations_and_ones_that_diverged_tell_nothing() -> None:
    assert make_loss_curve([], []).share_of_way(0.0) == 0.0
    assert make_loss_curve([1, 2, 3], [3.0, 2.0, 1.0]).share_of_way(-1.0) == 0.0
    dead = make_loss_curve(list(range(1, 11)), [1.0] * 9 + [None])
    assert dead.share_of_way(-1.0) == 0.0


# -------------------------------------------------------------------------------------- two curves


@pytest.mark.parametrize("factor", [0.25, 0.5, 1.0, 1.7, 4.0])
def test_a_curve_stretched_by_a_factor_takes_that_many_times_the_steps(factor: float) -> None:
    ratio = compare_steps(straight(), straight(stretched=factor))
    assert ratio.log_ratio == pytest.approx(math.log(factor), abs=1e-12)
    assert ratio.share == pytest.approx(1.0)


@pytest.mark.parametrize("slope", [0.2, 1.0])
@pytest.mark.parametrize("factor", [0.4, 1.3, 3.0])
def test_it_does_on_a_power_law_that_is_evaluated_elsewhere(slope: float, factor: float) -> None:
    """Straight lines between the evaluations of a power law are off by their curvature."""
    one = power_law(slope)
    other = power_law(slope, slower=factor, first=1.5, last=40.0, num=41)
    ratio = compare_steps(one, other)
    assert ratio.log_ratio == pytest.approx(math.log(factor), abs=0.01)
    assert ratio.share == pytest.approx(min(1.0, 40.0 / factor / 100.0), rel=0.05)


def test_the_share_is_that_of_the_reference_at_the_lowest_loss_compared() -> None:
    ratio = compare_steps(straight(20), straight(10, stretched=3.0))
    # The last of the ten is smoothed with its neighbour and itself, a third of a step short.
    assert ratio.share == pytest.approx((10 - 1 / 3) / 20)
    assert ratio.log_ratio == pytest.approx(math.log(3.0), abs=0.01)


def test_where_the_other_has_gone_further_the_references_end_is_compared() -> None:
    ratio = compare_steps(straight(10), straight(20, stretched=0.5))
    # The reference's end is smoothed, a third of its last step short.
    assert ratio.log_ratio == pytest.approx(math.log(0.5 * (10 - 1 / 3) / 10), abs=0.01)
    assert ratio.share == pytest.approx(1.0)


def test_swapping_two_curves_turns_the_sign() -> None:
    one, other = power_law(0.5), power_law(0.5, slower=2.0, last=200.0)
    there, back = compare_steps(one, other), compare_steps(other, one)
    assert there.log_ratio == pytest.approx(-back.log_ratio, abs=0.01)


def test_a_run_that_diverged_at_the_end_has_only_its_earlier_losses_to_compare() -> None:
    steps, losses = list(range(1, 13)), [math.exp(-n / 2.0) for n in range(1, 13)]
    alive = compare_steps(straight(), make_loss_curve(steps, losses))
    died = compare_steps(straight(), make_loss_curve([*steps, 13], [*losses, None]))
    assert alive.log_ratio == pytest.approx(math.log(2.0), abs=0.01)
    assert died.log_ratio == pytest.approx(math.log(2.0), abs=0.01)


def test_with_a_run_that_never_had_a_loss_there_is_nothing_in_common() -> None:
    for other in (make_loss_curve([1, 2, 3], [None, math.nan, math.inf]), make_loss_curve([], [])):
        ratio = compare_steps(straight(), other)
        assert ratio.log_ratio == math.inf
        assert ratio.share == 0.0


# ------------------------------------------------------------------------------------------- errors


def test_none_infinity_and_nan_are_no_numbers() -> None:
    curve = make_loss_curve([1, 2, 3], [None, math.inf, math.nan])
    assert (curve.ln_loss == math.inf).all()
    assert curve.steps_to(0.0) == math.inf


@given(one=st.floats(-1e6, 1e6), other=st.floats(-1e6, 1e6))
def test_lower_is_better_for_losses_of_0_and_below_too(one: float, other: float) -> None:
    assert math.isfinite(log_of_loss(one))
    assert loss_of_log(log_of_loss(one)) == pytest.approx(one, rel=1e-9, abs=1e-40)
    if one < other:
        assert log_of_loss(one) <= log_of_loss(other)


def test_curves_of_negative_losses_are_compared_as_others_are() -> None:
    steps = [1, 2, 4, 8]
    fast = make_loss_curve(steps, [0.5, 0.0, -0.5, -0.75])
    slow = make_loss_curve([2 * n for n in steps], [0.5, 0.0, -0.5, -0.75])
    assert compare_steps(fast, slow).log_ratio == pytest.approx(math.log(2))
    assert fast.log_loss_at(8) < fast.log_loss_at(4) < fast.log_loss_at(1)


def test_a_curve_without_a_point_ends_at_0() -> None:
    curve = make_loss_curve([], [])
    assert curve.last_step == 0.0
    assert curve.log_loss_at(3) == math.inf
    assert curve.steps_to(0.0) == math.inf


@pytest.mark.parametrize("steps", [[0, 1], [-1, 2], [2, 1], [1, 1]])
def test_steps_must_ascend_from_above_0(steps: list[float]) -> None:
    with pytest.raises(ValueError, match=r"needs ascending positive steps .*; got \[.* 2 losses"):
        make_loss_curve(steps, [1.0, 1.0])


def test_there_must_be_as_many_losses_as_steps() -> None:
    with pytest.raises(ValueError, match=r"as many losses; got \[1, 2, 3\] and 2 losses"):
        make_loss_curve([1, 2, 3], [1.0, 1.0])


@given(
    rate=st.floats(0.001, 0.2),
    first=st.integers(1, 50),
    gap=st.integers(1, 20),
    where=st.floats(0.01, 1.0),
)
def test_crossing_is_exact_on_an_exponential(
    rate: float, first: int, gap: int, where: float
) -> None:
    truth, goal = first + where * gap, 0.5

    def value(step: float) -> float:
        return goal * math.exp(-rate * (step - truth))

    last = first + gap
    found = crossing((first, value(first)), (last, value(last)), goal)
    assert found == pytest.approx(truth, rel=1e-6)


def test_crossing_of_a_metric_and_after_a_loss_that_was_not_finite() -> None:
    assert crossing((4, 0.0), (8, 1.0), 0.5) == 6.0
    assert crossing((4, math.nan), (8, 1.0), 0.5) == 8.0
