"""What the numbers of a study are about, and a training judged by it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rightbatch.laws.curve import crossing
from rightbatch.laws.estimate import Estimate
from rightbatch.laws.seeds import (
    mean_over_seeds,
)
from rightbatch.study.database import StoredTrial
from rightbatch.study.trials import EvaluationPoint, StudyTrial
from rightbatch.workload.target import Target

SecondsOf = Callable[[int], float]
"""Seconds of one update at a batch size."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the numbers of a study are about.

    Attributes:
        num_examples: N.
        target: What counts as trained, or None.
        seconds_of: The measured step time, or None.
        has_validation: Whether losses are compared on validation data.
        smallest: Examples that the model needs in one pass.
        metric_is_share: Whether the metric lies between 0 and 1.
    """

    num_examples: int
    target: Target | None
    seconds_of: SecondsOf | None
    has_validation: bool
    smallest: int = 1
    metric_is_share: bool = False

    def metric(self, values: Sequence[float | None]) -> Estimate:
        """The mean of the metric over seeds, within its range."""
        mean = mean_over_seeds(values)
        if not self.metric_is_share or mean.low is None or mean.high is None:
            return mean
        return dataclasses.replace(mean, low=max(0.0, mean.low), high=min(1.0, mean.high))

    def loss(self, point: EvaluationPoint) -> float | None:
        """The loss that is compared."""
        return point.val_loss if self.has_validation else point.train_loss


def summarise_trial(trial: StoredTrial, setting: Setting) -> StudyTrial:
    """A training in one row.

    Args:
        trial: The training.
        setting: What it is about.

    Returns:
        Its row; what a training that diverged last measured is left out.
    """
    key, points = trial.key, trial.points
    last = points[-1] if points else None
    shown = last if trial.state != "diverged" else None
    steps = last.step if last else 0
    seconds = None if setting.seconds_of is None else steps * setting.seconds_of(key.batch_size)
    return StudyTrial(
        batch_size=key.batch_size,
        learning_rate=key.learning_rate,
        seed=key.seed,
        state=trial.state,
        steps=steps,
        examples=last.examples if last else 0,
        seconds=seconds,
        train_loss=shown.train_loss if shown else None,
        val_loss=shown.val_loss if shown else None,
        val_metric=shown.val_metric if shown else None,
        # One that met the target and then left the numbers is no recipe.
        steps_to_target=steps_to_target(points, setting.target) if shown else None,
        distance=shown.distance if shown else None,
        relative_distance=shown.relative_distance if shown else None,
        roughness=shown.roughness if shown else None,
        dead=shown is not None and shown.weight is not None and shown.roughness is None,
        share=trial.share,
        note=trial.note,
    )


def steps_to_target(points: Sequence[EvaluationPoint], target: Target | None) -> float | None:
    """Where a training first met the target, interpolated between its evaluations.

    Args:
        points: Its evaluations.
        target: The target, or None.

    Returns:
        Updates, or None where it was not met.
    """
    if target is None:
        return None
    before: tuple[float, float] | None = None
    for point in points:
        value = _quantity(point, target)
        if value is None:
            continue
        if target.reached(value):
            here = (float(point.step), value)
            return here[0] if before is None else crossing(before, here, target.value)
        before = (float(point.step), value)
    return None


def _quantity(point: EvaluationPoint, target: Target) -> float | None:
    if target.quantity == "train_loss":
        return point.train_loss
    return point.val_loss if target.quantity == "val_loss" else point.val_metric
