"""A mean that forgets, in constant memory."""

from __future__ import annotations

import math


class RunningMean:
    """Two means of a quantity over a stream: over its recent past, and over all of it.

    The recent one weighs an example that is k examples old by 2^(−k/h), h the half-life:

        recent = Σ 2^(−k/h)·sum / Σ 2^(−k/h)·count

    The weights are divided by their own sum, so that it has no bias at the beginning. Examples of
    one update are of the same age.

    Args:
        half_life: Examples after which an example counts half.
    """

    def __init__(self, half_life: float) -> None:
        self.half_life = half_life
        self.sums = [0.0, 0.0, 0.0, 0.0]

    def add(self, total: float, count: float, num_examples: int) -> None:
        """Takes in the examples of one update.

        Args:
            total: Sum of the quantity over their terms.
            count: Terms: examples, or tokens.
            num_examples: Examples.
        """
        keep = 0.5 ** (num_examples / self.half_life)
        sums = self.sums
        sums[0] = keep * sums[0] + total
        sums[1] = keep * sums[1] + count
        sums[2] += total
        sums[3] += count

    @property
    def recent(self) -> float:
        """The mean over the recent past; NaN before the first example."""
        return self.sums[0] / self.sums[1] if self.sums[1] else math.nan

    @property
    def whole(self) -> float:
        """The mean over everything so far; NaN before the first example."""
        return self.sums[2] / self.sums[3] if self.sums[3] else math.nan
