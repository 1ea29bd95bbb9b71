"""What the owner of nodes sees of them, and asks for on channels. The functions run inside ``Registry.call``.

The owner of a channel is in general somebody else: nothing here grants anything. A node's label is its own to say
(``kachery-fast node start --label``), so nobody changes it here.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from ..errors import ActionRefused, InvalidArgument, NotOnHub, NotPermitted
from ..protocol.access import Action, Deny, Grant, Permission, decide
from .actions import Answer
from .channels import find_settings
from .grants import (
    ASKED,
    ID_PREFIX_LENGTH_MIN,
    LEFT,
    MEMBER,
    REMOVED,
    join_names,
    leave_channel,
    permission_names,
    row_of,
    to_grant,
)
from .identity import find_node, register_node
from .tables import approvals, channels, memberships, nodes

__all__ = [
    "MembershipLine", "NodeLine", "ask_permissions", "count_nodes", "find_own_node", "forget_node", "list_memberships",
    "list_nodes", "take_node", "withdraw",
]

NODES_PER_OWNER_MAX = 10_000
NODES_LISTED_MAX = 1_000
# Of one owner on one channel, those that were declined included; and of all together.
ASKING_PER_OWNER_MAX = 50
ASKING_PER_CHANNEL_MAX = 1_000


class NodeLine(Answer):
    """A node, as its owner's list has it. Times are ms since the epoch; ``channels``: how many it is a member of."""

    node: str
    label: str
    version: str
    created: int
    last_seen: int
    channels: int


class MembershipLine(Answer):
    """A node's standing on a channel, as its owner sees it.

    ``state``: "asked" (nobody granted anything yet), "member", or "removed" by the channel's owner. ``permissions``:
    in force, those both ``requested`` and ``granted``. ``why``: for each other permission, what it lacks.
    ``channelOwner``: empty where the node is no member and the channel has no public page.
    """

    channel: str
    channel_owner: str
    state: str
    requested: list[str]
    granted: list[str]
    permissions: list[str]
    why: dict[str, str]


# --- my nodes


def take_node(connection: Connection, node_id: str, owner: str, label: str, now_ms: int) -> None:
    """Register a node under somebody who says that it is his.

    :raises ActionRefused: it is another owner's, or he has too many.
    """
    found = find_node(connection, node_id)
    if found is not None and found.owner != owner:
        raise ActionRefused(who=owner, action="approveNode", why=(
            f"the node {node_id[:16]} belongs to {found.owner}, who would have to forget it first"))
    if found is None and (count := count_nodes(connection, owner)) >= NODES_PER_OWNER_MAX:
        raise ActionRefused(who=owner, action="approveNode", why=f"you have {count} nodes; forget some first")
    register_node(connection, node_id, owner, label, now_ms)


def count_nodes(connection: Connection, owner: str) -> int:
    """Return how many nodes are registered under somebody."""
    return int(connection.execute(sa.select(sa.func.count()).select_from(nodes).where(
        nodes.c.owner == owner, nodes.c.forgotten.is_(None))).scalar_one())


def list_nodes(connection: Connection, owner: str) -> list[NodeLine]:
    """Return somebody's nodes, those first that were seen last; the thousand newest of more."""
    count = sa.select(sa.func.count()).select_from(memberships).where(
        memberships.c.node == nodes.c.id, memberships.c.owner == nodes.c.owner,
        memberships.c.state == MEMBER).scalar_subquery()
    rows = connection.execute(
        sa.select(nodes, count.label("channels")).where(nodes.c.owner == owner, nodes.c.forgotten.is_(None))
        .order_by(nodes.c.last_seen.desc(), nodes.c.id).limit(NODES_LISTED_MAX))
    return [_line(row) for row in rows]


def find_own_node(connection: Connection, owner: str, text: str) -> NodeLine:
    """Find the node of ``owner`` that ``text`` names: an id, the first six or more digits of one, or a label.

    :raises NotOnHub: he has none that is called so. :raises InvalidArgument: he has several.
    """
    own = sa.and_(nodes.c.owner == owner, nodes.c.forgotten.is_(None))
    found = connection.execute(sa.select(nodes, sa.literal(0).label("channels")).where(own, nodes.c.id == text)).all()
    if not found:
        named = nodes.c.label == text
        if len(text) >= ID_PREFIX_LENGTH_MIN and text.isalnum():
            named = sa.or_(named, nodes.c.id.startswith(text))
        found = connection.execute(
            sa.select(nodes, sa.literal(0).label("channels")).where(own, named).limit(2)).all()
    if not found:
        raise NotOnHub(kind=f"node of {owner} called", name=text, advice="See: kachery-fast nodes list")
    if len(found) > 1:
        raise InvalidArgument(what=f"Several nodes of {owner} are called {text!r}. Name one by its id.")
    return _line(found[0])


def forget_node(connection: Connection, node_id: str, owner: str, now_ms: int) -> list[str]:
    """Take a node off all its channels and out of its owner's list; return the channels that it was on.

    What a channel's owner decided on the node stays, and so does the node's row with it: whoever takes the node next
    cannot bring it back by an invitation from before.
    """
    own = sa.and_(memberships.c.node == node_id, memberships.c.owner == owner)
    left = list(connection.execute(sa.select(memberships.c.channel).where(
        own, memberships.c.state == MEMBER).order_by(memberships.c.channel)).scalars())
    connection.execute(memberships.delete().where(own, memberships.c.decided == 0))
    connection.execute(memberships.update().where(own, memberships.c.state.in_([MEMBER, ASKED]))
                       .values(state=LEFT, requested=""))
    connection.execute(approvals.delete().where(approvals.c.node == node_id))
    this = nodes.c.id == node_id
    if connection.execute(sa.select(memberships.c.node).where(memberships.c.node == node_id).limit(1)).first() is None:
        connection.execute(nodes.delete().where(this))
    else:
        connection.execute(nodes.update().where(this).values(forgotten=now_ms, label="", version=""))
    return left


# --- what they may do


def list_memberships(connection: Connection, node_id: str, owner: str, channel: str | None = None,
                     ) -> list[MembershipLine]:
    """Return a node's standing on each of its channels, or on one, by the channel's name."""
    wanted = (
        sa.select(memberships, channels.c.owner.label("channel_owner"), channels.c.listed)
        .select_from(memberships.join(channels, channels.c.name == memberships.c.channel))
        .where(memberships.c.node == node_id, memberships.c.owner == owner, memberships.c.state != LEFT)
        .order_by(memberships.c.channel))
    if channel is not None:
        wanted = wanted.where(memberships.c.channel == channel)
    return [_membership(row) for row in connection.execute(wanted)]


def ask_permissions(
    connection: Connection, node_id: str, owner: str, channel: str, wanted: frozenset[Permission], now_ms: int
) -> bool:
    """Ask for permissions on a channel, in place of those that were asked for; return whether something was lost.

    Of a member it changes what is in force; anybody else's node is put on the channel's list of those that ask.

    :raises NotOnHub: there is no such channel. :raises NotPermitted: the channel's owner removed or declined the node,
        or too many ask.
    """
    settings = find_settings(connection, channel)
    rows = connection.execute(sa.select(memberships).where(
        memberships.c.channel == channel, memberships.c.node == node_id)).all()
    own = next((row for row in rows if row.owner == owner), None)
    if own is not None and own.state in (MEMBER, ASKED):
        old = to_grant(own)
        connection.execute(row_of(old).values(requested=join_names(wanted)))
        return own.state == MEMBER and not old.permissions <= wanted

    def refuse(why: str) -> NotPermitted:
        return NotPermitted(who=owner, action="ask for permissions", channel=channel, why=why)

    if any(row.state == REMOVED for row in rows):
        raise refuse("its owner removed or declined this node; ask him for an invitation")
    asking = memberships.c.state == ASKED
    mine, total = connection.execute(sa.select(
        sa.func.count().filter(memberships.c.owner == owner, memberships.c.state.in_([ASKED, REMOVED])),
        sa.func.count().filter(asking)).select_from(memberships).where(memberships.c.channel == channel)).one()
    if mine >= ASKING_PER_OWNER_MAX and settings.owner != owner:
        raise refuse(f"{mine} of your nodes wait there already, or were declined; ask its owner for an invitation")
    if total >= ASKING_PER_CHANNEL_MAX:
        raise refuse(f"{total} nodes wait there already; ask its owner for an invitation")
    values = {"requested": join_names(wanted), "granted": "", "state": ASKED}
    if own is None:
        connection.execute(memberships.insert().values(
            channel=channel, node=node_id, owner=owner, invitation="", created=now_ms, decided=0, **values))
    else:
        connection.execute(row_of(to_grant(own)).values(**values))
    return False


def withdraw(connection: Connection, node_id: str, owner: str, channel: str) -> None:
    """End a membership, or take back the asking for one.

    :raises NotOnHub: there is neither.
    """
    row = connection.execute(sa.select(memberships).where(
        memberships.c.channel == channel, memberships.c.node == node_id, memberships.c.owner == owner,
        memberships.c.state.in_([MEMBER, ASKED]))).first()
    if row is None:
        raise NotOnHub(kind=f"membership of {node_id[:16]} on", name=channel, advice="See: kachery-fast nodes show")
    if row.state == ASKED and not row.decided:
        connection.execute(memberships.delete().where(
            memberships.c.channel == channel, memberships.c.node == node_id, memberships.c.owner == owner))
    else:
        leave_channel(connection, to_grant(row))


def _line(row: Any) -> NodeLine:
    return NodeLine(node=row.id, label=row.label, version=row.version, created=row.created, last_seen=row.last_seen,
                    channels=row.channels)


def _membership(row: Any) -> MembershipLine:
    grant: Grant = to_grant(row)
    known = row.state == MEMBER or row.listed
    why = {}
    for permission in Permission:
        decision = decide(None if row.state == REMOVED else grant, Action[permission.name])
        if isinstance(decision, Deny):
            why[permission.value] = decision.reason
    return MembershipLine(
        channel=grant.channel, channel_owner=row.channel_owner if known else "", state=row.state,
        requested=permission_names(grant.requested), granted=permission_names(grant.granted),
        permissions=[permission.value for permission in sorted(Permission) if permission.value not in why], why=why)
