"""What a report is made of: a plan or a study, given as such or read from where it was kept."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path

from rightbatch.errors import CorruptStateError, UsageError
from rightbatch.plan.records import Plan
from rightbatch.store import read_record
from rightbatch.study.study import SCHEMA as STUDY_SCHEMA
from rightbatch.study.study import Study
from rightbatch.study.tidy import POINTS

PLAN_SCHEMA = "rightbatch.plan/1"
_FILES = ("study.json", "plan.json")


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """One evaluation of one training.

    Attributes:
        batch_size: Examples per update.
        learning_rate: Learning rate.
        seed: Decides initial weights and data order.
        step: Updates done.
        examples: Training examples processed.
        train_loss: Mean loss of the updates since the evaluation before, or None.
        val_loss: Validation loss, or None.
    """

    batch_size: int
    learning_rate: float
    seed: int
    step: int
    examples: int
    train_loss: float | None
    val_loss: float | None


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a report is made of.

    Attributes:
        plan: The plan, or None.
        study: The study: given, or the one that a plan rests on; or None.
        points: Every evaluation of the study's trainings, where its folder has them.
    """

    plan: Plan | None
    study: Study | None
    points: tuple[CurvePoint, ...] = ()

    @property
    def workload(self) -> str:
        """Name of what was trained."""
        record = self.plan or self.study
        assert record is not None
        return record.workload

    @property
    def num_examples(self) -> int:
        """N."""
        if self.study is not None:
            return self.study.num_examples
        assert self.plan is not None
        return self.plan.evidence.setting.num_examples

    @property
    def chosen(self) -> tuple[int, float] | None:
        """The batch size and learning rate of the answer, or None."""
        if self.plan is not None:
            return self.plan.recipe.global_batch, self.plan.recipe.learning_rate
        best = None if self.study is None else self.study.best
        return None if best is None else (best.batch_size, best.learning_rate)

    @property
    def target(self) -> str | None:
        """What counts as trained, or None."""
        if self.plan is not None:
            return self.plan.evidence.setting.target
        return None if self.study is None else self.study.design.target


def open_source(given: Plan | Study | str | Path) -> Source:
    """A plan or a study, as such or from its file or folder.

    Args:
        given: The record; a `plan.json` or `study.json`; or the folder that holds one.

    Returns:
        What a report is made of.

    Raises:
        UsageError: If there is nothing of the kind.
    """
    if isinstance(given, Plan):
        return Source(plan=given, study=given.evidence.study)
    if isinstance(given, Study):
        return Source(plan=None, study=given)
    if not isinstance(given, str | Path):
        raise UsageError(
            f"A report is made of a plan, a study or where one was kept, not of a "
            f"{type(given).__name__}. Pass one of these."
        )
    path = Path(given)
    if not path.is_dir():
        return _read(path)
    for name in _FILES:
        if (path / name).is_file():
            return _read(path / name)
    raise UsageError(
        f"There is nothing to report in {str(path)!r}: it has no {' and no '.join(_FILES)}. Pass "
        "the folder of a study, or a plan written with --out. A study that was killed writes its "
        "study.json when it is gone on with (--resume)."
    )


def _read(path: Path) -> Source:
    if not path.is_file():
        raise UsageError(f"There is no file {str(path)!r}. Pass a plan, or the folder of a study.")
    if _schema(path) != STUDY_SCHEMA:
        return open_source(read_record(path, Plan, schema=PLAN_SCHEMA))
    study = read_record(path, Study, schema=STUDY_SCHEMA)
    table = path.parent / POINTS
    return Source(plan=None, study=study, points=read_points(table) if table.is_file() else ())


def _schema(path: Path) -> str | None:
    """The schema a file states; what is unreadable is told by whoever reads it for good."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None
    return content.get("schema") if isinstance(content, dict) else None


def read_points(path: Path) -> tuple[CurvePoint, ...]:
    """The evaluations of a study's trainings.

    Args:
        path: Its `points.csv`.

    Returns:
        One record per row.

    Raises:
        CorruptStateError: If a row is not what a study writes.
    """
    rows = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8", errors="replace")))
    found: list[CurvePoint] = []
    for number, row in enumerate(rows, start=2):
        try:
            found.append(
                CurvePoint(
                    batch_size=int(row["batch_size"]),
                    learning_rate=float(row["learning_rate"]),
                    seed=int(row["seed"]),
                    step=int(row["step"]),
                    examples=int(row["examples"]),
                    train_loss=_number(row["train_loss"]),
                    val_loss=_number(row["val_loss"]),
                )
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptStateError(
                f"{path} is no table of evaluations: line {number} ({error}). Go on with the study "
                "(--resume) to have it written again."
            ) from error
    return tuple(found)


def _number(cell: str) -> float | None:
    """A loss; an empty cell, and what is not finite, is none."""
    number = float(cell) if cell else math.nan
    return number if math.isfinite(number) else None
