"""Runs groups side by side, each in a fenced process of its own.

A process that dies, of a signal or for want of memory, takes its group with it and nothing else.
"""

from __future__ import annotations

import queue
import threading
from contextlib import suppress

from rightbatch.isolate.child import Child, ChildResult
from rightbatch.study.executors.executor import Failure, GroupTask, Outcome
from rightbatch.study.executors.run_task import run_task
from rightbatch.workload import Workload

_LONGEST_SECONDS = 30 * 24 * 3600.0
"""Of one group. A training may take as long as it likes; the child asks for a number."""
_PRELOAD = ("torch._dynamo", "rightbatch.engines.compiled", __name__)
"""What every group would import, which takes seconds, is imported once in a process."""


class Processes:
    """Runs groups side by side in processes.

    Args:
        workload: What to train.
        count: How many processes.
        threads: Of the compiled engine, in each.
    """

    def __init__(self, workload: Workload, *, count: int, threads: int) -> None:
        self.capacity = count
        self._threads = threads
        self._waiting: queue.SimpleQueue[GroupTask | None] = queue.SimpleQueue()
        self._ended: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._pending = 0
        self._closing = threading.Event()
        self._children = [Child(workload, preload=_PRELOAD) for _ in range(count)]
        self._servants = [
            threading.Thread(target=self._serve, args=(child,), daemon=True)
            for child in self._children
        ]
        for servant in self._servants:
            servant.start()

    def submit(self, task: GroupTask) -> None:
        """Leaves a group to the next process that is free."""
        self._pending += 1
        self._waiting.put(task)

    @property
    def pending(self) -> int:
        """Groups that run or wait."""
        return self._pending

    def wait(self) -> list[Outcome]:
        """The next group that ends, and those that have ended too."""
        if not self._pending:
            return []
        ended = [self._ended.get()]
        with suppress(queue.Empty):
            while True:
                ended.append(self._ended.get_nowait())
        self._pending -= len(ended)
        return ended

    def close(self) -> None:
        """Ends every process."""
        self._closing.set()
        for _ in self._servants:
            self._waiting.put(None)
        for child in self._children:
            child.close()
        for servant in self._servants:
            servant.join()
        for child in self._children:  # one may have been begun in between
            child.close()

    def _serve(self, child: Child) -> None:
        while (task := self._waiting.get()) is not None and not self._closing.is_set():
            self._ended.put(self._run(child, task))

    def _run(self, child: Child, task: GroupTask) -> Outcome:
        try:
            result = child.run(_run_in_child, task, self._threads, timeout_seconds=_LONGEST_SECONDS)
        except Exception as error:  # the child did not start, or was closed under it
            return Outcome(task=task, lost=str(error))
        return _read(task, result)


def _run_in_child(workload: Workload, task: GroupTask, threads: int) -> Outcome:
    return run_task(workload, task, threads=threads)


def _read(task: GroupTask, result: ChildResult) -> Outcome:
    if isinstance(result.value, Outcome):
        return result.value
    if result.verdict == "oom":
        return Outcome(task=task, failure=Failure(kind="memory", text=result.message))
    if result.verdict == "error":
        text = f"{result.error_type}: {result.message}"
        return Outcome(task=task, failure=Failure(kind="other", text=text))
    return Outcome(task=task, lost=result.message)
