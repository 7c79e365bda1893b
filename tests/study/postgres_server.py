"""A PostgreSQL server of the tests' own, reached over a socket in a folder of its own."""

from __future__ import annotations

import contextlib
import getpass
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path


def find_programs() -> Path | None:
    """The folder of initdb and pg_ctl, or None. Debian does not put it on the path."""
    for folder in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True):
        if (folder / "pg_ctl").exists():
            return folder
    found = shutil.which("initdb")
    return Path(found).resolve().parent if found else None


@contextlib.contextmanager
def run_server(programs: Path) -> Iterator[str]:
    """Runs a server and gives the URL of its database."""
    # It refuses to run as root.
    user = "postgres" if os.getuid() == 0 else getpass.getuser()
    home = Path(tempfile.mkdtemp(prefix="rightbatch-postgres-"))
    if os.getuid() == 0:
        account = pwd.getpwnam(user)
        os.chown(home, account.pw_uid, account.pw_gid)
    data, log = home / "data", home / "log"

    def call(program: str, *arguments: str) -> None:
        subprocess.run(
            [str(programs / program), *arguments],
            check=True,
            user=user if os.getuid() == 0 else None,
            cwd=home,
            stdout=subprocess.DEVNULL,
        )

    options = f"-c listen_addresses='' -c unix_socket_directories={home} -c fsync=off"
    try:
        call("initdb", "-D", str(data), "-U", "postgres", "--auth=trust", "--no-sync")
        call("pg_ctl", "-D", str(data), "-l", str(log), "-o", options, "-w", "start")
        try:
            yield f"postgresql+psycopg://postgres@/postgres?host={home}"
        finally:
            call("pg_ctl", "-D", str(data), "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(home, ignore_errors=True)
