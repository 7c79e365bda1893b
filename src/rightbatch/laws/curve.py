"""The baseline's learning curve as a ruler: from a loss to the progress it stands for, and back.

A ruler must be monotone; a validation loss is not. The logarithm of the loss is smoothed over
neighbouring evaluations and its running minimum taken. Beyond the last point the curve goes on
with its local slope −d ln ℓ / d ln p, from a parabola through its last two e-folds of progress.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_FLATTEST = 0.04
"""Slopes below this are taken as this: beyond it a loss says nothing about progress."""


@dataclass(frozen=True)
class LossCurve:
    """ln loss against ln progress of one run, monotone.

    Attributes:
        ln_progress: Ascending, shape (points,).
        ln_loss: Descending, shape (points,).
        parabola: Coefficients of ln ℓ against ln p near the end, highest power first.
    """

    ln_progress: Array
    ln_loss: Array
    parabola: Array

    def slope(self, ln_progress: Array | float) -> Array:
        """σ = −d ln ℓ / d ln p there, at least 0.04."""
        inside = np.clip(ln_progress, self.ln_progress[-1] - 2.0, self.ln_progress[-1] + 0.3)
        square, linear = self.parabola[0], self.parabola[1]
        return np.maximum(-(2 * square * inside + linear), _FLATTEST)

    def ln_progress_at(self, ln_loss: Array | float) -> Array:
        """Where the curve has this loss, as ln of the progress; extrapolated outside."""
        ln_loss = np.asarray(ln_loss, dtype=float)
        within = np.interp(-ln_loss, -self.ln_loss, self.ln_progress)
        last = self.ln_progress[-1]
        beyond = last + (self.ln_loss[-1] - ln_loss) / self.slope(last)
        before = self.ln_progress[0] - (ln_loss - self.ln_loss[0]) / 0.3
        return np.where(
            ln_loss < self.ln_loss[-1], beyond, np.where(ln_loss > self.ln_loss[0], before, within)
        )


def make_loss_curve(progress: Array, losses: Array) -> LossCurve:
    """Makes a ruler of a run's evaluations.

    Args:
        progress: Σ η at each evaluation, positive, shape (points ≥ 3,).
        losses: The loss there, positive and finite, shape (points,).

    Returns:
        The curve.

    Raises:
        ValueError: If there are fewer than three points, or a progress or a loss is not positive
            and finite.

    Example:
        >>> curve = make_loss_curve(np.array([1.0, 2.0, 4.0, 8.0]), np.array([8.0, 4.0, 2.0, 1.0]))
        >>> round(float(np.exp(curve.ln_progress_at(np.log(0.5)))), 1)
        16.0
    """
    for name, numbers in (("progress", progress), ("loss", losses)):
        if len(numbers) < 3 or not (np.isfinite(numbers).all() and (numbers > 0).all()):
            raise ValueError(
                f"A loss curve needs at least 3 positive finite numbers as {name}, and got "
                f"{numbers.tolist()}."
            )
    order = np.argsort(progress, kind="stable")
    ln_progress, raw = np.log(progress[order]), np.log(losses[order])
    smooth = np.array([raw[max(0, i - 1) : i + 2].mean() for i in range(len(raw))])
    smooth[0], smooth[-1] = raw[0], raw[-2:].mean() if len(raw) > 8 else raw[-1]
    falling = np.minimum.accumulate(smooth) - 1e-9 * np.arange(len(raw))
    near_end = ln_progress > ln_progress[-1] - 2.0
    degree = 2 if near_end.sum() >= 6 else 1
    if near_end.sum() < 2:
        near_end[-2:] = True
    parabola: Array = np.asarray(
        np.polyfit(ln_progress[near_end], raw[near_end], degree), dtype=np.float64
    )
    if degree == 1:
        parabola = np.concatenate([[0.0], parabola])
    return LossCurve(ln_progress, np.asarray(falling, dtype=np.float64), parabola)
