"""Whether the order of batch sizes carries over from one model to another, and what it costs.

A *table* is one batch size: scores of shape (learning rates, seeds), lower is better, such as
ln seconds to a target; not finite where a training missed it. A size is worth its best rate's mean
over the seeds; where every rate missed the target on some seed it is *censored*: ranked last, tied
with all others that are.

Means of few seeds vary more than a bootstrap of them does: draws are stretched about their centre
by √(S/(S−1)) · t₀.₉₇₅(S−1) / z₀.₉₇₅, so that the interval of one mean is Student's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rightbatch.laws.estimate import Estimate, unresolved
from rightbatch.laws.interval import student_quantile
from rightbatch.laws.seeds import RESAMPLES

Array = NDArray[np.float64]
_NORMAL = 1.959964
"""The 97.5 % quantile of the normal distribution."""


def kendall_tau(first: ArrayLike, second: ArrayLike) -> float | None:
    """Kendall's τ_b: how far two lists agree in their order, ties counted as ties.

    τ_b = (C − D) / √((n₀ − n₁)(n₀ − n₂)) with C pairs in the same order, D in the opposite one,
    n₀ = n(n−1)/2, and n₁, n₂ the pairs tied in either list (Kendall 1945).

    Args:
        first: Shape (sizes,); not finite means last.
        second: Likewise.

    Returns:
        1 for the same order, −1 for the opposite one; None where all of a list is tied.

    Example:
        >>> kendall_tau([1, 2, 3], [10, 30, 20]), kendall_tau([1, 1], [1, 2])
        (0.3333333333333333, None)
    """
    a, b = (np.asarray(values, dtype=np.float64)[None] for values in (first, second))
    tau = float(_kendall_taus(a, b)[0])
    return None if math.isnan(tau) else tau


def _kendall_taus(first: Array, second: Array) -> Array:
    """τ_b of many pairs of lists, shape (pairs, sizes); NaN where all of a list is tied."""
    a, b = _orders(first), _orders(second)
    # Each pair is counted twice, above and below: that cancels.
    tied = np.sqrt((a**2).sum(axis=(1, 2)) * (b**2).sum(axis=(1, 2)))
    with np.errstate(invalid="ignore"):
        return (a * b).sum(axis=(1, 2)) / tied


def _orders(values: Array) -> Array:
    """The sign of each difference of two sizes; what is censored is last and tied."""
    finite = np.isfinite(values)
    last = np.where(finite, values, -np.inf).max(axis=1, keepdims=True, initial=0.0) + 1.0
    ranked = np.where(finite, values, last)
    return np.sign(ranked[:, :, None] - ranked[:, None, :])


def least_scores(tables: Sequence[ArrayLike]) -> Array:
    """Each size at its best rate.

    Args:
        tables: One per size, shape (rates, seeds).

    Returns:
        Mean over seeds, shape (sizes,); inf where a size is censored.

    Example:
        >>> least_scores([[[1.0, 3.0], [4.0, 4.0]], [[1.0, float("nan")]]]).tolist()
        [2.0, inf]
    """
    return np.array([_means(table).min() for table in tables])


def best_rate_of(table: ArrayLike) -> int | None:
    """Index of the best rate of a size, or None where it is censored."""
    means = _means(table)
    return int(np.argmin(means)) if np.isfinite(means).any() else None


def draw_least_scores(tables: Sequence[ArrayLike], *, seed: int = 0) -> Array:
    """`least_scores` of bootstrap samples of the seeds, the best rates chosen anew in each.

    Args:
        tables: As above; all have the same seeds, which are drawn together.
        seed: Of the draws.

    Returns:
        Shape (RESAMPLES, sizes).
    """
    count = np.asarray(tables[0]).shape[1]
    drawn = np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))
    stretch = _stretch(count)
    return np.stack([_draw(table, drawn, stretch) for table in tables], axis=1)


def estimate_rank_agreement(
    first: Sequence[ArrayLike], second: Sequence[ArrayLike], *, seed: int = 0
) -> Estimate:
    """Kendall's τ_b of the order of the same sizes in two studies.

    Args:
        first: Of each size, the scores in one study.
        second: In the other; in the same order of sizes.
        seed: Of the draws.

    Returns:
        τ with the interval of draws of the seeds of either study; without an interval for a single
        seed, without a value where all sizes of a study are tied.

    Example:
        >>> ups = [[[1.0, 1.1, 0.9]], [[2.0, 2.1, 1.9]], [[3.0, 3.1, 2.9]]]
        >>> estimate_rank_agreement(ups, ups).value
        1.0
    """
    seeds = min(np.asarray(table).shape[1] for table in (*first, *second))
    value = kendall_tau(least_scores(first), least_scores(second))
    if value is None:
        return unresolved(seeds, "all sizes of a study are tied")
    if seeds == 1:
        return Estimate(value=value, n=1, method="Kendall's τ, one seed")
    taus = _kendall_taus(
        draw_least_scores(first, seed=seed), draw_least_scores(second, seed=seed + 1)
    )
    low, high = _quantiles(taus[~np.isnan(taus)], value)
    return Estimate(
        value=value, low=low, high=high, n=seeds, method="Kendall's τ, bootstrap over seeds"
    )


def estimate_best_size(sizes: Sequence[int], tables: Sequence[ArrayLike]) -> Estimate:
    """The best of the sizes tried.

    Args:
        sizes: Ascending.
        tables: Of each.

    Returns:
        The size, and from which to which 95 % of the bootstrap samples chose.

    Example:
        >>> estimate_best_size([8, 64], [[[2.0, 2.1]], [[1.0, 1.1]]]).value
        64.0
    """
    scores, count = least_scores(tables), np.asarray(tables[0]).shape[1]
    if not np.isfinite(scores).any():
        return unresolved(count, "no size arrived")
    best = int(np.argmin(scores))
    if count == 1:
        return Estimate(value=float(sizes[best]), n=1, method="one seed")
    chosen = np.argmin(draw_least_scores(tables), axis=1)
    low, high = (int(i) for i in np.quantile(chosen, [0.025, 0.975], method="nearest"))
    return Estimate(
        value=float(sizes[best]),
        low=float(sizes[min(low, best)]),
        high=float(sizes[max(high, best)]),
        n=count,
        method="bootstrap over seeds, among the sizes tried",
    )


def estimate_excess(
    tables: Sequence[ArrayLike], size: int, rate: int | None = None, *, gave_up: float | None = None
) -> Estimate:
    """By how much a choice is worse than the best: its mean score − that of the best size.

    The true excess is the largest difference to any size. Its upper end is the largest upper end
    of the paired differences to each size at its best rate (Student's interval over seeds), so
    that it holds whichever of them is the best; its lower end is that of the difference to the
    best measured, and not below 0.

    Args:
        tables: Of each size.
        size: Index of the size that was chosen.
        rate: Index of the learning rate chosen there. Default: the best one there.
        gave_up: The score at which trainings of that size that had not arrived ended.

    Returns:
        The excess; in logarithms where scores are. Where the choice is censored, only a lower
        bound, and that where `gave_up` is known.

    Example:
        >>> excess = estimate_excess([[[1.0, 1.2, 0.8]], [[2.0, 2.3, 1.9]]], 1)
        >>> round(excess.value, 2), round(excess.low, 2), round(excess.high, 2)
        (1.07, 0.92, 1.21)
    """
    arrays = [np.asarray(table, dtype=np.float64) for table in tables]
    count = arrays[0].shape[1]
    rivals = [(i, r) for i, t in enumerate(arrays) if (r := best_rate_of(t)) is not None]
    if not rivals:
        return unresolved(count, "no size arrived")
    best = min(arrays[i][r].mean() for i, r in rivals)
    own_rate = best_rate_of(arrays[size]) if rate is None else rate
    own = None if own_rate is None else arrays[size][own_rate]
    if own is None or not np.isfinite(own).all():
        low = None if gave_up is None else max(0.0, gave_up - float(best))
        return unresolved(count, "the choice missed the target on some seed", low=low)
    differences = [own - arrays[i][r] for i, r in rivals]
    means = [float(d.mean()) for d in differences]
    value = max(0.0, *means)
    method = "against the best measured, paired over seeds"
    if count == 1:
        return Estimate(value=value, n=1, method=method)
    t = student_quantile(count - 1) / math.sqrt(count)
    halves = [t * float(d.std(ddof=1)) for d in differences]
    farthest = int(np.argmax(means))
    return Estimate(
        value=value,
        low=min(value, max(0.0, means[farthest] - halves[farthest])),
        high=max(value, *(m + h for m, h in zip(means, halves, strict=True))),
        n=count,
        method=method,
    )


def as_regret(excess: Estimate) -> Estimate:
    """From ln cost over that of the best to regret: cost ÷ that of the best − 1.

    Args:
        excess: In logarithms.

    Returns:
        The regret, 0.5 for half as much again.

    Example:
        >>> as_regret(Estimate(value=math.log(1.5), n=3)).value
        0.5
    """

    def back(number: float | None) -> float | None:
        return None if number is None else math.expm1(number)

    return Estimate(
        value=back(excess.value),
        low=back(excess.low),
        high=back(excess.high),
        n=excess.n,
        method=excess.method,
    )


def _means(table: ArrayLike) -> Array:
    """Of each rate, over its seeds; inf where one is missing."""
    scores = np.asarray(table, dtype=np.float64)
    return np.where(np.isfinite(scores), scores, np.inf).mean(axis=1)


def _draw(table: ArrayLike, drawn: NDArray[np.int64], stretch: float) -> Array:
    scores = np.asarray(table, dtype=np.float64)
    values = np.where(np.isfinite(scores), scores, np.inf)
    means = values[:, drawn].mean(axis=2)  # (rates, samples)
    # A rate that missed on some seed has no centre; in samples without that seed it may arrive.
    centre = np.where(np.isfinite(scores), scores, np.nan).mean(axis=1)
    known = np.isfinite(centre)
    means[known] = centre[known, None] + stretch * (means[known] - centre[known, None])
    return means.min(axis=0)


def _stretch(count: int) -> float:
    if count == 1:
        return 1.0
    return math.sqrt(count / (count - 1)) * student_quantile(count - 1) / _NORMAL


def _quantiles(draws: Array, value: float) -> tuple[float, float]:
    if not len(draws):
        return value, value
    low, high = (float(q) for q in np.quantile(draws, [0.025, 0.975]))
    return min(low, value), max(high, value)
