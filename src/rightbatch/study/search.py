"""What decides which trainings a study runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rightbatch.study.database import StoredTrial
from rightbatch.study.trials import Asked


class Search(Protocol):
    """Decides which trainings a study runs, from those that have ended.

    What it decides depends on the design and on what is in the database alone, so that a study
    that is gone on with, or that several machines work at, asks for the same.
    """

    def ask(self, trials: Sequence[StoredTrial]) -> Sequence[Asked]:
        """What to run next.

        Args:
            trials: All that were asked for before; all of them have ended.

        Returns:
            Trainings; those that have gone as far already are no matter. None: the study is done.
        """
        ...
