"""A real PostgreSQL for this process's tests: started when first asked for, ended with the run, a database for each.

It listens on a socket in its own directory and nowhere else, asks for a password, and does not wait for the disk.
"""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
import pytest

from kachery_fast.hub.registry import Registry, registry_url

from .programs import need_program

__all__ = ["PASSWORD", "Cluster", "shared_processes", "stop_shared", "the_cluster"]

PASSWORD = "the-pass-word"
_USER = "kachery"
_TEMPLATE = "migrated"
_OPTIONS = ("fsync=off", "synchronous_commit=off", "full_page_writes=off", "autovacuum=off", "shared_buffers=32MB",
            "max_connections=200", "listen_addresses=")
_START_TRIES = 2000


class Cluster:
    """One server and its directory."""

    def __init__(self) -> None:
        self._postgres, initdb = (need_program(name) for name in ("postgres", "initdb"))
        # Not below a directory of root's own: postgres refuses to be root, and must get there as somebody else.
        self.directory = Path(tempfile.mkdtemp(prefix="kachery-postgres-", dir=os.environ.get(
            "PYTEST_DEBUG_TEMPROOT")))
        self._account = _account()
        if self._account is not None:
            os.chown(self.directory, self._account.pw_uid, self._account.pw_gid)
        password_file = self.directory / "password"
        password_file.write_text(PASSWORD)
        password_file.chmod(0o644)
        self._process: subprocess.Popen[bytes] | None = None
        self._made = 0
        try:
            subprocess.run(
                [initdb, "--pgdata", str(self._data), "--username", _USER, "--auth", "password", "--pwfile",
                 str(password_file), "--no-sync", "--no-locale", "--encoding", "UTF8"],
                check=True, capture_output=True, cwd=self.directory, **self._as_account())
            self.start()
            self._run(f"CREATE DATABASE {_TEMPLATE}")
            asyncio.run(_migrate(self.url(_TEMPLATE)))
        except BaseException:
            self.close()
            raise

    @property
    def process_id(self) -> int:
        """Of the server; 0 while it is stopped."""
        return 0 if self._process is None else self._process.pid

    @property
    def _data(self) -> Path:
        return self.directory / "data"

    def url(self, database: str, password: str = PASSWORD) -> str:
        """The address of a database, as the setting hub_database takes it."""
        return f"postgresql://{_USER}:{password}@/{database}?host={quote(str(self.directory))}"

    def make_database(self, *, empty: bool = False) -> str:
        """Make a database with the registry's tables, or with none, and return its name."""
        self._made += 1
        name = f"test_{self._made}"
        self._run(f"CREATE DATABASE {name} TEMPLATE {'template0' if empty else _TEMPLATE}")
        return name

    def drop_database(self, name: str) -> None:
        """Remove a database, whoever is still connected."""
        self._run(f"DROP DATABASE {name} WITH (FORCE)")

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        options = [part for option in _OPTIONS for part in ("-c", option)]
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._postgres, "-D", str(self._data), "-k", str(self.directory), *options],
                stdout=log, stderr=log, cwd=self.directory, **self._as_account())
        for _ in range(_START_TRIES):
            assert self._process.poll() is None, self.log()
            try:
                return self._run("SELECT 1")
            except psycopg.OperationalError:  # it is coming up
                try:
                    self._process.wait(0.02)
                except subprocess.TimeoutExpired:
                    continue
        raise AssertionError(self.log())

    def stop(self) -> None:
        """Stop the server as an operator does who cannot wait: who is connected is cut off."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(60)
            self._process = None

    def close(self) -> None:
        """Stop the server and remove what it kept."""
        self.stop()
        shutil.rmtree(self.directory)

    def log(self) -> str:
        """What the server has said."""
        return (self.directory / "log").read_text()

    def _run(self, statement: str) -> None:
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(statement)

    def _as_account(self) -> dict[str, Any]:
        if self._account is None:
            return {}
        return {"user": self._account.pw_uid, "group": self._account.pw_gid, "extra_groups": []}


def _account() -> pwd.struct_passwd | None:
    """Whom to run it as, when this is root."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    pytest.skip("postgres refuses to run as root, and there is no user postgres or nobody")


async def _migrate(url: str) -> None:
    registry = Registry(registry_url(url, Path()))
    await registry.open()
    await registry.close()


_shared: list[Cluster] = []


def the_cluster() -> Cluster:
    """The one that the tests of this process share; skips the test where PostgreSQL is not installed."""
    if not _shared:
        _shared.append(Cluster())
    return _shared[0]


def shared_processes() -> frozenset[int]:
    """The ids of the servers that the tests of this process share."""
    return frozenset(cluster.process_id for cluster in _shared)


def stop_shared() -> None:
    """End it, at the end of the run."""
    while _shared:
        _shared.pop().close()
