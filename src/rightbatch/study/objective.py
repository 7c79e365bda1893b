"""One number for a training, by which searches choose where to look: lower is better."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rightbatch.laws.curve import make_loss_curve
from rightbatch.study.database import StoredTrial
from rightbatch.study.design import StudyDesign, Unit
from rightbatch.study.judging import Setting, steps_to_target

_DIVERGED = 3.0
"""What a training that diverged is told as, above the dearest one: one that missed the target lies
1 to 2 above it."""


class Objective:
    """Judges trainings as the study's answer does, and those that have none of it besides.

    With a target: the logarithm of what was spent until it was met, in modelled seconds, or in
    examples without a step time. A training that missed it is worse than any that met it, and the
    worse the higher its loss. Without a target: the logarithm of the last loss. Losses are those
    of the last fifth of the updates, averaged.

    Args:
        design: Of the study.
        setting: What its numbers are about.

    Attributes:
        updates: Of a whole training, by batch size.
        costs: Of a whole training, by batch size, in what trainings are compared by: equal for
            all without a target, since the design says how far each goes.
        unit: Of the costs.
    """

    def __init__(self, design: StudyDesign, setting: Setting) -> None:
        self._setting = setting
        seconds_of, N = setting.seconds_of, setting.num_examples
        self.updates: Mapping[int, int] = {
            B: design.budget.steps(B, N, seconds_of and seconds_of(B), setting.smallest)
            for B in design.batch_sizes
        }
        self.costs: Mapping[int, float]
        self.unit: Unit
        if setting.target is None:
            self.unit = design.budget.unit
            self.costs = dict.fromkeys(self.updates, design.budget.amount)
        else:
            self.unit = "examples" if seconds_of is None else "seconds"
            self.costs = {B: self.cost(B, steps) for B, steps in self.updates.items()}
        self._worst = math.log(max(self.costs.values()))

    def cost(self, batch_size: int, steps: float) -> float:
        """Of updates: modelled seconds, or examples where the step time was not measured."""
        seconds_of = self._setting.seconds_of
        return steps * (batch_size if seconds_of is None else seconds_of(batch_size))

    def score(self, trial: StoredTrial) -> float | None:
        """How good a training is.

        Args:
            trial: One that ended.

        Returns:
            A finite number; None where it diverged, failed, or measured no loss.
        """
        if trial.state != "complete" or not trial.points:
            return None
        curve = make_loss_curve(
            [point.step for point in trial.points],
            [self._setting.loss(point) for point in trial.points],
        )
        loss = curve.log_loss_at(curve.last_step)
        if not math.isfinite(loss):
            return None
        if self._setting.target is None:
            return loss
        steps = steps_to_target(trial.points, self._setting.target)
        if steps is not None:
            return math.log(self.cost(trial.key.batch_size, steps))
        return self._worst + 1.5 + math.atan(loss) / math.pi

    def beyond(self, worst: float | None) -> float:
        """What stands for a training that diverged.

        Args:
            worst: The highest score of any that did not, or None.

        Returns:
            More than that.
        """
        if self._setting.target is not None:
            return self._worst + _DIVERGED
        return 1.0 if worst is None else worst + 1.0
