"""Invitations to channels, and how a node becomes a member by one. The functions run inside ``Registry.call``."""

from __future__ import annotations

import secrets
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from ..errors import InvalidArgument, NotPermitted
from ..protocol.access import Grant, Permission
from .actions import Answer
from .channels import find_settings
from .grants import ASKED, MEMBER, REMOVED, find_grant, in_force, join_names, row_of, split_names, to_grant
from .identity import find_node, hash_code, register_node
from .tables import invitations, memberships, nodes

__all__ = [
    "InvitationLine", "check_inviter", "close_invitations", "create_invitation", "join_channel", "list_invitations",
]

MEMBERS_PER_CHANNEL_MAX = 10_000
INVITATIONS_PER_CHANNEL_MAX = 1_000
# Of one who does not own the channel, so that the owner's find room.
INVITATIONS_PER_MEMBER_MAX = 50


class InvitationLine(Answer):
    """An invitation that can still be used; its code is known to nobody here.

    ``owner``: who made it, and owns the new nodes that come by it. ``uses_left``: null for any number.
    """

    owner: str
    permissions: list[str]
    uses_left: int | None
    expires: int
    created: int


def check_inviter(connection: Connection, channel: str, owner: str, permissions: frozenset[Permission]) -> None:
    """Make sure that somebody may make an invitation that gives these permissions.

    The channel's owner may; where members may, the owner of a node may pass on what one of his nodes may do.

    :raises NotOnHub: there is no such channel. :raises NotPermitted: he may not.
    """
    settings = find_settings(connection, channel)
    if settings.owner == owner:
        return
    if settings.inviters != "members":
        raise NotPermitted(who=owner, action="invite", channel=channel, why="it belongs to another owner")
    rows = connection.execute(
        sa.select(memberships).select_from(memberships.join(nodes, in_force))
        .where(memberships.c.channel == channel, memberships.c.owner == owner))
    own: frozenset[Permission] = frozenset().union(*(to_grant(row).permissions for row in rows))
    if not own:
        raise NotPermitted(who=owner, action="invite", channel=channel, why="none of your nodes is on it")
    if missing := permissions - own:
        raise NotPermitted(who=owner, action="invite", channel=channel,
                           why=f"your nodes there have not {join_names(missing)} themselves")


def create_invitation(
    connection: Connection, channel: str, owner: str, permissions: frozenset[Permission], uses: int | None,
    expires_ms: int, now_ms: int,
) -> str:
    """Make an invitation to a channel; only its hash is kept.

    :param owner: who invites (``check_inviter``), and under whom nodes that nobody owns yet are registered.
    :param uses: how many nodes may use it; None for any number.
    :raises InvalidArgument: the channel has too many, or a member has.
    """
    connection.execute(invitations.delete().where(invitations.c.expires < now_ms))
    count, own = connection.execute(
        sa.select(sa.func.count(), sa.func.count().filter(invitations.c.node_owner == owner))
        .select_from(invitations).where(invitations.c.channel == channel)).one()
    if count >= INVITATIONS_PER_CHANNEL_MAX:
        raise InvalidArgument(what=f"The channel {channel!r} has {count} invitations; close some first.")
    if own >= INVITATIONS_PER_MEMBER_MAX and find_settings(connection, channel).owner != owner:
        raise InvalidArgument(what=f"{owner} has {own} invitations to the channel {channel!r}; wait until some expire.")
    code = secrets.token_urlsafe(16)
    connection.execute(invitations.insert().values(
        hash=hash_code(code), channel=channel, node_owner=owner, permissions=join_names(permissions), uses_left=uses,
        expires=expires_ms, created=now_ms))
    return code


def list_invitations(connection: Connection, channel: str, now_ms: int) -> list[InvitationLine]:
    """Return the invitations of a channel that can still be used, oldest first (their codes are not known here)."""
    rows = connection.execute(
        sa.select(invitations).where(
            invitations.c.channel == channel, invitations.c.expires >= now_ms,
            sa.or_(invitations.c.uses_left.is_(None), invitations.c.uses_left > 0))
        .order_by(invitations.c.created))
    return [InvitationLine(owner=row.node_owner, permissions=row.permissions.split(), uses_left=row.uses_left,
                           expires=row.expires, created=row.created) for row in rows]


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
    :raises NotPermitted: the invitation is unknown, expired or used up, its maker may not invite any more, or the node
        was removed after it was made.
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
    given = split_names(invitation.permissions)
    try:
        check_inviter(connection, invitation.channel, invitation.node_owner, given)
    except NotPermitted:
        raise refuse("who made the invitation may not invite so any more; ask the channel's owner for one") from None
    registered = find_node(connection, node_id)
    owner = invitation.node_owner if registered is None else registered.owner
    rows = connection.execute(sa.select(memberships).where(
        memberships.c.channel == invitation.channel, memberships.c.node == node_id)).all()
    row = next((found for found in rows if found.owner == owner), None)
    # Under whichever owner: forgotten by one and taken by another, it is the same node.
    later = [found.state for found in rows if found.decided >= invitation.created]
    if REMOVED in later:
        raise refuse("the channel's owner removed this node; ask for a new invitation")
    repeated = row is not None and row.state == MEMBER and row.invitation == digest
    if not repeated:
        _spend(connection, digest, refuse)
    _make_room(connection, invitation.channel, refuse)
    register_node(connection, node_id, owner, label, now_ms)
    values = {"requested": join_names(requested or given), "state": MEMBER, "invitation": digest}
    if row is None:
        connection.execute(memberships.insert().values(
            channel=invitation.channel, node=node_id, owner=owner, granted="" if later else join_names(given),
            created=now_ms, decided=0, **values))
    else:
        old = to_grant(row)
        granted = old.granted if later else old.granted | given
        connection.execute(row_of(old).values(granted=join_names(granted), **values))
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
    # Who only asks takes nobody's place.
    count = connection.execute(sa.select(sa.func.count()).select_from(memberships).where(
        memberships.c.channel == channel, memberships.c.state != ASKED)).scalar_one()
    if count >= MEMBERS_PER_CHANNEL_MAX:
        raise refuse(f"the channel has {count} nodes; {MEMBERS_PER_CHANNEL_MAX} are allowed")
