"""The level around which trainings waver in the end, where they have come to it.

At a constant learning rate SGD does not come to rest at a minimum: it wavers around a loss above
it, lower for a larger batch or a smaller rate. Whether a curve is there already is decided from
what seeds have in common, with their spread as the error. With three means of a seed's losses, over
the updates from T/8 to T/4, T/4 to T/2 and T/2 to T,

    fall before = first − second,    fall = second − third.

- *settled*: the fall cannot be told from 0 and is surely less than a fifth of the loss; or it can
  be, and is under 2 % of the loss and less than half of the fall before, as of a loss that comes
  down to its floor at least that fast; or it is under 0.1 %.
- *falling*, *rising*: the fall, or the rise, can be told from 0, and is not that small.
- *unresolved*: the seeds differ too much, or are too few, to say one or the other.

A fall can be told from 0 by the spread over seeds, or where every seed falls by more than it wavers
itself: seeds that crawl over a plateau at different paces differ much, and all of them fall.

Only a settled curve has a floor. What is slower than the whole training no curve can show: the
floor is that of the time scale of the training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rightbatch.laws.estimate import Estimate, unresolved
from rightbatch.laws.interval import student_quantile, symmetric
from rightbatch.laws.seeds import mean_over_seeds

Array = NDArray[np.float64]
Verdict = Literal["settled", "falling", "rising", "unresolved"]

_TOLERANCE = 0.2
"""A fall over a doubling of the updates that is surely less than this share of the loss is none."""
_SMALL = 0.02
"""A fall that can be told from 0, but is less than this, and shrinks, is none."""
_NEGLIGIBLE = 1e-3
"""Nor is this share of the loss, however it goes on."""
_CLEAR = 3.0
"""Standard errors, from how the curves themselves waver, at which a fall is seen."""
_FEWEST = 3
"""Evaluations in the last half, without which nothing is said."""


@dataclass(frozen=True, kw_only=True)
class NoiseFloor:
    """What the end of some trainings at one batch size and learning rate is like.

    Attributes:
        verdict: Whether they have come to their floor.
        level: The loss around which they waver, mean over seeds; without a value unless they have
            settled. Where they are falling it has an upper bound.
        wavering: How far a training's loss is from its own level, root mean square over the last
            half of its updates, mean over seeds.
        fall: By which share of itself the loss fell over the last doubling of the updates.
    """

    verdict: Verdict
    level: Estimate
    wavering: Estimate
    fall: Estimate


def estimate_noise_floor(curves: Sequence[tuple[Sequence[float], Sequence[float]]]) -> NoiseFloor:
    """The floor of trainings that differ in their seed alone.

    Args:
        curves: Of each seed the updates (ascending, positive) and the losses there.

    Returns:
        The floor. Its interval is Student's over seeds; where a small fall can be told from 0, it
        is wider below by as much: a loss that falls half as far at each doubling has that left.

    Raises:
        ValueError: If updates and losses of a curve do not fit together.

    Example:
        >>> steps = range(1, 65)
        >>> floor = estimate_noise_floor([
        ...     (steps, [0.5 + 2**-step for step in steps]), (steps, [0.6] * 64)])
        >>> floor.verdict, round(floor.level.value, 6)
        ('settled', 0.55)
        >>> estimate_noise_floor([(steps, [1 / step for step in steps])] * 2).verdict
        'falling'
    """
    ends = [end for end in (_end_of(*curve) for curve in curves) if end is not None]
    n = len(ends)
    if n == 0:
        nothing = unresolved(len(curves), "too few evaluations")
        return NoiseFloor(verdict="unresolved", level=nothing, wavering=nothing, fall=nothing)
    before, middle, last, wavering, errors = (
        np.array(values, dtype=np.float64) for values in zip(*ends, strict=True)
    )
    # A share of its own loss for each seed: seeds that end at different losses fall in proportion.
    size = (np.abs(middle) + np.abs(last)) / 2
    falls = _shares(middle - last, size)
    falls_before = _shares(before - middle, size)
    fall = mean_over_seeds(falls.tolist(), "share of the loss, over the last doubling of updates")
    clear = _falls_clearly(falls, _shares(errors, size))
    verdict = _judge(fall, float(falls_before.mean()), clear)
    level = _mean_of_last(middle, last)
    return NoiseFloor(
        verdict=verdict,
        level=_floor(level, verdict, 0.0 if clear is False else float((middle - last).mean())),
        wavering=mean_over_seeds(wavering.tolist(), "root mean square over the last half"),
        fall=fall,
    )


def _end_of(
    steps: Sequence[float], losses: Sequence[float]
) -> tuple[float, float, float, float, float] | None:
    """Mean losses of the last three doublings, how far the last wavers, the error of its fall."""
    at, loss = np.asarray(steps, np.float64), np.asarray(losses, np.float64)
    if at.shape != loss.shape or at.ndim != 1 or (len(at) and (np.diff(at) <= 0).any()):
        raise ValueError(
            f"A curve needs ascending updates and as many losses; got shapes {at.shape} and "
            f"{loss.shape}."
        )
    if len(at) == 0 or not np.isfinite(loss).all():
        return None
    parts = [(at > share * at[-1]) & (at <= 2 * share * at[-1]) for share in (0.125, 0.25, 0.5)]
    if parts[2].sum() < _FEWEST or not all(part.any() for part in parts):
        return None
    first, second, third = (float(loss[part].mean()) for part in parts)
    end = loss[parts[2]]
    x = np.log(at[parts[2]])
    line = np.polyval(np.polyfit(x, end, 1), x)
    freedom = max(1, len(end) - 2)
    wavering = math.sqrt(float(((end - line) ** 2).sum()) / freedom)
    error = wavering * math.sqrt(1 / int(parts[1].sum()) + 1 / len(end))
    return first, second, third, wavering, error


def _mean_of_last(middle: Array, last: Array) -> Estimate:
    """The mean loss of the last half; its spread is that of both parts."""
    # Curves are called settled where few seeds happen to agree in the last half, which makes that
    # half's own spread too small.
    method = "mean over the last half of the updates, and over seeds"
    n, value = len(last), float(last.mean())
    if n == 1:
        return Estimate(value=value, n=1, method=method)
    variances = float(last.var(ddof=1)), float(middle.var(ddof=1))
    spread, product = math.sqrt(sum(variances) / 2), math.sqrt(variances[0] * variances[1])
    # Two variances of parts with correlation r are worth 2/(1 + r²) of one.
    shared = float(((last - value) * (middle - middle.mean())).sum()) / (n - 1)
    correlation = 1.0 if product == 0 else shared / product
    freedom = round(2 * (n - 1) / (1 + correlation**2))
    return symmetric(value, student_quantile(freedom) * spread / math.sqrt(n), n, method)


def _shares(differences: Array, sizes: Array) -> Array:
    safe = np.where(sizes > 0, sizes, 1.0)
    return np.where(sizes > 0, differences / safe, 0.0)


def _falls_clearly(falls: Array, errors: Array) -> bool | None:
    """Whether all seeds go the same way by more than they waver; None where some go another way."""
    n = len(falls)
    if abs(float(falls.mean())) <= _CLEAR * float(np.sqrt((errors**2).sum())) / n:
        return False
    return True if abs(int(np.sign(falls).sum())) == n else None


def _judge(fall: Estimate, fall_before: float, clear: bool | None) -> Verdict:
    if fall.value is None or fall.low is None or fall.high is None:
        return "unresolved"  # one seed
    if max(-fall.low, fall.high) > _TOLERANCE and fall.low <= 0 <= fall.high and not clear:
        return "unresolved"
    small = abs(fall.value) <= _SMALL and abs(fall.value) <= abs(fall_before) / 2
    if small or abs(fall.value) <= _NEGLIGIBLE:
        return "settled"
    if clear is False and fall.low <= 0 <= fall.high:
        return "settled"
    if clear is None and fall.low <= 0 <= fall.high:
        return "unresolved"
    return "falling" if fall.value > 0 else "rising"


def _floor(level: Estimate, verdict: Verdict, fell: float) -> Estimate:
    if verdict == "falling":
        return Estimate(value=None, high=level.high, n=level.n, method="still falling")
    if verdict != "settled" or level.low is None or level.high is None:
        why = "rising again" if verdict == "rising" else "not resolved whether it has settled"
        return unresolved(level.n, why)
    return Estimate(
        value=level.value,
        low=level.low - max(0.0, fell),
        high=level.high,
        n=level.n,
        method=level.method,
    )
