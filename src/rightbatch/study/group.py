"""Runs trainings of one batch size together, evaluated at geometrically spaced updates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rightbatch.engines import Copies, CopiesEvaluation, make_copies
from rightbatch.laws.progress import examples_after
from rightbatch.study.trials import EvaluationPoint, TrialKey
from rightbatch.workload import Workload

Engine = Literal["auto", "compiled", "loop"]
SPACING = 1.12
"""Evaluations are at most so far apart in updates, where that is more than one."""
_MOST_BYTES = 2**29
"""Of weights, gradients and optimizer state of all trainings that run together."""
_MOST_TOGETHER = 128
_COPIES_OF_WEIGHTS = 4


@dataclass(frozen=True, kw_only=True)
class Finished:
    """One training of a group, at its end.

    Attributes:
        key: Which.
        diverged: Whether its loss left the numbers.
        points: Its evaluations while it had a loss.
    """

    key: TrialKey
    diverged: bool
    points: tuple[EvaluationPoint, ...]


def evaluation_steps(limit: int) -> Iterator[int]:
    """Updates after which a training is evaluated: 1, 2, 3, … and the last one.

    Args:
        limit: The last one.

    Yields:
        Ascending.

    Example:
        >>> list(evaluation_steps(24))
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 19, 21, 23, 24]
    """
    step = 1
    while step < limit:
        yield step
        step = max(step + 1, math.floor(step * SPACING))
    yield limit


def cut_into_groups(keys: Sequence[TrialKey], num_weights: int) -> list[list[TrialKey]]:
    """Trainings that fit into memory together, of one batch size each.

    Args:
        keys: What is to be run.
        num_weights: Of the model.

    Returns:
        Groups, the largest batches first: they take the fewest updates.
    """
    fit = _MOST_BYTES // max(1, 4 * _COPIES_OF_WEIGHTS * num_weights)
    most = max(1, min(_MOST_TOGETHER, fit))
    groups: list[list[TrialKey]] = []
    for size in sorted({key.batch_size for key in keys}, reverse=True):
        same = [key for key in keys if key.batch_size == size]
        groups += [same[i : i + most] for i in range(0, len(same), most)]
    return groups


def run_group(
    workload: Workload,
    keys: Sequence[TrialKey],
    steps: int,
    *,
    engine: Engine = "auto",
    progress: Callable[[float], None] | None = None,
) -> tuple[list[Finished], str]:
    """Runs trainings of one batch size to their end.

    Args:
        workload: What to train.
        keys: Which trainings; all have the same batch size.
        steps: Updates of each.
        engine: What runs them.
        progress: Told the share of the updates that is done.

    Returns:
        The trainings in the order of `keys`, and which engine ran them and why.
    """
    copies = make_copies(
        workload,
        global_batch=keys[0].batch_size,
        learning_rates=[key.learning_rate for key in keys],
        seeds=[key.seed for key in keys],
        engine=engine,
    )
    ran_by = f"{copies.engine}: {copies.reason}"
    points: list[list[EvaluationPoint]] = [[] for _ in keys]
    diverged = np.zeros(len(keys), dtype=bool)
    held = np.arange(len(keys))
    for step in evaluation_steps(steps):
        copies.advance(step - copies.steps)
        evaluation = copies.evaluate()
        diverged[held] |= evaluation.diverged
        examples = round(examples_after(step, keys[0].batch_size, workload.num_examples))
        for slot in np.flatnonzero(~evaluation.diverged):
            points[held[slot]].append(_point(evaluation, int(slot), step, examples))
        if progress is not None:
            progress(step / steps)
        if diverged[held].all():
            break
        held = _retire(copies, held, diverged)
    finished = [
        Finished(key=key, diverged=bool(left), points=tuple(own))
        for key, left, own in zip(keys, diverged, points, strict=True)
    ]
    return finished, ran_by


def _retire(copies: Copies, held: np.ndarray, diverged: np.ndarray) -> np.ndarray:
    """Leaves those that diverged out, where they are most of what is held."""
    alive = ~diverged[held]
    # Another number of copies is compiled anew: leaving a few out costs more than it saves.
    if 2 * alive.sum() > len(held):
        return held
    copies.keep(alive)
    return held[alive]


def _point(evaluation: CopiesEvaluation, slot: int, step: int, examples: int) -> EvaluationPoint:
    def value(of: np.ndarray | None) -> float | None:
        number = math.nan if of is None else float(of[slot])
        return number if math.isfinite(number) else None

    return EvaluationPoint(
        step=step,
        examples=examples,
        train_loss=value(evaluation.train_loss),
        val_loss=value(evaluation.val_loss),
        val_metric=value(evaluation.val_metric),
    )
