"""Timings taken in rounds: the level of each size, free of what the rounds did in common.

A round times every size once. In logarithms a sample is size level + round effect + noise;
alternating medians (Tukey's median polish) separate the three. A drifting machine ends up in the
round effects, a single outlier in the noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rightbatch.errors import UsageError
from rightbatch.laws.estimate import Estimate

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class SizeLevels:
    """Size levels: log-medians free of round effects, and how far they can be trusted."""

    sizes: Array
    logs: Array
    variance: Array  # of each level, relative to the others
    dof: Array
    common_variance: float  # of all levels together: what the rounds do in common
    counts: NDArray[np.int64]


def estimate_size_levels(
    micro_batches: ArrayLike, seconds: ArrayLike, rounds: ArrayLike
) -> SizeLevels:
    """The level of each size from timings taken in rounds.

    Args:
        micro_batches: Size of each sample, shape (samples,).
        seconds: Time of each, shape (samples,).
        rounds: Round of each, shape (samples,).

    Returns:
        Levels, with the variances of each and of all in common.

    Raises:
        UsageError: If there are no samples, or some are not positive finite numbers.
    """
    times = _positive(seconds)
    sizes, column = np.unique(np.asarray(micro_batches, dtype=np.float64), return_inverse=True)
    round_names, row = np.unique(np.asarray(rounds), return_inverse=True)
    table = np.full((len(round_names), len(sizes)), np.nan)
    table[row, column] = np.log(times)
    logs, effects, residuals = _median_polish(table)
    counts = np.sum(~np.isnan(table), axis=0)
    variance, dof = _level_variances(residuals, counts)
    common = _squared_scale(effects) * (math.pi / 2) / len(effects) if len(effects) > 1 else 0.0
    return SizeLevels(
        sizes=sizes,
        logs=logs,
        variance=variance,
        dof=dof,
        common_variance=common,
        counts=counts,
    )


def _median_polish(table: Array) -> tuple[Array, Array, Array]:
    """Splits log times (rounds × sizes, NaN where missing) into sizes + rounds + residuals."""
    logs = np.nanmedian(table, axis=0)
    effects = np.zeros(len(table))
    # With fewer sizes in a round, one outlier would pass for a slow round.
    shared = np.sum(~np.isnan(table), axis=1) >= 4
    if int(shared.sum()) > 1:
        for _ in range(10):
            effects[shared] = np.nanmedian(table[shared] - logs, axis=1)
            effects[shared] -= np.median(effects[shared])
            logs = np.nanmedian(table - effects[:, None], axis=0)
    return logs, effects, table - logs - effects[:, None]


def _level_variances(residuals: Array, counts: NDArray[np.int64]) -> tuple[Array, Array]:
    """Variance of each size's median and its degrees of freedom.

    A size's own scatter is shrunk towards the pooled one: three timings say little about it.

    Args:
        residuals: log t − level − round effect, shape (rounds, sizes), NaN where missing.
        counts: Rounds each size was timed in, shape (sizes,).

    Returns:
        Variance and degrees of freedom, each of shape (sizes,).
    """
    num_sizes = residuals.shape[1]
    # Where the rounds are odd, a size's median is one of its samples, whose residual of 0 would
    # shrink the scale.
    scattered = ~np.isnan(residuals) & (residuals != 0)
    pooled = _squared_scale(residuals[scattered])
    columns = zip(residuals.T, scattered.T, strict=True)
    own = np.array([_squared_scale(column[wanted]) for column, wanted in columns])
    # The polish has also fitted an effect to every round.
    polished = num_sizes / (num_sizes - 1) if num_sizes > 3 else 1.0
    pooled, own = pooled * polished, own * polished
    prior_dof = 6.0
    dof = prior_dof + counts - 1
    scatter = (prior_dof * pooled + (counts - 1) * own) / dof
    variance = scatter * (math.pi / 2) / counts
    return variance.astype(np.float64), dof.astype(np.float64)


def _squared_scale(values: Array) -> float:
    """Robust variance about 0 by the median absolute value (1.4826 of it is one normal σ)."""
    return (1.4826 * float(np.median(np.abs(values)))) ** 2 if len(values) else 0.0


def student_95(dof: float) -> float:
    """The 97.5 % quantile of Student's t: exact up to 4 dof, else by its expansion in 1/dof.

    Args:
        dof: Degrees of freedom.

    Returns:
        The quantile.

    Example:
        >>> round(student_95(10), 3)
        2.228
    """
    if dof <= 4:
        return (12.7062, 4.3027, 3.1824, 2.7764)[max(math.floor(dof), 1) - 1]
    z = 1.959963984540054
    g1 = (z**3 + z) / 4
    g2 = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + g1 / dof + g2 / dof**2 + g3 / dof**3


def estimate_median(values: ArrayLike, method: str = "median") -> Estimate:
    """The median of a few positive measurements, with an interval that outliers do not widen.

    Computed on logarithms: median ± t · 1.2533 σ/√n, with σ by the median absolute deviation.

    Args:
        values: Independent measurements, positive, shape (n,).
        method: What to write into the estimate.

    Returns:
        The estimate; without an interval when there is a single value.

    Raises:
        UsageError: If there are no values, or some are not positive.

    Example:
        >>> estimate_median([1.0, 2.0, 4.0]).value
        2.0
    """
    logs = np.log(_positive(values))
    centre = float(np.median(logs))
    n = len(logs)
    if n == 1:
        return Estimate(value=math.exp(centre), n=1, method=method)
    residuals = logs - centre
    scatter = _squared_scale(residuals[residuals != 0])
    half_width = student_95(max(n - 1, 2)) * math.sqrt(scatter * math.pi / 2 / n)
    return Estimate(
        value=math.exp(centre),
        low=math.exp(centre - half_width),
        high=math.exp(centre + half_width),
        n=n,
        method=method,
    )


def _positive(seconds: ArrayLike) -> Array:
    values = np.asarray(seconds, dtype=np.float64)
    good = np.isfinite(values) & (values > 0)
    if values.size == 0 or not bool(np.all(good)):
        raise UsageError(
            f"{values.size} timings, of which {int(np.sum(~good))} are not positive and finite. "
            "Pass at least one, all positive and finite."
        )
    return values
