"""What every executor runs in the end."""

from __future__ import annotations

from collections.abc import Callable

from rightbatch.device.out_of_memory import is_out_of_memory
from rightbatch.errors import UsageError
from rightbatch.study.executors.executor import Failure, GroupTask, Outcome
from rightbatch.study.group import run_group
from rightbatch.workload import Workload


def run_task(
    workload: Workload,
    task: GroupTask,
    *,
    threads: int | None,
    progress: Callable[[float], None] | None = None,
) -> Outcome:
    """Runs a group to its end.

    Args:
        workload: What to train.
        task: Which trainings.
        threads: Of the compiled engine; None: one per core.
        progress: Told the share of the updates that is done.

    Returns:
        How it ended; what was raised is in it.
    """
    try:
        finished, ran_by = run_group(
            workload,
            task.keys,
            task.steps,
            engine=task.engine,
            step_seconds=task.step_seconds,
            smallest=task.smallest,
            watch=task.watch,
            threads=threads,
            progress=progress,
        )
    except Exception as error:
        return Outcome(task=task, failure=describe_failure(error))
    return Outcome(task=task, finished=finished, ran_by=ran_by)


_LONGEST_TEXT = 500


def describe_failure(error: Exception) -> Failure:
    """What was raised, as data.

    Args:
        error: The exception.

    Returns:
        Its kind and text.
    """
    if isinstance(error, UsageError):
        return Failure(kind="usage", text=str(error))
    kind = "memory" if is_out_of_memory(error) else "other"
    return Failure(kind=kind, text=f"{type(error).__name__}: {error}"[:_LONGEST_TEXT])
