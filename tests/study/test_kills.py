"""T3 of the faults: kill -9 of workers and of coordinators, two of which share a study."""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from rightbatch.errors import UsageError
from rightbatch.study.database import StoredTrial, StudyDatabase
from rightbatch.study.trials import TrialKey

COORDINATOR = """
import functools, sys, time, torch
sys.path.insert(0, sys.argv[3])
from torch import nn
from rightbatch.study import runner
from rightbatch.study.claims import Claims
from test_study import make, small

class Slow(nn.Linear):
    def forward(self, x):
        if self.training:
            time.sleep(0.004)
        return super().forward(x)

if __name__ == "__main__":
    torch.set_num_threads(1)
    # Killed at random, a training may be lost any number of times without being to blame.
    runner._MOST_LOSSES = 10**9
    runner.Claims = functools.partial(Claims, lease_seconds=2.0)
    small(make(make_model=lambda: Slow(4, 2)), storage=sys.argv[1], name="study", workers=2,
          batch_sizes=[5, 10, 20, 40], seeds=int(sys.argv[2]), epochs=4)
"""


@dataclass
class Scene:
    """A study that coordinators share while their processes are killed."""

    url: str
    seeds: int

    def start(self) -> psutil.Popen:
        here = str(Path(__file__).parent)
        command = [sys.executable, "-c", COORDINATOR, self.url, str(self.seeds), here]
        return psutil.Popen(command, stderr=subprocess.DEVNULL)

    def acknowledged(self) -> dict[TrialKey, StoredTrial]:
        database = StudyDatabase(self.url, "study")
        try:
            database.open()
            return {t.key: t for t in database.trials() if t.state == "complete"}
        finally:
            database.close()


def check_kills(url: str, seed: int, *, kills: int, seeds: int, writers: int) -> None:
    draw, scene = random.Random(seed), Scene(url, seeds)
    coordinators = [scene.start() for _ in range(writers)]
    known: dict[TrialKey, StoredTrial] = {}
    done = {"worker": 0, "coordinator": 0}
    try:
        while not known:  # it begins when all have loaded what they need
            time.sleep(0.2)
            with contextlib.suppress(UsageError):  # no study yet
                known = scene.acknowledged()
        while sum(done.values()) < kills and any(c.poll() is None for c in coordinators):
            time.sleep(draw.uniform(0.02, 0.4))
            which = draw.randrange(writers)
            workers = _workers(coordinators[which])
            if coordinators[which].poll() is not None or not workers:
                continue
            if writers > 1 and draw.random() < 0.1:
                coordinators[which].send_signal(signal.SIGKILL)
                coordinators[which].wait()
                coordinators[which] = scene.start()
                done["coordinator"] += 1
            else:
                with contextlib.suppress(psutil.Error):
                    draw.choice(workers).send_signal(signal.SIGKILL)
                    done["worker"] += 1
            now = scene.acknowledged()
            assert {key: now.get(key) for key in known} == known, f"seed {seed}: {done}"
            known = now
        for coordinator in coordinators:
            assert coordinator.wait(600) == 0, f"seed {seed}: {done}"
    finally:
        for coordinator in coordinators:
            for process in [coordinator, *_workers(coordinator)]:
                with contextlib.suppress(psutil.Error):
                    process.send_signal(signal.SIGKILL)
    database = StudyDatabase(url, "study")
    database.open()
    trials, lost = database.trials(), [e for e in database.events() if e[1] == "lost"]
    database.close()
    assert done["worker"] and sum(done.values()) >= kills, f"the study ended before: {done}"
    assert lost, f"seed {seed}"
    assert [t.state for t in trials] == ["complete"] * (8 * seeds), f"seed {seed}"
    # A row twice would have two sets of evaluations; the last one is of the last update.
    assert all(t.points[-1].examples == 160 for t in trials), f"seed {seed}"
    print(f"seed {seed}: {done}, {len(lost)} losses noted, {len(trials)} trainings")


def _workers(coordinator: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return [p for p in coordinator.children(recursive=True) if p.status() != "zombie"]
    return []


def test_nothing_is_lost_or_counted_twice_when_workers_are_killed(new_postgres: str) -> None:
    check_kills(new_postgres, seed=1, kills=4, seeds=10, writers=1)


@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_two_hundred_kills(new_postgres: str) -> None:
    check_kills(new_postgres, seed=2, kills=200, seeds=60, writers=2)
