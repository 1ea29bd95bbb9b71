"""What people do with nodes: say that one is theirs, see what it may do, ask for more, leave, and forget it.

Whoever acts, does so on nodes of his own: others' are not found. Only a code reaches a node that is nobody's.
"""

from __future__ import annotations

from sqlalchemy.engine import Connection

from ..errors import InvalidArgument, KacheryError
from ..protocol.access import Permission, parse_permissions
from . import node_owners
from .actions import Act, Actor, Answer, At, Done, Request, Scope
from .approvals import end_approval, find_waiting
from .grants import permission_names
from .identity import find_node

__all__ = ["NODE_ACTS"]


# --- requests


class FindApproval(Request, tag="findApproval"):
    """Which node shows ``code``, and what does it ask for? To be looked at before it is approved."""

    code: str


class ApproveNode(Request, tag="approveNode"):
    """The node that shows ``code`` is mine: register it under me, and ask for what it asks for in my name."""

    code: str


class DenyNode(Request, tag="denyNode"):
    """The node that shows ``code`` is not mine, or not to be approved. Its code is spent."""

    code: str


class ListNodes(Request, tag="listNodes"):
    """My nodes, those first that were seen last; the thousand newest of more."""


class ShowNode(Request, tag="showNode"):
    """My node ``node`` (an id, the beginning of one, or a label), and what it may do where, and why not."""

    node: str


class RequestPermissions(Request, tag="requestPermissions"):
    """Ask for these permissions on ``channel`` for my node, in place of those that were asked for before.

    In force is what the channel's owner grants of it. A node that is not on the channel waits on its list.
    """

    node: str
    channel: str
    permissions: list[str]


class Withdraw(Request, tag="withdraw"):
    """Take my node off ``channel``, or take back its asking."""

    node: str
    channel: str


class ForgetNode(Request, tag="forgetNode"):
    """My node is mine no more: its memberships end, its connection is cut, and anybody may take it by a new code."""

    node: str


# --- answers


class ApprovalView(Answer):
    """A node that waits to be approved.

    ``label`` and ``version`` are what it says of itself. ``asked`` and ``expires``: ms since the epoch. ``address``:
    where it asked from. ``owner``: whose it is already, empty for nobody's. ``channel``, ``permissions``: what it asks
    for; empty for nothing.
    """

    node: str
    label: str
    version: str
    asked: int
    expires: int
    address: str
    owner: str
    channel: str
    permissions: list[str]


class NodeApproved(Answer):
    """A node that is the actor's now. ``membership``: on the channel that it asked for, null where ``refused`` says why
    it is not even on the list there, or none was asked for."""

    node: str
    label: str
    owner: str
    membership: node_owners.MembershipLine | None
    refused: str


class NodeDenied(Answer):
    """A node that was not approved."""

    node: str
    denied: bool = True


class NodeList(Answer):
    """Somebody's nodes. ``total``: how many there are. ``hub``: the hub's address."""

    owner: str
    hub: str
    total: int
    nodes: list[node_owners.NodeLine]


class NodeView(Answer):
    """A node as its owner sees it."""

    node: str
    owner: str
    label: str
    version: str
    created: int
    last_seen: int
    memberships: list[node_owners.MembershipLine]


class Withdrawn(Answer):
    """A node that is no longer on a channel, or on its list."""

    channel: str
    node: str
    withdrawn: bool = True


class NodeForgotten(Answer):
    """A node that is nobody's. ``channels``: those that it was on."""

    node: str
    channels: list[str]
    forgotten: bool = True


# --- how they are performed


def _find_approval(connection: Connection, actor: Actor, request: FindApproval, at: At) -> Done:
    approval = find_waiting(connection, request.code, at.now_ms)
    node = find_node(connection, approval.node_id)
    return Done(ApprovalView(
        node=approval.node_id, label=approval.label, version=approval.version, asked=approval.created,
        expires=approval.expires, address=approval.address, owner=node.owner if node is not None else "",
        channel=approval.channel, permissions=permission_names(approval.requested)))


def _approve(connection: Connection, actor: Actor, request: ApproveNode, at: At) -> Done:
    approval = find_waiting(connection, request.code, at.now_ms)
    node_id, refused, lost, membership = approval.node_id, "", False, None
    node_owners.take_node(connection, node_id, actor.owner, approval.label, at.now_ms)
    if approval.channel:
        try:
            lost = node_owners.ask_permissions(
                connection, node_id, actor.owner, approval.channel, approval.requested, at.now_ms)
            (membership,) = node_owners.list_memberships(connection, node_id, actor.owner, approval.channel)
        except KacheryError as error:  # nothing was written then; the node is his all the same
            refused = error.message
    end_approval(connection, approval, approved=True)
    return Done(NodeApproved(node=node_id, label=approval.label, owner=actor.owner, membership=membership,
                             refused=refused), cut=(node_id,) if lost else (), left=(approval.channel,), node=node_id)


def _deny(connection: Connection, actor: Actor, request: DenyNode, at: At) -> Done:
    approval = find_waiting(connection, request.code, at.now_ms)
    end_approval(connection, approval, approved=False)
    return Done(NodeDenied(node=approval.node_id), node=approval.node_id)


def _list(connection: Connection, actor: Actor, request: ListNodes, at: At) -> Done:
    return Done(NodeList(owner=actor.owner, hub=at.hub_url, total=node_owners.count_nodes(connection, actor.owner),
                         nodes=node_owners.list_nodes(connection, actor.owner)))


def _show(connection: Connection, actor: Actor, request: ShowNode, at: At) -> Done:
    found = node_owners.find_own_node(connection, actor.owner, request.node)
    return Done(NodeView(
        node=found.node, owner=actor.owner, label=found.label, version=found.version, created=found.created,
        last_seen=found.last_seen, memberships=node_owners.list_memberships(connection, found.node, actor.owner)))


def _request(connection: Connection, actor: Actor, request: RequestPermissions, at: At) -> Done:
    node_id = node_owners.find_own_node(connection, actor.owner, request.node).node
    wanted: frozenset[Permission] = parse_permissions(request.permissions)
    if not wanted:
        raise InvalidArgument(what="Name at least one permission, or all; to want none, withdraw from the channel.")
    lost = node_owners.ask_permissions(connection, node_id, actor.owner, request.channel, wanted, at.now_ms)
    (membership,) = node_owners.list_memberships(connection, node_id, actor.owner, request.channel)
    return Done(membership, cut=(node_id,) if lost else (), node=node_id)


def _withdraw(connection: Connection, actor: Actor, request: Withdraw, at: At) -> Done:
    node_id = node_owners.find_own_node(connection, actor.owner, request.node).node
    node_owners.withdraw(connection, node_id, actor.owner, request.channel)
    return Done(Withdrawn(channel=request.channel, node=node_id), cut=(node_id,), node=node_id)


def _forget(connection: Connection, actor: Actor, request: ForgetNode, at: At) -> Done:
    node_id = node_owners.find_own_node(connection, actor.owner, request.node).node
    left = node_owners.forget_node(connection, node_id, actor.owner, at.now_ms)
    return Done(NodeForgotten(node=node_id, channels=left), cut=(node_id,), left=tuple(left), node=node_id)


NODE_ACTS = (
    Act(FindApproval, ApprovalView, Scope.READ, _find_approval, changes=False, by_code=True),
    Act(ApproveNode, NodeApproved, Scope.MANAGE, _approve, by_code=True),
    Act(DenyNode, NodeDenied, Scope.MANAGE, _deny, by_code=True),
    Act(ListNodes, NodeList, Scope.READ, _list, changes=False),
    Act(ShowNode, NodeView, Scope.READ, _show, changes=False),
    Act(RequestPermissions, node_owners.MembershipLine, Scope.GRANT, _request),
    Act(Withdraw, Withdrawn, Scope.GRANT, _withdraw),
    Act(ForgetNode, NodeForgotten, Scope.MANAGE, _forget),
)
