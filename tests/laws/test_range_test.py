import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rightbatch.errors import UsageError
from rightbatch.laws.range_test import (
    analyse_range_test,
    find_explosion,
    make_ramp,
    smooth_centred,
    smooth_losses,
)

RAMP = make_ramp(1e-6, 10, 100)
STEP = RAMP[1] / RAMP[0]
losses_strategy = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=40)


def quadratic(curvature: float, noise: float = 0.0, seed: int = 0) -> list[float]:
    """½λx² under the ramp: L_{i+1} = L_i (1 − η_i λ)², exactly; unstable from η = 2/λ on."""
    rng, loss, losses = np.random.default_rng(seed), 1.0, []
    for lr in RAMP:
        losses.append(loss * math.exp(noise * rng.standard_normal()))
        loss = min(loss * (1 - lr * curvature) ** 2, 1e200)
    return losses


def planted(steepest: float, edge: float, noise: float = 0.0, seed: int = 0) -> np.ndarray:
    """A sigmoid fall in log lr from 2 to 1 with its middle at `steepest`, then an explosion."""
    rng = np.random.default_rng(seed)
    x = np.log10(RAMP)
    fall = 2 - 1 / (1 + np.exp(-4 * (x - math.log10(steepest))))
    explosion = np.expm1(np.clip(8 * (x - math.log10(edge)), 0, 50))
    return fall * np.exp(noise * rng.standard_normal(len(x))) + explosion


@given(losses_strategy, st.floats(0, 0.99))
def test_the_debiased_average_is_the_weighted_mean_of_the_past(
    losses: list[float], momentum: float
) -> None:
    smoothed = smooth_losses(losses, momentum=momentum)
    assert smoothed[0] == pytest.approx(losses[0])
    for i in range(len(losses)):
        weights = momentum ** np.arange(i, -1, -1.0)
        expected = float(np.sum(weights * losses[: i + 1]) / weights.sum())
        assert smoothed[i] == pytest.approx(expected, rel=1e-6, abs=1e-6)


@given(losses_strategy)
def test_the_two_sided_average_keeps_constants_symmetry_and_bounds(losses: list[float]) -> None:
    smoothed = smooth_centred(losses)
    assert np.allclose(smooth_centred(losses[::-1])[::-1], smoothed)
    assert smoothed.min() >= min(losses) - 1e-9 and smoothed.max() <= max(losses) + 1e-9
    assert np.allclose(smooth_centred([3.0] * 7), 3.0)


def test_the_two_sided_average_does_not_lag() -> None:
    ramp = np.arange(50.0)
    inside = slice(20, 30)
    assert np.allclose(smooth_centred(ramp)[inside], ramp[inside], atol=0.12)
    assert np.all(ramp[inside] - smooth_losses(ramp)[inside] > 5)


@pytest.mark.parametrize("curvature", [0.7, 1, 5, 30, 100, 3000])
def test_on_a_quadratic_the_edge_is_two_over_the_curvature(curvature: float) -> None:
    edge = analyse_range_test(RAMP, quadratic(curvature)).edge
    if curvature == 0.7:
        # Unstable only from 2.9 on, and not long enough to undo the fall: no explosion seen.
        assert edge is None
    elif curvature > 1:
        assert edge is not None
        assert abs(math.log(edge * curvature / 2)) <= 1.01 * math.log(STEP)


@pytest.mark.parametrize("curvature", [30, 100, 3000])
def test_noise_does_not_move_the_edge_by_more_than_three_steps(curvature: float) -> None:
    for seed in range(20):
        edge = analyse_range_test(RAMP, quadratic(curvature, 0.3, seed)).edge
        assert edge is not None
        assert abs(math.log(edge * curvature / 2)) <= 3.01 * math.log(STEP)


@pytest.mark.parametrize("global_batch", [2, 8, 64])
def test_the_edge_of_gaussian_regression_is_twice_the_best_rate(global_batch: int) -> None:
    # C = I, no label noise: E L' = L (1 − 2η + η²(1 + (d+1)/B)), which grows above 2η*.
    d, loss, losses = 6, 1.0, []
    for lr in RAMP:
        losses.append(loss)
        loss *= 1 - 2 * lr + lr**2 * (1 + (d + 1) / global_batch)
    edge = analyse_range_test(RAMP, losses).edge
    best = 1 / (1 + (d + 1) / global_batch)
    assert edge is not None
    assert abs(math.log(edge / (2 * best))) <= 1.01 * math.log(STEP)


@pytest.mark.parametrize("steepest", [1e-4, 1e-3, 1e-2])
def test_the_steepest_fall_is_found_in_log_learning_rate(steepest: float) -> None:
    result = analyse_range_test(RAMP, planted(steepest, 1.0))
    assert result.steepest == pytest.approx(steepest, rel=STEP - 1)
    for seed in range(20):
        noisy = analyse_range_test(RAMP, planted(steepest, 1.0, noise=0.05, seed=seed)).steepest
        assert noisy is not None
        assert abs(math.log10(noisy / steepest)) < 0.5


def test_peer_error_differentiating_by_linear_learning_rate() -> None:
    # dL/dη = dL/dlog η / η: with the least noise its minimum is at the smallest learning rates.
    losses = planted(1e-3, 1.0, noise=0.01)
    by_linear = RAMP[np.argmin(np.gradient(losses, RAMP))]
    assert by_linear < 1e-5
    ours = analyse_range_test(RAMP, losses).steepest
    assert ours is not None and 3e-4 < ours < 3e-3


def test_peer_error_debias_index_off_by_one() -> None:
    # The peer divides by 1 − m^{i+2}: the first average is L_0 (1 − m)/(1 − m²) = L_0/(1 + m).
    momentum = 0.98
    first = (1 - momentum) * 2.0 / (1 - momentum**2)
    assert first == pytest.approx(2.0 / 1.98)
    assert smooth_losses([2.0, 2.0], momentum=momentum).tolist() == pytest.approx([2.0, 2.0])


def test_the_minimum_and_the_valley_lie_on_the_fall() -> None:
    for seed in range(10):
        result = analyse_range_test(RAMP, planted(1e-3, 1.0, noise=0.02, seed=seed))
        assert result.minimum_div_10 is not None and result.valley is not None
        assert result.edge is not None
        assert 1e-3 < result.minimum_div_10 < 0.12
        assert 1e-4 < result.valley < 3e-2
        assert 0.4 < result.edge < 1.5
        assert result.best_loss == pytest.approx(1, rel=0.05)


def test_a_loss_that_saturates_at_guessing_has_an_edge_too() -> None:
    x = np.log10(RAMP)
    rise = 1 / (1 + np.exp(-12 * (x - math.log10(0.5))))
    for seed in range(10):
        noise = 0.03 * np.random.default_rng(seed).standard_normal(len(x))
        fallen = np.minimum(planted(1e-3, 100.0), 2)
        result = analyse_range_test(RAMP, fallen + rise + noise)
        assert find_explosion(fallen + rise + noise) is None
        assert result.edge is not None and 0.1 < result.edge < 0.6
        assert analyse_range_test(RAMP, fallen + noise).edge is None
        assert analyse_range_test(RAMP, fallen + 0.3 * rise + noise).edge is None


def test_a_loss_that_never_falls_gives_no_suggestion() -> None:
    rng = np.random.default_rng(0)
    flat = [analyse_range_test(RAMP, 2 + 0.3 * rng.standard_normal(100)) for _ in range(100)]
    assert sum(result.steepest is not None for result in flat) <= 5
    assert sum(result.edge is not None for result in flat) <= 5
    # Squared errors of single examples have heavy tails.
    heavy = [analyse_range_test(RAMP, rng.standard_normal(100) ** 2) for _ in range(100)]
    assert sum(result.edge is not None for result in heavy) <= 10
    rising = analyse_range_test(RAMP, np.linspace(1, 2, 100))
    assert rising.steepest is None and rising.valley is None


def test_an_explosion_is_the_first_four_fold_rise_of_the_average() -> None:
    assert find_explosion([1.0] * 20) is None
    # The last of 22 losses weighs 0.111 in the average, the one before 0.1.
    assert find_explosion([1.0] * 20 + [14.0] * 2) is None
    assert find_explosion([1.0] * 20 + [16.0] * 2) == 21
    # A single outlying batch is no explosion.
    assert find_explosion([1.0] * 20 + [400.0]) is None
    assert find_explosion([1.0, 1.0, math.nan]) == 2
    assert find_explosion([math.inf]) == 0
    assert find_explosion([]) is None
    # A lucky first loss sets no standard.
    assert find_explosion([0.1] + [1.0] * 30) is None
    assert find_explosion([-1.0] * 20 + [-1.0 + 16.0] * 2) == 21
    assert find_explosion([-1.0] * 20 + [-1.0 + 13.0] * 2) is None


def test_losses_may_be_negative_or_not_finite() -> None:
    losses = np.asarray(planted(1e-3, 0.3)) - 5
    result = analyse_range_test(RAMP, losses)
    assert result.edge is not None and 0.1 < result.edge < 1
    broken = planted(1e-3, 0.3)
    broken[np.flatnonzero(broken > 10)[0] :] = math.nan
    assert analyse_range_test(RAMP, broken).edge is not None
    gone = analyse_range_test(RAMP[:1], [math.nan])
    assert gone.edge == pytest.approx(1e-6) and gone.steepest is None


def test_a_short_curve_gives_nothing() -> None:
    assert analyse_range_test(RAMP[:2], [1.0, 0.5]).steepest is None


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(UsageError, match=r"goes from 1 to 0\.1 in 10 steps; it needs 0 < lr_min"):
        make_ramp(1, 0.1, 10)
    with pytest.raises(UsageError, match=r"\(3,\) learning rates came with \(2,\) losses"):
        analyse_range_test([1, 2, 3], [1, 2])
    with pytest.raises(UsageError, match="give as many, and the learning rates ascending"):
        analyse_range_test([1, 3, 2], [1, 2, 3])
