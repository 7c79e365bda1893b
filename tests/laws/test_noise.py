"""Noise-scale estimators: unbiased, covered, exact on the full set, silent when they must be."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from rightbatch.laws.estimate import Estimate
from rightbatch.laws.gradient import (
    best_learning_rate,
    curvature_noise_scale,
    gradient_variance,
    predicted_cosine_squared,
)
from rightbatch.laws.linear_regression import (
    LinearRegression,
    gradient_norm_squared,
    gradient_trace,
)
from rightbatch.laws.linear_regression import curvature_noise_scale as exact_curvature_scale
from rightbatch.laws.noise import (
    GradientSample,
    NoiseEstimate,
    estimate_noise_scale,
    make_gradient_sample,
    micro_batch_moments,
    two_batch_moments,
)
from rightbatch.laws.noise_sums import NoiseSums

Array = np.ndarray


def covers(estimate: Estimate, truth: float) -> bool:
    """Whether the interval holds the truth; infinite truth needs an open upper end."""
    above = estimate.low is None or estimate.low <= truth * (1 + 1e-12)
    below = estimate.high is None or truth <= estimate.high * (1 + 1e-12)
    return above and below


def micro_batches(rows: Array, sizes: list[int]) -> Array:
    return np.stack([part.mean(axis=0) for part in np.split(rows, np.cumsum(sizes)[:-1])])


def skewed_population(rng: np.random.Generator, n: int, d: int, signal: float) -> Array:
    """Gradients with unequal, skewed components, like those of a classifier."""
    scales = 1 / np.arange(1, d + 1) ** 0.6
    return signal / math.sqrt(d) + (rng.exponential(size=(n, d)) - 1) * scales


# --- unbiased ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[1] * 12, [3] * 4, [5, 1, 4, 2]])
@pytest.mark.parametrize("population", [None, 30])
def test_moments_are_unbiased(sizes: list[int], population: int | None) -> None:
    rng = np.random.default_rng(0)
    whole = skewed_population(rng, 30, 4, signal=0.5)
    trace = whole.var(axis=0, ddof=1 if population else 0).sum()
    norm_squared = np.sum(whole.mean(axis=0) ** 2)
    draws = []
    for _ in range(6000):
        rows = whole[rng.choice(30, size=12, replace=population is None)]
        sample = make_gradient_sample(
            micro_batches(rows, sizes), sizes=sizes, population=population
        )
        draws.append(micro_batch_moments(sample))
    found = np.array(draws)
    error = found.std(axis=0) / math.sqrt(len(found))
    assert np.all(np.abs(found.mean(axis=0) - [norm_squared, trace]) < 4 * error)


def test_the_finite_intercept_is_not_the_population_gradient() -> None:
    """Forgetting 1/N estimates |G_N|² − S/N: the trap named in science.md 1."""
    whole = skewed_population(np.random.default_rng(1), 40, 3, signal=0.2)
    with_population = make_gradient_sample(whole, per_example=True, population=40)
    without = make_gradient_sample(whole, per_example=True)
    exact, trace = micro_batch_moments(with_population)
    wrong, _ = micro_batch_moments(without)
    assert exact == pytest.approx(np.sum(whole.mean(axis=0) ** 2))
    assert wrong == pytest.approx(exact - trace / 40)


@pytest.mark.parametrize(("small", "big"), [(1, 64), (8, 16)])
def test_two_batch_sizes_are_unbiased_and_exact_in_expectation(small: int, big: int) -> None:
    norm_squared, trace = two_batch_moments(
        2.0 + 7.0 / small, 2.0 + 7.0 / big, small_batch=small, big_batch=big
    )
    assert float(norm_squared) == pytest.approx(2.0)
    assert float(trace) == pytest.approx(7.0)  # not low by the factor B
    rng = np.random.default_rng(2)
    rows = skewed_population(rng, 200_000, 5, signal=1.0).reshape(-1, big, 5)
    small_norms = np.sum(rows.reshape(len(rows), -1, small, 5).mean(axis=2) ** 2, axis=2)
    big_norms = np.sum(rows.mean(axis=1) ** 2, axis=1)
    draws = two_batch_moments(small_norms.mean(axis=1), big_norms, small_batch=small, big_batch=big)
    truth = (1.0, np.sum(1 / np.arange(1, 6) ** 1.2))
    for draw, exact in zip(draws, truth, strict=True):
        assert abs(draw.mean() - exact) < 4 * draw.std() / math.sqrt(len(draw))


def test_all_micro_batches_count_not_only_the_last() -> None:
    """Failure 10 of the peers: the small-batch norm taken from the last micro-batch only."""
    rng = np.random.default_rng(3)
    draws: dict[str, list[float]] = {"all": [], "last": []}
    rows = np.empty((8, 5))
    for _ in range(400):
        rows = micro_batches(skewed_population(rng, 64, 5, signal=1.0), [8] * 8)
        norms, big = np.sum(rows**2, axis=1), float(np.sum(rows.mean(axis=0) ** 2))
        for name, small in (("all", norms.mean()), ("last", norms[-1])):
            draws[name].append(float(two_batch_moments(small, big, small_batch=8, big_batch=64)[1]))
    assert np.std(draws["all"]) < 0.5 * np.std(draws["last"])
    sample = make_gradient_sample(rows, sizes=[8] * 8)
    assert micro_batch_moments(sample)[1] == pytest.approx(draws["all"][-1])


@given(
    sizes=st.lists(st.integers(1, 9), min_size=3, max_size=8),
    scale=st.floats(1e-3, 1e3),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=50, deadline=None)
def test_the_noise_scale_does_not_change_with_units(
    sizes: list[int], scale: float, seed: int
) -> None:
    rows = np.random.default_rng(seed).normal(loc=3.0, size=(len(sizes), 20))
    one = estimate_noise_scale(make_gradient_sample(rows, sizes=sizes)).noise_scale
    other = estimate_noise_scale(make_gradient_sample(rows * scale, sizes=sizes)).noise_scale
    assert (one.value is None) == (other.value is None)
    if one.value is not None:
        assert other.value == pytest.approx(one.value, rel=1e-6)
        assert other.high == pytest.approx(one.high, rel=1e-6)
        assert one.low is not None and one.high is not None
        assert 0 <= one.low <= one.value <= one.high


def test_exact_moments_of_linear_regression_are_found() -> None:
    problem = LinearRegression(
        eigenvalues=(4.0, 1.0, 0.25), offsets=(0.3, 1.0, 2.0), noise_variance=1.0
    )
    rng = np.random.default_rng(40)
    x = rng.normal(size=(50_000, 3)) * np.sqrt(problem.eigenvalues)
    rows = x * (x @ np.array(problem.offsets) - rng.normal(size=50_000))[:, None]
    parts, sizes = micro_batches(rows, [500] * 100), np.full(100, 500.0)
    sample = GradientSample(
        sizes=sizes,
        gram=parts @ parts.T,
        squared_sums=np.sum(rows**2, axis=1).reshape(100, 500).sum(axis=1),
    )
    estimate = estimate_noise_scale(sample)
    assert covers(estimate.gradient_norm_squared, gradient_norm_squared(problem))
    assert covers(estimate.trace, gradient_trace(problem))
    assert estimate.trace.value == pytest.approx(gradient_trace(problem), rel=0.05)
    found = curvature_noise_scale(np.diag(problem.eigenvalues), rows.mean(axis=0), np.cov(rows.T))
    assert found == pytest.approx(exact_curvature_scale(problem), rel=0.1)


# --- coverage (science.md 6.11) -----------------------------------------------------------------

DRAWS = 300
SPECTRA = {
    "isotropic": np.ones(50),
    "power law": 1 / np.arange(1, 101) ** 1.2,
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("noise_scale", [10.0, 100.0, 1000.0, math.inf])
@pytest.mark.parametrize("form", ["per-example", "micro-batches", "unequal"])
def test_coverage(spectrum: str, noise_scale: float, form: str) -> None:
    """95 % intervals cover 91–98 % of the time, the unresolved regime included."""
    eigenvalues = SPECTRA[spectrum]
    d = len(eigenvalues)
    rng = np.random.default_rng(5)
    # The gradient lies along the noise in the mean, neither in its largest direction nor beside it.
    direction = np.sqrt(eigenvalues / eigenvalues.sum())
    signal = 0.0 if math.isinf(noise_scale) else math.sqrt(eigenvalues.sum() / noise_scale)
    sizes = {"per-example": [1] * 96, "micro-batches": [8] * 24, "unequal": [3, 5, 8, 12] * 6}
    counts = np.array(sizes[form])
    estimates = []
    for _ in range(DRAWS):
        noise = rng.normal(size=(len(counts), d)) * np.sqrt(eigenvalues / counts[:, None])
        sample = make_gradient_sample(
            signal * direction + noise, sizes=sizes[form], per_example=form == "per-example"
        )
        estimates.append(estimate_noise_scale(sample))
    scales = [e.noise_scale for e in estimates]
    covered = np.mean([covers(scale, noise_scale) for scale in scales])
    assert 0.91 <= covered <= 0.985
    norm_covered = np.mean([covers(e.gradient_norm_squared, signal**2) for e in estimates])
    assert 0.91 <= norm_covered <= 0.985
    resolved = np.mean([scale.resolved for scale in scales])
    if noise_scale == 10.0:
        assert resolved == 1
    if math.isinf(noise_scale):
        assert resolved <= 0.07
    # The lower bound is never lost, and rests on the data: a wild one would be far too small.
    lows = [scale.low for scale in scales]
    assert None not in lows


@pytest.mark.parametrize(("drawn", "signal"), [(100, 0.6), (300, 0.25), (100, 0.0)])
@pytest.mark.parametrize("per_example", [True, False])
def test_coverage_of_a_finite_skewed_population(
    drawn: int, signal: float, per_example: bool
) -> None:
    rng = np.random.default_rng(6)
    whole = skewed_population(rng, 400, 30, signal=signal)
    truth = whole.var(axis=0, ddof=1).sum() / np.sum(whole.mean(axis=0) ** 2)
    covered = []
    for _ in range(DRAWS):
        rows = whole[rng.permutation(400)[:drawn]]
        sizes = [1] * drawn if per_example else [5] * (drawn // 5)
        sample = make_gradient_sample(
            micro_batches(rows, sizes),
            sizes=sizes,
            per_example=per_example,
            population=400,
        )
        covered.append(covers(estimate_noise_scale(sample).noise_scale, truth))
    assert 0.91 <= np.mean(covered) <= 0.985


def test_the_whole_population_is_exact() -> None:
    whole = skewed_population(np.random.default_rng(7), 60, 5, signal=0.05)
    truth = whole.var(axis=0, ddof=1).sum() / np.sum(whole.mean(axis=0) ** 2)
    scale = estimate_noise_scale(
        make_gradient_sample(whole, per_example=True, population=60)
    ).noise_scale
    assert scale.value == pytest.approx(truth)
    assert scale.low == pytest.approx(truth) and scale.high == pytest.approx(truth)


@pytest.mark.parametrize(
    ("seed", "sizes"),
    [(8692, [2, 4, 1, 7]), (5742, [6, 3, 9, 8]), (2954, [7, 4, 5, 3])],
)
def test_the_interval_holds_the_value_when_groups_are_few(seed: int, sizes: list[int]) -> None:
    """Four groups can claim a covariance that two variances do not allow: the set was empty."""
    rows = np.random.default_rng(seed).normal(loc=3.0, size=(4, 20))
    scale = estimate_noise_scale(make_gradient_sample(rows, sizes=sizes)).noise_scale
    assert scale.value is not None and scale.low is not None and scale.high is not None
    assert 0 <= scale.low < scale.value < scale.high


# --- unresolved ---------------------------------------------------------------------------------


def test_a_negative_gradient_norm_is_unresolved_and_not_clamped() -> None:
    """Failures 9 and 10 of the peers: clamped to a range, or divided by a negative number."""
    rng = np.random.default_rng(8)
    for _ in range(200):
        estimate = estimate_noise_scale(
            make_gradient_sample(rng.normal(size=(20, 30)), per_example=True)
        )
        value = estimate.gradient_norm_squared.value
        assert value is not None
        if value < 0:
            assert estimate.noise_scale.value is None and estimate.noise_scale.high is None
            assert estimate.noise_scale.low is not None and estimate.noise_scale.low > 1
            return
    pytest.fail("no draw had a negative |G|²; the test needs another seed")


def test_far_below_zero_keeps_a_finite_lower_bound() -> None:
    # Pairs that cancel: |G|² is estimated far below 0, which chance hardly ever does.
    half = np.random.default_rng(9).normal(size=(10, 50))
    scale = estimate_noise_scale(
        make_gradient_sample(np.concatenate([half, -half]), per_example=True)
    ).noise_scale
    assert scale.value is None and scale.high is None
    assert scale.low is not None and 1 < scale.low < 1000


def test_no_noise_is_a_noise_scale_of_zero() -> None:
    estimate = estimate_noise_scale(make_gradient_sample(np.ones((8, 3)), per_example=True))
    assert estimate.noise_scale.value == 0.0 == estimate.noise_scale.high


def test_no_gradient_at_all_is_unresolved() -> None:
    scale = estimate_noise_scale(
        make_gradient_sample(np.zeros((8, 3)), per_example=True)
    ).noise_scale
    assert not scale.resolved


# --- running sums -------------------------------------------------------------------------------


def test_running_sums_take_the_ratio_last() -> None:
    rng = np.random.default_rng(10)
    sums = NoiseSums()
    ratios = []
    for _ in range(4000):
        sample = make_gradient_sample(rng.normal(loc=0.5, size=(8, 10)))
        norm_squared, trace = micro_batch_moments(sample)
        sums = sums.add(norm_squared, trace)
        ratios.append(trace / norm_squared)
    scale = sums.estimate().noise_scale
    assert covers(scale, 4.0)
    assert scale.value == pytest.approx(4.0, rel=0.05)
    assert abs(np.mean(ratios) - 4.0) > 0.3  # what averaging ratios would have given


@pytest.mark.parametrize("loc", [0.5, 0.05, 0.0])
def test_coverage_of_running_sums(loc: float) -> None:
    rng = np.random.default_rng(11)
    truth = math.inf if loc == 0 else 1 / loc**2
    covered = []
    for _ in range(DRAWS):
        rows = rng.normal(loc=loc, size=(40, 4, 30))
        norms, big = np.sum(rows**2, axis=2).mean(axis=1), np.sum(rows.mean(axis=1) ** 2, axis=1)
        draws = zip(*two_batch_moments(norms, big, small_batch=1, big_batch=4), strict=True)
        sums = NoiseSums()
        for norm_squared, trace in draws:
            sums = sums.add(float(norm_squared), float(trace))
        covered.append(covers(sums.estimate().noise_scale, truth))
    assert 0.91 <= np.mean(covered) <= 0.985


def test_two_draws_are_not_enough() -> None:
    assert not NoiseSums().add(1.0, 1.0).add(1.0, 1.0).estimate().noise_scale.resolved


# --- laws ---------------------------------------------------------------------------------------


def test_standard_error_falls_with_slope_minus_one_half_until_n_matters() -> None:
    """science.md 6.6, on a real population."""
    rng = np.random.default_rng(12)
    whole = rng.normal(size=(512, 20))
    trace = whole.var(axis=0, ddof=1).sum()
    batches = np.array([2, 8, 32, 128, 256, 512])
    measured = []
    for batch in batches:
        draws = [whole[rng.permutation(512)[:batch]].mean(axis=0) for _ in range(600)]
        measured.append(np.mean(np.sum((np.array(draws) - whole.mean(axis=0)) ** 2, axis=1)))
    exact = [gradient_variance(trace, global_batch=b, population=512) for b in batches]
    np.testing.assert_allclose(measured[:-1], exact[:-1], rtol=0.08)
    assert exact[-1] == 0 and measured[-1] == pytest.approx(0, abs=1e-20)
    slope = np.polyfit(np.log(batches[:3]), np.log(measured[:3]) / 2, 1)[0]
    assert slope == pytest.approx(-0.5, abs=0.03)


@pytest.mark.parametrize("global_batch", [1, 10, 100])
def test_predicted_direction(global_batch: int) -> None:
    """science.md 6.7: E cos² in high effective dimension."""
    rng = np.random.default_rng(13)
    d, noise_scale = 2000, 20.0
    gradient = np.full(d, math.sqrt(1 / noise_scale))
    rows = gradient + rng.normal(size=(400, d)) / math.sqrt(global_batch)
    cosines = (rows @ gradient) ** 2 / np.sum(rows**2, axis=1) / np.sum(gradient**2)
    predicted = predicted_cosine_squared(noise_scale, global_batch=global_batch)
    assert cosines.mean() == pytest.approx(predicted, abs=0.01)


def test_the_full_set_points_exactly_the_right_way() -> None:
    assert predicted_cosine_squared(50.0, global_batch=80, population=80) == 1


def test_best_learning_rate_is_the_argmax_of_the_expected_gain() -> None:
    rng = np.random.default_rng(14)
    root = rng.normal(size=(5, 5))
    hessian, covariance = root @ root.T, np.diag(rng.uniform(0.5, 2, 5))
    gradient = rng.normal(size=5)
    curvature = gradient @ hessian @ gradient
    noise_scale = curvature_noise_scale(hessian, gradient, covariance)
    for batch in (1, 30, 1000):
        rates = np.linspace(0, 2 * np.sum(gradient**2) / curvature, 200_001)
        noisy = curvature + np.trace(hessian @ covariance) / batch
        gain = rates * np.sum(gradient**2) - rates**2 / 2 * noisy
        found = best_learning_rate(
            float(np.sum(gradient**2) / curvature), noise_scale=noise_scale, global_batch=batch
        )
        assert found == pytest.approx(rates[np.argmax(gain)], rel=1e-3)
    assert curvature_noise_scale(np.eye(5), gradient, covariance) == pytest.approx(
        np.trace(covariance) / np.sum(gradient**2)
    )


# --- records and refusals -----------------------------------------------------------------------


def test_the_record_survives_json() -> None:
    estimate = estimate_noise_scale(
        make_gradient_sample(np.random.default_rng(15).normal(loc=1, size=(20, 3)))
    )
    adapter = TypeAdapter(NoiseEstimate)
    assert adapter.validate_python(adapter.dump_python(estimate, mode="json")) == estimate


def test_wrong_input_is_refused() -> None:
    ones = np.ones((3, 2))
    with pytest.raises(ValueError, match="2 micro-batches cannot give an interval"):
        estimate_noise_scale(make_gradient_sample(ones[:2]))
    with pytest.raises(ValueError, match="at least two"):
        micro_batch_moments(make_gradient_sample(ones[:1]))
    with pytest.raises(ValueError, match="the second larger; got 8 and 8"):
        two_batch_moments(1.0, 1.0, small_batch=8, big_batch=8)
    with pytest.raises(ValueError, match="3 examples cannot be drawn without replacement from 2"):
        make_gradient_sample(ones, population=2)
    with pytest.raises(ValueError, match="one example each"):
        make_gradient_sample(ones, sizes=[2, 2, 2], per_example=True)
    with pytest.raises(ValueError, match=r"gram has shape \(2, 2\) for 3 groups"):
        GradientSample(sizes=np.ones(3), gram=np.ones((2, 2)))
    with pytest.raises(ValueError, match=r"squared_sums has shape \(2,\)"):
        GradientSample(sizes=np.ones(3), gram=np.ones((3, 3)), squared_sums=np.ones(2))
    with pytest.raises(ValueError, match="A group has 0 examples"):
        GradientSample(sizes=np.zeros(3), gram=np.ones((3, 3)))
