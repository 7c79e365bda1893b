"""The exact laws against each other, against Monte Carlo and against plain iteration."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rightbatch.laws.linear_regression import (
    LinearRegression,
    best_steps,
    curvature_noise_scale,
    divergence_edge,
    expected_loss,
    from_covariance,
    gradient_norm_squared,
    gradient_trace,
    initial_loss,
    isotropic_best_learning_rate,
    isotropic_steps,
    loss_by_recursion,
    simple_noise_scale,
    steps_to_target,
)

SIX = LinearRegression(
    eigenvalues=tuple(np.geomspace(4, 0.1, 6).tolist()),
    offsets=tuple((np.geomspace(4, 0.1, 6) ** -0.5).tolist()),
    noise_variance=5.0,
)
PROBLEMS = [
    SIX,
    LinearRegression(eigenvalues=(2.0, 0.5, 0.1), offsets=(1.0, -2.0, 3.0)),
    LinearRegression(eigenvalues=(1.0,) * 4, offsets=(0.5,) * 4, noise_variance=0.3),
]


def draw(problem: LinearRegression, n: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    x = rng.normal(size=(n, problem.dimension)) * np.sqrt(problem.eigenvalues)
    return x, rng.normal(size=n) * math.sqrt(problem.noise_variance)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_moments_match_monte_carlo(problem: LinearRegression) -> None:
    x, noise = draw(problem, 400_000, np.random.default_rng(0))
    gradients = x * (x @ np.array(problem.offsets) - noise)[:, None]
    covariance = np.cov(gradients.T)
    mean, hessian = gradients.mean(axis=0), np.diag(problem.eigenvalues)
    assert np.sum(mean**2) == pytest.approx(gradient_norm_squared(problem), rel=0.03)
    assert np.trace(covariance) == pytest.approx(gradient_trace(problem), rel=0.03)
    weighted = np.trace(hessian @ covariance) / (mean @ hessian @ mean)
    assert weighted == pytest.approx(curvature_noise_scale(problem), rel=0.05)


def test_a_full_covariance_is_the_same_problem_rotated() -> None:
    rng = np.random.default_rng(1)
    rotation = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    covariance = rotation @ np.diag(SIX.eigenvalues) @ rotation.T
    problem = from_covariance(covariance, rotation @ np.array(SIX.offsets), noise_variance=5.0)
    assert simple_noise_scale(problem) == pytest.approx(simple_noise_scale(SIX))
    delta = rotation @ np.array(SIX.offsets)
    assert initial_loss(problem) == pytest.approx(delta @ covariance @ delta / 2)
    cubic = delta @ covariance @ covariance @ covariance @ delta
    spread = 5 + delta @ covariance @ delta
    expected = (spread * np.trace(covariance @ covariance) + cubic) / cubic
    assert curvature_noise_scale(problem) == pytest.approx(expected)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("global_batch", [1, 7])
def test_recursion_matches_simulated_sgd(problem: LinearRegression, global_batch: int) -> None:
    rng = np.random.default_rng(2)
    eta = divergence_edge(problem, global_batch=global_batch) / 4
    runs, steps = 20_000, 12
    delta = np.tile(problem.offsets, (runs, 1))
    eigenvalues = np.array(problem.eigenvalues)
    exact = loss_by_recursion(
        problem, learning_rates=[eta], global_batch=global_batch, num_steps=steps
    )[0]
    for step in range(steps + 1):
        losses = delta**2 @ eigenvalues / 2
        error = losses.std() / math.sqrt(runs)
        assert abs(losses.mean() - exact[step]) < 5 * error + 1e-12
        x, noise = draw(problem, runs * global_batch, rng)
        x, noise = x.reshape(runs, global_batch, -1), noise.reshape(runs, global_batch)
        residual = np.einsum("rbd,rd->rb", x, delta) - noise
        delta = delta - eta * np.einsum("rb,rbd->rd", residual, x) / global_batch


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("global_batch", [1, 10, 1000])
def test_closed_form_equals_recursion(problem: LinearRegression, global_batch: int) -> None:
    edge = divergence_edge(problem, global_batch=global_batch)
    rates = edge * np.array([0.01, 0.3, 0.7, 0.99, 1.05])
    slow = loss_by_recursion(
        problem, learning_rates=rates, global_batch=global_batch, num_steps=300
    )
    fast = expected_loss(
        problem, learning_rates=rates, global_batch=global_batch, steps=np.arange(301)
    )
    np.testing.assert_allclose(fast, slow, rtol=1e-8)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("global_batch", [1, 10, 1000])
def test_the_edge_separates_bounded_from_unbounded(
    problem: LinearRegression, global_batch: int
) -> None:
    edge = divergence_edge(problem, global_batch=global_batch)
    late = expected_loss(
        problem,
        learning_rates=[edge * 0.999, edge * 1.001],
        global_batch=global_batch,
        steps=[1e5, 2e5],
    )
    assert late[0, 1] <= late[0, 0] * (1 + 1e-9)
    assert late[1, 1] > 10 * late[1, 0] or math.isinf(late[1, 1])


@pytest.mark.parametrize("global_batch", [1, 8, 256])
def test_steps_to_target_is_the_first_crossing(global_batch: int) -> None:
    target = 0.3 * initial_loss(SIX)
    rates = divergence_edge(SIX, global_batch=global_batch) * np.array([0.02, 0.1, 0.4, 0.9, 1.2])
    curve = loss_by_recursion(SIX, learning_rates=rates, global_batch=global_batch, num_steps=3000)
    found = steps_to_target(
        SIX, learning_rates=rates, global_batch=global_batch, target_loss=target, max_steps=3000
    )
    for losses, steps in zip(curve, found, strict=True):
        below = np.flatnonzero(losses <= target)
        if len(below) == 0:
            assert math.isinf(steps)
        else:
            assert below[0] - 1 < steps <= below[0]


def test_a_target_already_met_needs_no_steps() -> None:
    steps = steps_to_target(
        SIX, learning_rates=[0.01], global_batch=4, target_loss=2 * initial_loss(SIX)
    )
    assert steps.tolist() == [0.0]


def test_an_unreachable_target_has_no_best_learning_rate() -> None:
    result = best_steps(SIX, global_batch=1, target_loss=1e-9, max_steps=1000)
    assert result.steps is None and result.learning_rate is None


def test_best_steps_beats_a_fine_grid() -> None:
    target = 0.02 * initial_loss(SIX)
    best = best_steps(SIX, global_batch=32, target_loss=target)
    edge = divergence_edge(SIX, global_batch=32)
    grid = steps_to_target(
        SIX,
        learning_rates=np.geomspace(edge * 1e-3, edge, 500),
        global_batch=32,
        target_loss=target,
    )
    assert best.steps is not None and best.learning_rate is not None
    assert best.steps <= grid.min() * (1 + 1e-9)
    again = steps_to_target(
        SIX, learning_rates=[best.learning_rate], global_batch=32, target_loss=target
    )
    assert again[0] == pytest.approx(best.steps)


@pytest.mark.parametrize("dimension", [1, 5, 40])
@pytest.mark.parametrize("global_batch", [1, 16, 1024])
def test_isotropic_closed_forms(dimension: int, global_batch: int) -> None:
    problem = LinearRegression(eigenvalues=(1.0,) * dimension, offsets=(0.7,) * dimension)
    assert simple_noise_scale(problem) == pytest.approx(dimension + 1)
    assert curvature_noise_scale(problem) == pytest.approx(dimension + 1)
    best_rate = isotropic_best_learning_rate(dimension, global_batch=global_batch)
    assert divergence_edge(problem, global_batch=global_batch) == pytest.approx(2 * best_rate)
    best = best_steps(problem, global_batch=global_batch, target_loss=initial_loss(problem) / 50)
    expected = isotropic_steps(dimension, global_batch=global_batch, loss_ratio=50)
    assert best.steps == pytest.approx(expected, rel=1e-6)
    if expected > 1:
        assert best.learning_rate == pytest.approx(best_rate, rel=1e-2)


@pytest.mark.parametrize(
    ("eigenvalues", "offsets", "noise", "message"),
    [
        ((1.0,), (1.0, 2.0), 0.0, "1 eigenvalues and 2 offsets"),
        ((), (), 0.0, "0 eigenvalues"),
        ((1.0, 0.0), (1.0, 2.0), 0.0, r"smallest eigenvalue is 0\.0"),
        ((1.0,), (1.0,), -1.0, r"noise_variance is -1\.0"),
    ],
)
def test_a_wrong_problem_is_refused(
    eigenvalues: tuple[float, ...], offsets: tuple[float, ...], noise: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        LinearRegression(eigenvalues=eigenvalues, offsets=offsets, noise_variance=noise)
