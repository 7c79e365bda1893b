"""The learning curve of a run, and what two curves say of each other at the same loss.

Runs that share initial weights and data order are compared in two ways. At the same step and
batch: who has the lower loss. At the same loss: how many steps each took to it, which carries
over to other batches. A validation loss is noisy and not monotone; its logarithm is smoothed over
neighbouring evaluations, and for steps to a loss the running minimum is taken. A loss that is 0 or
negative has no logarithm; there a straight line carries it on, so that lower stays better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_LEAST_LOSS = 1e-30
"""Where the logarithm of a loss is carried on as a straight line."""
_FLATTEST = 0.05
"""Slopes below this are taken as this: a flat curve says nothing of how far there is to go."""
_RECENT = 0.8
"""A loss at a step is the mean of the evaluations since this share of the steps."""
_COMPARED = 0.6
"""Runs are compared at the losses that one had in this last part of its way."""


def log_of_loss(loss: float | None) -> float:
    """The logarithm of a loss, carried on as a straight line below 1e−30.

    Args:
        loss: The loss; None, infinity and NaN are no numbers.

    Returns:
        ln loss, or inf where it was not a number.
    """
    if loss is None or not math.isfinite(loss):
        return math.inf
    if loss >= _LEAST_LOSS:
        return float(np.log(loss))
    return math.log(_LEAST_LOSS) + (loss / _LEAST_LOSS - 1.0)


def loss_of_log(ln_loss: float) -> float:
    """The loss that `log_of_loss` gives this for."""
    least = math.log(_LEAST_LOSS)
    return math.exp(ln_loss) if ln_loss >= least else _LEAST_LOSS * (1.0 + ln_loss - least)


@dataclass(frozen=True)
class LossCurve:
    """Evaluations of one run.

    Attributes:
        steps: Ascending, positive, shape (points,).
        ln_loss: As evaluated; inf where it was not a number. Shape (points,).
        smooth: Mean over three neighbours, shape (points,).
        falling: Running minimum of `smooth`, shape (points,).
    """

    steps: Array
    ln_loss: Array
    smooth: Array
    falling: Array

    @property
    def last_step(self) -> float:
        """Where the curve ends; 0 for one without a point."""
        return float(self.steps[-1]) if len(self.steps) else 0.0

    def log_loss_at(self, step: float) -> float:
        """The mean ln loss of the evaluations shortly before a step; inf if one was no number.

        Args:
            step: At most the last step.

        Returns:
            The mean, or inf where the curve does not reach.
        """
        seen = (self.steps <= step * 1.001) & (self.steps >= _RECENT * step)
        if not seen.any():
            before = np.flatnonzero(self.steps <= step)
            return float(self.ln_loss[before[-1]]) if len(before) else math.inf
        return float(self.ln_loss[seen].mean())

    def steps_to(self, ln_loss: float) -> float:
        """Steps until the loss was first this low, interpolated; inf if it never was."""
        below = np.flatnonzero(self.falling <= ln_loss)
        if not len(below):
            return math.inf
        i = int(below[0])
        if i == 0 or not math.isfinite(self.falling[i - 1]):
            return float(self.steps[i])
        high, low = float(self.falling[i - 1]), float(self.falling[i])
        share = (high - ln_loss) / (high - low)
        return float(self.steps[i - 1] + share * (self.steps[i] - self.steps[i - 1]))

    def share_of_way(self, ln_target: float) -> float:
        """Steps done as a share of those to a loss, carried on with the slope of late.

        The slope is −d ln ℓ / d ln n over the last factor of two in steps.

        Args:
            ln_target: ln of the loss to reach.

        Returns:
            Between 0 and 1; 0 where there are too few evaluations to tell.
        """
        late = self.steps >= self.last_step / 2
        if late.sum() < 4 or not np.isfinite(self.ln_loss[late]).all():
            return 0.0
        fit = np.polyfit(np.log(self.steps[late]), self.ln_loss[late], 1)
        slope, at_one = float(fit[0]), float(fit[1])
        now = at_one + slope * math.log(self.last_step)
        return math.exp(-max(0.0, now - ln_target) / max(-slope, _FLATTEST))


def make_loss_curve(steps: Sequence[float], losses: Sequence[float | None]) -> LossCurve:
    """Makes the curve of a run's evaluations.

    Args:
        steps: Steps at each evaluation, ascending and positive.
        losses: The loss there; None or inf where it was not a number.

    Returns:
        The curve.

    Raises:
        ValueError: If the lengths differ, or the steps do not ascend from above 0.

    Example:
        >>> curve = make_loss_curve([1, 2, 4, 8], [8.0, 4.0, 2.0, 1.0])
        >>> round(math.exp(curve.log_loss_at(4)), 6)
        2.0
    """
    at = np.array(steps, dtype=np.float64)
    if len(steps) != len(losses) or (len(at) and (at[0] <= 0 or (np.diff(at) <= 0).any())):
        raise ValueError(
            f"A loss curve needs ascending positive steps and as many losses; got {list(steps)} "
            f"and {len(losses)} losses."
        )
    raw: Array = np.array([log_of_loss(x) for x in losses], dtype=np.float64)
    padded = np.pad(raw, 1, mode="edge") if len(raw) else raw
    smooth: Array = (
        np.array([padded[i : i + 3].mean() for i in range(len(raw))]) if len(raw) else raw
    )
    return LossCurve(at, raw, smooth, np.minimum.accumulate(smooth) if len(raw) else raw)


@dataclass(frozen=True)
class StepRatio:
    """How many times the steps one run took that another did to the same losses.

    Attributes:
        log_ratio: Mean ln of the ratio, over the losses of the last part of the shorter way;
            inf where they have no loss in common.
        share: How far along its own way the other was at the lowest loss compared, 0 to 1.
    """

    log_ratio: float
    share: float


def compare_steps(reference: LossCurve, other: LossCurve) -> StepRatio:
    """Compares the steps of two runs to the same losses.

    Args:
        reference: The run that steps are counted against.
        other: The run in question.

    Returns:
        ln(steps of `other` / steps of `reference`).

    Example:
        >>> steps = range(1, 65)
        >>> fast = make_loss_curve(steps, [1 / s for s in steps])
        >>> slow = make_loss_curve([2 * s for s in steps], [1 / s for s in steps])
        >>> round(math.exp(compare_steps(fast, slow).log_ratio), 2)
        2.0
    """
    ratios: list[float] = []
    share = 0.0
    for step, ln_loss in zip(other.steps, other.falling, strict=True):
        if step < _COMPARED * other.last_step or not math.isfinite(ln_loss):
            continue
        # Where the other has gone beyond, the reference's end is all there is to compare with.
        goal = max(float(ln_loss), float(reference.falling[-1]))
        theirs = reference.steps_to(goal)
        ratios.append(math.log(other.steps_to(goal) / theirs))
        share = max(share, theirs / reference.last_step)
    if not ratios:
        return StepRatio(math.inf, 0.0)
    return StepRatio(float(np.mean(ratios)), share)


def crossing(before: tuple[float, float], after: tuple[float, float], goal: float) -> float:
    """Where a run met its target between two evaluations.

    Args:
        before: Step and value of an evaluation that did not meet it (a value that is not finite
            tells nothing: the later step is the answer).
        after: Step and value of one that did.
        goal: The value that had to be met.

    Returns:
        Steps, interpolated in ln value (in the value, where a logarithm does not exist).

    Example:
        >>> round(crossing((10, 4.0), (20, 1.0), 2.0), 9)
        15.0
    """
    (first, high), (last, low) = before, after
    if not math.isfinite(high) or high == low:
        return float(last)
    if min(high, low, goal) > 0:
        high, low, goal = math.log(high), math.log(low), math.log(goal)
    return float(first + (last - first) * (high - goal) / (high - low))
