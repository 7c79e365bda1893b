"""Averages over seeds, and the choice of the best of several rates with its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rightbatch.laws.estimate import Estimate, unresolved
from rightbatch.laws.interval import student_quantile

Array = NDArray[np.float64]
RESAMPLES = 1000
"""Bootstrap samples behind an interval."""
_MISSED = 1e9
"""One seed that has no value outweighs any difference between values."""


def mean_over_seeds(values: Sequence[float | None], method: str = "mean over seeds") -> Estimate:
    """The mean of what seeds gave, with Student's interval.

    Args:
        values: One per seed; None counts as not there.
        method: How the values came about.

    Returns:
        The mean; without an interval for one value, without a value for none.

    Example:
        >>> mean = mean_over_seeds([1.0, 2.0, 3.0])
        >>> mean.value, round(mean.high, 2)
        (2.0, 4.48)
    """
    there = np.array([value for value in values if value is not None], dtype=np.float64)
    n = len(there)
    if n == 0:
        return unresolved(0, method)
    mean = float(there.mean())
    if n == 1:
        return Estimate(value=mean, n=1, method=method)
    half = student_quantile(n - 1) * float(there.std(ddof=1)) / math.sqrt(n)
    return Estimate(value=mean, low=mean - half, high=mean + half, n=n, method=method)


def geometric_mean_over_seeds(values: Sequence[float | None], scale: float = 1.0) -> Estimate:
    """The geometric mean of positive numbers, with Student's interval in their logarithms.

    Args:
        values: One per seed; one that is None (a target that was missed) leaves no value but a
            lower bound: the least of the others.
        scale: The result is multiplied by it.

    Returns:
        The mean.

    Example:
        >>> geometric_mean_over_seeds([1.0, 4.0]).value, geometric_mean_over_seeds([3.0, None]).low
        (2.0, 3.0)
    """
    there = [value for value in values if value is not None]
    if len(there) < len(values) or not there:
        low = min(there) * scale if there else None
        return unresolved(len(values), "some seeds missed it" if values else "no seed", low=low)
    logs = mean_over_seeds([math.log(value) for value in there], "geometric mean over seeds")

    def back(number: float | None) -> float | None:
        return None if number is None else math.exp(number) * scale

    return Estimate(
        value=back(logs.value),
        low=back(logs.low),
        high=back(logs.high),
        n=logs.n,
        method=logs.method,
    )


def best_of_rates(scores: ArrayLike) -> int:
    """The rate whose seeds do best: fewest without a score, then the least mean.

    Args:
        scores: Shape (rates, seeds); lower is better, NaN where a seed has none.

    Returns:
        Its index.

    Example:
        >>> best_of_rates([[3.0, 3.0], [1.0, float("nan")], [2.0, 2.5]])
        2
    """
    table = np.asarray(scores, dtype=np.float64)
    every: NDArray[np.intp] = np.arange(table.shape[1], dtype=np.intp)
    return int(_best(table, every[None, :])[0])


def draw_best_rates(scores: ArrayLike, *, seed: int = 0) -> NDArray[np.intp]:
    """The best rate of bootstrap samples of the seeds.

    Args:
        scores: As for `best_of_rates`. All rates share their seeds, so these are drawn together.
        seed: Of the draws: the same for sizes that share seeds.

    Returns:
        Indices of rates, shape (RESAMPLES,).
    """
    table = np.asarray(scores, dtype=np.float64)
    count = table.shape[1]
    rng = np.random.default_rng(seed)
    drawn: NDArray[np.intp] = rng.integers(count, size=(RESAMPLES, count), dtype=np.intp)
    return _best(table, drawn)


def _best(table: Array, drawn: NDArray[np.intp]) -> NDArray[np.intp]:
    values = table[:, drawn]  # (rates, samples, seeds)
    missing = np.isnan(values)
    held = np.maximum((~missing).sum(axis=2), 1)
    means = np.where(missing, 0.0, values).sum(axis=2) / held
    span = float(np.nanmax(np.abs(table), initial=1.0))
    return np.argmin(missing.sum(axis=2) * _MISSED * max(span, 1.0) + means, axis=0)


def rate_interval(
    rates: Sequence[float], best: int, drawn: NDArray[np.intp], num_seeds: int
) -> Estimate:
    """The best of some learning rates, and where the best of all lies.

    Args:
        rates: Ascending.
        best: Index of the best.
        drawn: The best of bootstrap samples.
        num_seeds: Of how many seeds: one has no interval, and of two, which the samples say little
            about, it reaches one rate farther.

    Returns:
        The rate; its interval reaches to the rates beside those that 95 % of the samples chose,
        since between them is the best where steps fall and rise once. It is open at the ends of
        what was tried.
    """
    low, high = (int(i) for i in np.quantile(drawn, [0.025, 0.975], method="nearest"))
    farther = 2 if num_seeds == 2 else 1
    low, high = min(low, best) - farther, max(high, best) + farther
    method = "bootstrap over seeds, to the next rates tried"
    if num_seeds == 1:
        return Estimate(value=rates[best], n=1, method="one seed")
    return Estimate(
        value=rates[best],
        low=None if low < 0 else rates[low],
        high=None if high >= len(rates) else rates[high],
        n=num_seeds,
        method=method,
    )


def exponent_over_sizes(
    sizes: Sequence[int],
    rates: Sequence[Sequence[float]],
    drawn: Sequence[NDArray[np.intp]],
    best: Sequence[int],
) -> Estimate:
    """P of best rate ∝ Bᵖ, by least squares in logarithms.

    Args:
        sizes: Batch sizes, at least 3.
        rates: Of each size, the learning rates tried.
        drawn: Of each size, the best of bootstrap samples of the same seeds.
        best: Of each size, the best.

    Returns:
        The exponent. Its interval is that of the samples, each best rate drawn evenly between half
        way to its neighbours, since the grid knows it no better.
    """
    x = np.log(np.asarray(sizes, dtype=np.float64))
    x = x - x.mean()
    rng = np.random.default_rng((0, 1))  # not the stream that seeds are drawn from
    logs = [np.log(np.asarray(own, dtype=np.float64)) for own in rates]
    central = np.array([own[index] for own, index in zip(logs, best, strict=True)])
    samples = np.stack(
        [_spread(own, chosen, rng) for own, chosen in zip(logs, drawn, strict=True)], axis=1
    )
    slopes = samples @ x / float(x @ x)
    low, high = (float(q) for q in np.quantile(slopes, [0.025, 0.975]))
    value = float(central @ x / (x @ x))
    return Estimate(
        value=value,
        low=min(low, value),
        high=max(high, value),
        n=len(sizes),
        method="least squares over sizes, bootstrap over seeds",
    )


def _spread(logs: Array, chosen: NDArray[np.intp], rng: np.random.Generator) -> Array:
    """Chosen rates, evenly between half way to their neighbours."""
    if len(logs) == 1:
        return np.repeat(logs, len(chosen))
    gaps = np.diff(logs)
    down = np.concatenate([gaps[:1], gaps])[chosen] / 2
    up = np.concatenate([gaps, gaps[-1:]])[chosen] / 2
    place = rng.random(len(chosen))
    return logs[chosen] - down + place * (down + up)
