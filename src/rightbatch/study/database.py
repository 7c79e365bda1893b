"""The trials of a study in a small SQL database: a SQLite file, or PostgreSQL by URL.

One coordinator writes, the trainings of a group at once, in one transaction: what was told to be
done is on disk whole, and a process that is killed leaves nothing half written. Numbers that are
not finite are stored as NULL.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import sqlalchemy as sql
from pydantic import TypeAdapter, ValidationError
from sqlalchemy import event
from sqlalchemy.exc import ArgumentError, DatabaseError, NoSuchModuleError

from rightbatch.errors import CorruptStateError, MissingExtraError, UsageError
from rightbatch.study.design import StudyDesign
from rightbatch.study.trials import EvaluationPoint, TrialKey, TrialState

VERSION = 1
"""Of the tables; another one is refused."""

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
_TRIALS = sql.Table(
    "trials",
    _METADATA,
    sql.Column("id", sql.Integer, primary_key=True),
    sql.Column("study", sql.ForeignKey("studies.id"), nullable=False, index=True),
    sql.Column("batch_size", sql.Integer, nullable=False),
    sql.Column("learning_rate", sql.Double, nullable=False),
    sql.Column("seed", sql.BigInteger, nullable=False),
    sql.Column("state", sql.Text, nullable=False),
    sql.Column("note", sql.Text, nullable=False, default=""),
    sql.UniqueConstraint("study", "batch_size", "learning_rate", "seed"),
)
_POINTS = sql.Table(
    "points",
    _METADATA,
    sql.Column("trial", sql.ForeignKey("trials.id"), primary_key=True),
    sql.Column("step", sql.BigInteger, primary_key=True),
    sql.Column("examples", sql.BigInteger, nullable=False),
    sql.Column("train_loss", sql.Double),
    sql.Column("val_loss", sql.Double),
    sql.Column("val_metric", sql.Double),
)
_EVENTS = sql.Table(
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
    """

    key: TrialKey
    state: TrialState
    points: tuple[EvaluationPoint, ...]
    note: str = ""


class StudyDatabase:
    """One study in a database.

    Args:
        url: `sqlite:///path`, a bare path of a SQLite file, or `postgresql://…`.
        name: Of the study in this database.

    Raises:
        UsageError: If the URL cannot be read.
        CorruptStateError: If the file is no database of studies.
    """

    def __init__(self, url: str, name: str) -> None:
        self.name = name
        self._engine = _connect(url)
        # Without its password.
        self._shown = url if "://" not in url else self._engine.url.render_as_string()
        self._study: int | None = None
        with self._explained():
            _METADATA.create_all(self._engine)

    def close(self) -> None:
        """Closes its connections."""
        self._engine.dispose()

    # ---- the study -----------------------------------------------------------------------------

    def begin(self, design: StudyDesign, task: dict[str, Any]) -> bool:
        """Begins the study, or goes on with the one of this name.

        Args:
            design: What it runs.
            task: What is trained, plain data: another task under the same name is refused.

        Returns:
            Whether it was there before.

        Raises:
            UsageError: If there is a study of this name with another design or task.
        """
        row = {
            "version": VERSION,
            "name": self.name,
            "created": _now(),
            "task": _to_json(task),
            "design": _to_json(TypeAdapter(StudyDesign).dump_python(design, mode="json")),
        }
        with self._explained(), self._engine.begin() as connection:
            query = sql.select(_STUDIES).where(_STUDIES.c.name == self.name)
            found = connection.execute(query).mappings().first()
            if found is None:
                made = connection.execute(sql.insert(_STUDIES).values(**row))
                self._study = _first_key(made)
                return False
            self._study = cast("int", found["id"])
        for what in ("version", "task", "design"):
            if found[what] != row[what]:
                raise UsageError(
                    f"{self._shown} holds a study {self.name!r} of another {what}: "
                    f"{found[what]}, and now {row[what]}. Give this one another name or place."
                )
        return True

    def open(self) -> tuple[StudyDesign, dict[str, Any]]:
        """Opens the study of this name, whatever it is.

        Returns:
            Its design and its task.

        Raises:
            UsageError: If there is none.
            CorruptStateError: If its design cannot be read.
        """
        with self._explained(), self._engine.connect() as connection:
            query = sql.select(_STUDIES).where(_STUDIES.c.name == self.name)
            found = connection.execute(query).mappings().first()
        if found is None:
            raise UsageError(f"{self._shown} holds no study {self.name!r}.")
        self._study = cast("int", found["id"])
        try:
            design = TypeAdapter(StudyDesign).validate_json(found["design"])
            return design, json.loads(found["task"])
        except (ValidationError, ValueError) as error:
            raise CorruptStateError(
                f"The design of study {self.name!r} in {self._shown} cannot be read: {error}."
            ) from error

    # ---- its trials ----------------------------------------------------------------------------

    def add(self, keys: Iterable[TrialKey]) -> None:
        """Adds trainings that wait; those that are there already stay as they are."""
        there = set(self._ids())
        rows = [
            {"study": self._study, **dataclasses.asdict(key), "state": "waiting", "note": ""}
            for key in dict.fromkeys(keys)
            if key not in there
        ]
        if rows:
            with self._explained(), self._engine.begin() as connection:
                connection.execute(sql.insert(_TRIALS), rows)

    def set_state(self, keys: Sequence[TrialKey], state: TrialState, note: str = "") -> None:
        """Sets the state of trainings, all at once."""
        self.write([(key, state, (), note) for key in keys])

    def write(
        self,
        results: Sequence[tuple[TrialKey, TrialState, Sequence[EvaluationPoint], str]],
    ) -> None:
        """Writes states and evaluations of trainings, all of them or none.

        Args:
            results: Key, state, evaluations (which replace those that are there) and note.
        """
        ids = self._ids()
        states = [{"trial": ids[key], "new": state, "why": note} for key, state, _, note in results]
        points = [
            {"trial": ids[key], **dataclasses.asdict(point)}
            for key, _, points, _ in results
            for point in points
        ]
        update = (
            sql.update(_TRIALS)
            .where(_TRIALS.c.id == sql.bindparam("trial"))
            .values(state=sql.bindparam("new"), note=sql.bindparam("why"))
        )
        with self._explained(), self._engine.begin() as connection:
            if points:
                of = sql.bindparam("of", expanding=True)
                gone = sql.delete(_POINTS).where(_POINTS.c.trial.in_(of))
                connection.execute(gone, {"of": sorted({point["trial"] for point in points})})
                connection.execute(sql.insert(_POINTS), points)
            if states:
                connection.execute(update, states)

    def trials(self) -> list[StoredTrial]:
        """All trainings in the order in which they were added, with their evaluations."""
        own = _TRIALS.c.study == self._study
        points: dict[int, list[EvaluationPoint]] = {}
        with self._explained(), self._engine.connect() as connection:
            found = connection.execute(sql.select(_TRIALS).where(own).order_by(_TRIALS.c.id)).all()
            joined = sql.select(_POINTS).join(_TRIALS).where(own)
            for row in connection.execute(joined.order_by(_POINTS.c.trial, _POINTS.c.step)):
                trial, *values = row
                points.setdefault(trial, []).append(
                    EvaluationPoint(**dict(zip(_POINT_FIELDS, values, strict=True)))
                )
        return [
            StoredTrial(
                key=TrialKey(
                    batch_size=row.batch_size, learning_rate=row.learning_rate, seed=row.seed
                ),
                state=row.state,
                points=tuple(points.get(row.id, ())),
                note=row.note,
            )
            for row in found
        ]

    def _ids(self) -> dict[TrialKey, int]:
        query = sql.select(_TRIALS).where(_TRIALS.c.study == self._study)
        with self._explained(), self._engine.connect() as connection:
            return {
                TrialKey(
                    batch_size=row.batch_size, learning_rate=row.learning_rate, seed=row.seed
                ): row.id
                for row in connection.execute(query)
            }

    def tell(self, kind: str, text: str) -> None:
        """Notes that something happened."""
        row = {"study": self._study, "time": _now(), "kind": kind, "text": text}
        with self._explained(), self._engine.begin() as connection:
            connection.execute(sql.insert(_EVENTS).values(**row))

    def events(self) -> list[tuple[str, str, str]]:
        """What happened: time (UTC), kind and text, oldest first."""
        query = sql.select(_EVENTS.c.time, _EVENTS.c.kind, _EVENTS.c.text)
        with self._explained(), self._engine.connect() as connection:
            rows = connection.execute(
                query.where(_EVENTS.c.study == self._study).order_by(_EVENTS.c.id)
            )
            return [(row.time, row.kind, row.text) for row in rows]

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What the database refuses, in a sentence."""
        try:
            yield
        except DatabaseError as error:
            reason = str(error.orig).splitlines()[0]
            if "not a database" in reason or "malformed" in reason:
                raise CorruptStateError(
                    f"{self._shown} is no database of studies ({reason}). Give another file, or "
                    "restore it from a copy."
                ) from error
            raise OSError(f"The study database {self._shown} refused: {reason}.") from error


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


def _first_key(result: sql.CursorResult[Any]) -> int:
    key = result.inserted_primary_key
    assert key is not None
    return cast("int", key[0])


def _to_json(data: Any) -> str:
    return json.dumps(data, sort_keys=True, allow_nan=False)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
