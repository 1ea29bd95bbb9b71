"""Who is on a channel and with which permissions, and the damage that was found in its bucket.

What a node may do is never decided here: these functions find and change the ``Grant`` that ``protocol.access``
decides on. They run inside ``Registry.call``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from ..errors import InvalidArgument, NotOnHub
from ..protocol.access import Grant, Permission
from .actions import Answer
from .tables import channels, damage_reports, memberships, nodes

__all__ = [
    "ASKED", "ID_PREFIX_LENGTH_MIN", "LEFT", "MEMBER", "REMOVED", "DamageLine", "MemberRecord", "change_granted",
    "find_grant", "in_force", "join_names", "leave_channel", "list_damage", "list_members", "list_node_grants",
    "permission_names", "record_damage", "remove_member", "resolve_member", "row_of", "split_names", "to_grant",
]

DAMAGE_REPORTS_PER_CHANNEL_MAX = 1_000
ID_PREFIX_LENGTH_MIN = 6
# "asked": the node's owner asks to be let in, and nobody has decided yet.
MEMBER, LEFT, REMOVED, ASKED = "member", "left", "removed", "asked"


class MemberRecord(NamedTuple):
    """A node on a channel, or one that asks to be."""

    grant: Grant
    label: str
    version: str
    last_seen: int
    state: str


class DamageLine(Answer):
    """An object that was removed at ``time`` (ms): its bytes had the SHA-1 ``actual``, and not that of its name."""

    sha1: str
    actual: str | None
    reported_by: str
    time: int


def join_names(permissions: Iterable[Permission]) -> str:
    """As a column holds them."""
    return " ".join(permission_names(permissions))


def permission_names(permissions: Iterable[Permission]) -> list[str]:
    """As answers list them."""
    return sorted(permission.value for permission in permissions)


def split_names(text: str) -> frozenset[Permission]:
    """As a column holds them."""
    return frozenset(Permission(word) for word in text.split())


def to_grant(row: Any) -> Grant:
    """A row of memberships."""
    return Grant(row.node, row.owner, row.channel, split_names(row.requested), split_names(row.granted))


# A membership counts while the node still is registered under the owner who holds it.
_same_owner = sa.and_(
    memberships.c.node == nodes.c.id, memberships.c.owner == nodes.c.owner, nodes.c.forgotten.is_(None))
in_force = sa.and_(_same_owner, memberships.c.state == MEMBER)
_known = sa.and_(_same_owner, memberships.c.state.in_([MEMBER, ASKED]))
# Made once, as every request of a node runs it: making it takes as long as running it.
_FIND_GRANT = sa.select(memberships).select_from(memberships.join(nodes, in_force)).where(
    memberships.c.node == sa.bindparam("node_id"), memberships.c.channel == sa.bindparam("of"))


def find_grant(connection: Connection, node_id: str, channel: str) -> Grant | None:
    """Return a node's standing on a channel, None when it is no member or there is no such channel."""
    row = connection.execute(_FIND_GRANT, {"node_id": node_id, "of": channel}).first()
    return None if row is None else to_grant(row)


def list_node_grants(connection: Connection, node_id: str) -> list[tuple[Grant, str, bool]]:
    """Return a node's standing on each of its channels, by the channel's name, with the channel's owner and whether it
    is private."""
    rows = connection.execute(
        sa.select(memberships, channels.c.owner.label("channel_owner"), channels.c.private)
        .select_from(memberships.join(nodes, in_force).join(channels, channels.c.name == memberships.c.channel))
        .where(memberships.c.node == node_id).order_by(memberships.c.channel))
    return [(to_grant(row), str(row.channel_owner), bool(row.private)) for row in rows]


def list_members(connection: Connection, channel: str, *, asking: bool = False) -> list[MemberRecord]:
    """Return the nodes on a channel, in the order in which they came; with ``asking`` also those that ask to be."""
    rows = connection.execute(
        sa.select(memberships, nodes.c.label, nodes.c.version, nodes.c.last_seen)
        .select_from(memberships.join(nodes, _known if asking else in_force))
        .where(memberships.c.channel == channel).order_by(memberships.c.created, memberships.c.node))
    return [MemberRecord(to_grant(row), row.label, row.version, row.last_seen, row.state) for row in rows]


def resolve_member(connection: Connection, channel: str, text: str) -> Grant:
    """Find the member that ``text`` names: a node id, the first six or more digits of one, or a label.

    :raises NotOnHub: none is called so. :raises InvalidArgument: several are.
    """
    members = list_members(connection, channel, asking=True)
    matches = [member for member in members if member.grant.node_id == text]
    if not matches:
        matches = [member for member in members if member.label == text or (
            len(text) >= ID_PREFIX_LENGTH_MIN and member.grant.node_id.startswith(text))]
    if not matches:
        raise NotOnHub(kind=f"node on {channel!r} called", name=text,
                       advice=f"See: kachery-fast channel show {channel}")
    if len(matches) > 1:
        raise InvalidArgument(what=f"{len(matches)} nodes on {channel!r} are called {text!r}. Name one by its id.")
    return matches[0].grant


def change_granted(
    connection: Connection, grant: Grant, add: frozenset[Permission], take: frozenset[Permission], now_ms: int
) -> Grant:
    """Grant or take away permissions; return the standing that is now in force. Who is granted anything is let in."""
    granted = (grant.granted | add) - take
    values = {"granted": join_names(granted), "decided": now_ms, **({"state": MEMBER} if add else {})}
    connection.execute(row_of(grant).values(**values))
    return grant._replace(granted=granted)


def remove_member(connection: Connection, grant: Grant, now_ms: int) -> None:
    """Take a node off a channel; it comes back only by an invitation made after this."""
    connection.execute(row_of(grant).values(state=REMOVED, granted="", decided=now_ms))


def leave_channel(connection: Connection, grant: Grant) -> None:
    """End a membership at the node's own wish; what the channel's owner decided is kept for its return."""
    connection.execute(row_of(grant).values(state=LEFT, requested=""))


def row_of(grant: Grant) -> sa.Update:
    """The row of a standing, to be changed."""
    return memberships.update().where(
        memberships.c.channel == grant.channel, memberships.c.node == grant.node_id,
        memberships.c.owner == grant.owner_id)


# --- damage


def record_damage(
    connection: Connection, grant: Grant, sha1: str, found: str, actual: str | None, now_ms: int
) -> None:
    """Keep which node reported a damaged object that was then removed, what it had received, and what the hub read."""
    connection.execute(damage_reports.insert().values(
        channel=grant.channel, node=grant.node_id, sha1=sha1, found=found, actual=actual, time=now_ms))
    oldest = (sa.select(damage_reports.c.id).where(damage_reports.c.channel == grant.channel)
              .order_by(damage_reports.c.id.desc()).offset(DAMAGE_REPORTS_PER_CHANNEL_MAX).limit(1))
    found_id = connection.execute(oldest).scalar()
    if found_id is not None:
        connection.execute(damage_reports.delete().where(
            damage_reports.c.channel == grant.channel, damage_reports.c.id <= found_id))


def list_damage(connection: Connection, channel: str) -> list[DamageLine]:
    """Return the last hundred objects of a channel that were removed as damaged, newest first."""
    rows = connection.execute(
        sa.select(damage_reports).where(damage_reports.c.channel == channel)
        .order_by(damage_reports.c.id.desc()).limit(100))
    return [DamageLine(sha1=row.sha1, actual=row.actual, reported_by=row.node, time=row.time) for row in rows]
