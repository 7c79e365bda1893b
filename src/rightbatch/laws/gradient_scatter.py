"""How gradients of batches scatter around the full one: error, slope, direction.

With g_m the gradient of a batch of m examples, drawn without replacement from N, and G that of all,

    E|g_m − G|² = S (1/m − 1/N),    E cos²(g_m, G) ≈ 1/(1 + (S/|G|²)(1/m − 1/N)).

So the standard error falls as m^−½ while N does not matter, and is 0 at m = N; the second holds in
high effective dimension (McCandlish et al. 2018, appendix A.1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rightbatch.laws.estimate import Estimate, unresolved
from rightbatch.laws.gradient import gradient_variance, predicted_cosine_squared
from rightbatch.laws.interval import student_quantile, symmetric
from rightbatch.laws.seeds import mean_over_seeds

Array = NDArray[np.float64]
FEWEST_DRAWS = 4
"""Draws at a size without which it says nothing of the slope."""


@dataclass(frozen=True, kw_only=True)
class BatchDraws:
    """Gradients of some batches of one size, beside the full gradient.

    Attributes:
        batch_size: m.
        squared_errors: |g_m − G|² of each draw.
        cosines: cos(g_m, G) of each draw.
    """

    batch_size: int
    squared_errors: tuple[float, ...]
    cosines: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class SizeScatter:
    """How gradients of one batch size scatter.

    Attributes:
        batch_size: m.
        standard_error: √E|g_m − G|².
        predicted_error: √(S(1/m − 1/N)).
        cosine: Mean cos(g_m, G).
        cosine_low: Its 10 % quantile over draws.
        cosine_median: Its median.
        cosine_high: Its 90 % quantile.
        cosine_squared: Mean cos².
        predicted_cosine_squared: 1/(1 + (S/|G|²)(1/m − 1/N)).
    """

    batch_size: int
    standard_error: Estimate
    predicted_error: float
    cosine: Estimate
    cosine_low: float
    cosine_median: float
    cosine_high: float
    cosine_squared: Estimate
    predicted_cosine_squared: float


@dataclass(frozen=True, kw_only=True)
class Scatter:
    """How gradients scatter at some weights.

    Attributes:
        gradient_norm: |G|.
        trace: S = tr Σ.
        slope: Of ln standard error against ln m, with the factor √(1 − m/N) of the finite set taken
            out: −½ where examples are drawn independently.
        sizes: Each batch size, ascending.
    """

    gradient_norm: float
    trace: Estimate
    slope: Estimate
    sizes: tuple[SizeScatter, ...]


def estimate_scatter(
    draws: Sequence[BatchDraws], *, gradient_norm: float, population: int
) -> Scatter:
    """The scatter of gradients from draws at several batch sizes.

    Args:
        draws: Of each size, ascending; N may be among them.
        gradient_norm: |G|, positive.
        population: N.

    Returns:
        The scatter; the slope is not resolved from fewer than two sizes below N.

    Raises:
        ValueError: If there are no draws below N.

    Example:
        >>> sizes = (1, 4, 16)
        >>> scatter = estimate_scatter(
        ...     [BatchDraws(batch_size=m, squared_errors=(64 / m - 1,) * 4, cosines=(0.5,) * 4)
        ...      for m in sizes], gradient_norm=1.0, population=64)
        >>> round(scatter.trace.value, 6), round(scatter.slope.value, 6)
        (64.0, -0.5)
    """
    below = [d for d in draws if d.batch_size < population and d.squared_errors]
    if not below:
        raise ValueError(f"There are no draws of fewer than {population} examples; give some.")
    unit = [
        np.asarray(d.squared_errors)
        / gradient_variance(1.0, global_batch=d.batch_size, population=population)
        for d in below
    ]
    trace = mean_over_seeds(np.concatenate(unit).tolist(), "draws of all sizes")
    assert trace.value is not None
    sizes = tuple(_size(d, trace.value, gradient_norm, population) for d in draws)
    return Scatter(
        gradient_norm=gradient_norm,
        trace=trace,
        slope=_slope([d.batch_size for d in below], unit),
        sizes=sizes,
    )


def _size(d: BatchDraws, trace: float, gradient_norm: float, population: int) -> SizeScatter:
    squares = mean_over_seeds(list(d.squared_errors), "draws")
    cosines = np.asarray(d.cosines)
    low, median, high = (float(q) for q in np.quantile(cosines, [0.1, 0.5, 0.9]))
    variance = gradient_variance(trace, global_batch=d.batch_size, population=population)
    return SizeScatter(
        batch_size=d.batch_size,
        standard_error=_root(squares),
        predicted_error=math.sqrt(max(variance, 0.0)),
        cosine=mean_over_seeds(cosines.tolist(), "draws"),
        cosine_low=low,
        cosine_median=median,
        cosine_high=high,
        cosine_squared=mean_over_seeds((cosines**2).tolist(), "draws"),
        predicted_cosine_squared=predicted_cosine_squared(
            trace / gradient_norm**2, global_batch=d.batch_size, population=population
        ),
    )


def _root(square: Estimate) -> Estimate:
    def root(number: float | None) -> float | None:
        return None if number is None else math.sqrt(max(number, 0.0))

    return Estimate(
        value=root(square.value),
        low=root(square.low),
        high=root(square.high),
        n=square.n,
        method=square.method,
    )


def _slope(sizes: Sequence[int], unit: Sequence[ArrayLike]) -> Estimate:
    """½ of the slope of ln(m |g_m − G|²/(1 − m/N)) less 1, weighted by the draws' own spread."""
    method = "weighted least squares in logarithms"
    x, y, weights, count = list[float](), list[float](), list[float](), 0
    for size, values in zip(sizes, unit, strict=True):
        own = np.asarray(values, np.float64)
        n, mean = len(own), float(own.mean())
        if n < FEWEST_DRAWS or mean <= 0:
            continue
        # Of ln mean; that of a mean of few is low by half its variance. Gradients whose errors all
        # have one length would weigh without bound.
        variance = max(float(own.var(ddof=1)) / n / mean**2, 1e-12)
        x.append(math.log(size))
        y.append((math.log(mean) + variance / 2) / 2)
        weights.append(4 / variance)
        count += n
    if len(x) < 2:
        return unresolved(count, "fewer than two batch sizes")
    at, value, w = (np.asarray(v, np.float64) for v in (x, y, weights))
    centred = at - float((w * at).sum() / w.sum())
    spread = float((w * centred**2).sum())
    slope = float((w * centred * value).sum()) / spread
    misfit = value - float((w * value).sum() / w.sum()) - slope * centred
    # Where the points scatter around the line by more than their errors, so does the slope.
    excess = 1.0 if len(x) < 3 else max(1.0, float((w * misfit**2).sum()) / (len(x) - 2))
    half = student_quantile(count - len(x)) * math.sqrt(excess / spread)
    return symmetric(slope - 0.5, half, count, method)
