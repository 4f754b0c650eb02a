"""A PostgreSQL of Debian's packages, for as long as a test needs it."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

_BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
PG_CTL = str(_BINARIES[-1]) if _BINARIES else shutil.which("pg_ctl")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class Postgres:
    """A server on a port of this machine, with an empty database and a password."""

    def __init__(self) -> None:
        assert PG_CTL
        self._folder = Path(tempfile.mkdtemp(prefix="bayesian-merger-postgres-"))
        # It refuses to run as root.
        self._user = "postgres" if os.geteuid() == 0 else None
        if self._user:
            shutil.chown(self._folder, self._user)
        self.port, self.password = free_port(), secrets.token_hex(8)
        told = self._folder / "password"
        told.write_text(self.password)
        told.chmod(0o644)
        options = f"--username=merger --pwfile={told} --auth=scram-sha-256 --no-sync"
        self._run("initdb", "--silent", "-o", options)
        self.start()

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://merger:{self.password}@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        settings = f"-p {self.port} -h 127.0.0.1 -k '' -F -c max_connections=300"
        self._run("start", "-w", "-o", settings, "-l", str(self._folder / "log"))

    def stop(self) -> None:
        """As a power cut does it."""
        self._run("stop", "-m", "immediate")

    def run(self, order: str) -> None:
        """One order of SQL."""
        import psycopg

        address = f"host=127.0.0.1 port={self.port} user=merger password={self.password}"
        with psycopg.connect(f"{address} dbname=postgres", autocommit=True) as connection:
            connection.execute(order)

    def dump(self) -> bytes:
        """All that the database holds, as orders of SQL."""
        assert PG_CTL
        address = self.url.replace("+psycopg", "")
        program = Path(PG_CTL).resolve().with_name("pg_dump")
        return subprocess.run([program, address], capture_output=True, check=True).stdout

    def _run(self, *order: str) -> None:
        assert PG_CTL
        command = [PG_CTL, "-D", str(self._folder / "data"), *order]
        # What it starts would keep a pipe open.
        with tempfile.TemporaryFile() as said:
            done = subprocess.run(
                command, stdout=said, stderr=said, user=self._user, cwd="/", check=False
            )
            said.seek(0)
            assert done.returncode == 0, said.read().decode()

    def __enter__(self) -> Postgres:
        return self

    def __exit__(self, *_: object) -> None:
        if (self._folder / "data" / "postmaster.pid").exists():
            self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)
