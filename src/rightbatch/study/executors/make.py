"""Chooses the executor."""

from __future__ import annotations

from collections.abc import Callable

from rightbatch.errors import UsageError
from rightbatch.study.executors.executor import Executor, ExecutorName, GroupTask
from rightbatch.study.executors.in_place import InPlace
from rightbatch.study.group import count_cores
from rightbatch.workload import Workload


def make_executor(
    workload: Workload,
    *,
    executor: ExecutorName,
    workers: int,
    threads: int | None,
    progress: Callable[[GroupTask, float], None],
) -> Executor:
    """Makes what runs the groups of a study.

    Args:
        workload: What to train.
        executor: `local`: here, or in processes of this machine; `ray`: on a Ray cluster.
        workers: Of `local`: how many processes; 1: this one.
        threads: Of the compiled engine, in each. Default: the cores, divided among the processes.
        progress: Told the group that runs here and how far it is.

    Returns:
        The executor.

    Raises:
        UsageError: If the arguments do not fit together.
        MissingExtraError: If Ray is asked for and not installed.
    """
    if workers < 1:
        raise UsageError(f"workers={workers}. At least one process is needed.")
    if executor == "ray":
        if workers > 1:
            raise UsageError(
                f"A Ray cluster decides itself how many workers it has. Drop workers={workers}."
            )
        from rightbatch.study.executors.ray_cluster import RayCluster

        return RayCluster(workload)
    if executor != "local":
        raise UsageError(f"The executor is {executor!r}. Choose local or ray.")
    if workers == 1:
        return InPlace(workload, threads=threads, progress=progress)
    from rightbatch.study.executors.processes import Processes

    each = max(1, count_cores() // workers) if threads is None else threads
    return Processes(workload, count=workers, threads=each)
