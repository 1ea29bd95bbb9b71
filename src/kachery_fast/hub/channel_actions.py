"""What people do with channels: make them, say who may do what on them, invite, and take nodes off again."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

from msgspec import UNSET, UnsetType
from sqlalchemy.engine import Connection

from ..errors import InvalidArgument, KacheryError
from ..protocol.access import Grant, Permission, parse_permissions
from . import channels, grants, invitations
from .actions import Act, Actor, Answer, At, Done, Outside, Request, Scope
from .buckets import Buckets, EngineRow, find_bucket, rows_of
from .engine_actions import check_readers
from .grants import permission_names as _names
from .move_rows import unfinished
from .pubsubs import find_pubsub

__all__ = ["CHANNEL_ACTS"]

INVITATION_DAYS_MAX = 3650.0
INVITATION_USES_MAX = 100_000
_DAY_MS = 24 * 3600 * 1000


# --- requests


class CreateChannel(Request, tag="createChannel"):
    """Make the channel ``name``."""

    name: str


class ListChannels(Request, tag="listChannels"):
    """My channels."""


class ShowChannel(Request, tag="showChannel"):
    """The settings of ``channel``, its nodes, its open invitations, and the damage found in its bucket."""

    channel: str


class ChangeChannel(Request, tag="changeChannel"):
    """Change settings of ``channel``; what is not named stays. Limits take null for "no limit".

    ``listed``: has a public page. ``private``: reading needs a signed URL. ``inviters``: who may invite, the owner
    alone or every owner of a node on it. ``sizeBytesMax``: of its objects together. ``unreadDaysMax``: objects that
    nobody has read for as long go. ``nodeDayBytesMax``: what one node may upload in a day (UTC).
    """

    channel: str
    description: str | UnsetType = UNSET
    listed: bool | UnsetType = UNSET
    private: bool | UnsetType = UNSET
    inviters: Literal["owner", "members"] | UnsetType = UNSET
    size_bytes_max: int | UnsetType | None = UNSET
    unread_days_max: int | UnsetType | None = UNSET
    node_day_bytes_max: int | UnsetType | None = UNSET


class GrantPermissions(Request, tag="grant"):
    """Give ``node`` (an id, the beginning of one, or a label) these permissions on ``channel``."""

    channel: str
    node: str
    permissions: list[str]


class RevokePermissions(Request, tag="revoke"):
    """Take these permissions from ``node``; it holds from the next request on, and cuts the node's connection."""

    channel: str
    node: str
    permissions: list[str]


class Invite(Request, tag="invite"):
    """Make an invitation that gives ``permissions``, for ``uses`` nodes (null: any number) and ``days`` days."""

    channel: str
    permissions: tuple[str, ...] = ("requestFiles", "provideFiles")
    uses: int | None = 1
    days: float = 7.0


class CloseInvitations(Request, tag="closeInvitations"):
    """Make every invitation to ``channel`` useless."""

    channel: str


class RemoveNode(Request, tag="removeNode"):
    """Take ``node`` off ``channel``; only an invitation made later lets it in again."""

    channel: str
    node: str


class DeleteChannel(Request, tag="deleteChannel"):
    """Remove ``channel``, its members' rights and its objects."""

    channel: str


# --- answers


class ChannelMade(Answer):
    """A channel that was made."""

    channel: str
    owner: str


class ChannelList(Answer):
    """Somebody's channels. ``hub``: the hub's address."""

    owner: str
    hub: str
    channels: list[channels.ChannelLine]


class Standing(Answer):
    """What a node may do on a channel: ``permissions`` are those both ``requested`` and ``granted``."""

    channel: str
    node: str
    requested: list[str]
    granted: list[str]
    permissions: list[str]


class MemberStanding(Answer):
    """A node on a channel. ``state``: "member", or "asked" when nobody has granted it anything yet."""

    node: str
    owner: str
    label: str
    version: str
    last_seen: int
    state: str
    requested: list[str]
    granted: list[str]
    permissions: list[str]


class ChannelView(channels.ChannelSettings):
    """A channel as its owner sees it. ``bucket``, ``pubsub``: the names of its owner's that it uses; null: the hub's
    own."""

    bucket: str | None
    pubsub: str | None
    members: list[MemberStanding]
    invitations: list[invitations.InvitationLine]
    damage: list[grants.DamageLine]


class InvitationMade(Answer):
    """An invitation; ``link`` is what the node is to be given."""

    channel: str
    code: str
    link: str
    permissions: list[str]
    uses: int | None
    expires: int


class InvitationsClosed(Answer):
    """How many invitations there were."""

    channel: str
    closed: int


class NodeRemoved(Answer):
    """A node that is no longer on a channel."""

    channel: str
    node: str
    removed: bool = True


class ChannelDeleted(Answer):
    """A channel that is gone, and how many objects went with it. ``left``: why there are some left, where there are."""

    channel: str
    deleted: bool = True
    objects_removed: int = 0
    left: str = ""


# --- how they are performed


def _create(connection: Connection, actor: Actor, request: CreateChannel, at: At) -> Done:
    channels.create_channel(connection, request.name, actor.owner, at.now_ms)
    return Done(ChannelMade(channel=request.name, owner=actor.owner), channels_changed=True)


def _list(connection: Connection, actor: Actor, request: ListChannels, at: At) -> Done:
    found = channels.list_channels(connection, actor.owner)
    return Done(ChannelList(owner=actor.owner, hub=at.hub_url, channels=found))


def _show(connection: Connection, actor: Actor, request: ShowChannel, at: At) -> Done:
    found = channels.require_channel(connection, request.channel, actor.owner, "see the members")
    bucket, pubsub = find_bucket(connection, request.channel), find_pubsub(connection, request.channel)
    return Done(ChannelView(
        **found.fields(), members=[_member(member) for member in
                                 grants.list_members(connection, request.channel, asking=True)],
        invitations=invitations.list_invitations(connection, request.channel, at.now_ms),
        damage=grants.list_damage(connection, request.channel), bucket=None if bucket is None else bucket.name,
        pubsub=None if pubsub is None else pubsub.name))


def _change(connection: Connection, actor: Actor, request: ChangeChannel, at: At) -> Done:
    channels.require_channel(connection, request.channel, actor.owner, "change its settings")
    changed = {name: value for name in channels.CHANGEABLE
               if (value := getattr(request, name)) is not UNSET}
    settings = channels.change_channel(connection, request.channel, changed)
    bucket = find_bucket(connection, request.channel)
    check_readers(connection, request.channel, None if bucket is None else bucket.id)
    return Done(settings, channels_changed="private" in changed)


def _grant(connection: Connection, actor: Actor, request: GrantPermissions, at: At) -> Done:
    channels.require_channel(connection, request.channel, actor.owner, "grant permissions")
    grant = grants.resolve_member(connection, request.channel, request.node)
    changed = grants.change_granted(connection, grant, _named(request.permissions), frozenset(), at.now_ms)
    return Done(_standing(changed))


def _revoke(connection: Connection, actor: Actor, request: RevokePermissions, at: At) -> Done:
    channels.require_channel(connection, request.channel, actor.owner, "revoke permissions")
    grant = grants.resolve_member(connection, request.channel, request.node)
    changed = grants.change_granted(connection, grant, frozenset(), _named(request.permissions), at.now_ms)
    return Done(_standing(changed), cut=(grant.node_id,))


def _remove(connection: Connection, actor: Actor, request: RemoveNode, at: At) -> Done:
    channels.require_channel(connection, request.channel, actor.owner, "remove nodes")
    grant = grants.resolve_member(connection, request.channel, request.node)
    grants.remove_member(connection, grant, at.now_ms)
    return Done(NodeRemoved(channel=request.channel, node=grant.node_id), cut=(grant.node_id,))


def _invite(connection: Connection, actor: Actor, request: Invite, at: At) -> Done:
    permissions = parse_permissions(request.permissions)
    if not 0 < request.days <= INVITATION_DAYS_MAX:
        raise InvalidArgument(what=f"An invitation holds for up to {INVITATION_DAYS_MAX:g} days, not {request.days:g}.")
    if request.uses is not None and not 1 <= request.uses <= INVITATION_USES_MAX:
        raise InvalidArgument(what=f"An invitation has 1 to {INVITATION_USES_MAX} uses, not {request.uses}.")
    invitations.check_inviter(connection, request.channel, actor.owner, permissions)
    expires = at.now_ms + int(request.days * _DAY_MS)
    code = invitations.create_invitation(
        connection, request.channel, actor.owner, permissions, request.uses, expires, at.now_ms)
    return Done(InvitationMade(
        channel=request.channel, code=code, link=f"{at.hub_url}/join/{code}", permissions=_names(permissions),
        uses=request.uses, expires=expires))


def _close_invitations(connection: Connection, actor: Actor, request: CloseInvitations, at: At) -> Done:
    channels.require_channel(connection, request.channel, actor.owner, "close invitations")
    closed = invitations.close_invitations(connection, request.channel)
    return Done(InvitationsClosed(channel=request.channel, closed=closed))


def _delete(connection: Connection, actor: Actor, request: DeleteChannel, at: At) -> Done:
    channels.require_channel(connection, request.channel, actor.owner, "delete it")
    bucket = find_bucket(connection, request.channel)
    # Also the hub's own, which it may have had before: whoever takes the name next finds nothing of it. And where it
    # was on its way to, if that has not ended.
    owners = {bucket, *rows_of(connection, unfinished(connection, request.channel)).values()} - {None}
    members = channels.delete_channel(connection, request.channel)
    return Done(partial(_empty, request.channel, (*owners, None)), cut=tuple(members), channels_changed=True)


async def _empty(channel: str, buckets: Sequence[EngineRow | None], outside: Outside) -> ChannelDeleted:
    outside.usage.forget(channel)
    removed, left = 0, ""
    for bucket in buckets:
        try:
            removed += await outside.buckets.run(
                partial(_remove_all, outside.buckets, bucket, channel), own=bucket is None)
        except KacheryError as error:
            if bucket is None:
                raise
            # The channel is gone; what is in a bucket that cannot be reached, or not be written to, is its owner's.
            left = left or error.message
    return ChannelDeleted(channel=channel, objects_removed=removed, left=left)


def _remove_all(buckets: Buckets, bucket: EngineRow | None, channel: str) -> int:
    return buckets.use(bucket).remove_channel(channel)


CHANNEL_ACTS = (
    Act(CreateChannel, ChannelMade, Scope.MANAGE, _create),
    Act(ListChannels, ChannelList, Scope.READ, _list, changes=False),
    Act(ShowChannel, ChannelView, Scope.READ, _show, changes=False),
    Act(ChangeChannel, channels.ChannelSettings, Scope.MANAGE, _change),
    Act(GrantPermissions, Standing, Scope.GRANT, _grant),
    Act(RevokePermissions, Standing, Scope.GRANT, _revoke),
    Act(RemoveNode, NodeRemoved, Scope.GRANT, _remove),
    Act(Invite, InvitationMade, Scope.GRANT, _invite),
    Act(CloseInvitations, InvitationsClosed, Scope.GRANT, _close_invitations),
    Act(DeleteChannel, ChannelDeleted, Scope.MANAGE, _delete),
)


def _named(names: list[str]) -> frozenset[Permission]:
    found = parse_permissions(names)
    if not found:
        raise InvalidArgument(what="Name at least one permission, or all.")
    return found


def _standing(grant: Grant) -> Standing:
    return Standing(channel=grant.channel, node=grant.node_id, requested=_names(grant.requested),
                    granted=_names(grant.granted), permissions=_names(grant.permissions))


def _member(member: grants.MemberRecord) -> MemberStanding:
    grant = member.grant
    return MemberStanding(
        node=grant.node_id, owner=grant.owner_id, label=member.label, version=member.version,
        last_seen=member.last_seen, state=member.state, requested=_names(grant.requested),
        granted=_names(grant.granted), permissions=_names(grant.permissions))
