"""Is a power of two faster here? Answered by timing B − 1, B and B + 1 against each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from rightbatch.errors import UsageError
from rightbatch.laws.estimate import Estimate
from rightbatch.laws.rounds import estimate_median

WORTH_HAVING = 0.02
"""A gain below this share of the step time does not decide a batch size."""

Verdict = Literal["yes", "no", "too noisy"]


@dataclass(frozen=True, kw_only=True)
class PowerOfTwo:
    """Whether one power of two is faster than its neighbours.

    Attributes:
        micro_batch: B, the power of two.
        ratio: t(B) / ((t(B−1) + t(B+1))/2); below 1 the power of two is faster.
        verdict: `yes` when it is faster by at least 2 % and certainly not slower, `no` when a
            gain of 2 % is excluded, else `too noisy`.
        sentence: The answer in words.
    """

    micro_batch: int
    ratio: Estimate
    verdict: Verdict
    sentence: str


def compare_power_of_two(
    micro_batch: int, below: ArrayLike, at: ArrayLike, above: ArrayLike
) -> PowerOfTwo:
    """Compares t(B) with the mean of t(B−1) and t(B+1), round by round.

    The mean is what a straight line through the neighbours predicts at B, so the law's own slope
    is not taken for an effect; pairing within rounds removes what the machine did meanwhile.

    Args:
        micro_batch: B.
        below: Seconds of B − 1 in each round, shape (rounds,).
        at: Seconds of B, shape (rounds,).
        above: Seconds of B + 1, shape (rounds,).

    Returns:
        Ratio and verdict.

    Raises:
        UsageError: If there are fewer than 3 rounds.

    Example:
        >>> compare_power_of_two(64, [1.0] * 5, [0.8] * 5, [1.0] * 5).verdict
        'yes'
    """
    neighbours = (np.asarray(below, dtype=np.float64) + np.asarray(above, dtype=np.float64)) / 2
    ratios = np.asarray(at, dtype=np.float64) / neighbours
    if len(ratios) < 3:
        raise UsageError(f"{len(ratios)} rounds were timed; at least 3 are needed to compare.")
    ratio = estimate_median(ratios, "median of paired rounds")
    assert ratio.value is not None and ratio.low is not None and ratio.high is not None
    threshold = 1 - WORTH_HAVING
    verdict: Verdict = "too noisy"
    if ratio.value <= threshold and ratio.high < 1:
        verdict = "yes"
    elif ratio.low > threshold:
        verdict = "no"
    change = f"{abs(1 - ratio.value):.1%} {'less' if ratio.value < 1 else 'more'} time"
    opening = {
        "yes": f"{micro_batch} is faster than its neighbours",
        "no": f"{micro_batch} is not faster than its neighbours",
        "too noisy": f"Too noisy to tell whether {micro_batch} is faster than its neighbours",
    }[verdict]
    sentence = (
        f"{opening}: it takes {change} than {micro_batch - 1} and {micro_batch + 1} "
        f"(ratio {ratio.value:.3f}, {ratio.low:.3f}–{ratio.high:.3f})."
    )
    return PowerOfTwo(micro_batch=micro_batch, ratio=ratio, verdict=verdict, sentence=sentence)
