"""The study database: whole or not at all, the same after a kill, and clear about what is wrong."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rightbatch.errors import CorruptStateError, UsageError
from rightbatch.study.database import StudyDatabase
from rightbatch.study.design import StudyDesign, make_design
from rightbatch.study.trials import EvaluationPoint, TrialKey


def design(**changes: Any) -> StudyDesign:
    asked = {"batch_sizes": [1, 10], "learning_rates": [0.1, 1.0], "seeds": 2, "epochs": 3}
    return make_design(100, **{**asked, **changes})


def opened(place: Path | str) -> StudyDatabase:
    database = StudyDatabase(str(place), "study")
    database.begin(design(), {"workload": "w"})
    return database


def key(batch: int = 1, rate: float = 0.1, seed: int = 0) -> TrialKey:
    return TrialKey(batch_size=batch, learning_rate=rate, seed=seed)


def point(step: int, loss: float | None = 1.0) -> EvaluationPoint:
    return EvaluationPoint(step=step, examples=step, train_loss=loss, val_loss=None, val_metric=0.5)


def test_what_is_written_is_read_again_to_the_bit(tmp_path: Path) -> None:
    database = opened(tmp_path / "s.db")
    keys = [key(rate=1 / 3), key(10, 1e-300, 2**40)]
    database.add([*keys, keys[0]])
    points = [point(1, 0.1 + 0.2), point(2, None)]
    database.write([(keys[0], "complete", points, ""), (keys[1], "failed", [], "why")])
    database.add(keys)  # nothing changes
    database.close()
    first, second = opened(tmp_path / "s.db").trials()
    assert (first.key, first.state, list(first.points)) == (keys[0], "complete", points)
    assert (second.key, second.state, second.note) == (keys[1], "failed", "why")


def test_evaluations_written_again_replace_the_others(tmp_path: Path) -> None:
    database = opened("sqlite://")
    database.add([key()])
    database.write([(key(), "running", [point(1), point(2)], "")])
    database.write([(key(), "complete", [point(3)], "")])
    assert [p.step for p in database.trials()[0].points] == [3]


def test_the_same_study_is_gone_on_with_and_another_refused(tmp_path: Path) -> None:
    place = str(tmp_path / "s.db")
    assert not StudyDatabase(place, "study").begin(design(), {"workload": "w"})
    again = StudyDatabase(place, "study")
    assert again.begin(design(), {"workload": "w"})
    assert again.open() == (design(), {"workload": "w"})
    with pytest.raises(UsageError, match="another task"):
        StudyDatabase(place, "study").begin(design(), {"workload": "v"})
    with pytest.raises(UsageError, match="another design"):
        StudyDatabase(place, "study").begin(design(seeds=3), {"workload": "w"})
    assert not StudyDatabase(place, "other").begin(design(seeds=3), {"workload": "v"})
    with pytest.raises(UsageError, match="holds no study 'third'"):
        StudyDatabase(place, "third").open()


def test_two_studies_in_one_database_do_not_see_each_other(tmp_path: Path) -> None:
    first, second = (StudyDatabase(str(tmp_path / "s.db"), name) for name in "ab")
    for database in (first, second):
        database.begin(design(), {})
        database.add([key()])
    first.write([(key(), "complete", [point(1)], "")])
    second.tell("begun", "x")
    assert second.trials()[0].state == "waiting" and not second.trials()[0].points
    assert first.events() == []


def test_a_transaction_that_fails_leaves_nothing(tmp_path: Path) -> None:
    database = opened(tmp_path / "s.db")
    database.add([key(), key(seed=1)])
    with pytest.raises(OSError, match="refused"):
        database.write([(key(), "complete", [point(1), point(1)], "")])
    with pytest.raises(KeyError):
        database.write([(key(), "complete", [], ""), (key(seed=9), "complete", [], "")])
    assert [trial.state for trial in database.trials()] == ["waiting", "waiting"]


def test_files_and_urls_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "s.db").write_bytes(b"not a database, but long enough to look at" * 50)
    with pytest.raises(CorruptStateError, match="no database of studies"):
        StudyDatabase(str(tmp_path / "s.db"), "study")
    with pytest.raises(UsageError, match="no folder"):
        StudyDatabase(str(tmp_path / "none" / "s.db"), "study")
    for url in ("nonsense://x", "://"):
        with pytest.raises(UsageError, match="no URL that can be read"):
            StudyDatabase(url, "study")


def test_a_design_that_was_tampered_with_is_told(tmp_path: Path) -> None:
    opened(tmp_path / "s.db").close()
    with sqlite3.connect(tmp_path / "s.db") as raw:
        raw.execute("UPDATE studies SET design = '{}'")
    with pytest.raises(CorruptStateError, match="cannot be read"):
        StudyDatabase(str(tmp_path / "s.db"), "study").open()


def test_thousands_of_trials_a_second(tmp_path: Path) -> None:
    """Not timed here beyond what would be a mistake: one transaction for each."""
    database = opened(tmp_path / "s.db")
    keys = [key(batch, seed=seed) for batch in range(1, 51) for seed in range(20)]
    database.add(keys)
    started = time.perf_counter()
    database.write([(k, "complete", [point(step) for step in range(40)], "") for k in keys])
    assert time.perf_counter() - started < 20
    assert sum(len(trial.points) for trial in database.trials()) == 40_000


WRITER = """
import sys
from rightbatch.study.database import StudyDatabase
from rightbatch.study.design import make_design
from rightbatch.study.trials import EvaluationPoint, TrialKey
design = make_design(100, batch_sizes=[1, 10], learning_rates=[0.1, 1.0], seeds=2, epochs=3)
database = StudyDatabase(sys.argv[1], "study")
database.begin(design, {"workload": "w"})
for seed in range(10_000):
    keys = [TrialKey(batch_size=b, learning_rate=0.1, seed=seed) for b in (1, 10)]
    database.add(keys)
    points = [
        EvaluationPoint(step=s, examples=s, train_loss=1.0, val_loss=None, val_metric=None)
        for s in range(1, 30)
    ]
    database.write([(key, "complete", points, "") for key in keys])
    print(seed, flush=True)
"""


def kill_a_writer(place: Path, delay: float) -> int:
    """The last seed that the writer said was written."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(place)], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(delay)
        os.kill(writer.pid, signal.SIGKILL)
        rest = writer.stdout.read().split()
    return int(rest[-1]) if rest else 0


@pytest.mark.parametrize("number", range(3))
def test_what_was_acknowledged_survives_a_kill(tmp_path: Path, number: int) -> None:
    delay = random.Random(number).uniform(0.0, 0.3)
    told = kill_a_writer(tmp_path / "s.db", delay)
    trials = opened(tmp_path / "s.db").trials()
    complete = [trial for trial in trials if trial.state == "complete"]
    assert {t.key.seed for t in complete} >= set(range(told + 1)), f"delay {delay}"
    assert len({t.key for t in trials}) == len(trials)
    assert all(len(trial.points) == 29 for trial in complete)
    # Both of a seed, or neither: they were written together.
    assert all(sum(t.key.seed == s for t in complete) == 2 for s in {t.key.seed for t in complete})
