"""The registry: one SQL database of owners, nodes, channels, memberships, invitations, claims on tasks.

SQLite in WAL mode by default, or PostgreSQL, which several hubs can share. Every access is a plain function of a
connection, run as one transaction on a thread of the registry's (``Registry.call``), so the event loop never waits for
a disk. Transactions are serializable: SQLite has one writer, on the registry's only thread; on PostgreSQL a transaction
that met another one is run again. So a function may read, decide and write, as if it were alone.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, Engine

from ..errors import DiskError, HubError, InvalidArgument, InvalidSetting, KacheryError, RegistryUnreachable
from .tables import metadata

__all__ = ["HEAD", "Registry", "connect_options", "insert_into", "insert_new", "name_of", "reading", "registry_url"]

_log = logging.getLogger("kachery_fast.hub")
_P = ParamSpec("_P")
_T = TypeVar("_T")

# The newest migration. A registry that has it is opened without Alembic, which takes a quarter of a second to import.
HEAD = "0002"

_CONNECTIONS_MAX = 8
_TRIES_MAX = 20
_PAUSE_SECONDS_MAX = 0.05
# Of PostgreSQL: serialization_failure, deadlock_detected (Appendix A of its manual).
_AGAIN = frozenset({"40001", "40P01"})
# And of those that pass: connection exceptions, insufficient resources, operator intervention (a restart).
_AWAY = ("08", "53", "57P")
# How long PostgreSQL may take to answer a connection, and to take a word that was sent, before it counts as away.
_CONNECT_SECONDS = 5
_SILENCE_MS = 10_000
# Any number, known to nobody else: the lock that one of several hubs holds while it brings the tables up to date.
_MIGRATION_LOCK = 0x6B616368


def registry_url(text: str, directory: Path) -> URL:
    """Return the database that the setting ``hub_database`` names; ``hub.db`` in the hub's directory when it is empty.

    :raises InvalidSetting: it is not the address of a PostgreSQL database, or its driver is not installed.
    """
    if not text:
        return URL.create("sqlite", database=str(directory / "hub.db"))
    try:
        url = sa.make_url(text)
        if url.get_backend_name() != "postgresql":
            raise _refused(url, "it must begin with postgresql://")
        if url.drivername == "postgresql":
            url = url.set(drivername="postgresql+psycopg")
        if "@" in (url.host or ""):
            raise _refused(None, "an @ in a password is written %40")
        url.get_dialect().import_dbapi()
    except ModuleNotFoundError as error:
        raise _refused(url, f"the driver {error.name} is not installed. Install it with: "
                            "pip install 'kachery-fast[postgresql]'") from None
    except (sa.exc.ArgumentError, ValueError):
        # Not what they say: it may be the password, taken for a port.
        raise _refused(None, "it must be like postgresql://USER:PASSWORD@HOST/DATABASE") from None
    return url


def _refused(url: URL | None, why: str) -> InvalidSetting:
    shown = "(what cannot be read)" if url is None else name_of(url)
    return InvalidSetting(name="hub_database", value=shown, source="the settings", why=why)


def name_of(url: URL) -> str:
    """Return what a database is called in errors and logs: no password, nor any option, which could be one."""
    if url.get_backend_name() == "sqlite":
        return str(url.database)
    host = url.query.get("host", "") if url.host is None else url.host
    return URL.create(url.get_backend_name(), username=url.username, host=str(host) or None, port=url.port,
                      database=url.database).render_as_string()


def connect_options() -> dict[str, Any]:
    """How psycopg connects: it must notice when PostgreSQL is gone, which a silent network would hide for minutes."""
    return {"connect_timeout": _CONNECT_SECONDS, "keepalives_idle": 10, "keepalives_interval": 5,
            "keepalives_count": 3, "tcp_user_timeout": _SILENCE_MS}


def insert_into(connection: Connection, table: sa.Table) -> Any:
    """Return an INSERT that can say what is to happen ON CONFLICT: both databases have the same, by different names."""
    if connection.dialect.name == "postgresql":
        from sqlalchemy.dialects import postgresql  # a twentieth of a second, which few hubs need

        return postgresql.insert(table)
    from sqlalchemy.dialects import sqlite

    return sqlite.insert(table)


def insert_new(connection: Connection, table: sa.Table, **values: Any) -> bool:
    """Insert a row, unless there is one of the same key: False."""
    # Without the option SQLAlchemy does not ask psycopg how many rows an INSERT has made.
    counted = connection.execution_options(preserve_rowcount=True)
    return counted.execute(insert_into(connection, table).values(**values).on_conflict_do_nothing()).rowcount == 1


class Registry:
    """One database and the threads that talk to it.

    ``url``: its address. ``shared``: whether other hubs may use it at the same time.
    """

    def __init__(self, url: URL) -> None:
        self.url = url
        self._name = name_of(url)
        self._engine: Engine | None = None
        self.shared = url.get_backend_name() != "sqlite"
        self._threads = ThreadPoolExecutor(max_workers=_CONNECTIONS_MAX if self.shared else 1,
                                           thread_name_prefix="hub-registry")

    async def open(self) -> None:
        """Connect, and bring the tables up to date.

        :raises DiskError: the database cannot be opened or made. :raises RegistryUnreachable: PostgreSQL is away.
        :raises HubError: it was written by a newer version.
        """
        await asyncio.get_running_loop().run_in_executor(self._threads, self._open)

    async def call(
        self, function: Callable[Concatenate[Connection, _P], _T], *args: _P.args, **kwargs: _P.kwargs
    ) -> _T:
        """Run ``function(connection, ...)`` as one transaction; an exception from it rolls everything back.

        :param function: may be run several times, each time from the start.
        :raises DiskError: the database failed. :raises InvalidArgument: it does not take a value.
        :raises RegistryUnreachable: PostgreSQL is away; what was to be done is
            not done, unless its last word was under way.
        """
        return await asyncio.get_running_loop().run_in_executor(
            self._threads, lambda: self._run(function, *args, **kwargs)
        )

    async def close(self) -> None:
        """Finish what was begun and disconnect."""
        await asyncio.to_thread(self._close)

    def _run(
        self, function: Callable[Concatenate[Connection, _P], _T], *args: _P.args, **kwargs: _P.kwargs
    ) -> _T:
        assert self._engine is not None, "the registry is not open"
        tries = 0
        while True:
            tries += 1
            try:
                with self._engine.begin() as connection:
                    return function(connection, *args, **kwargs)
            except sa.exc.SQLAlchemyError as error:
                if _can_be_repeated(error) and tries < _TRIES_MAX:
                    time.sleep(random.uniform(0, _PAUSE_SECONDS_MAX))  # noqa: S311 - to part from the other
                    continue
                raise self._translated(error, "use") from error

    def _open(self) -> None:
        options: dict[str, Any] = {}
        if self.shared:
            options = {"isolation_level": "SERIALIZABLE", "pool_size": _CONNECTIONS_MAX, "max_overflow": 0,
                       "pool_pre_ping": True, "connect_args": connect_options()}
        # What is asked with is in no log: hashes of codes, credentials of engines.
        engine = sa.create_engine(self.url, hide_parameters=True, **options)
        if not self.shared:
            sa.event.listen(engine, "connect", _prepare_sqlite)
            sa.event.listen(engine, "begin", _begin_sqlite)
        try:
            _bring_up_to_date(engine, self._name)
        except sa.exc.SQLAlchemyError as error:
            engine.dispose()
            raise self._translated(error, "opening") from error
        except BaseException:
            engine.dispose()
            raise
        self._engine = engine

    def _translated(self, error: sa.exc.SQLAlchemyError, action: str) -> KacheryError:
        if isinstance(error, sa.exc.DataError):  # of PostgreSQL: a zero byte, a text too long
            return InvalidArgument(what=f"The hub's registry does not take this: {_reason(error)}.")
        if self.shared and _is_away(error):
            _log.warning("the registry %s cannot be reached: %s", self._name, _reason(error))
            return RegistryUnreachable(registry=self._name, why=_reason(error))
        _log.error("the registry failed", exc_info=error)
        return DiskError(action=action, path=self._name, why=_reason(error))

    def _close(self) -> None:
        # First what is under way: a connection that is in use is not closed with the others.
        self._threads.shutdown()
        if self._engine is not None:
            self._engine.dispose()
            self._engine = None


@contextmanager
def reading(url: URL) -> Iterator[Connection]:
    """Connect to a registry that hubs may be using, to see it as at one moment; neither waits for the other.

    :raises HubError: its tables are of another version. :raises DiskError: :raises RegistryUnreachable:
    """
    registry = Registry(url)
    options: dict[str, Any] = {"isolation_level": "REPEATABLE READ", "connect_args": connect_options()}
    engine = sa.create_engine(url, hide_parameters=True, **(options if registry.shared else {}))
    if not registry.shared:
        sa.event.listen(engine, "connect", _prepare_sqlite)
        sa.event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    try:
        with engine.begin() as connection:
            found = _version_of(connection)
            if found != HEAD:
                raise HubError(url=name_of(url), why=f"its registry has version {found or '0'} of the tables, this "
                                                     f"program knows {HEAD}; start a hub of this version on it first")
            yield connection
    except sa.exc.SQLAlchemyError as error:
        raise registry._translated(error, "reading") from error
    finally:
        engine.dispose()


def _bring_up_to_date(engine: Engine, name: str) -> None:
    """Run the migrations that are missing, all in one transaction.

    :raises HubError: there are some that this program does not know.
    """
    with engine.connect() as connection:
        if engine.dialect.name == "postgresql":
            # Of the session, so that the transaction begins after another hub's has ended.
            connection.execute(sa.select(sa.func.pg_advisory_lock(_MIGRATION_LOCK)))
            connection.commit()
        with connection.begin():
            found = _version_of(connection)
            if not found and not sa.inspect(connection).get_table_names():
                _make_tables(connection)
            elif found != HEAD:
                _migrate(connection, found, name)
        if engine.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_unlock(_MIGRATION_LOCK)))
            connection.commit()


def _version_of(connection: Connection) -> str:
    """The registry's newest migration; "" when it is empty, or from before there were any."""
    if not sa.inspect(connection).has_table("alembic_version"):
        return ""
    return str(connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar() or "")


def _make_tables(connection: Connection) -> None:
    """Make in an empty database what all migrations would, in a quarter of their time.

    Source: https://alembic.sqlalchemy.org/en/latest/cookbook.html, "Building an Up to Date Database from Scratch".
    """
    metadata.create_all(connection)
    versions = sa.MetaData()
    ours = sa.Table("alembic_version", versions, sa.Column("version_num", sa.String(32), primary_key=True))
    # Programs from before there were migrations refuse a registry whose version is not theirs, 1 or 2.
    theirs = sa.Table("schema_version", versions, sa.Column("version", sa.Integer, primary_key=True))
    versions.create_all(connection)
    connection.execute(ours.insert().values(version_num=HEAD))
    connection.execute(theirs.insert().values(version=3))


def _migrate(connection: Connection, found: str, name: str) -> None:
    from alembic.config import Config
    from alembic.runtime.environment import EnvironmentContext
    from alembic.script import ScriptDirectory

    folder = str(Path(__file__).parent / "migrations")
    scripts = ScriptDirectory(folder, version_locations=[folder])
    if found and found not in {script.revision for script in scripts.walk_revisions()}:
        raise HubError(url=name, why=f"its registry has version {found} of the tables, this program knows {HEAD}; use "
                                     "a newer kachery-fast")
    _log.info("the registry's tables go from version %s to %s", found or "0", HEAD)
    context = EnvironmentContext(Config(), scripts, fn=lambda revision, _: scripts._upgrade_revs(HEAD, revision))
    with context:
        context.configure(connection=connection)
        context.run_migrations()


def _prepare_sqlite(connection: Any, _record: object) -> None:
    # FULL: a permission that was taken away must still be away after a power cut. Writes are rare.
    connection.isolation_level = None  # transactions are begun below, where Python's module would begin them too late
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "busy_timeout = 5000"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _can_be_repeated(error: sa.exc.SQLAlchemyError) -> bool:
    return getattr(getattr(error, "orig", None), "sqlstate", None) in _AGAIN


def _is_away(error: sa.exc.SQLAlchemyError) -> bool:
    """Whether it failed to reach PostgreSQL, rather than in it."""
    if isinstance(error, sa.exc.TimeoutError):
        return True
    state = getattr(getattr(error, "orig", None), "sqlstate", None)
    broken = isinstance(error, sa.exc.DBAPIError) and error.connection_invalidated
    return broken or (isinstance(error, sa.exc.OperationalError) and (state is None or state.startswith(_AWAY)))


def _reason(error: sa.exc.SQLAlchemyError) -> str:
    return str(getattr(error, "orig", None) or error).splitlines()[0]
