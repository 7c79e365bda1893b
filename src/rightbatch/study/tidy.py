"""A study as two tables in CSV that pandas, polars and spreadsheets open directly."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from rightbatch.store import write_atomically
from rightbatch.study.database import StoredTrial
from rightbatch.study.trials import EvaluationPoint, StudyTrial, TrialKey

TRIALS, POINTS = "trials.csv", "points.csv"


def write_tidy(
    folder: Path, trials: Sequence[StudyTrial], stored: Sequence[StoredTrial], num_examples: int
) -> None:
    """Writes one row per training and one per evaluation.

    Args:
        folder: Where; there are `trials.csv` and `points.csv` afterwards.
        trials: The trainings' rows.
        stored: The same trainings with their evaluations.
        num_examples: N, for epochs.
    """
    names = [field.name for field in dataclasses.fields(StudyTrial)]
    rows = [dataclasses.astuple(trial) for trial in trials]
    write_atomically(folder / TRIALS, _csv(names, rows))
    key_names = [field.name for field in dataclasses.fields(TrialKey)]
    point_names = [field.name for field in dataclasses.fields(EvaluationPoint)]
    points = (
        (*dataclasses.astuple(trial.key), *dataclasses.astuple(p), p.examples / num_examples)
        for trial in stored
        for p in trial.points
    )
    write_atomically(folder / POINTS, _csv([*key_names, *point_names, "epochs"], points))


def _csv(header: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([["" if cell is None else cell for cell in row] for row in rows])
    return text.getvalue().encode()
