"""Intervals that the laws share."""

from __future__ import annotations

import math

from scipy import special  # pyright: ignore[reportMissingTypeStubs]

from rightbatch.laws.estimate import Estimate


def student_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, for two-sided 95 % intervals.

    Args:
        freedom: Degrees of freedom.

    Returns:
        The quantile.

    Example:
        >>> round(student_quantile(10), 3)
        2.228
    """
    return float(special.stdtrit(freedom, 0.975))  # pyright: ignore[reportUnknownMemberType]


def symmetric(value: float, half_width: float, n: int, method: str) -> Estimate:
    """An estimate with equal distances to both ends.

    Args:
        value: Point estimate.
        half_width: Distance to either end.
        n: Samples behind it.
        method: How it was obtained.

    Returns:
        The estimate.
    """
    return Estimate(
        value=value, low=value - half_width, high=value + half_width, n=n, method=method
    )


def accepted_ratios(
    denominator: float, *, floor: float, b: float, c: float
) -> tuple[float | None, float | None]:
    """The positive x with ax² + bx + c ≤ 0, where a = denominator² − floor.

    A denominator that is far below 0 would reject every x; it is then taken to be at 0, where the
    set is the unbounded one (no upper end).

    Args:
        denominator: Estimate of |G|².
        floor: Quantile² × the part of its variance that does not depend on x.
        b: Linear coefficient.
        c: Constant coefficient.

    Returns:
        The ends; None for an end that the data do not bound.
    """
    if denominator <= 0:
        # b holds −2·numerator·denominator; without that term the bound can only become lower.
        a, b = -floor, min(b, 0.0)
    else:
        a = denominator**2 - floor
    if a <= 0:
        if c <= 0 or (a == 0 and b >= 0):
            return None, None
        # One positive root; the form 2c/(…) does not cancel when a is small.
        return 2 * c / (-b + math.sqrt(b * b - 4 * a * c)), None
    inside = math.sqrt(max(b * b - 4 * a * c, 0.0))
    high = (-b + inside) / (2 * a)
    low = 2 * c / (-b + inside) if c > 0 else 0.0
    return max(low, 0.0), high
