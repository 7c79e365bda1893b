"""Makes the search that a design asks for."""

from __future__ import annotations

from collections.abc import Callable

from rightbatch.study.database import StudyDatabase
from rightbatch.study.design import SAMPLERS, StudyDesign
from rightbatch.study.grid import GridSearch
from rightbatch.study.judging import Setting
from rightbatch.study.race_search import RaceSearch
from rightbatch.study.sampler_search import SamplerSearch
from rightbatch.workload import Workload


def make_search(
    workload: Workload,
    design: StudyDesign,
    database: StudyDatabase,
    setting: Setting,
    say: Callable[[str], None],
    *,
    at_once: int,
) -> GridSearch | RaceSearch | SamplerSearch:
    """Makes what decides which trainings a study runs.

    Args:
        workload: What to train.
        design: Says which search.
        database: Of the study, begun.
        setting: What trainings are judged by, step times included.
        say: Told what is being done.
        at_once: Groups of trainings that are run side by side.

    Returns:
        The search.

    Raises:
        MissingExtraError: If it needs Optuna, which is not installed.
    """
    if design.search in SAMPLERS:
        return SamplerSearch(workload, design, database, setting, say, at_once=at_once)
    make = RaceSearch if design.search == "race" else GridSearch
    return make(workload, design, database, setting, say)
