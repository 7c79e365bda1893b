"""Claims: nothing runs twice at once, nothing acknowledged is lost, late is a duplicate."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable

import pytest

from rightbatch.study.claims import Claim, Claims, Result
from rightbatch.study.database import StudyDatabase
from rightbatch.study.design import make_design
from rightbatch.study.trials import Asked, EvaluationPoint, TrialKey

DESIGN = make_design(100, batch_sizes=[1, 10], learning_rates=[0.1, 1.0], seeds=2, epochs=3)


def opened(place: str) -> StudyDatabase:
    database = StudyDatabase(place, "study")
    database.begin(DESIGN, {"workload": "w"})
    return database


def asked(sizes: Iterable[int] = (1, 10), seeds: int = 3, share: float = 1.0) -> list[Asked]:
    return [
        Asked(key=TrialKey(batch_size=B, learning_rate=0.1, seed=seed), share=share)
        for B in sizes
        for seed in range(seeds)
    ]


def done(step: int = 1) -> Result:
    point = EvaluationPoint(step=step, examples=step, train_loss=1.0, val_loss=0.5, val_metric=None)
    return Result(state="complete", points=[point])


def test_groups_are_of_one_size_and_equally_far(place: str) -> None:
    database = opened(place)
    database.add([*asked(), *asked([10], seeds=5, share=0.5)])
    claims = Claims(database)
    taken = [claims.take(4) for _ in range(4)]
    assert [[(c.key.batch_size, c.share, c.key.seed) for c in group] for group in taken] == [
        [(10, 0.5, 3), (10, 0.5, 4)],
        [(10, 1.0, 0), (10, 1.0, 1), (10, 1.0, 2)],
        [(1, 1.0, 0), (1, 1.0, 1), (1, 1.0, 2)],
        [],
    ]
    claims.close()
    assert database.count_states() == {"waiting": 8}
    assert [c.key.batch_size for c in claims.take(9, small_batches_first=True)] == [1, 1, 1]
    claims.close()
    database.close()


def test_two_coordinators_never_hold_the_same(new_postgres: str) -> None:
    first = opened(new_postgres)
    first.add(asked(range(1, 41), seeds=5))
    found: list[list[Claim]] = [[], [], []]

    def work(own: list[Claim]) -> None:
        database = opened(new_postgres)
        claims = Claims(database)
        while group := claims.take(3):
            own += group
            claims.settle({claim: done() for claim in group})
        claims.close()
        database.close()

    threads = [threading.Thread(target=work, args=(own,)) for own in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    keys = [claim.key for own in found for claim in own]
    assert len(keys) == len(set(keys)) == 200
    assert first.count_states() == {"complete": 200}
    first.close()


def test_a_lease_that_is_over_is_claimed_by_another_and_the_late_result_is_a_duplicate(
    new_postgres: str,
) -> None:
    databases = [opened(new_postgres), opened(new_postgres)]
    databases[0].add(asked([10], seeds=2))
    slow, quick = Claims(databases[0], lease_seconds=0.2), Claims(databases[1])
    slow._over.set()  # its renewing thread has died
    held = slow.take(2)
    assert quick.take(2) == []
    time.sleep(0.4)
    taken = quick.take(2)
    assert [c.key for c in taken] == [c.key for c in held]
    assert [c.attempt for c in taken] == [2, 2]
    assert slow.settle({held[0]: done(7)}) == [held[0]]
    quick.settle({claim: done(3) for claim in taken})
    assert slow.settle({held[1]: done(7)}) == [held[1]]
    slow.give_back(held)  # nothing of its own is left
    assert {t.points[-1].step for t in databases[0].trials()} == {3}
    told = [json.loads(text) for _, kind, text in databases[0].events() if kind == "duplicate"]
    assert [(t["seed"], t["attempt"], t["state"]) for t in told] == [
        (0, 1, "complete"), (1, 1, "complete"),
    ]  # fmt: skip
    for database in databases:
        database.close()


def test_a_lease_is_renewed_while_its_owner_lives(new_postgres: str) -> None:
    databases = [opened(new_postgres), opened(new_postgres)]
    databases[0].add(asked([10], seeds=1))
    owner, other = Claims(databases[0], lease_seconds=1.0), Claims(databases[1])
    assert len(owner.take(1)) == 1
    time.sleep(2.0)
    assert other.take(1) == []
    owner.close()
    assert len(other.take(1)) == 1
    other.close()
    for database in databases:
        database.close()


def test_nobody_claims_again_what_it_is_running(place: str) -> None:
    database = opened(place)
    database.add(asked([10], seeds=2))
    claims = Claims(database, lease_seconds=-5.0)  # over at once, as a long group's in a file
    held = claims.take(1)
    assert [claim.key.seed for claim in claims.take(2)] == [1]
    assert claims.take(2) == []
    assert claims.settle({claim: done() for claim in held}) == []
    claims._over.set()
    claims.close()
    database.close()


def test_the_next_owner_of_a_file_takes_over_what_a_killed_one_was_running(
    tmp_path: object,
) -> None:
    place = f"{tmp_path}/s.db"
    killed = opened(place)
    killed.add(asked([10]))
    assert len(Claims(killed).take(9)) == 3
    killed.close()  # which gives nothing back
    database = opened(place)
    assert [c.attempt for c in Claims(database).take(9)] == [2, 2, 2]
    database.close()


def test_results_are_written_all_or_none(place: str) -> None:
    database = opened(place)
    database.add(asked([10], seeds=2))
    claims = Claims(database)
    first, second = claims.take(2)
    twice = Result(state="complete", points=[*done().points, *done().points])
    with pytest.raises(OSError, match="refused"):
        claims.settle({first: done(), second: twice})
    assert database.count_states() == {"running": 2} and not database.trials()[0].points
    claims.settle({first: done(), second: Result(state="failed", note="why")})
    assert [(t.state, len(t.points), t.note) for t in database.trials()] == [
        ("complete", 1, ""), ("failed", 0, "why"),
    ]  # fmt: skip
    claims.close("stopped")
    assert database.count_states() == {"complete": 1, "failed": 1}
    database.close()


def test_a_training_that_is_asked_to_go_farther_waits_again(place: str) -> None:
    database = opened(place)
    assert database.add(asked([10], seeds=2, share=0.25)) == 2
    claims = Claims(database)
    claims.settle({claim: done(1) for claim in claims.take(2)})
    assert database.add(asked([10], seeds=2, share=0.25)) == 0
    assert database.add(asked([10], seeds=1, share=1.0)) == 1
    (claim,) = claims.take(2)
    assert (claim.key.seed, claim.share, claim.attempt) == (0, 1.0, 2)
    claims.settle({claim: done(4)})
    assert [(t.share, t.points[-1].step) for t in database.trials()] == [(1.0, 4), (0.25, 1)]
    claims.close()
    database.close()
