"""Databases of both kinds for the tests of studies."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import sqlalchemy as sql

from .postgres_server import find_programs, run_server

_NUMBERS = itertools.count()


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """URL of a running server's database."""
    if find_spec("psycopg") is None:
        pytest.skip("psycopg is not installed")
    programs = find_programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (Debian's package postgresql)")
    with run_server(programs) as url:
        yield url


@pytest.fixture
def new_postgres(postgres: str) -> Iterator[str]:
    """URL of an empty database on that server."""
    name = f"test_{next(_NUMBERS)}"
    server = sql.create_engine(postgres, isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.execute(sql.text(f"CREATE DATABASE {name}"))
    server.dispose()
    yield postgres.replace("/postgres?", f"/{name}?")


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL or path of an empty database, of each kind."""
    if request.param == "sqlite":
        return str(tmp_path / "s.db")
    return request.getfixturevalue("new_postgres")
