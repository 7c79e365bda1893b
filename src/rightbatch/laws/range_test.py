"""The learning-rate range test: what a ramp of the learning rate says about the right one.

The learning rate rises exponentially, one step at each. The loss first stays, then falls, then
explodes. Everything here is in log learning rate: per *unit of learning rate* the steepest fall
is always at the smallest one (dL/dη = dL/d log η / η), which is how a finder comes to suggest
9e-8 where 1e-3 is right.

Two smoothings are used. While the test runs only the past is known: a debiased exponential
average, (1 − m) Σ_j m^{i−j} L_j / (1 − m^{i+1}) with i counted from 0, so that the first average
*is* the first loss. Afterwards both sides are known: weights m^{|i−j|}, normalised, which do not
lag behind the ramp (a one-sided average with m = 0.9 lags by 9 steps, often half a decade).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rightbatch.errors import UsageError

Array = NDArray[np.float64]

MOMENTUM = 0.9
"""Of the running average that decides when to stop."""
CENTRED_MOMENTUM = 0.8
"""Of the two-sided average: each point counts about 9 steps."""
EXPLOSION_FACTOR = 4.0
"""The test stops where the average is this many times the best one so far."""
_SETTLED = 10
_EDGE_MOMENTUM = 0.5
_EDGE_RISE = 1.3
"""At the edge the loss is this many times the best: no longer noise, not yet an explosion."""


@dataclass(frozen=True, kw_only=True)
class RangeTest:
    """What one ramp says. None: the curve does not show it.

    Attributes:
        steepest: Learning rate of the steepest fall per decade.
        minimum_div_10: A tenth of the learning rate of least loss.
        valley: Middle of the longest fall, in log learning rate.
        edge: Where the loss starts to explode, or to lose most of what it had gained and never
            gets it back; None if it does neither in this range.
        best_loss: Least smoothed loss before the explosion.
    """

    steepest: float | None
    minimum_div_10: float | None
    valley: float | None
    edge: float | None
    best_loss: float | None


def make_ramp(lr_min: float, lr_max: float, num_steps: int) -> Array:
    """Learning rates from `lr_min` to `lr_max`, equally spaced in logarithm.

    Args:
        lr_min: First learning rate.
        lr_max: Last learning rate.
        num_steps: How many, at least 2.

    Returns:
        Shape (num_steps,).

    Raises:
        UsageError: If the range is empty or not positive.

    Example:
        >>> [round(float(lr), 6) for lr in make_ramp(1e-3, 1e-1, 3)]
        [0.001, 0.01, 0.1]
    """
    if not (0 < lr_min < lr_max < math.inf) or num_steps < 2:
        raise UsageError(
            f"The range test goes from {lr_min:g} to {lr_max:g} in {num_steps} steps; it needs "
            "0 < lr_min < lr_max and at least 2 steps."
        )
    return np.geomspace(lr_min, lr_max, num_steps)


def smooth_losses(losses: ArrayLike, *, momentum: float = MOMENTUM) -> Array:
    """Debiased exponential average: the one that is known while the test runs.

    Args:
        losses: L_0 … L_{n−1}, shape (n,).
        momentum: m, the share of the past.

    Returns:
        The average after each loss, shape (n,); the first equals the first loss.

    Example:
        >>> smooth_losses([2.0, 2.0, 1.0], momentum=0.5).round(3).tolist()
        [2.0, 2.0, 1.429]
    """
    values = np.asarray(losses, dtype=np.float64)
    smoothed = np.empty_like(values)
    average = 0.0
    for i, loss in enumerate(values):
        average = momentum * average + (1 - momentum) * float(loss)
        smoothed[i] = average / (1 - momentum ** (i + 1))
    return smoothed


def smooth_centred(losses: ArrayLike, *, momentum: float = CENTRED_MOMENTUM) -> Array:
    """Two-sided exponential average, Σ_j m^{|i−j|} L_j / Σ_j m^{|i−j|}: it does not lag.

    Args:
        losses: L_0 … L_{n−1}, shape (n,).
        momentum: m, the share of the neighbours.

    Returns:
        Shape (n,).
    """
    values = np.asarray(losses, dtype=np.float64)
    steps = np.arange(len(values))
    weights = momentum ** np.abs(steps[:, None] - steps)
    return (weights @ values) / weights.sum(axis=1)


def find_explosion(
    losses: ArrayLike, *, momentum: float = MOMENTUM, factor: float = EXPLOSION_FACTOR
) -> int | None:
    """The first step at which the average exceeds `factor` times the best one before.

    Guards against taking noise for an explosion, since single examples' losses scatter by
    orders of magnitude: the first ten steps only set the standard; the middle one of the last
    three losses must be high too; and without a clear fall before (to a fifth), the average must
    be twice as high as it ever was up to five steps before. A loss that is not a number has
    exploded, whatever the step.

    Args:
        losses: The losses so far, shape (n,).
        momentum: Of the running average.
        factor: How many times the best counts as an explosion.

    Returns:
        The index of the step, or None if the loss has not exploded.

    Example:
        >>> find_explosion([1.0] * 20 + [2.0, 20.0, 50.0])
        22
    """
    values = np.asarray(losses, dtype=np.float64)
    finite = np.isfinite(values)
    num_finite = len(values) if bool(finite.all()) else int(np.argmin(finite))
    if num_finite > _SETTLED:
        smoothed = smooth_losses(values[:num_finite], momentum=momentum)
        start = float(smoothed[_SETTLED - 1])
        best = np.minimum.accumulate(smoothed[_SETTLED - 1 :])
        latest = np.array(
            [np.median(values[i - 2 : i + 1]) for i in range(_SETTLED - 1, num_finite)]
        )
        # For a loss that can be negative, the same distance above it.
        too_high = smoothed[_SETTLED - 1 :] - best > (factor - 1) * np.abs(best) + 1e-300
        lasting = latest - best > (factor / 2 - 1) * np.abs(best)
        earlier = np.concatenate([np.full(5, start), smoothed[_SETTLED - 1 :]])[: len(best)]
        highest = np.maximum.accumulate(earlier)
        clear = (best < start / 5) | (smoothed[_SETTLED - 1 :] > highest + np.abs(highest))
        exploded = np.flatnonzero(too_high & lasting & clear)
        if len(exploded):
            return int(exploded[0]) + _SETTLED - 1
    return num_finite if num_finite < len(values) else None


def analyse_range_test(learning_rates: ArrayLike, losses: ArrayLike) -> RangeTest:
    """Suggestions and edge from one ramp.

    Args:
        learning_rates: Of each step, ascending, shape (n,).
        losses: Loss of each step *before* its update, shape (n,). May end in NaN or infinity.

    Returns:
        The suggestions. All are None where the loss never fell by more than its noise; `edge` is
        None where it did not explode.

    Raises:
        UsageError: If the shapes differ or the learning rates do not rise.
    """
    rates = np.asarray(learning_rates, dtype=np.float64)
    values = np.asarray(losses, dtype=np.float64)
    if rates.shape != values.shape or bool(np.any(np.diff(rates) <= 0)):
        raise UsageError(
            f"{rates.shape} learning rates came with {values.shape} losses; give as many, and "
            "the learning rates ascending."
        )
    explosion = find_explosion(values)
    end = len(values) if explosion is None else explosion
    edge = (
        _find_lasting_rise(rates, values)
        if explosion is None
        else _find_edge(rates, values, explosion)
    )
    if end < 3:
        return RangeTest(steepest=None, minimum_div_10=None, valley=None, edge=edge, best_loss=None)
    rates, values = rates[:end], values[:end]
    smoothed = smooth_centred(values)
    lowest = int(np.argmin(smoothed))
    best = float(smoothed[lowest])
    if lowest < 2 or float(smoothed[:lowest].max()) - best < _least_fall(values[: lowest + 1]):
        return RangeTest(steepest=None, minimum_div_10=None, valley=None, edge=edge, best_loss=best)
    # Beyond the minimum there is no fall to look for.
    slopes = np.gradient(smoothed, np.log(rates))[: lowest + 1]
    return RangeTest(
        steepest=float(rates[int(np.argmin(slopes))]),
        minimum_div_10=float(rates[lowest]) / 10,
        valley=_middle_of_longest_fall(rates, smoothed),
        edge=edge,
        best_loss=best,
    )


def _least_fall(losses: Array) -> float:
    """What a fall of the smoothed loss must exceed not to be noise."""
    # Neighbouring losses differ by √2 σ; an average over w of them scatters by σ/√w, and the
    # range of a dozen such averages is about 3 of that.
    # Root mean square, not median: single examples' losses have heavy tails, which averages keep.
    sigma = float(np.sqrt(np.mean(np.diff(losses) ** 2))) / math.sqrt(2)
    width = (1 + CENTRED_MOMENTUM) / (1 - CENTRED_MOMENTUM)
    return 4.5 * sigma / math.sqrt(width)


def _find_edge(rates: Array, losses: Array, explosion: int) -> float:
    """Where the rise into the explosion begins: the last low before it that is near the best."""
    until = losses[: explosion + 1]
    until = until[np.isfinite(until)]
    if len(until) < 2:
        return float(rates[0])
    # What is beyond the limit counts as at the limit, or it would drown the steps before it.
    best = float(smooth_centred(until, momentum=_EDGE_MOMENTUM).min())
    limit = best + (EXPLOSION_FACTOR - 1) * abs(best)
    until = np.minimum(until, max(limit, float(until[0])))
    in_logs = bool(np.all(until > 0))
    heights = np.log(until) if in_logs else until
    rise = math.log(_EDGE_RISE) if in_logs else (_EDGE_RISE - 1) * abs(best)
    # What noise alone does to the average does not count as a rise.
    scatter = 1.4826 * float(np.median(np.abs(np.diff(heights)))) / math.sqrt(2)
    momentum = CENTRED_MOMENTUM if scatter > rise else _EDGE_MOMENTUM
    rise = max(rise, 3 * scatter * math.sqrt((1 - momentum) / (1 + momentum)))
    smoothed = smooth_centred(heights, momentum=momentum)
    last = int(np.flatnonzero(smoothed <= smoothed.min() + rise)[-1])
    # Back to the low, but no further than the average reaches: beyond, it would follow noise.
    for _ in range(3):
        if last > 0 and smoothed[last - 1] < smoothed[last]:
            last -= 1
    # The update at `last` was the first to raise the loss, the one before the last not to.
    return float(math.sqrt(rates[max(last - 1, 0)] * rates[last]))


def _find_lasting_rise(rates: Array, losses: Array) -> float | None:
    """Where the loss turns for good, without exploding.

    Cross-entropy of a network whose units have died stays near that of guessing: it never
    reaches 4 × the best, but the best learning rate is as surely behind it.

    Args:
        rates: Learning rates, shape (n,).
        losses: Losses, shape (n,).

    Returns:
        The learning rate at the end of the low, or None if half of the fall is never lost again
        or the fall is no more than noise.
    """
    if len(losses) < 3:
        return None
    smoothed = smooth_centred(losses)
    lowest = int(np.argmin(smoothed))
    fall = float(smoothed[: lowest + 1].max() - smoothed[lowest])
    lost = float(smoothed[-1] - smoothed[lowest])
    if lowest < 2 or fall < _least_fall(losses[: lowest + 1]) or lost < fall / 2:
        return None
    near_best = smoothed <= smoothed[lowest] + 0.2 * fall
    return float(rates[int(np.flatnonzero(near_best)[-1])])


def _middle_of_longest_fall(rates: Array, smoothed: Array) -> float:
    """Half way, in log learning rate, along the longest decreasing subsequence."""
    length = np.ones(len(smoothed), dtype=np.int64)
    first = np.arange(len(smoothed))
    for i in range(1, len(smoothed)):
        higher = np.flatnonzero(smoothed[:i] > smoothed[i])
        if len(higher):
            best = int(higher[np.argmax(length[higher])])
            length[i], first[i] = length[best] + 1, first[best]
    last = int(np.argmax(length))
    start = int(first[last])
    # The nearly level stretch before the fall belongs to the subsequence but not to the valley.
    nearly_all = float(smoothed[last]) + 0.98 * float(smoothed[start] - smoothed[last])
    start = max(start, int(np.flatnonzero(smoothed[:last] >= nearly_all)[-1]) if last else 0)
    return float(math.sqrt(rates[start] * rates[last]))
