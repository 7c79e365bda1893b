"""Every batch size at every learning rate, and farther rates where the best is at the edge."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from rightbatch.study.auto_rates import farther_rates, settle_first_rates
from rightbatch.study.database import StoredTrial, StudyDatabase
from rightbatch.study.design import StudyDesign
from rightbatch.study.judging import Setting
from rightbatch.study.size_table import tables_of
from rightbatch.study.trials import Asked, TrialKey
from rightbatch.workload import Workload


class GridSearch:
    """The full grid.

    Args:
        workload: What to train.
        design: Of the study.
        database: Keeps what the range tests say.
        setting: What trainings are judged by.
        say: Told what is being done.
    """

    def __init__(
        self,
        workload: Workload,
        design: StudyDesign,
        database: StudyDatabase,
        setting: Setting,
        say: Callable[[str], None],
    ) -> None:
        self._workload, self._design, self._database = workload, design, database
        self._setting, self._say = setting, say

    def ask(self, trials: Sequence[StoredTrial]) -> Sequence[Asked]:
        """The whole grid first; after that, with rates of its own, those beyond an edge."""
        rates = self._design.learning_rates
        if rates is not None:
            return self._cells((size, rates) for size in self._design.batch_sizes)
        if not trials:
            first = settle_first_rates(self._workload, self._design, self._database, self._say)
            return self._cells(first.items())
        tables = tables_of(trials, self._setting)
        return self._cells((table.batch_size, farther_rates(table)) for table in tables)

    def _cells(self, rates_of: Iterable[tuple[int, Sequence[float]]]) -> list[Asked]:
        return [
            Asked(key=TrialKey(batch_size=size, learning_rate=rate, seed=seed))
            for size, rates in rates_of
            for rate in rates
            for seed in self._design.seeds
        ]
