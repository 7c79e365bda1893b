"""A real training as a contestant of a race."""

from __future__ import annotations

import math

import torch

from rightbatch.study.runs import Look
from rightbatch.training import Training
from rightbatch.training.evaluate import evaluate
from rightbatch.workload import Examples, Target, Workload

MOST_LOOKED_AT = 2048
"""Examples of one evaluation: a race looks often, and this many tell a loss to about 1 %."""


class TrainingContestant:
    """A `Training` that a race can advance and look at.

    The loss that is compared is the validation loss, or without validation data the loss on a
    fixed part of the training set: losses of the updates themselves depend on their batch.

    Args:
        training: The run.
        target: What counts as trained, or None.
    """

    def __init__(self, training: Training, target: Target | None) -> None:
        self._training = training
        self._target = target

    def advance(self, num_steps: int) -> None:
        """Does `num_steps` updates."""
        self._training.advance(num_steps)

    def look(self) -> Look:
        """Evaluates; a run that diverged has an infinite loss."""
        training = self._training
        if training.diverged:
            return Look(math.inf, None)
        workload = training.workload
        examples = looked_at(workload, self._target)
        found = evaluate(workload, training.model, examples, device=training.device)
        loss = found.loss if math.isfinite(found.loss) else math.inf
        if self._target is None:
            return Look(loss, None)
        value = found.loss if self._target.quantity.endswith("_loss") else found.metric
        return Look(loss, value is not None and self._target.reached(value))


class _Part:
    """The first examples of a set in a fixed shuffled order."""

    truncated = False

    def __init__(self, whole: Examples, num_examples: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._whole = whole
        self._indices = torch.randperm(whole.num_examples, generator=generator)[:num_examples]
        self.num_examples = num_examples

    def batch(self, indices: torch.Tensor) -> object:
        """The examples at `indices` of this part."""
        return self._whole.batch(self._indices[indices])


def looked_at(workload: Workload, target: Target | None) -> Examples:
    """The examples that a race evaluates on.

    Args:
        workload: What is trained.
        target: A target on the training loss asks for training examples.

    Returns:
        The validation set, or a part of the training set without one; at most 2048 examples.
    """
    on_training_set = target is not None and target.quantity == "train_loss"
    val = None if on_training_set else workload.val_examples
    whole = val if val is not None else workload.train_examples
    if whole.num_examples <= MOST_LOOKED_AT:
        return whole
    return _Part(whole, MOST_LOOKED_AT)
