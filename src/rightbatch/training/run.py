"""`train`: a whole run, from a recipe to a trained model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from rightbatch.errors import UsageError
from rightbatch.recipe import Recipe
from rightbatch.training.callbacks import Callback, Point
from rightbatch.training.distributed import join_ranks
from rightbatch.training.loop import Training
from rightbatch.training.rates import Horizon
from rightbatch.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished training.

    Attributes:
        recipe: What was run.
        model: The trained model.
        steps: Updates done.
        epochs: Passes over the training set, fractional when stopped inside one.
        examples: Training examples processed.
        train_loss: Mean loss of the updates since the evaluation before the last.
        val_loss: Last validation loss, or None without a validation set.
        val_metric: Last validation metric, or None without one.
        diverged: Whether the loss became NaN, infinite or exploded.
        reached_target: Whether the target was met; None without a target.
        steps_to_target: Updates done when the target was first met, or None.
        history: The evaluations, oldest first.
    """

    recipe: Recipe
    model: nn.Module
    steps: int
    epochs: float
    examples: int
    train_loss: float
    val_loss: float | None
    val_metric: float | None
    diverged: bool
    reached_target: bool | None
    steps_to_target: int | None
    history: list[Point] = field(repr=False)


def train(
    workload: Workload,
    recipe: Recipe,
    *,
    epochs: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    until_target: bool = False,
    evaluate_every: int | None = None,
    callbacks: Sequence[Callback] = (),
    workers: int = 0,
) -> Run:
    """Trains a workload as a recipe says.

    Under `torchrun`, the processes train together, each on its share of every update. All of them
    return the same run; callbacks are called on rank 0.

    Args:
        workload: What to train.
        recipe: How.
        epochs: Passes over the training set (a limit, with `until_target`).
        steps: Updates; give either `epochs` or `steps`.
        seed: Decides initial weights, data order and dropout.
        device: Where.
        until_target: Stop at the first evaluation that meets the workload's target.
        evaluate_every: Updates between evaluations. Default: once an epoch.
        callbacks: What watches the run.
        workers: Processes that fetch examples ahead; 0 fetches between updates.

    Returns:
        The finished run.

    Raises:
        UsageError: If not exactly one of `epochs` and `steps` is given.
    """
    if (epochs is None) == (steps is None):
        raise UsageError("Give either epochs or steps, and not both.")
    N = workload.num_examples
    horizon = Horizon(steps=steps, examples=None if epochs is None else epochs * N)
    with join_ranks(recipe, device) as ranks:
        training = Training(
            workload,
            recipe,
            seed=seed,
            device=device if ranks is None else ranks.device,
            horizon=horizon,
            callbacks=callbacks,
            workers=workers,
            ranks=ranks,
        )
        course = _Course(training, until_target=until_target, evaluate_every=evaluate_every)
        for callback in training.callbacks:
            callback.on_start(training)
        course.finish()
        run = course.result()
        for callback in training.callbacks:
            callback.on_end(training, run)
    return run


class _Course:
    """The way of a run from evaluation to evaluation, to its horizon.

    Args:
        training: The run.
        until_target: Stop at the first evaluation that meets the target.
        evaluate_every: Updates between evaluations, or None: once an epoch.
    """

    def __init__(
        self, training: Training, *, until_target: bool, evaluate_every: int | None
    ) -> None:
        self._training = training
        self._until_target = until_target
        self._every = evaluate_every
        self._target = training.workload.parsed_target
        self.history: list[Point] = []
        self.steps_to_target: int | None = None

    def finish(self) -> None:
        """Trains to the end, or to where the run stops for another reason."""
        while not self._over():
            self._advance_to_evaluation()
            point = self._training.evaluate()
            self._note(point)

    def _over(self) -> bool:
        training = self._training
        met = self._until_target and self.steps_to_target is not None
        return met or training.over

    def _advance_to_evaluation(self) -> None:
        training = self._training
        if self._every is not None:
            next_at = (training.steps // self._every + 1) * self._every
            training.advance(next_at - training.steps)
        else:
            training.advance(to_epoch=math.floor(training.epochs) + 1)

    def _note(self, point: Point) -> None:
        self.history.append(point)
        for callback in self._training.callbacks:
            callback.on_evaluation(self._training, point)
        if self._target is None or self.steps_to_target is not None:
            return
        value = point_value(point, self._target.quantity)
        if value is not None and self._target.reached(value):
            self.steps_to_target = point.step

    def result(self) -> Run:
        """The finished run."""
        training = self._training
        last = self.history[-1] if self.history else training.evaluate()
        return Run(
            recipe=training.recipe,
            model=training.whole_model(),
            steps=training.steps,
            epochs=training.epochs,
            examples=training.examples,
            train_loss=last.train_loss,
            val_loss=last.val_loss,
            val_metric=last.val_metric,
            diverged=training.diverged,
            reached_target=None if self._target is None else self.steps_to_target is not None,
            steps_to_target=self.steps_to_target,
            history=self.history,
        )


def point_value(point: Point, quantity: str) -> float | None:
    """The quantity of a target at an evaluation point, or None if it was not evaluated."""
    if quantity == "train_loss":
        return point.train_loss
    return point.val_loss if quantity == "val_loss" else point.val_metric
