"""Signed requests that hubs on one registry have accepted, so that none is accepted twice, at whichever of them.

The functions run inside ``Registry.call``. A hub that has its registry for itself remembers by itself.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from .registry import insert_new
from .tables import seen_requests

__all__ = ["find_start", "forget", "remember", "start_anew"]

# The row of no node: what was signed before its time is not accepted.
_START = {"node": "", "id": ""}


def remember(connection: Connection, node_id: str, request_id: str, time_ms: int) -> bool:
    """Write down a request; False: it is there already."""
    return insert_new(connection, seen_requests, node=node_id, id=request_id, time=time_ms)


def forget(connection: Connection, oldest_ms: int) -> None:
    """Forget what was signed before a time from which on nothing is accepted any more."""
    connection.execute(seen_requests.delete().where(seen_requests.c.time < oldest_ms))


def start_anew(connection: Connection, time_ms: int) -> None:
    """Accept nothing that was signed before this time: what was seen until then is not known here."""
    connection.execute(seen_requests.insert().values(time=time_ms, **_START))


def find_start(connection: Connection) -> int:
    """Return the time of ``start_anew``; 0 if there was none, or long ago."""
    return connection.execute(sa.select(seen_requests.c.time).filter_by(**_START)).scalar() or 0
