"""Runs groups on a Ray cluster: the one that is there, or a local one of its own."""

from __future__ import annotations

import importlib
import logging
import warnings
from typing import Any

from rightbatch.errors import MissingExtraError
from rightbatch.isolate.transport import dump, load
from rightbatch.study.executors.executor import Failure, GroupTask, Outcome
from rightbatch.study.executors.run_task import run_task
from rightbatch.workload import Workload


class RayCluster:
    """Runs groups as Ray tasks of one CPU each.

    Args:
        workload: What to train.

    Raises:
        MissingExtraError: If Ray is not installed.
    """

    def __init__(self, workload: Workload) -> None:
        try:
            self._ray: Any = importlib.import_module("ray")
        except ImportError as error:
            raise MissingExtraError("ray", "ray") from error
        self._began_it = not self._ray.is_initialized()
        if self._began_it:
            _connect(self._ray)
        self.capacity = max(1, int(self._ray.cluster_resources().get("CPU", 1)))
        # Bytes of ours, so that lambdas and classes of a script travel as to any child process.
        self._workload = self._ray.put([bytes(part) for part in dump(workload)])
        # A worker that is lost is tried again by the study, which counts how often.
        self._remote = self._ray.remote(num_cpus=1, max_retries=0)(_run_remotely)
        self._running: dict[Any, GroupTask] = {}

    def submit(self, task: GroupTask) -> None:
        """Leaves a group to the cluster."""
        self._running[self._remote.remote(self._workload, task)] = task

    @property
    def pending(self) -> int:
        """Groups that run or wait."""
        return len(self._running)

    def wait(self) -> list[Outcome]:
        """The next group that ends."""
        if not self._running:
            return []
        ready, _ = self._ray.wait(list(self._running), num_returns=1)
        return [self._read(reference) for reference in ready]

    def close(self) -> None:
        """Cancels what runs, and leaves the cluster."""
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        self._running.clear()
        if self._began_it:
            self._ray.shutdown()

    def _read(self, reference: Any) -> Outcome:
        task = self._running.pop(reference)
        try:
            return load(self._ray.get(reference))
        except self._ray.exceptions.OutOfMemoryError as error:
            return Outcome(task=task, failure=Failure(kind="memory", text=_first_line(error)))
        except self._ray.exceptions.RayTaskError as error:
            return Outcome(task=task, failure=Failure(kind="other", text=_first_line(error.cause)))
        except self._ray.exceptions.RayError as error:
            return Outcome(task=task, lost=_first_line(error))


def _connect(ray: Any) -> None:
    quietly = {"log_to_driver": False, "logging_level": logging.ERROR}
    with warnings.catch_warnings():
        # JAX warns of any fork; Ray's are followed at once by another program.
        warnings.filterwarnings(
            "ignore", message=r"os\.fork\(\) was called", category=RuntimeWarning
        )
        try:
            ray.init(address="auto", **quietly)
        except ConnectionError:
            ray.init(include_dashboard=False, **quietly)


def _run_remotely(workload: list[bytes], task: GroupTask) -> list[bytes]:
    outcome = run_task(load(workload), task, threads=1)
    return [bytes(part) for part in dump(outcome)]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
