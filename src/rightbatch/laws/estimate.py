"""A number with its interval: every measured value in rightbatch is one of these."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A measured value, its 95 % interval and the number of samples it rests on.

    `value is None` means *unresolved*: the data do not tell. A missing `low` or `high` means
    that the interval is not bounded on that side (JSON has no infinity).

    Attributes:
        value: Point estimate, or None when unresolved.
        low: Lower end of the 95 % interval, or None when unbounded below.
        high: Upper end of the 95 % interval, or None when unbounded above.
        n: Number of independent samples behind the estimate.
        method: How it was obtained, in a few words.

    Example:
        >>> Estimate(value=2.0, low=1.5, high=2.5, n=10).resolved
        True
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int
    method: str = ""

    def __post_init__(self) -> None:
        for name in ("value", "low", "high"):
            number = getattr(self, name)
            if number is not None and not math.isfinite(number):
                raise ValueError(f"Estimate.{name} is {number}; use None for 'not bounded'.")

    @property
    def resolved(self) -> bool:
        """Whether the data tell anything: there is a point estimate."""
        return self.value is not None


def unresolved(n: int, method: str = "", *, low: float | None = None) -> Estimate:
    """An estimate without a value: the data do not tell.

    Args:
        n: Number of samples that were looked at.
        method: How it was attempted.
        low: A lower bound, where at least that much is known.

    Returns:
        An `Estimate` whose `value` is None.
    """
    return Estimate(value=None, low=low, high=None, n=n, method=method)
