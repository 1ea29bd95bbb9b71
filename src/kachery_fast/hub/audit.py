"""The audit log: who changed what when. The functions run inside ``Registry.call``."""

from __future__ import annotations

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from .actions import Actor, Answer, Request
from .tables import audit

__all__ = ["Entry", "entries_of", "note"]

DETAIL_LENGTH_MAX = 2000
KEPT_MS = 400 * 24 * 3600 * 1000


class Entry(Answer):
    """One line: at ``time`` (ms), ``owner`` did ``action`` with ``detail`` (JSON), through ``via``."""

    id: int
    time: int
    owner: str
    via: str
    action: str
    channel: str
    node: str
    detail: str


# Said elsewhere in an entry, or (a code, worthless by now) of no use to a reader, or nobody's to read.
_LEFT_OUT = frozenset({
    "type", "channel", "node", "code", "accessKey", "secretKey", "serviceAccount", "apiKey", "seed", "secret"})


def note(connection: Connection, actor: Actor, action: str, request: Request, now_ms: int, node: str = "") -> None:
    """Write down an action, without what is secret in a request. What is over a year old goes.

    :param node: the id of the node that it was about, where the request may not tell.
    """
    fields = msgspec.to_builtins(request)
    detail = {name: value for name, value in fields.items() if name not in _LEFT_OUT}
    connection.execute(audit.insert().values(
        time=now_ms, owner=actor.owner, via=actor.via, action=action, channel=str(fields.get("channel") or "")[:64],
        node=str(node or fields.get("node") or "")[:64],
        detail=msgspec.json.encode(detail).decode()[:DETAIL_LENGTH_MAX]))
    connection.execute(audit.delete().where(audit.c.time < now_ms - KEPT_MS))


def entries_of(
    connection: Connection, *, owner: str | None = None, channel: str | None = None, before: int | None = None,
    limit: int = 100,
) -> list[Entry]:
    """Return the newest entries first.

    :param owner: only of what this one did. :param channel: only about this one. :param before: only entries with a
        smaller id, for the next page.
    """
    wanted = sa.select(audit).order_by(audit.c.id.desc()).limit(limit)
    if owner is not None:
        wanted = wanted.where(audit.c.owner == owner)
    if channel is not None:
        wanted = wanted.where(audit.c.channel == channel)
    if before is not None:
        wanted = wanted.where(audit.c.id < before)
    return [_entry(row) for row in connection.execute(wanted)]


def _entry(row: Row[tuple[object, ...]]) -> Entry:
    return Entry(**row._mapping)
