"""What one coordinator works at: trainings that it has claimed, so that nobody else runs them.

A claim is a lease: it holds while its owner renews it. Where the owner dies, anybody may claim the
training again once the lease is over, and the number of the attempt tells the two apart: a result
that comes in after that is noted as a duplicate and counts for nothing.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sql

from rightbatch.study.database import EVENTS, POINTS, TRIALS, StudyDatabase, key_of
from rightbatch.study.trials import EvaluationPoint, TrialKey, TrialState

LEASE_SECONDS = 60.0
_CLAIMABLE: tuple[TrialState, ...] = ("waiting", "stopped")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A training that is ours to run.

    Attributes:
        trial: Its number in the database.
        key: Which.
        share: Of the design's budget, how far.
        attempt: How often it was claimed, this time included.
    """

    trial: int
    key: TrialKey
    share: float
    attempt: int


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a training ended.

    Attributes:
        state: Complete, diverged or failed.
        points: Its evaluations.
        note: Why it failed, or empty.
    """

    state: TrialState
    points: Sequence[EvaluationPoint] = ()
    note: str = ""


class Claims:
    """The trainings that this process has claimed.

    Args:
        database: Of the study, begun.
        lease_seconds: How long a claim holds when it is not renewed. Where others may work at the
            study, a thread renews all claims three times in that time.
    """

    def __init__(self, database: StudyDatabase, *, lease_seconds: float = LEASE_SECONDS) -> None:
        self._database = database
        self._lease_seconds = lease_seconds
        self.worker = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._own = TRIALS.c.study == database.study
        self._mine = sql.and_(
            self._own, TRIALS.c.state == "running", TRIALS.c.worker == self.worker
        )
        self._over = threading.Event()
        self._renewer: threading.Thread | None = None
        if not database.shared:  # Whoever ran them before is gone: the file has one owner.
            self._write(sql.update(TRIALS).where(self._own).values(lease=0.0))

    def take(self, most: int, *, small_batches_first: bool = False) -> list[Claim]:
        """Claims trainings that can run together: of one batch size, and equally far.

        Args:
            most: How many at most.
            small_batches_first: Instead of large ones, which take the fewest updates.

        Returns:
            The claims; none where nothing waits.
        """
        open_ = sql.or_(
            TRIALS.c.state.in_(_CLAIMABLE),
            # Not its own: in a file nobody else works at, claims are not renewed.
            sql.and_(
                TRIALS.c.state == "running",
                TRIALS.c.worker != self.worker,
                TRIALS.c.lease < _clock(),
            ),
        )
        size = TRIALS.c.batch_size
        query = (
            sql.select(TRIALS)
            .where(self._own, open_)
            .order_by(size if small_batches_first else size.desc(), TRIALS.c.share, TRIALS.c.id)
            .limit(most)
            .with_for_update(skip_locked=True)
        )
        with self._database.transaction() as connection:
            found = connection.execute(query).all()
            together = [
                row
                for row in found
                if (row.batch_size, row.share) == (found[0].batch_size, found[0].share)
            ]
            if not together:
                return []
            mark = sql.update(TRIALS).where(TRIALS.c.id.in_([row.id for row in together]))
            connection.execute(
                mark.values(
                    state="running",
                    worker=self.worker,
                    attempt=TRIALS.c.attempt + 1,
                    lease=_clock() + self._lease_seconds,
                    note="",
                )
            )
        self._keep_renewing()
        return [
            Claim(trial=row.id, key=key_of(row), share=row.share, attempt=row.attempt + 1)
            for row in together
        ]

    def renew(self) -> None:
        """Holds all claims for another while."""
        lease = _clock() + self._lease_seconds
        self._write(sql.update(TRIALS).where(self._mine).values(lease=lease))

    def settle(self, results: Mapping[Claim, Result]) -> list[Claim]:
        """Writes how trainings ended, all of them or none.

        Args:
            results: Of claims. Where a claim was lost meanwhile, the result is noted as a
                duplicate, and what the other has written or will write stays.

        Returns:
            The claims that were lost.
        """
        update = (
            sql.update(TRIALS)
            .where(TRIALS.c.id == sql.bindparam("trial"))
            .values(state=sql.bindparam("new"), note=sql.bindparam("why"), worker="", lease=0.0)
        )
        with self._database.transaction() as connection:
            held = self._held(connection, list(results))
            counted = {claim: result for claim, result in results.items() if claim in held}
            late = [claim for claim in results if claim not in held]
            ids = [claim.trial for claim in counted]
            connection.execute(sql.delete(POINTS).where(POINTS.c.trial.in_(ids)))
            points = [
                {"trial": claim.trial, **asdict(point)}
                for claim, result in counted.items()
                for point in result.points
            ]
            if points:
                connection.execute(sql.insert(POINTS), points)
            states = [
                {"trial": claim.trial, "new": result.state, "why": result.note}
                for claim, result in counted.items()
            ]
            if states:
                connection.execute(update, states)
            if late:
                events = [self._duplicate(claim, results[claim]) for claim in late]
                connection.execute(sql.insert(EVENTS), events)
        return late

    def give_back(self, claims: Sequence[Claim], state: TrialState = "waiting") -> None:
        """Leaves trainings to whoever claims them next.

        Args:
            claims: Which.
            state: What they are until then.
        """
        ids = [claim.trial for claim in claims]
        freed = sql.update(TRIALS).where(self._mine, TRIALS.c.id.in_(ids))
        self._write(freed.values(state=state, worker="", lease=0.0))

    def close(self, state: TrialState = "waiting") -> None:
        """Ends the renewing and gives back all that is held.

        Args:
            state: What they are until somebody claims them again.
        """
        self._over.set()
        if self._renewer is not None:
            self._renewer.join()
            self._renewer = None
        self._write(sql.update(TRIALS).where(self._mine).values(state=state, worker="", lease=0.0))

    def _held(self, connection: sql.Connection, claims: Sequence[Claim]) -> set[Claim]:
        query = (
            sql.select(TRIALS.c.id, TRIALS.c.attempt)
            .where(self._mine, TRIALS.c.id.in_([claim.trial for claim in claims]))
            .with_for_update()
        )
        there = {(row.id, row.attempt) for row in connection.execute(query)}
        return {claim for claim in claims if (claim.trial, claim.attempt) in there}

    def _duplicate(self, claim: Claim, result: Result) -> dict[str, Any]:
        about = {**asdict(claim.key), "attempt": claim.attempt, "state": result.state}
        return self._database.event("duplicate", json.dumps(about))

    def _keep_renewing(self) -> None:
        if self._database.shared and self._renewer is None:
            self._renewer = threading.Thread(target=self._renew_until_over, daemon=True)
            self._renewer.start()

    def _renew_until_over(self) -> None:
        while not self._over.wait(self._lease_seconds / 3):
            try:
                self.renew()
            except OSError:  # A server that comes back finds the claim, or another's.
                continue

    def _write(self, statement: Any) -> None:
        with self._database.transaction() as connection:
            connection.execute(statement)


def _clock() -> Any:
    """Seconds by the database's own clock: those of several machines differ."""
    return sql.cast(sql.extract("epoch", sql.func.current_timestamp()), sql.Double)
