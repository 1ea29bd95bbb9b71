"""The registry: owners, nodes, channels, memberships, invitations, claims on tasks, in one SQL database.

SQLite in WAL mode by default; nothing here keeps PostgreSQL from taking its place. Every access is a plain function of
a connection, run as one transaction on the registry's own thread (``Registry.call``), so the event loop never waits
for a disk and SQLite never sees two writers. What must hold between replicas (an invitation's last use, a name taken
once) is left to the database: conditional updates and primary keys, not locks of this process.

Times are milliseconds since the epoch.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import URL, Connection, Engine

from ..errors import DiskError, HubError

__all__ = [
    "Registry", "channels", "damage_reports", "invitations", "memberships", "nodes", "owner_tokens", "owners",
    "sqlite_url", "task_claims",
]

_log = logging.getLogger("kachery_fast.hub")
_P = ParamSpec("_P")
_T = TypeVar("_T")

# 2: task_claims.
SCHEMA_VERSION = 2

_metadata = sa.MetaData()

_schema = sa.Table("schema_version", _metadata, sa.Column("version", sa.Integer, primary_key=True))

owners = sa.Table(
    "owners", _metadata,
    sa.Column("id", sa.String(254), primary_key=True),
    sa.Column("created", sa.BigInteger, nullable=False),
)
# The hash is of 256 random bits, so one round of SHA-256 is enough (nothing to guess at).
owner_tokens = sa.Table(
    "owner_tokens", _metadata,
    sa.Column("hash", sa.String(64), primary_key=True),
    sa.Column("owner", sa.ForeignKey("owners.id"), nullable=False),
    sa.Column("created", sa.BigInteger, nullable=False),
)
nodes = sa.Table(
    "nodes", _metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("owner", sa.ForeignKey("owners.id"), nullable=False),
    sa.Column("label", sa.String(100), nullable=False, default=""),
    sa.Column("version", sa.String(100), nullable=False, default=""),
    sa.Column("created", sa.BigInteger, nullable=False),
    sa.Column("last_seen", sa.BigInteger, nullable=False),
)
# ``folded`` keeps "Lab" and "lab" from being two channels: their objects would be one on some file systems.
channels = sa.Table(
    "channels", _metadata,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("folded", sa.String(64), nullable=False, unique=True),
    sa.Column("owner", sa.ForeignKey("owners.id"), nullable=False),
    sa.Column("created", sa.BigInteger, nullable=False),
)
# A row outlives membership (state "left" or "removed"), so that ``decided``, the time of the channel owner's last
# word on this node, holds against invitations that are older than it.
memberships = sa.Table(
    "memberships", _metadata,
    sa.Column("channel", sa.ForeignKey("channels.name"), primary_key=True),
    sa.Column("node", sa.ForeignKey("nodes.id"), primary_key=True),
    sa.Column("owner", sa.ForeignKey("owners.id"), primary_key=True),
    sa.Column("requested", sa.String(200), nullable=False),
    sa.Column("granted", sa.String(200), nullable=False),
    sa.Column("state", sa.String(10), nullable=False),
    sa.Column("invitation", sa.String(64), nullable=False),
    sa.Column("created", sa.BigInteger, nullable=False),
    sa.Column("decided", sa.BigInteger, nullable=False),
    sa.Index("memberships_by_node", "node"),
)
# ``uses_left`` is null for any number. ``node_owner``: under whose name a new node is registered.
invitations = sa.Table(
    "invitations", _metadata,
    sa.Column("hash", sa.String(64), primary_key=True),
    sa.Column("channel", sa.ForeignKey("channels.name"), nullable=False, index=True),
    sa.Column("node_owner", sa.ForeignKey("owners.id"), nullable=False),
    sa.Column("permissions", sa.String(200), nullable=False),
    sa.Column("uses_left", sa.Integer, nullable=True),
    sa.Column("expires", sa.BigInteger, nullable=False),
    sa.Column("created", sa.BigInteger, nullable=False),
)
damage_reports = sa.Table(
    "damage_reports", _metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("channel", sa.String(64), nullable=False, index=True),
    sa.Column("node", sa.String(64), nullable=False),
    sa.Column("sha1", sa.String(40), nullable=False),
    sa.Column("found", sa.String(40), nullable=False),
    sa.Column("actual", sa.String(40), nullable=True),
    sa.Column("time", sa.BigInteger, nullable=False),
)
# ``revision`` grows with each change, so that a change can be made only to what was looked at. ``changed`` is the time
# of the last one, by which rows are forgotten.
task_claims = sa.Table(
    "task_claims", _metadata,
    sa.Column("channel", sa.ForeignKey("channels.name"), primary_key=True),
    sa.Column("task", sa.String(64), primary_key=True),
    sa.Column("kind", sa.String(20), nullable=False),
    sa.Column("function", sa.String(200), nullable=False),
    sa.Column("node", sa.String(64), nullable=False),
    sa.Column("attempt", sa.String(64), nullable=False),
    sa.Column("idempotent", sa.Boolean, nullable=False),
    sa.Column("state", sa.String(10), nullable=False),
    sa.Column("claimed", sa.BigInteger, nullable=False),
    sa.Column("expires", sa.BigInteger, nullable=False),
    sa.Column("receipt", sa.Text, nullable=True),
    sa.Column("changed", sa.BigInteger, nullable=False, index=True),
    sa.Column("revision", sa.Integer, nullable=False),
)


def sqlite_url(path: Path) -> URL:
    """Return the database URL of the SQLite file ``path``."""
    return URL.create("sqlite", database=str(path))


class Registry:
    """One database and the one thread that talks to it."""

    def __init__(self, url: URL | str) -> None:
        self._url = sa.make_url(url)
        self._engine: Engine | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hub-registry")

    async def open(self) -> None:
        """Connect, and create the tables where they are missing.

        :raises DiskError: the database cannot be opened or made.
        :raises HubError: it was written by a newer version.
        """
        await asyncio.get_running_loop().run_in_executor(self._thread, self._open)

    async def call(
        self, function: Callable[Concatenate[Connection, _P], _T], *args: _P.args, **kwargs: _P.kwargs
    ) -> _T:
        """Run ``function(connection, ...)`` as one transaction; an exception from it rolls everything back.

        :raises DiskError: the database failed.
        """
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, lambda: self._run(function, *args, **kwargs)
        )

    async def close(self) -> None:
        """Finish what was begun and disconnect."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._dispose)
        self._thread.shutdown()

    def _run(
        self, function: Callable[Concatenate[Connection, _P], _T], *args: _P.args, **kwargs: _P.kwargs
    ) -> _T:
        assert self._engine is not None, "the registry is not open"
        try:
            with self._engine.begin() as connection:
                return function(connection, *args, **kwargs)
        except sa.exc.SQLAlchemyError as error:
            _log.exception("the registry failed")
            raise DiskError(action="use", path=self._url.database, why=_reason(error)) from error

    def _open(self) -> None:
        engine = sa.create_engine(self._url)
        if engine.dialect.name == "sqlite":
            sa.event.listen(engine, "connect", _prepare_sqlite)
        try:
            with engine.begin() as connection:
                found = _bring_up_to_date(connection)
        except sa.exc.SQLAlchemyError as error:
            engine.dispose()
            raise DiskError(action="opening", path=self._url.database, why=_reason(error)) from error
        if found > SCHEMA_VERSION:
            engine.dispose()
            raise HubError(url=self._url.database, why=f"its registry has version {found} of the tables, this program "
                                                       f"knows {SCHEMA_VERSION}; use a newer kachery-fast")
        self._engine = engine

    def _dispose(self) -> None:
        if self._engine is not None:
            self._engine.dispose()
            self._engine = None


def _bring_up_to_date(connection: Connection) -> int:
    """Create what is missing, and return the version of the tables as found; one from the future is left alone."""
    found: int | None = None
    if sa.inspect(connection).has_table(_schema.name):
        found = connection.execute(sa.select(_schema.c.version)).scalar()
    if found is not None and found > SCHEMA_VERSION:
        return found
    # All that a version has added so far are tables of its own, so there is nothing to be changed in the old ones.
    _metadata.create_all(connection)
    if found is None:
        connection.execute(_schema.insert().values(version=SCHEMA_VERSION))
    elif found < SCHEMA_VERSION:
        _log.info("the registry's tables go from version %d to %d", found, SCHEMA_VERSION)
        connection.execute(_schema.update().values(version=SCHEMA_VERSION))
    return SCHEMA_VERSION if found is None else found


def _prepare_sqlite(connection: Any, _record: object) -> None:
    # FULL: a permission that was taken away must still be away after a power cut. Writes are rare.
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "busy_timeout = 5000"):
        connection.execute(f"PRAGMA {pragma}")


def _reason(error: sa.exc.SQLAlchemyError) -> str:
    return str(getattr(error, "orig", None) or error).splitlines()[0]
