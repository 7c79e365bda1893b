"""The ruler: from a loss to the progress it stands for, against curves that are known exactly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from rightbatch.laws.curve import LossCurve, make_loss_curve

Array = NDArray[np.float64]


def power_law(slope: float, *, num: int = 30, last: float = 100.0) -> tuple[Array, Array]:
    """ℓ = 5 p^−slope at progress spaced evenly in logarithm."""
    progress = np.geomspace(1.0, last, num)
    return progress, 5.0 * progress**-slope


def progress_at(curve: LossCurve, loss: Array | float) -> Array:
    return np.exp(curve.ln_progress_at(np.log(loss)))


# -------------------------------------------------------------------------------------- exact cases


@pytest.mark.parametrize("slope", [0.1, 0.5, 1.0, 2.0])
def test_a_power_law_is_inverted_exactly(slope: float) -> None:
    progress, losses = power_law(slope)
    curve = make_loss_curve(progress, losses)
    between = np.sqrt(progress[1:-2] * progress[2:-1])
    np.testing.assert_allclose(progress_at(curve, 5.0 * between**-slope), between, rtol=1e-6)
    np.testing.assert_allclose(curve.slope(np.log(progress[-5:])), slope, rtol=1e-6)


@pytest.mark.parametrize("slope", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("num", [3, 5, 8])
def test_beyond_its_end_a_power_law_goes_on(slope: float, num: int) -> None:
    progress, losses = power_law(slope, num=num, last=8.0)
    curve = make_loss_curve(progress, losses)
    beyond = np.array([9.0, 12.0, 40.0])
    np.testing.assert_allclose(progress_at(curve, 5.0 * beyond**-slope), beyond, rtol=1e-6)


def test_long_curves_go_on_too_from_their_smoothed_end() -> None:
    """The last point is the mean of two; on a fine grid that moves the end by half a step."""
    progress, losses = power_law(0.5, num=60)
    curve = make_loss_curve(progress, losses)
    step = progress[-1] / progress[-2]
    found = float(progress_at(curve, 5.0 * 300.0**-0.5))
    assert 300.0 / step <= found <= 300.0 * step


def test_a_curve_that_bends_goes_on_with_its_slope_at_the_end() -> None:
    """ln ℓ = −(ln p)²/4 has slope ln(p)/2: the parabola sees it, a straight fit would not."""
    progress = np.geomspace(1.0, 50.0, 40)
    curve = make_loss_curve(progress, np.exp(-(np.log(progress) ** 2) / 4))
    assert float(curve.slope(np.log(50.0))) == pytest.approx(np.log(50.0) / 2, rel=1e-6)
    assert float(curve.slope(np.log(20.0))) == pytest.approx(np.log(20.0) / 2, rel=1e-6)


def test_losses_above_the_first_stand_for_less_progress_than_the_first() -> None:
    progress, losses = power_law(0.5)
    curve = make_loss_curve(progress, losses)
    assert float(progress_at(curve, 1.5 * losses[0])) < progress[0]
    assert float(progress_at(curve, losses[0])) == pytest.approx(progress[0], rel=1e-6)


def test_the_order_of_the_evaluations_does_not_matter() -> None:
    progress, losses = power_law(0.7)
    shuffled = np.random.default_rng(0).permutation(len(progress))
    one, other = (
        make_loss_curve(progress, losses),
        make_loss_curve(progress[shuffled], losses[shuffled]),
    )
    np.testing.assert_array_equal(one.ln_loss, other.ln_loss)
    np.testing.assert_array_equal(one.ln_progress, other.ln_progress)


# --------------------------------------------------------------------------------- monotone, robust


@given(
    st.lists(st.floats(1e-3, 1e3), min_size=3, max_size=30),
    st.floats(0.01, 10.0),
    st.integers(0, 2**31),
)
def test_the_ruler_is_monotone_whatever_the_losses(
    losses: list[float], first: float, seed: int
) -> None:
    gaps = np.random.default_rng(seed).uniform(0.05, 1.0, len(losses))
    curve = make_loss_curve(first * np.exp(np.cumsum(gaps)), np.array(losses))
    assert (np.diff(curve.ln_progress) > 0).all()
    assert (np.diff(curve.ln_loss) < 0).all()
    asked = np.linspace(np.log(1e4), np.log(1e-4), 300)
    found = curve.ln_progress_at(asked)
    assert np.isfinite(found).all()
    assert (np.diff(found) >= -1e-9).all()
    assert (curve.slope(np.linspace(-10.0, 10.0, 50)) > 0).all()


def test_a_flat_end_says_little_but_not_nothing() -> None:
    """On a plateau a lower loss would be a very long way off, not infinitely far."""
    progress = np.geomspace(1.0, 100.0, 30)
    curve = make_loss_curve(progress, np.maximum(5.0 / progress, 0.2))
    at_half = float(progress_at(curve, 0.1))
    assert np.isfinite(at_half)
    assert at_half > 10 * progress[-1]


@pytest.mark.parametrize("seed", range(5))
def test_noise_in_the_losses_moves_the_ruler_by_noise_over_slope(seed: int) -> None:
    """2 % of noise on a slope of 0.5 is 4 % of progress for one point, less when smoothed."""
    progress, losses = power_law(0.5, num=60)
    noise = np.random.default_rng(seed).normal(0.0, 0.02, len(losses))
    curve = make_loss_curve(progress, losses * np.exp(noise))
    inside = np.geomspace(2.0, 60.0, 40)
    error = np.log(progress_at(curve, 5.0 * inside**-0.5) / inside)
    # The running minimum sees the lowest of what is noisy: a bias towards less progress.
    assert np.abs(error).mean() < 0.06
    assert np.abs(error).max() < 0.15
    beyond = float(progress_at(curve, 5.0 * 130.0**-0.5))
    assert beyond == pytest.approx(130.0, rel=0.2)


def test_one_spike_does_not_tear_the_ruler() -> None:
    progress, losses = power_law(0.5, num=60)
    spiked = losses.copy()
    spiked[30] *= 5
    clean, torn = (make_loss_curve(progress, x) for x in (losses, spiked))
    np.testing.assert_allclose(
        progress_at(torn, losses[5:55]), progress_at(clean, losses[5:55]), rtol=0.2
    )


# ------------------------------------------------------------------------------------------- errors


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("bad", [0.0, -1.0, NAN, INF])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_impossible_numbers(bad: float, where: int) -> None:
    progress, losses = np.array([1.0, 2.0, 3.0]), np.array([3.0, 2.0, 1.0])
    wrong = losses.copy()
    wrong[where] = bad
    with pytest.raises(ValueError, match=r"needs at least 3 positive finite numbers as loss, and"):
        make_loss_curve(progress, wrong)
    wrong = progress.copy()
    wrong[where] = bad
    with pytest.raises(ValueError, match=r"3 positive finite numbers as progress, and got \["):
        make_loss_curve(wrong, losses)


def test_two_points_are_no_ruler() -> None:
    with pytest.raises(ValueError, match=r"needs at least 3 positive .* and got \[.*2.0"):
        make_loss_curve(np.array([1.0, 2.0]), np.array([2.0, 1.0]))
