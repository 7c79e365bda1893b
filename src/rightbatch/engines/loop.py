"""The loop engine: one `Training` per copy, one after the other. Runs every workload."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from rightbatch.engines.copies import (
    BoolArray,
    CopiesEvaluation,
    EngineName,
    FloatArray,
    IntArray,
    Watched,
    make_watched,
    without_diverged,
)
from rightbatch.laws.path import RunningPath
from rightbatch.recipe import Recipe
from rightbatch.training import Callback, Training
from rightbatch.training.watching.distance import (
    distance_from,
    initial_weights,
    norm_of_weights,
)
from rightbatch.training.watching.watched_weight import WatchedWeight
from rightbatch.workload import Workload


class LoopCopies:
    """Copies that are trained one by one with the loop of `rightbatch.training`.

    Args:
        workload: What to train.
        global_batch: Examples per update.
        learning_rates: Shape (copies,).
        seeds: Shape (copies,).
        reason: Why this engine was taken.
        watch: The weight to follow, as in `rightbatch.Watch`; None watches nothing.
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
        watch: str | None = None,
    ) -> None:
        self.learning_rates = learning_rates
        self.seeds = seeds
        self.steps = 0
        self.reason = reason
        self.watching: str | None = None
        self._followers = [] if watch is None else [_Follower(watch) for _ in seeds]
        self._trainings = [
            Training(
                workload,
                Recipe(global_batch=global_batch, learning_rate=float(lr)),
                seed=int(seed),
                callbacks=self._followers[i : i + 1],
            )
            for i, (lr, seed) in enumerate(zip(learning_rates, seeds, strict=True))
        ]
        for follower, training in zip(self._followers, self._trainings, strict=False):
            follower.begin(training)
            self.watching = follower.name

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
            watched=self._look(diverged) if self.watching is not None else None,
        )

    def _look(self, diverged: BoolArray) -> Watched:
        looks = [
            follower.look(training)
            for follower, training in zip(self._followers, self._trainings, strict=True)
        ]
        columns = np.array(looks, dtype=np.float64).reshape(-1, 4).T
        names = ("distance", "initial_norm", "weight", "roughness")
        return make_watched(diverged=diverged, **dict(zip(names, columns, strict=True)))

    def keep(self, mask: Any) -> None:
        """Retires the copies whose entry in `mask` (bool, shape (copies,)) is false."""
        kept = np.flatnonzero(np.asarray(mask, dtype=np.bool_))
        self.learning_rates = self.learning_rates[kept]
        self.seeds = self.seeds[kept]
        self._trainings = [self._trainings[i] for i in kept]
        self._followers = [self._followers[i] for i in kept if self._followers]

    def state_dict(self, copy_index: int) -> dict[str, Tensor]:
        """Weights and buffers of one copy (an index into the copies still held)."""
        state = self._trainings[copy_index].model.state_dict()
        return {name: tensor.detach().clone() for name, tensor in state.items()}


class _Follower(Callback):
    """Follows one weight of one training, in constant memory, and knows where it began."""

    def __init__(self, asked: str) -> None:
        self._asked = asked

    def begin(self, training: Training) -> None:
        """Notes where the weights are, before the first update."""
        self._weight = WatchedWeight(training.model, self._asked)
        self.name = self._weight.name
        begin = self._weight.initial
        self._path = RunningPath(last=begin, low=begin, high=begin)
        self._initial = initial_weights(training)
        self._initial_norm = norm_of_weights(training.model)

    def on_step(self, training: Training) -> None:
        self._path.add(self._weight.value())

    def look(self, training: Training) -> tuple[float, float, float, float]:
        """Distance, norm of the initial weights, the weight, and the roughness of its path."""
        distance = float(distance_from(self._initial, training.model))
        return distance, self._initial_norm, self._path.last, self._path.roughness


def _array(values: list[float | None]) -> FloatArray | None:
    return None if any(value is None for value in values) else np.array(values, dtype=np.float64)
