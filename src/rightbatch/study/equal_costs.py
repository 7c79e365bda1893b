"""The batch sizes of a study after the same epochs, steps, examples or seconds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from rightbatch.laws.seeds import (
    best_of_rates,
    mean_over_seeds,
)
from rightbatch.study.database import StoredTrial
from rightbatch.study.design import Unit
from rightbatch.study.findings import (
    Comparison,
    EqualCost,
)
from rightbatch.study.judging import Setting
from rightbatch.study.size_table import SizeTable
from rightbatch.study.trials import EvaluationPoint


def compare_sizes(tables: Sequence[SizeTable], setting: Setting) -> tuple[Comparison, ...]:
    """All sizes at equal epochs, steps, examples and modelled seconds.

    Args:
        tables: Of each size.
        setting: What they are about.

    Returns:
        One comparison for each that can be made, as far as all sizes came.
    """
    found: list[Comparison] = []
    units: list[Unit] = ["epochs", "steps", "examples", "seconds"]
    for unit in units:
        if unit == "seconds" and setting.seconds_of is None:
            continue
        reached = [farthest(table, unit, setting) for table in tables]
        if len(reached) < 2 or min(reached) <= 0:
            continue
        amount = min(reached)
        sizes = [_at(table, unit, amount, setting) for table in tables]
        there = tuple(size for size in sizes if size is not None)
        if len(there) > 1:
            found.append(Comparison(unit=unit, amount=amount, sizes=there))
    return tuple(found)


def progress_of(point: EvaluationPoint, batch_size: int, unit: Unit, setting: Setting) -> float:
    """How far an evaluation is, in a unit.

    Args:
        point: The evaluation.
        batch_size: Of its training.
        unit: Epochs, steps, examples, or modelled seconds.
        setting: Gives N and the step time.

    Returns:
        The progress.
    """
    if unit == "steps":
        return float(point.step)
    if unit == "seconds":
        assert setting.seconds_of is not None  # asked before
        return point.step * setting.seconds_of(batch_size)
    return point.examples / (setting.num_examples if unit == "epochs" else 1)


def farthest(table: SizeTable, unit: Unit, setting: Setting) -> float:
    """How far the trainings of a size came, in a unit.

    Args:
        table: The trainings.
        unit: Epochs, steps, examples, or modelled seconds.
        setting: Gives N and the step time.

    Returns:
        The progress of the last evaluation; 0 without any.
    """
    points = [t.points[-1] for rate in table.rates for t in table.trials_at(rate) if t.points]
    return max((progress_of(p, table.batch_size, unit, setting) for p in points), default=0.0)


def _at(table: SizeTable, unit: Unit, amount: float, setting: Setting) -> EqualCost | None:
    """The best rate of a size at a cost, by the loss there."""

    def values(rate: float, of: Quantity) -> list[float | None]:
        return [value_at(t, unit, amount, setting, of) for t in table.trials_at(rate)]

    losses = [values(rate, setting.loss) for rate in table.rates]
    if all(loss is None for row in losses for loss in row):
        return None
    scores = np.full((len(losses), max(len(row) for row in losses)), np.nan)
    for i, row in enumerate(losses):
        scores[i, : len(row)] = [np.nan if loss is None else loss for loss in row]
    best = best_of_rates(scores)
    rate = table.rates[best]
    return EqualCost(
        batch_size=table.batch_size,
        learning_rate=rate,
        loss=mean_over_seeds(losses[best]),
        metric=setting.metric(values(rate, lambda point: point.val_metric)),
    )


Quantity = Callable[[EvaluationPoint], float | None]
"""A number of an evaluation."""


def value_at(
    trial: StoredTrial, unit: Unit, amount: float, setting: Setting, of: Quantity
) -> float | None:
    """A quantity of a training at a cost, interpolated between the evaluations around it.

    Args:
        trial: The training.
        unit: Of the cost.
        amount: How much of it.
        setting: Gives N and the step time.
        of: The quantity at an evaluation.

    Returns:
        The quantity; None where the training did not end well or was not evaluated around it.
    """
    if trial.state != "complete":
        return None
    size = trial.key.batch_size
    curve = [(progress_of(p, size, unit, setting), of(p)) for p in trial.points]
    known = [(x, y) for x, y in curve if y is not None]
    slack = 1e-9 * amount
    if not known or known[0][0] > amount + slack or known[-1][0] < amount - slack:
        return None
    x, y = zip(*known, strict=True)
    return float(np.interp(math.log(amount), np.log(x), y))
