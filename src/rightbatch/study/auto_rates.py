"""Learning rates of a study that finds them itself: a range test, then octaves until it turns."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from rightbatch.probes.learning_rate import LearningRateRecord, find_learning_rate
from rightbatch.study.database import StudyDatabase
from rightbatch.study.design import StudyDesign
from rightbatch.study.size_table import SizeTable
from rightbatch.workload import Workload

_FIRST_RATES = "first rates"
_BELOW, _ABOVE = 4, 1
"""Octaves around the rate of the ramp's least loss: the best one of a training is mostly below."""
_FARTHER = 2
"""Octaves that are added where the best rate is the lowest or the highest."""
_MOST = 24
"""Rates of one size; a best one that is still at the edge is then told as such."""
_OTHERWISE = -3
"""log2 of the rate to begin with, where the range test does not tell."""


def first_rates(workload: Workload, batch_size: int) -> tuple[float, ...]:
    """Powers of two around the rate at which the loss of a range test is least.

    Args:
        workload: What to train.
        batch_size: Examples per update.

    Returns:
        Ascending.
    """
    record = find_learning_rate(
        workload, global_batch=batch_size, seeds=2, num_steps=60, lr_min=1e-5
    )
    octave = _octave_of_least_loss(record)
    centre = _OTHERWISE if octave is None else octave
    return tuple(2.0**k for k in range(centre - _BELOW, centre + _ABOVE + 1))


def settle_first_rates(
    workload: Workload, design: StudyDesign, database: StudyDatabase, say: Callable[[str], None]
) -> dict[int, Sequence[float]]:
    """The rates that each size of a design begins with: tested once, and kept in the database.

    Args:
        workload: What to train.
        design: Of the study.
        database: Where they are kept.
        say: Told what is being done.

    Returns:
        Rates by batch size, ascending.
    """
    found = database.fact(_FIRST_RATES)
    if found is None:
        tested: dict[str, Sequence[float]] = {}
        for size in design.batch_sizes:
            say(f"learning rate: range test at batch {size:,}")
            tested[str(size)] = first_rates(workload, size)
        found = database.settle_fact(_FIRST_RATES, tested)
    return {int(size): rates for size, rates in found.items()}


def _octave_of_least_loss(record: LearningRateRecord) -> int | None:
    least = [
        math.log2(min(zip(curve.losses, curve.learning_rates, strict=True))[1])
        for curve in record.curves
        if curve.losses and math.isfinite(min(curve.losses))
    ]
    return round(sum(least) / len(least)) if least else None


def farther_rates(table: SizeTable) -> tuple[float, ...]:
    """Rates to try beyond the edge that the best one is at; none where it is inside.

    Args:
        table: The trainings of a size.

    Returns:
        Ascending.
    """
    if len(table.rates) >= _MOST:
        return ()
    if not table.resolved or table.at_edge == "lowest":
        return tuple(table.rates[0] / 2.0**k for k in range(_FARTHER, 0, -1))
    if table.at_edge == "highest":
        return tuple(table.rates[-1] * 2.0**k for k in range(1, _FARTHER + 1))
    return ()
