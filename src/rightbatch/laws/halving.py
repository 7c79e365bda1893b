"""Successive halving over batch sizes and learning rates: how far the rungs go, and who goes on.

All cells (a batch size at a learning rate, with all its seeds) run for a small part of the budget;
the best third of them for three times that, and so on to the whole of it. Cells share their seeds,
so two are compared by the differences seed by seed.

Early rungs lie. While the loss still falls, a larger learning rate falls faster; the noise floor
that it ends on shows later. On a quadratic the rate that is best after T updates is ln(…)/(λT)
where noise governs, and constant where it does not: from a share s of the way to the end of it,
it falls by a factor between 1 and 1/s. So the rates below the best one, down to the first that is
lower by that, go on with it, and the one above.

K. Jamieson and A. Talwalkar, "Non-stochastic best arm identification and hyperparameter
optimization", AISTATS 2016.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rightbatch.laws.interval import student_quantile

Array = NDArray[np.float64]
REDUCTION = 3
"""η: a rung is so many times as long as the one before, and has about so many times fewer cells."""
_ROOM = 1.5
"""Cells that cannot be told from the last one kept go on while there are fewer than this many times
the share that goes on anyway."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A cell as one of several that are compared.

    Attributes:
        batch_size: B.
        learning_rate: The rate.
    """

    batch_size: int
    learning_rate: float


def make_rungs(
    updates: Mapping[int, int],
    costs: Mapping[int, float],
    num_cells: int,
    *,
    least_updates: int = 4,
) -> list[dict[int, float]]:
    """How far a training goes on each rung.

    On a rung all trainings cost the same: the k-th before the last is a cost of max C/η^k, and a
    training at B that costs C(B) in all goes to the share min(1, max C/(η^k C(B))) of its way.
    Where all costs are given as equal, that is the same share of its way for each.

    Args:
        updates: Of a whole training, by batch size.
        costs: Of a whole training, by batch size, in what they are compared by.
        num_cells: Cells to begin with: there are no more rungs than thirds can be taken of them.
        least_updates: What every training needs on the first rung (or all of its own, where these
            are fewer) to be judged there.

    Returns:
        Shares by batch size, the first rung first; on the last all are 1.

    Example:
        >>> make_rungs({1: 900, 9: 100}, {1: 9.0, 9: 3.0}, 9)
        [{1: 0.1111..., 9: 0.3333...}, {1: 0.3333..., 9: 1.0}, {1: 1.0, 9: 1.0}]
        >>> make_rungs({1: 900, 90: 10}, {1: 1.0, 90: 1.0}, 9)
        [{1: 1.0, 90: 1.0}]
    """
    dearest = max(costs.values())
    rungs = [dict.fromkeys(updates, 1.0)]
    while REDUCTION ** len(rungs) <= num_cells:
        amount = dearest / REDUCTION ** len(rungs)
        shares = {size: min(1.0, amount / costs[size]) for size in updates}
        if any(shares[size] * all_ < min(least_updates, all_) for size, all_ in updates.items()):
            break
        rungs.append(shares)
    return rungs[::-1]


def promote(scores: ArrayLike, arms: Sequence[Arm], shares: Mapping[int, float]) -> list[int]:
    """The cells that go on to the next rung.

    These are: the best η-th part; of the best one's batch size the rates that may yet be best (down
    to the first that is lower by 1/share) and the one above; and while there is room, cells that
    cannot be told from the last of the best part (the interval of their difference, seed by seed,
    holds 0). A cell none of whose seeds has a score goes no farther.

    Args:
        scores: Shape (cells, seeds); lower is better, NaN where a seed has none, as where it
            diverged. Cells with fewer of these come first, then those with the lower mean.
        arms: What each cell is.
        shares: How far each batch size is, of its whole way.

    Returns:
        Indices, the best first.

    Example:
        >>> arms = [Arm(batch_size=8, learning_rate=2.0**k) for k in range(9)]
        >>> scores = [[abs(k - 6) + 0.1 * s for s in range(3)] for k in range(9)]
        >>> promote(scores, arms, {8: 1 / 3}), promote(scores, arms, {8: 1 / 9})
        ([6, 5, 7, 4], [6, 5, 7, 4, 3, 2])
    """
    table = np.asarray(scores, dtype=np.float64)
    ranked = rank(table)
    if not ranked:
        return []
    quota = -(-len(arms) // REDUCTION)
    kept = set(ranked[:quota])
    last = ranked[min(quota, len(ranked)) - 1]
    kept |= _beside(arms, ranked[0], shares[arms[ranked[0]].batch_size]) & set(ranked)
    room = math.ceil(_ROOM * quota)
    for index in ranked[quota:]:
        if len(kept) < room and not _is_worse(table[index], table[last]):
            kept.add(index)
    return [index for index in ranked if index in kept]


def rank(scores: ArrayLike) -> list[int]:
    """Cells that have any score, the best first; of equals the one that was given first.

    Args:
        scores: As for `promote`.

    Returns:
        Indices.
    """
    table = np.asarray(scores, dtype=np.float64)
    missing = np.isnan(table).sum(axis=1)
    there = np.flatnonzero(missing < table.shape[1])
    means = np.nanmean(table[there], axis=1)
    return [int(i) for i in there[np.lexsort((there, means, missing[there]))]]


def _beside(arms: Sequence[Arm], best: int, share: float) -> set[int]:
    """The rates of the best one's batch size that may be best at the end, and those beside them."""
    own = arms[best]
    alike = [i for i, arm in enumerate(arms) if arm.batch_size == own.batch_size]
    alike.sort(key=lambda i: arms[i].learning_rate)
    place = alike.index(best)
    low = max(0, place - 1)
    # The learning rates of a grid are rounded: a third of one is a third to six digits.
    least = share * own.learning_rate * (1 + 1e-6)
    while low > 0 and arms[alike[low]].learning_rate > least:
        low -= 1
    return set(alike[low : place + 2])


def _is_worse(scores: Array, other: Array) -> bool:
    """Whether a cell is surely behind another, by the differences of the seeds that both have."""
    gaps = scores - other
    gaps = gaps[~np.isnan(gaps)]
    n = len(gaps)
    if n < 2:  # one seed tells no chance from a difference; where it is, the order is all there is
        return True
    half = student_quantile(n - 1) * float(gaps.std(ddof=1)) / math.sqrt(n)
    return float(gaps.mean()) > half
