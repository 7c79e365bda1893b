"""The training loop, as an object that can be advanced step by step, and `train` on top of it.

A `Training` is a run that can be continued: probes advance it a little, a race advances the arms
that are still in, `train` advances it to the end. What it does depends only on the workload, the
recipe and the seed, not on how it was cut into pieces.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rightbatch.errors import UsageError
from rightbatch.recipe import Recipe
from rightbatch.training.evaluate import Evaluation, evaluate, to_device
from rightbatch.training.order import epoch_order
from rightbatch.training.step import optimizer_step
from rightbatch.workload import Workload

_AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16}
EXPLOSION = 1e4
"""A loss this many times the first one counts as diverged, though still finite."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One evaluation during a run."""

    step: int
    examples: int
    train_loss: float
    val_loss: float | None
    val_metric: float | None


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


class Training:
    """A run that can be advanced in pieces.

    The caller's random state is not touched: dropout and the like draw from a generator state that
    belongs to this training and is swapped in while it runs.

    Args:
        workload: What to train.
        recipe: How.
        seed: Decides initial weights, data order and dropout.
        device: Where.
    """

    def __init__(
        self, workload: Workload, recipe: Recipe, *, seed: int = 0, device: str = "cpu"
    ) -> None:
        self.workload = workload
        self.recipe = recipe
        self.seed = seed
        self.device = device
        with torch.inference_mode(False):
            self.model = workload.build_model(seed, device)
            self.optimizer = workload.make_optimizer(self.model.parameters(), recipe.learning_rate)
        self._base_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.steps = 0
        self.examples = 0
        self.diverged = False
        self.first_loss: float | None = None
        self._random_state = _seeded_random_state(seed)
        self._epoch, self._offset = 0, 0
        self._windows = self._iterate_windows()
        self._losses: list[Tensor] = []

    @property
    def epochs(self) -> float:
        """Passes over the training set so far."""
        return self.examples / self.workload.num_examples

    def fork(self, recipe: Recipe) -> Training:
        """A copy that goes on from here under another recipe; this one is not touched.

        Weights, buffers, optimizer state, place in the data and random state are copied; batch and
        learning rate are the recipe's.

        Args:
            recipe: How the copy trains.

        Returns:
            The copy.
        """
        copied = copy.copy(self)
        copied.recipe = recipe
        with torch.inference_mode(False):
            copied.model = copy.deepcopy(self.model)
            copied.optimizer = self.workload.make_optimizer(
                copied.model.parameters(), recipe.learning_rate
            )
        copied._base_lrs = [group["lr"] for group in copied.optimizer.param_groups]
        with torch.inference_mode(False):
            copied.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        for group, lr in zip(copied.optimizer.param_groups, copied._base_lrs, strict=True):
            group["lr"] = lr
        copied._losses = []
        copied._windows = copied._iterate_windows()
        return copied

    def advance(self, num_steps: int) -> None:
        """Does up to `num_steps` updates; stops early when the loss leaves the numbers.

        Args:
            num_steps: Updates to do.
        """
        autocast = _AUTOCAST[self.recipe.precision]
        # The caller may have switched gradients off, as a callback of an evaluation has.
        with self._own_random_state(), torch.inference_mode(False), torch.enable_grad():
            for _ in range(num_steps):
                if self.diverged:
                    return
                window, num_examples = next(self._windows)
                self._set_learning_rate()
                loss = optimizer_step(
                    self.workload, self.model, self.optimizer, window, autocast=autocast
                )
                self.steps += 1
                self.examples += num_examples
                self._offset += num_examples
                self._losses.append(loss)
                # Looking at the loss waits for the device, so it is done in groups of steps.
                if self.first_loss is None or len(self._losses) % 16 == 0:
                    self._check_divergence()
        self._check_divergence()

    def recent_train_loss(self) -> float:
        """Mean loss of the updates since the last call (NaN if there were none)."""
        mean = float(torch.stack(self._losses).float().mean()) if self._losses else math.nan
        self._losses.clear()
        return mean

    def evaluate(self) -> Point:
        """Evaluates on the validation set and closes the interval of the training loss.

        Returns:
            The losses at this step.
        """
        val = Evaluation(loss=math.nan)
        examples = self.workload.val_examples
        if examples is not None:
            with self._own_random_state():
                val = evaluate(self.workload, self.model, examples, device=self.device)
        return Point(
            step=self.steps,
            examples=self.examples,
            train_loss=self.recent_train_loss(),
            val_loss=None if examples is None else val.loss,
            val_metric=val.metric,
        )

    def _iterate_windows(self) -> Iterator[tuple[list[Any], int]]:
        """Endless windows: the micro-batches of one update, and their number of examples."""
        source, recipe = self.workload.train_examples, self.recipe
        while True:
            if self._offset >= source.num_examples:
                self._epoch, self._offset = self._epoch + 1, 0
            order = epoch_order(source.num_examples, seed=self.seed, epoch=self._epoch)
            # The cursor counts examples: a copy with another batch goes on where this one stands.
            for window in order[self._offset :].split(recipe.global_batch):
                batches = [
                    to_device(source.batch(indices), self.device)
                    for indices in window.split(recipe.micro_batch)
                ]
                yield batches, len(window)

    def _set_learning_rate(self) -> None:
        warmup = self.recipe.warmup_steps
        if self.steps > warmup:
            return
        factor = min(1.0, (self.steps + 1) / (warmup + 1))
        for group, lr in zip(self.optimizer.param_groups, self._base_lrs, strict=True):
            group["lr"] = lr * factor

    def _check_divergence(self) -> None:
        if not self._losses:
            return
        recent = torch.stack(self._losses[-16:]).float()
        if self.first_loss is None:
            self.first_loss = float(recent[0])
        worst = float(recent.abs().max())
        limit = EXPLOSION * max(abs(self.first_loss), 1e-8)
        self.diverged = not bool(recent.isfinite().all()) or worst > limit

    @contextmanager
    def _own_random_state(self) -> Iterator[None]:
        """Swaps this training's random state in, and the caller's back."""
        outside = torch.random.get_rng_state()
        torch.random.set_rng_state(self._random_state)
        try:
            yield
        finally:
            self._random_state = torch.random.get_rng_state()
            torch.random.set_rng_state(outside)


def _seeded_random_state(seed: int) -> Tensor:
    generator = torch.Generator()
    # Another stream than the one that drew the initial weights.
    generator.manual_seed(seed + 0x5EED)
    return generator.get_state()


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
) -> Run:
    """Trains a workload as a recipe says.

    Args:
        workload: What to train.
        recipe: How.
        epochs: Passes over the training set (a limit, with `until_target`).
        steps: Updates; give either `epochs` or `steps`.
        seed: Decides initial weights, data order and dropout.
        device: Where.
        until_target: Stop at the first evaluation that meets the workload's target.
        evaluate_every: Updates between evaluations. Default: once an epoch.

    Returns:
        The finished run.

    Raises:
        UsageError: If not exactly one of `epochs` and `steps` is given.
    """
    if (epochs is None) == (steps is None):
        raise UsageError("Give either epochs or steps, and not both.")
    steps_per_epoch = math.ceil(workload.num_examples / recipe.global_batch)
    total = steps if steps is not None else round((epochs or 0) * steps_per_epoch)
    every = evaluate_every or steps_per_epoch
    target = workload.parsed_target
    training = Training(workload, recipe, seed=seed, device=device)
    history: list[Point] = []
    steps_to_target = None
    while training.steps < total and not training.diverged:
        training.advance(min(every, total - training.steps))
        point = training.evaluate()
        history.append(point)
        if target is not None and steps_to_target is None:
            value = point_value(point, target.quantity)
            if value is not None and target.reached(value):
                steps_to_target = training.steps
                if until_target:
                    break
    last = history[-1] if history else training.evaluate()
    return Run(
        recipe=recipe,
        model=training.model,
        steps=training.steps,
        epochs=training.epochs,
        examples=training.examples,
        train_loss=last.train_loss,
        val_loss=last.val_loss,
        val_metric=last.val_metric,
        diverged=training.diverged,
        reached_target=None if target is None else steps_to_target is not None,
        steps_to_target=steps_to_target,
        history=history,
    )


def point_value(point: Point, quantity: str) -> float | None:
    """The quantity of a target at an evaluation point, or None if it was not evaluated."""
    if quantity == "train_loss":
        return point.train_loss
    return point.val_loss if quantity == "val_loss" else point.val_metric
