"""Steps to target: the one measurement that the grid, the peers and our plans are judged by.

A run is evaluated at every step at first and then at geometrically spaced ones, no more than 7 %
apart. Steps to target is where the first evaluation that meets the target was preceded by one that
did not, interpolated in the logarithm of the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from rightbatch.engines import CopiesEvaluation, make_copies
from rightbatch.laws.curve import crossing
from rightbatch.laws.progress import spaced_steps
from rightbatch.recipe import Recipe
from rightbatch.training import Training
from rightbatch.workload import Workload
from rightbatch.workload.target import Target

SPACING = 1.07
"""Largest ratio of the steps of two evaluations, where they are more than one step apart."""

State = Literal["reached", "censored", "diverged"]


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """How one run ended.

    Attributes:
        state: `censored`: the target was not met within `steps_run`; `diverged`: it never will.
        steps_to_target: Interpolated, or None.
        steps_run: Updates done when that was known.
    """

    state: State
    steps_to_target: float | None
    steps_run: int


class Runs(Protocol):
    """What is needed of a group of runs: the engines' `Copies`, or recipes with a warm-up."""

    steps: int

    def advance(self, num_steps: int) -> None:
        """Does updates of every run."""
        ...

    def evaluate(self) -> CopiesEvaluation:
        """Evaluates every run."""
        ...

    def keep(self, mask: Any) -> None:
        """Retires runs."""
        ...


def run_to_target(
    runs: Runs,
    target: Target,
    num_runs: int,
    limit: Callable[[Sequence[Arrival | None]], int],
) -> list[Arrival]:
    """Advances runs until each met the target, diverged, or reached the limit.

    Args:
        runs: The runs, at their initial weights.
        target: The target.
        num_runs: How many they are.
        limit: Told the arrivals so far, says after how many steps the rest is hopeless. It is
            asked at every evaluation and may fall.

    Returns:
        One arrival per run.
    """
    arrivals: list[Arrival | None] = [None] * num_runs
    held = np.arange(num_runs)
    last = _values(runs.evaluate(), target)
    last_step = 0
    for step in spaced_steps(SPACING, limit(arrivals)):
        if step > limit(arrivals):
            break
        runs.advance(step - last_step)
        evaluation = runs.evaluate()
        values = _values(evaluation, target)
        for slot, run in enumerate(held):
            if arrivals[run] is not None:
                continue
            if evaluation.diverged[slot]:
                arrivals[run] = Arrival(state="diverged", steps_to_target=None, steps_run=step)
            elif target.reached(float(values[slot])):
                when = crossing(
                    (last_step, float(last[slot])), (step, float(values[slot])), target.value
                )
                arrivals[run] = Arrival(state="reached", steps_to_target=when, steps_run=step)
        waiting = np.array([arrivals[run] is None for run in held])
        last, last_step = values, step
        if not waiting.any():
            break
        # Retiring a few would compile another size for little.
        if 2 * waiting.sum() <= len(held):
            runs.keep(waiting)
            held, last = held[waiting], last[waiting]
    out = Arrival(state="censored", steps_to_target=None, steps_run=last_step)
    return [out if arrival is None else arrival for arrival in arrivals]


def _values(evaluation: CopiesEvaluation, target: Target) -> np.ndarray[Any, Any]:
    if target.quantity == "train_loss":
        return evaluation.train_loss
    found = evaluation.val_loss if target.quantity == "val_loss" else evaluation.val_metric
    assert found is not None  # the workload was checked to evaluate its target
    return found


def run_cells(
    workload: Workload,
    global_batch: int,
    learning_rates: Sequence[float],
    seeds: Sequence[int],
    limit: Callable[[Sequence[Arrival | None]], int],
) -> list[Arrival]:
    """Runs pairs of learning rate and seed at one batch, together.

    Args:
        workload: With a target.
        global_batch: Examples per update.
        learning_rates: One per run.
        seeds: One per run.
        limit: See `run_to_target`.

    Returns:
        One arrival per run.
    """
    target = workload.parsed_target
    assert target is not None
    copies = make_copies(
        workload, global_batch=global_batch, learning_rates=learning_rates, seeds=seeds
    )
    return run_to_target(copies, target, len(seeds), limit)


def run_recipe(
    workload: Workload, recipe: Recipe, seeds: Sequence[int], limit_steps: int
) -> list[Arrival]:
    """Runs a recipe from fresh weights on several seeds.

    Args:
        workload: With a target.
        recipe: Its split and precision do not change the steps it needs and are left out here.
        seeds: One run each.
        limit_steps: Beyond this a run counts as censored.

    Returns:
        One arrival per seed.
    """
    if recipe.warmup_steps == 0:
        rates = [recipe.learning_rate] * len(seeds)
        return run_cells(workload, recipe.global_batch, rates, seeds, lambda _: limit_steps)
    target = workload.parsed_target
    assert target is not None
    return run_to_target(
        _WarmRuns(workload, recipe, seeds), target, len(seeds), lambda _: limit_steps
    )


class _WarmRuns:
    """Runs of a recipe with a warm-up, which the engines do not have: one after another."""

    def __init__(self, workload: Workload, recipe: Recipe, seeds: Sequence[int]) -> None:
        unsplit = Recipe(
            global_batch=recipe.global_batch,
            learning_rate=recipe.learning_rate,
            warmup_steps=recipe.warmup_steps,
        )
        self.steps = 0
        self._trainings = [Training(workload, unsplit, seed=seed) for seed in seeds]

    def advance(self, num_steps: int) -> None:
        for training in self._trainings:
            training.advance(num_steps)
        self.steps += num_steps

    def evaluate(self) -> CopiesEvaluation:
        points = [training.evaluate() for training in self._trainings]
        return CopiesEvaluation(
            train_loss=_array([point.train_loss for point in points]),
            val_loss=_array([point.val_loss for point in points]),
            val_metric=_array([point.val_metric for point in points]),
            diverged=np.array([training.diverged for training in self._trainings]),
        )

    def keep(self, mask: Any) -> None:
        self._trainings = [self._trainings[i] for i in np.flatnonzero(mask)]


def _array(values: Sequence[float | None]) -> np.ndarray[Any, Any]:
    return np.array([math.nan if value is None else value for value in values])
