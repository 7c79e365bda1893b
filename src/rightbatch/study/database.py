"""The trials of a study in a small SQL database: a SQLite file, or PostgreSQL by URL.

A coordinator writes the trainings of a group at once, in one transaction: what was told to be done
is on disk whole, and a process that is killed leaves nothing half written. A SQLite file has one
coordinator; on a PostgreSQL server several machines work at one study, each on the trainings that
it has claimed (`claims`). Numbers that are not finite are stored as NULL.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import filelock
import sqlalchemy as sql
from pydantic import TypeAdapter, ValidationError
from sqlalchemy import event
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, DatabaseError, NoSuchModuleError

from rightbatch.errors import CorruptStateError, MissingExtraError, UsageError
from rightbatch.study.design import StudyDesign
from rightbatch.study.trials import Asked, EvaluationPoint, TrialKey, TrialState

VERSION = 2
"""Of the tables; another one is refused."""
_TABLES_LOCK = 7_261_748_242
"""Held while tables are made on a server, where two may begin at once: any number of ours."""

_METADATA = sql.MetaData()
_STUDIES = sql.Table(
    "studies",
    _METADATA,
    sql.Column("id", sql.Integer, primary_key=True),
    sql.Column("version", sql.Integer, nullable=False),
    sql.Column("name", sql.Text, nullable=False, unique=True),
    sql.Column("created", sql.Text, nullable=False),
    sql.Column("task", sql.Text, nullable=False),
    sql.Column("design", sql.Text, nullable=False),
)
TRIALS = sql.Table(
    "trials",
    _METADATA,
    sql.Column("id", sql.Integer, primary_key=True),
    sql.Column("study", sql.ForeignKey("studies.id"), nullable=False, index=True),
    sql.Column("batch_size", sql.Integer, nullable=False),
    sql.Column("learning_rate", sql.Double, nullable=False),
    sql.Column("seed", sql.BigInteger, nullable=False),
    sql.Column("share", sql.Double, nullable=False, default=1.0),
    sql.Column("state", sql.Text, nullable=False),
    sql.Column("note", sql.Text, nullable=False, default=""),
    sql.Column("worker", sql.Text, nullable=False, default=""),
    sql.Column("attempt", sql.Integer, nullable=False, default=0),
    sql.Column("lease", sql.Double, nullable=False, default=0.0),
    sql.UniqueConstraint("study", "batch_size", "learning_rate", "seed"),
)
POINTS = sql.Table(
    "points",
    _METADATA,
    sql.Column("trial", sql.ForeignKey("trials.id"), primary_key=True),
    sql.Column("step", sql.BigInteger, primary_key=True),
    sql.Column("examples", sql.BigInteger, nullable=False),
    sql.Column("train_loss", sql.Double),
    sql.Column("val_loss", sql.Double),
    sql.Column("val_metric", sql.Double),
    sql.Column("distance", sql.Double),
    sql.Column("relative_distance", sql.Double),
    sql.Column("weight", sql.Double),
    sql.Column("roughness", sql.Double),
)
_FACTS = sql.Table(
    "facts",
    _METADATA,
    sql.Column("study", sql.ForeignKey("studies.id"), primary_key=True),
    sql.Column("name", sql.Text, primary_key=True),
    sql.Column("value", sql.Text, nullable=False),
)
EVENTS = sql.Table(
    "events",
    _METADATA,
    sql.Column("id", sql.Integer, primary_key=True),
    sql.Column("study", sql.ForeignKey("studies.id"), nullable=False, index=True),
    sql.Column("time", sql.Text, nullable=False),
    sql.Column("kind", sql.Text, nullable=False),
    sql.Column("text", sql.Text, nullable=False),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTrial:
    """A training as it lies in the database.

    Attributes:
        key: Which.
        state: How far it is.
        points: Its evaluations, by step.
        note: Why it failed, or empty.
        share: Of the design's budget, how much of it was asked for.
    """

    key: TrialKey
    state: TrialState
    points: tuple[EvaluationPoint, ...]
    note: str = ""
    share: float = 1.0


class StudyDatabase:
    """One study in a database.

    Args:
        url: `sqlite:///path`, a bare path of a SQLite file, or `postgresql+psycopg://…`.
        name: Of the study in this database.

    Attributes:
        name: Of the study.
        shown: Where it is, without a password.
        engine: The connections.
        shared: Whether other processes, on other machines too, may work at the same study.

    Raises:
        UsageError: If the URL cannot be read.
        CorruptStateError: If the file is no database of studies.
    """

    def __init__(self, url: str, name: str) -> None:
        self.name = name
        self.engine = _connect(url)
        self.shared = self.engine.dialect.name != "sqlite"
        self.shown = url if "://" not in url else self.engine.url.render_as_string()
        self._study: int | None = None
        self._lock: filelock.BaseFileLock | None = None
        with self.transaction() as connection:
            if self.shared:
                connection.execute(sql.select(sql.func.pg_advisory_xact_lock(_TABLES_LOCK)))
            _METADATA.create_all(connection)

    def close(self) -> None:
        """Closes its connections, and leaves the file to others."""
        self.engine.dispose()
        if self._lock is not None:
            self._lock.release()

    @property
    def study(self) -> int:
        """The number of the study that was begun or opened."""
        assert self._study is not None
        return self._study

    # ---- the study -----------------------------------------------------------------------------

    def begin(self, design: StudyDesign, task: dict[str, Any]) -> bool:
        """Begins the study, or goes on with the one of this name.

        Args:
            design: What it runs.
            task: What is trained, plain data: another task under the same name is refused.

        Returns:
            Whether it was there before.

        Raises:
            UsageError: If there is a study of this name with another design or task, or another
                process works at this SQLite file.
        """
        self._own_the_file()
        row = {
            "version": VERSION,
            "name": self.name,
            "created": _now(),
            "task": _to_json(task),
            "design": _to_json(TypeAdapter(StudyDesign).dump_python(design, mode="json")),
        }
        query = sql.select(_STUDIES).where(_STUDIES.c.name == self.name)
        with self.transaction() as connection:
            made = self._insert_new(connection, _STUDIES, row)
            found = connection.execute(query).mappings().one()
        for what in ("version", "task", "design"):
            if found[what] != row[what]:
                raise UsageError(
                    f"{self.shown} holds a study {self.name!r} of another {what}: "
                    f"{found[what]}, and now {row[what]}. Give this one another name or place."
                )
        self._study = cast("int", found["id"])
        return not made

    def open(self) -> tuple[StudyDesign, dict[str, Any]]:
        """Opens the study of this name, whatever it is, to be read.

        Returns:
            Its design and its task.

        Raises:
            UsageError: If there is none.
            CorruptStateError: If its design cannot be read.
        """
        with self.transaction() as connection:
            query = sql.select(_STUDIES).where(_STUDIES.c.name == self.name)
            found = connection.execute(query).mappings().first()
        if found is None:
            raise UsageError(f"{self.shown} holds no study {self.name!r}.")
        self._study = cast("int", found["id"])
        try:
            design = TypeAdapter(StudyDesign).validate_json(found["design"])
            return design, json.loads(found["task"])
        except (ValidationError, ValueError) as error:
            raise CorruptStateError(
                f"The design of study {self.name!r} in {self.shown} cannot be read: {error}."
            ) from error

    def _own_the_file(self) -> None:
        """One coordinator for a SQLite file: WAL with several writers may lose what was written."""
        path = self.engine.url.database
        if self.shared or self._lock is not None or path in (None, "", ":memory:"):
            return
        lock = filelock.FileLock(f"{path}.lock")
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            raise UsageError(
                f"Another process works at {self.shown}. Wait for its end, give this study "
                "another place, or let several work at one in PostgreSQL (--storage "
                "postgresql+psycopg://…)."
            ) from None
        self._lock = lock

    # ---- its trials ----------------------------------------------------------------------------

    def add(self, asked: Iterable[Asked]) -> int:
        """Adds trainings that wait; one that is there waits again where more of it is asked for.

        Args:
            asked: Which, and how far.

        Returns:
            How many were new or are to go farther.
        """
        rows = [
            {"study": self.study, **dataclasses.asdict(one.key), "share": one.share,
             "state": "waiting", "note": ""}
            for one in dict.fromkeys(asked)
        ]  # fmt: skip
        if not rows:
            return 0
        farther = (
            sql.update(TRIALS)
            .where(
                TRIALS.c.study == sql.bindparam("of"),
                *(TRIALS.c[name] == sql.bindparam(f"of_{name}") for name in _KEY_FIELDS),
                TRIALS.c.share < sql.bindparam("to"),
            )
            .values(share=sql.bindparam("to"), state="waiting")
        )
        with self.transaction() as connection:
            count = sum(self._insert_new(connection, TRIALS, row) for row in rows)
            for row in rows:
                at = {f"of_{name}": row[name] for name in _KEY_FIELDS}
                found = connection.execute(farther, {"of": self.study, "to": row["share"], **at})
                count += found.rowcount
        return count

    def set_state(self, old: Sequence[TrialState], new: TrialState) -> None:
        """Moves all trainings that are in one of some states to another."""
        own = sql.and_(TRIALS.c.study == self.study, TRIALS.c.state.in_(old))
        with self.transaction() as connection:
            connection.execute(sql.update(TRIALS).where(own).values(state=new))

    def count_states(self) -> dict[TrialState, int]:
        """How many trainings are in which state."""
        query = sql.select(TRIALS.c.state, sql.func.count()).where(TRIALS.c.study == self.study)
        with self.transaction() as connection:
            rows = connection.execute(query.group_by(TRIALS.c.state)).all()
        return {row[0]: row[1] for row in rows}

    def trials(self) -> list[StoredTrial]:
        """All trainings in the order in which they were added, with their evaluations."""
        own = TRIALS.c.study == self.study
        points: dict[int, list[EvaluationPoint]] = {}
        with self.transaction() as connection:
            found = connection.execute(sql.select(TRIALS).where(own).order_by(TRIALS.c.id)).all()
            joined = sql.select(POINTS).join(TRIALS).where(own)
            for row in connection.execute(joined.order_by(POINTS.c.trial, POINTS.c.step)):
                trial, *values = row
                points.setdefault(trial, []).append(
                    EvaluationPoint(**dict(zip(_POINT_FIELDS, values, strict=True)))
                )
        return [
            StoredTrial(
                key=key_of(row),
                state=row.state,
                points=tuple(points.get(row.id, ())),
                note=row.note,
                share=row.share,
            )
            for row in found
        ]

    # ---- facts and events ----------------------------------------------------------------------

    def fact(self, name: str) -> Any:
        """What was found out about this study, or None."""
        with self.transaction() as connection:
            query = sql.select(_FACTS.c.value).where(
                _FACTS.c.study == self.study, _FACTS.c.name == name
            )
            found = connection.execute(query).scalar()
        return None if found is None else json.loads(found)

    def settle_fact(self, name: str, value: Any) -> Any:
        """Keeps what was found out, unless another process was first.

        Args:
            name: What it is.
            value: Plain data.

        Returns:
            What holds for everybody.
        """
        row = {"study": self.study, "name": name, "value": _to_json(value)}
        with self.transaction() as connection:
            self._insert_new(connection, _FACTS, row)
        return self.fact(name)

    def tell(self, kind: str, text: str) -> None:
        """Notes that something happened."""
        with self.transaction() as connection:
            connection.execute(sql.insert(EVENTS).values(self.event(kind, text)))

    def event(self, kind: str, text: str) -> dict[str, Any]:
        """A row that notes that something happened."""
        return {"study": self.study, "time": _now(), "kind": kind, "text": text}

    def events(self) -> list[tuple[str, str, str]]:
        """What happened: time (UTC), kind and text, oldest first."""
        query = sql.select(EVENTS.c.time, EVENTS.c.kind, EVENTS.c.text)
        with self.transaction() as connection:
            rows = connection.execute(
                query.where(EVENTS.c.study == self.study).order_by(EVENTS.c.id)
            )
            return [(row.time, row.kind, row.text) for row in rows]

    # ---- connections ---------------------------------------------------------------------------

    @contextmanager
    def transaction(self) -> Iterator[sql.Connection]:
        """All of it or none; what the database refuses is said in a sentence."""
        try:
            with self.engine.begin() as connection:
                yield connection
        except DatabaseError as error:
            reason = str(error.orig).splitlines()[0]
            if "not a database" in reason or "malformed" in reason:
                raise CorruptStateError(
                    f"{self.shown} is no database of studies ({reason}). Give another file, or "
                    "restore it from a copy."
                ) from error
            raise OSError(f"The study database {self.shown} refused: {reason}.") from error

    def _insert_new(self, connection: sql.Connection, table: sql.Table, row: Any) -> bool:
        """Inserts a row unless such a one is there, and says whether it did."""
        insert = postgresql.insert if self.shared else sqlite.insert
        new = insert(table).on_conflict_do_nothing().returning(sql.literal(1))
        return connection.execute(new, row).first() is not None


def key_of(row: Any) -> TrialKey:
    """Which training a row is about."""
    return TrialKey(**{name: getattr(row, name) for name in _KEY_FIELDS})


_KEY_FIELDS = tuple(field.name for field in dataclasses.fields(TrialKey))
_POINT_FIELDS = tuple(field.name for field in dataclasses.fields(EvaluationPoint))


def _connect(url: str) -> sql.Engine:
    """An engine; of SQLite one that survives being killed and a lost power supply."""
    if "://" not in url:
        path = Path(url)
        if not path.parent.is_dir():
            raise UsageError(
                f"There is no folder {str(path.parent)!r} for {path.name!r}. Make it first."
            )
        place: str | sql.URL = sql.URL.create("sqlite", database=str(path))
    else:
        place = url
    try:
        engine = sql.create_engine(place)
    except (ArgumentError, NoSuchModuleError) as error:
        raise UsageError(
            f"The storage {url!r} is no URL that can be read ({error}). Write sqlite:///study.db "
            "or postgresql+psycopg://user@host/name."
        ) from error
    except ImportError as error:
        raise MissingExtraError(str(error.name), "postgres") from error
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _set_up_sqlite)
    return engine


def _set_up_sqlite(connection: Any, _: Any) -> None:
    cursor = connection.cursor()
    # Readers, such as a live page, do not wait for the writer; a commit is on disk when it returns.
    for setting in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        "busy_timeout=10000",
    ):
        cursor.execute(f"PRAGMA {setting}")
    cursor.close()


def _to_json(data: Any) -> str:
    return json.dumps(data, sort_keys=True, allow_nan=False)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
