"""Paired ratios: what one implementation costs in units of another, round by round.

A round times every implementation once, so a machine that slows down slows both halves of a pair.
The ratio is the median over rounds of t_r(row) / t_r(reference); its interval lies between the two
order statistics that hold the median of any distribution with a probability of at least 95 %.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Literal

from rightbatch.laws.estimate import Estimate

Verdict = Literal["met", "missed", "open", ""]

BAR_OURS = 1.05
"""Ours ÷ hand-written, from batch 32 upwards."""
BAR_OURS_SMALL = 1.25
"""Ours ÷ hand-written at batch 1, where a step is almost nothing but overhead."""
BAR_WATCHING = 1.05
"""Ours with watching ÷ ours, from batch 32 upwards."""


def estimate_median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """The median of paired ratios.

    Args:
        numerators: One time per round.
        denominators: The other time of the same rounds.

    Returns:
        The estimate; without an interval below six rounds, which cannot give one of 95 %.

    Example:
        >>> estimate_median_ratio([2.0, 3.0, 8.0], [2.0, 2.0, 2.0]).value
        1.5
    """
    ratios = sorted(top / bottom for top, bottom in zip(numerators, denominators, strict=True))
    n = len(ratios)
    rank = median_rank(n)
    return Estimate(
        value=statistics.median(ratios),
        low=ratios[rank - 1] if rank else None,
        high=ratios[n - rank] if rank else None,
        n=n,
        method="median of paired ratios, order statistics",
    )


def median_rank(n: int) -> int:
    """The largest k for which P(x_(k) ≤ median ≤ x_(n+1−k)) ≥ 95 %; 0 where there is none.

    Args:
        n: Number of independent values.

    Returns:
        The rank, counted from 1.

    Example:
        >>> median_rank(5), median_rank(6), median_rank(20)
        (0, 1, 6)
    """
    rank, below = 0, 0
    while rank < n:
        below += math.comb(n, rank)
        # Exact in integers: twice the lower tail must not exceed 5 % of 2^n.
        if 40 * below > 2**n:
            break
        rank += 1
    return rank


def bar_of(row: str, global_batch: int) -> float | None:
    """What a ratio should not exceed, or None where nothing was promised.

    Args:
        row: `ours` (÷ hand-written) or `watching ÷ ours`.
        global_batch: Examples per update.

    Returns:
        The bar.

    Example:
        >>> bar_of("ours", 1), bar_of("ours", 32), bar_of("lightning", 32)
        (1.25, 1.05, None)
    """
    if row == "ours" and global_batch == 1:
        return BAR_OURS_SMALL
    if row == "ours" and global_batch >= 32:
        return BAR_OURS
    if row == "watching ÷ ours" and global_batch >= 32:
        return BAR_WATCHING
    return None


def judge(ratio: Estimate, bar: float | None) -> Verdict:
    """Whether a ratio keeps its bar: `open` where the interval lies on both sides of it."""
    if bar is None or ratio.value is None:
        return ""
    if ratio.low is None or ratio.high is None:
        return "open"
    if ratio.high <= bar:
        return "met"
    return "missed" if ratio.low > bar else "open"
