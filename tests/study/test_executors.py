"""One contract for every executor: the same results, errors told, what is lost is run again."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

from rightbatch.errors import MissingExtraError, UsageError
from rightbatch.study.executors import Executor, Failure, GroupTask, Outcome, make_executor
from rightbatch.study.trials import TrialKey
from rightbatch.workload import Workload

from .test_study import make, small, without_cost

MAIN = os.getpid()
KINDS = ["local", "processes", "ray"]


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """A local cluster that every test of this file connects to."""
    if find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    import ray

    quietly = {"log_to_driver": False, "logging_level": logging.ERROR}
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=r"os\.fork\(\) was called", category=RuntimeWarning
        )
        ray.init(num_cpus=2, include_dashboard=False, **quietly)
    yield ray
    ray.shutdown()


def built(kind: str, request: pytest.FixtureRequest, workload: Workload) -> Executor:
    if kind == "ray":
        request.getfixturevalue("ray")
    return make_executor(
        workload,
        executor="ray" if kind == "ray" else "local",
        workers=2 if kind == "processes" else 1,
        threads=None,
        progress=lambda *_: None,
    )


def task(number: int, seeds: int = 2, **changes: Any) -> GroupTask:
    keys = [TrialKey(batch_size=5 * number, learning_rate=0.1, seed=s) for s in range(seeds)]
    asked: dict[str, Any] = {
        "number": number, "keys": tuple(keys), "steps": 12, "engine": "loop",
        "step_seconds": None, "smallest": 1, **changes,
    }  # fmt: skip
    return GroupTask(**asked)


def run_all(executor: Executor, tasks: list[GroupTask]) -> list[Outcome]:
    for one in tasks:
        executor.submit(one)
    ended: list[Outcome] = []
    while executor.pending:
        ended += executor.wait()
    assert executor.wait() == []
    return sorted(ended, key=lambda outcome: outcome.task.number)


@pytest.mark.parametrize("kind", KINDS)
def test_every_executor_gives_the_results_of_the_first(
    kind: str, request: pytest.FixtureRequest
) -> None:
    tasks = [task(number) for number in (1, 2, 4)]
    executor, plain = built(kind, request, make()), built("local", request, make())
    try:
        found = run_all(executor, tasks)
    finally:
        executor.close()
    assert [outcome.task for outcome in found] == tasks
    assert found == run_all(plain, tasks)


class Raising(nn.Linear):
    """Raises at some sizes."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.training and len(input) == 10:
            raise ValueError("no tens")
        if self.training and len(input) == 20:
            raise MemoryError("no room")
        return super().forward(input)


class Dying(nn.Linear):
    """Takes a worker along at one size, and not the process that wrote its number here."""

    def __init__(self, main: int) -> None:
        super().__init__(4, 2)
        self.main = main

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if len(input) == 10 and os.getpid() != self.main:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(input)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_training_raises_is_told_as_data(kind: str, request: pytest.FixtureRequest) -> None:
    executor = built(kind, request, make(make_model=lambda: Raising(4, 2)))
    try:
        good, wrong, large = run_all(executor, [task(1), task(2), task(4)])
    finally:
        executor.close()
    assert good.failure is None and len(good.finished) == 2
    assert wrong.failure == Failure(kind="other", text="ValueError: no tens")
    assert large.failure == Failure(kind="memory", text="MemoryError: no room")


@pytest.mark.parametrize("kind", ["processes", "ray"])
def test_a_worker_that_dies_takes_only_its_group_along(
    kind: str, request: pytest.FixtureRequest
) -> None:
    executor = built(kind, request, make(make_model=lambda: Dying(MAIN)))
    try:
        good, bad, later = run_all(executor, [task(1), task(2), task(4)])
    finally:
        executor.close()
    assert len(good.finished) == len(later.finished) == 2
    assert bad.lost and not bad.finished and bad.failure is None


def test_a_training_whose_worker_always_dies_has_failed_and_the_others_are_done() -> None:
    workload = make(make_model=lambda: Dying(MAIN))
    study = small(workload, batch_sizes=[5, 10], workers=2, seeds=1)
    states = {(t.batch_size, t.state) for t in study.trials}
    assert states == {(5, "complete"), (10, "failed")}
    assert "What ran it was lost 3 times. The child process died by signal SIGKILL." in (
        study.trials_at(10)[0].note
    )


@pytest.mark.parametrize("kind", ["processes", "ray"])
def test_a_study_with_workers_is_the_study_without(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"workers": 2}
    if kind == "ray":
        request.getfixturevalue("ray")
        options = {"executor": "ray"}
    said: list[str] = []
    options["progress"] = lambda text, *_: said.append(text)
    found, plain = small(run_directory=tmp_path, **options), small()
    assert "0 of 8 trainings have ended" in said and "8 of 8 trainings have ended" in said
    assert [t.val_loss for t in found.trials] == [t.val_loss for t in plain.trials]
    assert without_cost(found).keys() == without_cost(plain).keys()
    assert found.engines == plain.engines


def test_closing_leaves_no_process_behind(request: pytest.FixtureRequest) -> None:
    before = set(psutil.Process().children(recursive=True))
    executor = built("processes", request, make())
    for number in (1, 2, 4):
        executor.submit(task(number, steps=10**7))
    deadline = time.monotonic() + 60
    while len(set(psutil.Process().children(recursive=True)) - before) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    executor.close()
    assert not set(psutil.Process().children(recursive=True)) - before
    assert not [t for t in threading.enumerate() if "_serve" in t.name]


def test_arguments_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"workers=0\. At least one"):
        small(workers=0)
    with pytest.raises(UsageError, match="decides itself how many workers"):
        small(workers=3, executor="ray")
    with pytest.raises(UsageError, match=r"'slurm'\. Choose local or ray"):
        small(executor="slurm")
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"ray is not installed\. Run: pip install 'right"):
        small(executor="ray")
