"""The study database: whole or not at all, the same after a kill, and clear about what is wrong."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rightbatch.errors import CorruptStateError, UsageError
from rightbatch.study.claims import Claims, Result
from rightbatch.study.database import StudyDatabase
from rightbatch.study.design import StudyDesign, make_design
from rightbatch.study.trials import Asked, EvaluationPoint, TrialKey


def design(**changes: Any) -> StudyDesign:
    asked = {"batch_sizes": [1, 10], "learning_rates": [0.1, 1.0], "seeds": 2, "epochs": 3}
    return make_design(100, **{**asked, **changes})


def opened(place: Path | str) -> StudyDatabase:
    database = StudyDatabase(str(place), "study")
    database.begin(design(), {"workload": "w"})
    return database


def key(batch: int = 1, rate: float = 0.1, seed: int = 0) -> TrialKey:
    return TrialKey(batch_size=batch, learning_rate=rate, seed=seed)


def asked(keys: Sequence[TrialKey]) -> list[Asked]:
    return [Asked(key=key) for key in keys]


def finish(database: StudyDatabase, results: Sequence[Result]) -> None:
    """Ends that many trainings of one batch size, in the order in which they were added."""
    claims = Claims(database)
    claims.settle(dict(zip(claims.take(len(results)), results, strict=True)))


def point(step: int, loss: float | None = 1.0) -> EvaluationPoint:
    return EvaluationPoint(step=step, examples=step, train_loss=loss, val_loss=None, val_metric=0.5)


def test_what_is_written_is_read_again_to_the_bit(tmp_path: Path) -> None:
    database = opened(tmp_path / "s.db")
    keys = [key(rate=1 / 3), key(1, 1e-300, 2**40)]
    database.add(asked([*keys, keys[0]]))
    points = [point(1, 0.1 + 0.2), point(2, None)]
    results = [Result(state="complete", points=points), Result(state="failed", note="why")]
    finish(database, results)
    assert database.add(asked(keys)) == 0  # nothing changes
    database.close()
    first, second = opened(tmp_path / "s.db").trials()
    assert (first.key, first.state, list(first.points)) == (keys[0], "complete", points)
    assert (second.key, second.state, second.note) == (keys[1], "failed", "why")


@contextmanager
def study_of(place: str, name: str) -> Iterator[StudyDatabase]:
    database = StudyDatabase(place, name)
    try:
        yield database
    finally:
        database.close()


def test_the_same_study_is_gone_on_with_and_another_refused(place: str) -> None:
    with study_of(place, "study") as database:
        assert not database.begin(design(), {"workload": "w"})
    with study_of(place, "study") as again:
        assert again.begin(design(), {"workload": "w"})
        assert again.open() == (design(), {"workload": "w"})
    with study_of(place, "study") as other, pytest.raises(UsageError, match="another task"):
        other.begin(design(), {"workload": "v"})
    with study_of(place, "study") as other, pytest.raises(UsageError, match="another design"):
        other.begin(design(seeds=3), {"workload": "w"})
    with study_of(place, "other") as other:
        assert not other.begin(design(seeds=3), {"workload": "v"})
    with study_of(place, "third") as third, pytest.raises(UsageError, match="no study 'third'"):
        third.open()


def test_two_studies_in_one_database_do_not_see_each_other(place: str) -> None:
    with study_of(place, "a") as first:
        first.begin(design(), {})
        first.add(asked([key()]))
        finish(first, [Result(state="complete", points=[point(1)])])
        first.settle_fact("x", 1)
    with study_of(place, "b") as second:
        second.begin(design(), {})
        second.add(asked([key()]))
        second.tell("begun", "x")
        assert second.trials()[0].state == "waiting" and not second.trials()[0].points
        assert second.fact("x") is None
    with study_of(place, "a") as first:
        first.open()
        assert first.events() == []


def test_a_file_has_one_coordinator_and_any_number_of_readers(tmp_path: Path) -> None:
    place = str(tmp_path / "s.db")
    first = opened(place)
    second = StudyDatabase(place, "study")
    with pytest.raises(UsageError, match=r"Another process works at .*s\.db\. Wait"):
        second.begin(design(), {"workload": "w"})
    assert second.open()[0] == design()
    second.close()
    first.close()
    opened(place).close()


def test_what_was_found_out_first_holds(place: str) -> None:
    database = opened(place)
    assert database.fact("rates") is None
    assert database.settle_fact("rates", {"1": [0.5]}) == {"1": [0.5]}
    assert database.settle_fact("rates", {"1": [0.7]}) == {"1": [0.5]}
    database.close()


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
    started = time.perf_counter()
    database.add(asked(keys))
    result = Result(state="complete", points=[point(step) for step in range(40)])
    claims = Claims(database)
    while group := claims.take(128):
        claims.settle(dict.fromkeys(group, result))
    assert time.perf_counter() - started < 20
    assert sum(len(trial.points) for trial in database.trials()) == 40_000


WRITER = """
import sys
from rightbatch.study.database import StudyDatabase
from rightbatch.study.design import make_design
from rightbatch.study.claims import Claims, Result
from rightbatch.study.trials import Asked, EvaluationPoint, TrialKey
design = make_design(100, batch_sizes=[1, 10], learning_rates=[0.1, 1.0], seeds=2, epochs=3)
database = StudyDatabase(sys.argv[1], "study")
database.begin(design, {"workload": "w"})
claims = Claims(database)
for seed in range(10_000):
    keys = [TrialKey(batch_size=1, learning_rate=lr, seed=seed) for lr in (0.1, 1.0)]
    database.add([Asked(key=key) for key in keys])
    points = [
        EvaluationPoint(step=s, examples=s, train_loss=1.0, val_loss=None, val_metric=None)
        for s in range(1, 30)
    ]
    result = Result(state="complete", points=points)
    claims.settle(dict.fromkeys(claims.take(2), result))
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
