"""A MariaDB of Debian's packages, for as long as a test needs it."""

from __future__ import annotations

import getpass
import secrets
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from postgres import free_port

MARIADBD = shutil.which("mariadbd", path="/usr/sbin:/usr/bin:/usr/local/bin")


class MariaDB:
    """A server on a port of this machine, with an empty database and a password."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="bayesian-merger-mariadb-"))
        self.port, self.password = free_port(), secrets.token_hex(8)
        self._common = ("--no-defaults", f"--datadir={self._folder / 'data'}")
        self._user = f"--user={getpass.getuser()}"
        made = (
            "--auth-root-authentication-method=normal",
            "--skip-test-db",
            "--skip-name-resolve",
        )
        command = ["mariadb-install-db", *self._common, self._user, *made]
        subprocess.run(command, capture_output=True, check=True)
        self.start()
        self.run(f"CREATE USER merger@'127.0.0.1' IDENTIFIED BY '{self.password}'")
        self.run("CREATE DATABASE merges")
        self.run("GRANT ALL ON merges.* TO merger@'127.0.0.1'")

    @property
    def url(self) -> str:
        return f"mysql+pymysql://merger:{self.password}@127.0.0.1:{self.port}/merges"

    def start(self) -> None:
        assert MARIADBD
        network = (f"--port={self.port}", "--bind-address=127.0.0.1", "--skip-name-resolve")
        told = (f"--socket={self._folder / 'socket'}", "--innodb-flush-log-at-trx-commit=2")
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [MARIADBD, *self._common, self._user, *network, *told], stdout=log, stderr=log
            )
        end = time.monotonic() + 60
        while True:
            try:
                self.run("SELECT 1")
                return
            except subprocess.CalledProcessError:
                if self._process.poll() is not None or time.monotonic() > end:
                    raise AssertionError((self._folder / "log").read_text()) from None
                time.sleep(0.1)

    def stop(self) -> None:
        """As a power cut does it."""
        self._process.kill()
        self._process.wait()

    def run(self, order: str) -> str:
        """One order of SQL."""
        socket = f"--socket={self._folder / 'socket'}"
        command = [
            "mariadb",
            "--no-defaults",
            "--user=root",
            socket,
            "--batch",
            "--execute",
            order,
        ]
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout

    def __enter__(self) -> MariaDB:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)
