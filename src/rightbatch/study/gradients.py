"""The gradient picture that is part of a study: at the initial weights, and part of the way."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import TypeAdapter

from rightbatch.errors import RightbatchError
from rightbatch.probes.gradient_scatter import GradientRecord, measure_gradient_scatter
from rightbatch.recipe import Recipe
from rightbatch.study.database import StudyDatabase
from rightbatch.study.design import StudyDesign
from rightbatch.study.findings import Best
from rightbatch.study.judging import Setting
from rightbatch.workload import Workload

_FACT = "gradients"
_SHARE = 0.1
"""Of a training's updates: the noise scale grows fast at first."""
_SECONDS = 1.0
"""Of the training loop, at most."""


@dataclass(frozen=True, kw_only=True)
class StudyGradients:
    """How batches' gradients scatter around the full one.

    Attributes:
        record: At the initial weights, and after part of a training at the best pair.
        skipped: Why there is none, or empty.
    """

    record: GradientRecord | None
    skipped: str = ""


def study_gradients(
    workload: Workload,
    database: StudyDatabase,
    design: StudyDesign,
    setting: Setting,
    best: Best | None,
) -> StudyGradients:
    """The picture as it was measured before, or measured now.

    Args:
        workload: What is trained.
        database: Keeps it, so that a study that is gone on with does not measure it again.
        design: Of the study.
        setting: Gives the step time.
        best: The pair to train with.

    Returns:
        The picture, or why there is none.
    """
    if best is None:
        return StudyGradients(record=None, skipped="no training ended with a loss")
    reader = TypeAdapter(GradientRecord)
    pair = f"{best.batch_size} {best.learning_rate!r}"
    known = database.fact(f"{_FACT} {pair}")
    if known is not None:
        return StudyGradients(record=reader.validate_python(known))
    recipe = Recipe(global_batch=best.batch_size, learning_rate=best.learning_rate)
    try:
        record = measure_gradient_scatter(
            workload,
            batch_sizes=design.batch_sizes,
            recipe=recipe,
            steps=_steps(design, setting, best.batch_size),
            seed=design.seeds[0],
        )
    except RightbatchError as error:
        return StudyGradients(record=None, skipped=str(error))
    database.settle_fact(f"{_FACT} {pair}", reader.dump_python(record, mode="json"))
    return StudyGradients(record=record)


def _steps(design: StudyDesign, setting: Setting, batch_size: int) -> int:
    """A tenth of a training's updates, and no more than about a second of them."""
    seconds = None if setting.seconds_of is None else setting.seconds_of(batch_size)
    N = setting.num_examples
    whole = design.budget.steps(batch_size, N, seconds, setting.smallest)
    most = 100 if seconds is None else int(_SECONDS / seconds)
    return max(1, min(round(_SHARE * whole), most))
