"""Sharpness from values of a loss: Keskar's φ and the box it searches, and a trace from probes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rightbatch.laws.estimate import Estimate
from rightbatch.laws.seeds import mean_over_seeds

Array = NDArray[np.float64]


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
