"""What the trainings of a study cost, as one table of rates and seeds for each batch size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rightbatch.errors import UsageError
from rightbatch.study.study import Study
from rightbatch.study.trials import StudyTrial

Goal = Literal["seconds", "examples", "steps", "loss"]
GOALS: tuple[Goal, ...] = ("seconds", "examples", "steps", "loss")
"""Modelled seconds, examples or steps to the target; the loss when the study's budget is spent."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SizeCosts:
    """One batch size under one goal.

    Attributes:
        batch_size: Examples per update.
        rates: Learning rates, ascending.
        scores: Shape (rates, seeds), lower is better: ln cost to the target, or the loss at the
            end; inf where a training missed the target, diverged or failed.
        gave_up: ln cost of the longest training that missed the target; None where none did.
    """

    batch_size: int
    rates: tuple[float, ...]
    scores: NDArray[np.float64]
    gave_up: float | None


def size_costs(study: Study, goal: Goal) -> tuple[SizeCosts, ...]:
    """The costs of a study's trainings.

    Args:
        study: The study.
        goal: What is to be least.

    Returns:
        One table per batch size, ascending; none where the study cannot tell: without a target, or
        without step times where seconds are asked for.

    Raises:
        UsageError: If there is no such goal.
    """
    if goal not in GOALS:
        raise UsageError(f"The goal is {goal!r}. Give {', '.join(GOALS[:-1])} or {GOALS[-1]}.")
    if goal != "loss" and study.design.target is None:
        return ()
    if goal == "seconds" and all(trial.seconds is None for trial in study.trials):
        return ()
    sizes = sorted({trial.batch_size for trial in study.trials})
    return tuple(_costs_of(study, size, goal) for size in sizes)


def _costs_of(study: Study, size: int, goal: Goal) -> SizeCosts:
    trials = study.trials_at(size)
    rates = tuple(sorted({trial.learning_rate for trial in trials}))
    by_key = {(trial.learning_rate, trial.seed): trial for trial in trials}
    price = _price(trials, goal)
    has_validation = any(trial.val_loss is not None for trial in study.trials)
    scores = np.full((len(rates), len(study.design.seeds)), np.inf)
    gave_up = 0.0
    for i, rate in enumerate(rates):
        for j, seed in enumerate(study.design.seeds):
            trial = by_key.get((rate, seed))
            if trial is None or trial.state != "complete":
                continue
            if goal == "loss":
                loss = trial.val_loss if has_validation else trial.train_loss
                scores[i, j] = math.inf if loss is None else loss
            elif trial.steps_to_target is not None:
                scores[i, j] = math.log(trial.steps_to_target * price)
            else:
                gave_up = max(gave_up, trial.steps * price)
    return SizeCosts(
        batch_size=size,
        rates=rates,
        scores=scores,
        gave_up=math.log(gave_up) if gave_up > 0 else None,
    )


def _price(trials: Sequence[StudyTrial], goal: Goal) -> float:
    """Of one step at a size."""
    longest = max(trials, key=lambda trial: trial.steps)
    if goal in ("steps", "loss") or longest.steps == 0:
        return 1.0
    of = longest.seconds if goal == "seconds" else longest.examples
    return math.inf if not of else of / longest.steps
