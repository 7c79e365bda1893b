"""The loop engine: one `Training` per copy, one after the other. Runs every workload."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from rightbatch.engines.copies import (
    CopiesEvaluation,
    EngineName,
    FloatArray,
    IntArray,
    without_diverged,
)
from rightbatch.recipe import Recipe
from rightbatch.training import Training
from rightbatch.workload import Workload


class LoopCopies:
    """Copies that are trained one by one with the loop of `rightbatch.training`.

    Args:
        workload: What to train.
        global_batch: Examples per update.
        learning_rates: Shape (copies,).
        seeds: Shape (copies,).
        reason: Why this engine was taken.
    """

    engine: EngineName = "loop"

    def __init__(
        self,
        workload: Workload,
        *,
        global_batch: int,
        learning_rates: FloatArray,
        seeds: IntArray,
        reason: str,
    ) -> None:
        self.learning_rates = learning_rates
        self.seeds = seeds
        self.steps = 0
        self.reason = reason
        self._trainings = [
            Training(
                workload, Recipe(global_batch=global_batch, learning_rate=float(lr)), seed=int(seed)
            )
            for lr, seed in zip(learning_rates, seeds, strict=True)
        ]

    def advance(self, num_steps: int) -> None:
        """Does `num_steps` updates of every copy that has not diverged."""
        for training in self._trainings:
            training.advance(num_steps)
        self.steps += num_steps

    def wait(self) -> None:
        """Nothing to wait for."""

    def evaluate(self) -> CopiesEvaluation:
        """Evaluates every copy on the validation set and closes the training-loss interval."""
        points = [training.evaluate() for training in self._trainings]
        diverged = np.array([training.diverged for training in self._trainings], dtype=np.bool_)
        train_loss = without_diverged(np.array([p.train_loss for p in points]), diverged)
        assert train_loss is not None
        return CopiesEvaluation(
            train_loss=train_loss,
            val_loss=without_diverged(_array([p.val_loss for p in points]), diverged),
            val_metric=without_diverged(_array([p.val_metric for p in points]), diverged),
            diverged=diverged,
        )

    def keep(self, mask: Any) -> None:
        """Retires the copies whose entry in `mask` (bool, shape (copies,)) is false."""
        kept = np.flatnonzero(np.asarray(mask, dtype=np.bool_))
        self.learning_rates = self.learning_rates[kept]
        self.seeds = self.seeds[kept]
        self._trainings = [self._trainings[i] for i in kept]

    def state_dict(self, copy_index: int) -> dict[str, Tensor]:
        """Weights and buffers of one copy (an index into the copies still held)."""
        state = self._trainings[copy_index].model.state_dict()
        return {name: tensor.detach().clone() for name, tensor in state.items()}


def _array(values: list[float | None]) -> FloatArray | None:
    return None if any(value is None for value in values) else np.array(values, dtype=np.float64)
