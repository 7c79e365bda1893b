"""max(floor, α + βB) fitted to size levels in relative error, and redrawn for its intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rightbatch.laws.rounds import SizeLevels

Array = NDArray[np.float64]

_HUBER = 1.345
_FARTHEST = 20.0
"""A redrawn time is at most a factor e^20 away."""
_ITERATIONS = 40


@dataclass(frozen=True, kw_only=True)
class FloorFit:
    """The fitted law.

    Attributes:
        alpha: α, seconds.
        beta: β, seconds per example.
        num_floored: How many of the smallest sizes lie on the floor (0: there is none).
        floor: Seconds; 0 without a floor.
        misfit_variance: Variance of log t about the law beyond what the measurement explains, at
            most sizes (robust: a single kinked size does not count).
        full_misfit_variance: The same over all sizes; what the parameters' intervals rest on.
        residuals: log t − log law, shape (sizes,).
    """

    alpha: float
    beta: float
    num_floored: int
    floor: float  # 0 without a floor
    misfit_variance: float
    full_misfit_variance: float
    residuals: Array


def fit_floor_law(levels: SizeLevels) -> FloorFit:
    """The best of the laws without a floor and with the k smallest sizes on it.

    Args:
        levels: The measured sizes.

    Returns:
        The law of least Bayesian information criterion.
    """
    candidates = [_fit_with_floor(levels, 0)]
    candidates += [_fit_with_floor(levels, k) for k in range(2, len(levels.sizes) - 1)]
    noise = float(np.median(levels.variance)) + 1e-8

    def criterion(fitted: FloorFit) -> float:
        scaled = np.abs(fitted.residuals) / math.sqrt(noise + 1e-4)
        # Huber's loss, so that one bad size does not buy a floor.
        loss = np.where(scaled < 3, scaled**2, 6 * scaled - 9).sum()
        num = len(levels.sizes)
        return num * math.log(loss / num + 1) + (fitted.floor > 0) * 2 * math.log(num)

    return min(candidates, key=criterion)


def _fit_with_floor(levels: SizeLevels, num_floored: int) -> FloorFit:
    affine = slice(num_floored, None)
    misfit_variance = 1e-4
    parameters = 1 if len(levels.sizes) == 1 else 2 + (num_floored > 0)
    alpha, beta, floor, residuals = 0.0, 0.0, 0.0, levels.logs
    for _ in range(2):
        variance = levels.variance + misfit_variance + 1e-12
        a, b = fit_affine(levels.sizes[affine], levels.logs[None, affine], variance[affine])
        alpha, beta = float(a[0]), float(b[0])
        floor = floor_level(levels.logs[None], variance, num_floored)[0] if num_floored else 0.0
        predicted = np.maximum(floor, alpha + beta * levels.sizes)
        residuals = levels.logs - np.log(predicted)
        misfit_variance = _misfit_variance(
            (1.4826 * float(np.median(np.abs(residuals)))) ** 2, levels, parameters
        )
    return FloorFit(
        alpha=alpha,
        beta=beta,
        num_floored=num_floored,
        floor=float(floor),
        misfit_variance=misfit_variance,
        full_misfit_variance=_misfit_variance(float(np.mean(residuals**2)), levels, parameters),
        residuals=residuals,
    )


def _misfit_variance(mean_square: float, levels: SizeLevels, parameters: int) -> float:
    """The residuals' variance that the measurement does not explain."""
    free = len(levels.sizes) - parameters
    # With as many parameters as sizes the residuals tell nothing.
    if free <= 0:
        return 0.0
    explained = float(np.median(levels.variance))
    return max(mean_square * len(levels.sizes) / free - explained, 0.0)


def floor_level(logs: Array, variance: Array, num_floored: int) -> Array:
    """The floor of each draw: the weighted geometric mean of the smallest sizes' times.

    Args:
        logs: log t, shape (draws, sizes).
        variance: Of each log t, shape (sizes,).
        num_floored: How many of the smallest sizes lie on the floor.

    Returns:
        Seconds, shape (draws,).
    """
    weights = 1 / variance[:num_floored]
    return np.exp(logs[:, :num_floored] @ weights / weights.sum())


def fit_affine(sizes: Array, logs: Array, variance: Array) -> tuple[Array, Array]:
    """α ≥ 0 and β ≥ 0 of least Huber loss of log t − log(α + βB), for many draws at once.

    Args:
        sizes: B, shape (sizes,).
        logs: log t, shape (draws, sizes).
        variance: Of each log t, shape (sizes,).

    Returns:
        α and β, each of shape (draws,).
    """
    times = np.exp(logs)
    alpha = times.min(axis=1) * 0.5
    beta = np.median(times / sizes, axis=1) * 0.5
    for _ in range(_ITERATIONS):
        predicted = alpha[:, None] + beta[:, None] * sizes
        residuals = logs - np.log(predicted)
        weights = _huber_weights(residuals, variance)
        # Gauss–Newton on the log residual is weighted least squares on this target.
        target = predicted * (1 + np.clip(residuals, -0.7, 0.7))
        scaled = weights / predicted**2
        alpha, beta = _least_squares(sizes, target, scaled)
        only_slope = np.exp((weights * (logs - np.log(sizes))).sum(1) / weights.sum(1))
        only_constant = np.exp((weights * logs).sum(1) / weights.sum(1))
        beta = np.where(alpha <= 0, only_slope, beta)
        alpha = np.maximum(alpha, 0.0)
        alpha = np.where(beta <= 0, only_constant, alpha)
        beta = np.maximum(beta, 0.0)
    return alpha, beta


def _huber_weights(residuals: Array, variance: Array) -> Array:
    scaled = np.abs(residuals) / np.sqrt(variance)
    return np.minimum(1.0, _HUBER / np.maximum(scaled, 1e-12)) / variance


def _least_squares(x: Array, y: Array, weights: Array) -> tuple[Array, Array]:
    """Weighted straight line per row; a constant where there is a single x."""
    total = weights.sum(axis=1)
    x_mean = (weights @ x) / total
    y_mean = (weights * y).sum(axis=1) / total
    offset = x - x_mean[:, None]
    spread = (weights * offset**2).sum(axis=1)
    slope = (weights * offset * y).sum(axis=1) / np.where(spread > 0, spread, 1.0)
    slope = np.where(spread > 0, slope, 0.0)
    return y_mean - slope * x_mean, slope


def redraw_levels(
    levels: SizeLevels, fitted: FloorFit, num_draws: int, rng: np.random.Generator
) -> tuple[Array, Array]:
    """Size levels as they might have come out, and the common level of all rounds.

    Args:
        levels: The measured sizes.
        fitted: The law fitted to them.
        num_draws: How often.
        rng: Source of the draws.

    Returns:
        log t, shape (draws, sizes), and the logarithm of a factor for all, shape (draws,).
    """
    total = levels.variance + fitted.full_misfit_variance
    free = max(len(levels.sizes) - 2, 1)
    # Satterthwaite: how well the total variance itself is known.
    parts = levels.variance**2 / levels.dof + fitted.full_misfit_variance**2 / free
    dof = np.where(parts > 0, total**2 / np.where(parts > 0, parts, 1.0), 1e6)
    shape = (num_draws, len(levels.sizes))
    # One factor per draw, not one per size: the scatter's scale is misjudged in common.
    scale = np.sqrt(float(np.median(dof)) / rng.chisquare(float(np.median(dof)), (num_draws, 1)))
    scatter = rng.standard_normal(shape) * np.sqrt(total) * scale
    # With little to judge the scale by, a few draws are beyond what numbers can hold.
    logs = levels.logs + np.clip(scatter, -_FARTHEST, _FARTHEST)
    common = rng.standard_normal(num_draws) * math.sqrt(levels.common_variance)
    return logs, common


def shrink_residuals(levels: SizeLevels, fitted: FloorFit) -> Array:
    """The law's residuals as far as they are more than noise.

    Args:
        levels: The measured sizes.
        fitted: The law fitted to them.

    Returns:
        Shrunk log t − log law, shape (sizes,).
    """
    total = levels.variance + fitted.misfit_variance
    usual = fitted.misfit_variance / np.where(total > 0, total, 1.0)
    # A single kinked size does not move the usual misfit, but is no noise either.
    own = 1 - levels.variance * 4 / np.maximum(fitted.residuals**2, 1e-300)
    return fitted.residuals * np.clip(np.maximum(usual, own), 0.0, 1.0)
