"""Runs groups one after the other in this process."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from rightbatch.study.executors.executor import GroupTask, Outcome
from rightbatch.study.executors.run_task import run_task
from rightbatch.workload import Workload


class InPlace:
    """Runs groups one after the other in this process.

    Args:
        workload: What to train.
        threads: Of the compiled engine; None: one per core.
        progress: Told the group that runs and the share of its updates that is done.
    """

    capacity = 1

    def __init__(
        self,
        workload: Workload,
        *,
        threads: int | None,
        progress: Callable[[GroupTask, float], None],
    ) -> None:
        self._workload, self._threads, self._progress = workload, threads, progress
        self._waiting: deque[GroupTask] = deque()

    def submit(self, task: GroupTask) -> None:
        """Puts a group at the end."""
        self._waiting.append(task)

    @property
    def pending(self) -> int:
        """Groups that wait."""
        return len(self._waiting)

    def wait(self) -> list[Outcome]:
        """Runs the first group to its end."""
        if not self._waiting:
            return []
        task = self._waiting.popleft()
        self._progress(task, 0.0)
        return [
            run_task(
                self._workload,
                task,
                threads=self._threads,
                progress=lambda share: self._progress(task, share),
            )
        ]

    def close(self) -> None:
        """Nothing is left running."""
        self._waiting.clear()
