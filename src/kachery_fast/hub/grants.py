"""Channels, who is on them and with which permissions, and the invitations that let nodes in.

What a node may do is never decided here: these functions find and change the ``Grant`` that ``protocol.access``
decides on. They run inside ``Registry.call``.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from ..errors import AlreadyExists, InvalidArgument, NotOnHub, NotPermitted
from ..protocol.access import Grant, Permission
from ..protocol.names import check_channel_name
from .identity import find_node, hash_code, register_node
from .registry import channels, damage_reports, invitations, memberships, nodes, task_claims

__all__ = [
    "MemberRecord", "change_granted", "close_invitations", "create_channel", "create_invitation", "delete_channel",
    "find_channel_owner", "find_grant", "join_channel", "leave_channel", "list_channels", "list_damage",
    "list_invitations", "list_members", "list_node_grants", "record_damage", "remove_member", "require_channel",
    "resolve_member",
]

CHANNELS_PER_OWNER_MAX = 1_000
MEMBERS_PER_CHANNEL_MAX = 10_000
INVITATIONS_PER_CHANNEL_MAX = 1_000
DAMAGE_REPORTS_PER_CHANNEL_MAX = 1_000
_ID_PREFIX_LENGTH_MIN = 6
_MEMBER, _LEFT, _REMOVED = "member", "left", "removed"


class MemberRecord(NamedTuple):
    """A node on a channel."""

    grant: Grant
    label: str
    version: str
    last_seen: int


def _join(permissions: Iterable[Permission]) -> str:
    return " ".join(sorted(permission.value for permission in permissions))


def _split(text: str) -> frozenset[Permission]:
    return frozenset(Permission(word) for word in text.split())


def _grant(row: Any) -> Grant:
    return Grant(row.node, row.owner, row.channel, _split(row.requested), _split(row.granted))


# A membership counts while the node still is registered under the owner who holds it.
_in_force = sa.and_(
    memberships.c.node == nodes.c.id, memberships.c.owner == nodes.c.owner, memberships.c.state == _MEMBER)


# --- channels


def create_channel(connection: Connection, name: str, owner: str, now_ms: int) -> None:
    """Make a channel.

    :raises InvalidName: the name cannot be one. :raises AlreadyExists: it is taken, in whichever case.
    :raises InvalidArgument: the owner has too many.
    """
    check_channel_name(name)
    taken = connection.execute(sa.select(channels.c.name).where(channels.c.folded == name.lower())).scalar()
    if taken is not None:
        raise AlreadyExists(what=f"The channel {taken!r}", advice="Choose another name.")
    count = connection.execute(
        sa.select(sa.func.count()).select_from(channels).where(channels.c.owner == owner)).scalar_one()
    if count >= CHANNELS_PER_OWNER_MAX:
        raise InvalidArgument(what=f"{owner} has {count} channels already; {CHANNELS_PER_OWNER_MAX} are allowed.")
    connection.execute(channels.insert().values(name=name, folded=name.lower(), owner=owner, created=now_ms))


def require_channel(connection: Connection, name: str, owner: str, action: str) -> None:
    """Make sure that ``owner`` owns the channel.

    :raises NotOnHub: there is no such channel. :raises NotPermitted: it is another owner's.
    """
    if find_channel_owner(connection, name) != owner:
        raise NotPermitted(who=owner, action=action, channel=name, why="it belongs to another owner")


def find_channel_owner(connection: Connection, name: str) -> str:
    """Return the owner of a channel.

    :raises NotOnHub: there is no such channel.
    """
    found = connection.execute(sa.select(channels.c.owner).where(channels.c.name == name)).scalar()
    if found is None:
        raise NotOnHub(kind="channel", name=name, advice="See: kachery-fast channel list")
    return str(found)


def list_channels(connection: Connection, owner: str) -> list[dict[str, Any]]:
    """Return name, time of creation (ms) and number of members of each channel of ``owner``, by name."""
    count = sa.select(sa.func.count()).select_from(memberships.join(nodes, _in_force)).where(
        memberships.c.channel == channels.c.name).scalar_subquery()
    rows = connection.execute(
        sa.select(channels.c.name, channels.c.created, count.label("members"))
        .where(channels.c.owner == owner).order_by(channels.c.name))
    return [{"name": row.name, "created": row.created, "members": row.members} for row in rows]


def delete_channel(connection: Connection, name: str) -> list[str]:
    """Remove a channel, its memberships, invitations and claims; return the ids of the nodes that were on it."""
    members = [str(row.node) for row in connection.execute(
        sa.select(memberships.c.node).where(memberships.c.channel == name, memberships.c.state == _MEMBER))]
    for table in (memberships, invitations, task_claims):
        connection.execute(table.delete().where(table.c.channel == name))
    connection.execute(channels.delete().where(channels.c.name == name))
    return members


# --- members and what they may


def find_grant(connection: Connection, node_id: str, channel: str) -> Grant | None:
    """Return a node's standing on a channel, None when it is no member or there is no such channel."""
    row = connection.execute(
        sa.select(memberships).select_from(memberships.join(nodes, _in_force))
        .where(memberships.c.node == node_id, memberships.c.channel == channel)).first()
    return None if row is None else _grant(row)


def list_node_grants(connection: Connection, node_id: str) -> list[tuple[Grant, str]]:
    """Return a node's standing on each of its channels with the channel's owner, by the channel's name."""
    rows = connection.execute(
        sa.select(memberships, channels.c.owner.label("channel_owner"))
        .select_from(memberships.join(nodes, _in_force).join(channels, channels.c.name == memberships.c.channel))
        .where(memberships.c.node == node_id).order_by(memberships.c.channel))
    return [(_grant(row), str(row.channel_owner)) for row in rows]


def list_members(connection: Connection, channel: str) -> list[MemberRecord]:
    """Return the nodes on a channel, in the order in which they came."""
    rows = connection.execute(
        sa.select(memberships, nodes.c.label, nodes.c.version, nodes.c.last_seen)
        .select_from(memberships.join(nodes, _in_force))
        .where(memberships.c.channel == channel).order_by(memberships.c.created, memberships.c.node))
    return [MemberRecord(_grant(row), row.label, row.version, row.last_seen) for row in rows]


def resolve_member(connection: Connection, channel: str, text: str) -> Grant:
    """Find the member that ``text`` names: a node id, the first six or more digits of one, or a label.

    :raises NotOnHub: none is called so. :raises InvalidArgument: several are.
    """
    members = list_members(connection, channel)
    matches = [member for member in members if member.grant.node_id == text]
    if not matches:
        matches = [member for member in members if member.label == text or (
            len(text) >= _ID_PREFIX_LENGTH_MIN and member.grant.node_id.startswith(text))]
    if not matches:
        raise NotOnHub(kind=f"node on {channel!r} called", name=text,
                       advice=f"See: kachery-fast channel show {channel}")
    if len(matches) > 1:
        raise InvalidArgument(what=f"{len(matches)} nodes on {channel!r} are called {text!r}. Name one by its id.")
    return matches[0].grant


def change_granted(
    connection: Connection, grant: Grant, add: frozenset[Permission], take: frozenset[Permission], now_ms: int
) -> Grant:
    """Grant or take away permissions; return the standing that is now in force."""
    granted = (grant.granted | add) - take
    connection.execute(_row_of(grant).values(granted=_join(granted), decided=now_ms))
    return grant._replace(granted=granted)


def remove_member(connection: Connection, grant: Grant, now_ms: int) -> None:
    """Take a node off a channel; it comes back only by an invitation made after this."""
    connection.execute(_row_of(grant).values(state=_REMOVED, granted="", decided=now_ms))


def leave_channel(connection: Connection, grant: Grant) -> None:
    """End a membership at the node's own wish; what the channel's owner decided is kept for its return."""
    connection.execute(_row_of(grant).values(state=_LEFT, requested=""))


def _row_of(grant: Grant) -> sa.Update:
    return memberships.update().where(
        memberships.c.channel == grant.channel, memberships.c.node == grant.node_id,
        memberships.c.owner == grant.owner_id)


# --- invitations


def create_invitation(
    connection: Connection, channel: str, permissions: frozenset[Permission], uses: int | None, expires_ms: int,
    now_ms: int,
) -> str:
    """Make an invitation to a channel, for nodes to be registered under the channel's owner; only its hash is kept.

    :param uses: how many nodes may use it; None for any number.
    :raises InvalidArgument: the channel has too many.
    """
    connection.execute(invitations.delete().where(invitations.c.expires < now_ms))
    count = connection.execute(
        sa.select(sa.func.count()).select_from(invitations).where(invitations.c.channel == channel)).scalar_one()
    if count >= INVITATIONS_PER_CHANNEL_MAX:
        raise InvalidArgument(what=f"The channel {channel!r} has {count} invitations; close some first.")
    owner = connection.execute(sa.select(channels.c.owner).where(channels.c.name == channel)).scalar_one()
    code = secrets.token_urlsafe(16)
    connection.execute(invitations.insert().values(
        hash=hash_code(code), channel=channel, node_owner=owner, permissions=_join(permissions), uses_left=uses,
        expires=expires_ms, created=now_ms))
    return code


def list_invitations(connection: Connection, channel: str, now_ms: int) -> list[dict[str, Any]]:
    """Return the invitations of a channel that can still be used, oldest first (their codes are not known here)."""
    rows = connection.execute(
        sa.select(invitations).where(
            invitations.c.channel == channel, invitations.c.expires >= now_ms,
            sa.or_(invitations.c.uses_left.is_(None), invitations.c.uses_left > 0))
        .order_by(invitations.c.created))
    return [{"permissions": row.permissions.split(), "usesLeft": row.uses_left, "expires": row.expires,
             "created": row.created} for row in rows]


def close_invitations(connection: Connection, channel: str) -> int:
    """Make every invitation of a channel useless; return how many there were."""
    return connection.execute(invitations.delete().where(invitations.c.channel == channel)).rowcount


def join_channel(
    connection: Connection, node_id: str, code: str, label: str, requested: frozenset[Permission], now_ms: int
) -> Grant:
    """Make a node a member by an invitation, registering it first when it is new.

    A member that repeats its request (an answer may be lost) spends no further use. An invitation never overrules a
    later decision of the channel's owner on this node.

    :param requested: what the node's owner asks for; empty for all that the invitation gives.
    :raises NotPermitted: the invitation is unknown, expired or used up, or the node was removed after it was made.
    """
    digest = hash_code(code)
    invitation = connection.execute(sa.select(invitations).where(invitations.c.hash == digest)).first()

    def refuse(why: str) -> NotPermitted:
        channel = invitation.channel if invitation is not None else "?"
        return NotPermitted(who=f"node {node_id[:16]}", action="join", channel=channel, why=why)

    if invitation is None:
        raise refuse("the hub knows no such invitation; ask the channel's owner for a new one")
    if invitation.expires < now_ms:
        raise refuse("the invitation has expired; ask the channel's owner for a new one")
    registered = find_node(connection, node_id)
    owner = invitation.node_owner if registered is None else registered.owner
    row = connection.execute(sa.select(memberships).where(
        memberships.c.channel == invitation.channel, memberships.c.node == node_id,
        memberships.c.owner == owner)).first()
    overruled = row is not None and row.decided >= invitation.created
    if row is not None and row.state == _REMOVED and overruled:
        raise refuse("the channel's owner removed this node; ask for a new invitation")
    repeated = row is not None and row.state == _MEMBER and row.invitation == digest
    if not repeated:
        _spend(connection, digest, refuse)
    _make_room(connection, invitation.channel, refuse)
    register_node(connection, node_id, owner, label, now_ms)
    given = _split(invitation.permissions)
    values = {"requested": _join(requested or given), "state": _MEMBER, "invitation": digest}
    if row is None:
        connection.execute(memberships.insert().values(
            channel=invitation.channel, node=node_id, owner=owner, granted=_join(given), created=now_ms, decided=0,
            **values))
    else:
        old = _grant(row)
        granted = old.granted if overruled else old.granted | given
        connection.execute(_row_of(old).values(granted=_join(granted), **values))
    grant = find_grant(connection, node_id, invitation.channel)
    assert grant is not None, "a membership just written is there"
    return grant


def _spend(connection: Connection, digest: str, refuse: Any) -> None:
    # One conditional update: two nodes that come at once cannot both have the last use, on any database.
    spent = connection.execute(
        invitations.update()
        .where(invitations.c.hash == digest, sa.or_(invitations.c.uses_left.is_(None), invitations.c.uses_left > 0))
        .values(uses_left=invitations.c.uses_left - 1)).rowcount
    if not spent:
        raise refuse("the invitation is used up; ask the channel's owner for a new one")


def _make_room(connection: Connection, channel: str, refuse: Any) -> None:
    count = connection.execute(
        sa.select(sa.func.count()).select_from(memberships).where(memberships.c.channel == channel)).scalar_one()
    if count >= MEMBERS_PER_CHANNEL_MAX:
        raise refuse(f"the channel has {count} nodes; {MEMBERS_PER_CHANNEL_MAX} are allowed")


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


def list_damage(connection: Connection, channel: str) -> list[dict[str, Any]]:
    """Return the last hundred objects of a channel that were removed as damaged, newest first."""
    rows = connection.execute(
        sa.select(damage_reports).where(damage_reports.c.channel == channel)
        .order_by(damage_reports.c.id.desc()).limit(100))
    return [{"sha1": row.sha1, "actual": row.actual, "reportedBy": row.node, "time": row.time} for row in rows]
