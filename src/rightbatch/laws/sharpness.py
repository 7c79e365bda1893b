"""Sharpness from values: Keskar's φ and its box, a trace from probes, and pairs over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rightbatch.laws.estimate import Estimate, unresolved
from rightbatch.laws.seeds import mean_over_seeds

Array = NDArray[np.float64]
Order = Literal["lower", "higher", "not told apart"]


def keskar_sharpness(highest: float, loss: float) -> float | None:
    """φ = 100 (max f(x + Ay) − f(x)) / (1 + f(x)).

    Args:
        highest: The largest loss that was found in the box.
        loss: f(x).

    Returns:
        φ in percent; None where 1 + f(x) is not positive: φ is defined for losses above −1.

    Example:
        >>> keskar_sharpness(0.75, 0.5), keskar_sharpness(0.0, -2.0)
        (16.666666666666668, None)

    References:
        Keskar et al. 2017, "On Large-Batch Training for Deep Learning: Generalization Gap and
        Sharp Minima", metric 2.1.
    """
    if not 1.0 + loss > 0:
        return None
    return 100.0 * (highest - loss) / (1.0 + loss)


def keskar_box(coordinates: ArrayLike, epsilon: float) -> Array:
    """Half widths of the box C_ε: |y_i| ≤ ε(|(A⁺x)_i| + 1).

    Args:
        coordinates: A⁺x: the weights themselves where A = I.
        epsilon: ε.

    Returns:
        Half widths, of the same shape.

    Example:
        >>> [float(half) for half in keskar_box([0.0, -3.0], 0.5)]
        [0.5, 2.0]
    """
    return epsilon * (np.abs(np.asarray(coordinates, dtype=np.float64)) + 1.0)


def estimate_trace(known: float, samples: Sequence[float], method: str) -> Estimate:
    """The trace of a matrix: a part that is known, and the mean of quadratic forms for the rest.

    Args:
        known: Trace over a subspace, exact.
        samples: zᵀMz of random z with E zzᵀ = the projection onto the rest; none where nothing is
            left.
        method: How it was obtained.

    Returns:
        The sum, with Student's interval of the mean.

    Example:
        >>> estimate_trace(10.0, [1.0, 2.0, 3.0], "Hutchinson").value
        12.0
        >>> estimate_trace(10.0, [], "exact").high
        10.0
    """
    if not samples:
        return Estimate(value=known, low=known, high=known, n=0, method=method)
    rest = mean_over_seeds(samples, method)

    def plus(value: float | None) -> float | None:
        return None if value is None else known + value

    return Estimate(
        value=plus(rest.value), low=plus(rest.low), high=plus(rest.high), n=rest.n, method=method
    )


def order_of_pairs(
    first: Sequence[float | None], second: Sequence[float | None]
) -> tuple[Order, Estimate]:
    """Whether a quantity is lower in the first of two trainings than in the second, over seeds.

    The two of a seed share weights and data order, so differences within seeds are looked at: of
    the logarithms, as a ratio; of the values themselves where some are not positive.

    Args:
        first: One per seed; None where there is no value.
        second: Likewise.

    Returns:
        The verdict at 95 %, and the ratio first/second over the seeds where both have a value,
        which has none where a value is not positive.

    Example:
        >>> order, ratio = order_of_pairs([1.0, 2.0, 3.0], [2.1, 4.0, 5.9])
        >>> order, round(ratio.value, 2)
        ('lower', 0.49)
    """
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    method = "geometric mean of ratios within seeds"
    if not all(a > 0 and b > 0 for a, b in pairs):
        difference = mean_over_seeds([a - b for a, b in pairs])
        return _order(difference), unresolved(len(pairs), "not all values are positive")
    logs = mean_over_seeds([math.log(a) - math.log(b) for a, b in pairs], method)

    def back(value: float | None) -> float | None:
        # Two seeds that are far apart have an interval beyond the floats.
        return None if value is None or value > 700 else math.exp(value)

    ratio = Estimate(
        value=back(logs.value), low=back(logs.low), high=back(logs.high), n=logs.n, method=method
    )
    return _order(logs), ratio


def _order(difference: Estimate) -> Order:
    if difference.high is not None and difference.high < 0:
        return "lower"
    if difference.low is not None and difference.low > 0:
        return "higher"
    return "not told apart"
