"""``POST /api/owner``: what a channel's owner asks of the hub, by a bearer token.

A request is one JSON object with a ``type``; unknown types and unknown fields are refused, so that a misspelt
permission change never passes as done.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import msgspec
from sqlalchemy.engine import Connection

from ..errors import BadMessage, InvalidArgument, OwnerTokenRefused
from ..protocol.access import Grant, Permission, parse_permissions
from . import grants, identity
from .engines import BucketEngine, PubsubEngine
from .limits import RateLimiter
from .registry import Registry

__all__ = ["OwnerApi"]

_log = logging.getLogger("kachery_fast.hub")

TOKEN_FAILURES_PER_MINUTE_MAX = 10
INVITATION_DAYS_MAX = 3650.0
INVITATION_USES_MAX = 100_000
_DAY_MS = 24 * 3600 * 1000


class _Request(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", rename="camel", kw_only=True):
    pass


class CreateChannel(_Request, tag="createChannel"):
    """Make the channel ``name``."""

    name: str


class ListChannels(_Request, tag="listChannels"):
    """My channels."""


class ShowChannel(_Request, tag="showChannel"):
    """The members of ``channel``, its open invitations, and the damage found in its bucket."""

    channel: str


class GrantPermissions(_Request, tag="grant"):
    """Give ``node`` (an id, the beginning of one, or a label) these permissions on ``channel``."""

    channel: str
    node: str
    permissions: list[str]


class RevokePermissions(_Request, tag="revoke"):
    """Take these permissions from ``node``; it holds from the next request on, and cuts the node's connection."""

    channel: str
    node: str
    permissions: list[str]


class Invite(_Request, tag="invite"):
    """Make an invitation that gives ``permissions``, for ``uses`` nodes (null: any number) and ``days`` days."""

    channel: str
    permissions: tuple[str, ...] = ("requestFiles", "provideFiles")
    uses: int | None = 1
    days: float = 7.0


class CloseInvitations(_Request, tag="closeInvitations"):
    """Make every invitation to ``channel`` useless."""

    channel: str


class RemoveNode(_Request, tag="removeNode"):
    """Take ``node`` off ``channel``; only an invitation made later lets it in again."""

    channel: str
    node: str


class DeleteChannel(_Request, tag="deleteChannel"):
    """Remove ``channel``, its members' rights and its objects."""

    channel: str


OwnerRequest = (
    CreateChannel | ListChannels | ShowChannel | GrantPermissions | RevokePermissions | Invite | CloseInvitations
    | RemoveNode | DeleteChannel
)
_decoder: msgspec.json.Decoder[OwnerRequest] = msgspec.json.Decoder(OwnerRequest)


class OwnerApi:
    """Answers channel owners. One for each hub, used on its event loop.

    :param public_url: returns the hub's address as other machines know it, for invitation links.
    """

    def __init__(
        self, registry: Registry, bucket: BucketEngine, pubsub: PubsubEngine, clock: Callable[[], float],
        public_url: Callable[[], str],
    ) -> None:
        self._registry = registry
        self._bucket = bucket
        self._pubsub = pubsub
        self._clock = clock
        self._public_url = public_url
        self._failures = RateLimiter(TOKEN_FAILURES_PER_MINUTE_MAX / 60, 60.0)

    async def answer(self, data: bytes, authorization: str, address: str) -> dict[str, Any]:
        """Answer one request.

        :param authorization: the header of this name. :param address: whom to count wrong tokens against.
        :raises KacheryError: the request is refused; the error says why.
        """
        owner = await self._authenticate(authorization, address)
        try:
            request = _decoder.decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise BadMessage(why=str(error)) from None
        return await self.perform(owner, request)

    async def perform(self, owner: str, request: OwnerRequest) -> dict[str, Any]:
        """Do what an owner, known by now, asks; plain JSON comes back.

        :raises KacheryError: it cannot be done.
        """
        now_ms = int(self._clock() * 1000)
        answer: dict[str, Any]
        cut: list[str]
        answer, cut = await self._registry.call(_perform, owner, request, now_ms)
        for node_id in cut:
            await self._pubsub.revoke(node_id)
        if isinstance(request, DeleteChannel):
            answer["objectsRemoved"] = await asyncio.get_running_loop().run_in_executor(
                None, self._bucket.remove_channel, request.channel)
        if isinstance(request, ListChannels):
            answer["hub"] = self._public_url()
        if isinstance(request, Invite):
            answer["link"] = f"{self._public_url()}/join/{answer['code']}"
        if not isinstance(request, (ListChannels, ShowChannel)):
            _log.info("owner %s: %s %s", owner, type(request).__name__, getattr(request, "channel", ""))
        return answer

    async def _authenticate(self, authorization: str, address: str) -> str:
        # Taken beforehand, so that many guesses at once are counted too.
        self._failures.spend(address, 1, self._clock(), who=f"address {address}",
                             limit=f"{TOKEN_FAILURES_PER_MINUTE_MAX} wrong tokens are allowed in a minute")
        scheme, _, token = authorization.partition(" ")
        owner = None
        if scheme.lower() == "bearer" and token.strip():
            owner = await self._registry.call(identity.find_token_owner, token.strip())
        if owner is None:
            raise OwnerTokenRefused(why="it is not one of this hub's" if token.strip() else "none was sent")
        self._failures.refund(address, 1, self._clock())
        return owner


def _perform(
    connection: Connection, owner: str, request: OwnerRequest, now_ms: int
) -> tuple[dict[str, Any], list[str]]:
    """Perform a request in one transaction; return the answer, and the nodes whose connections must be cut."""
    if isinstance(request, ListChannels):
        return {"owner": owner, "channels": grants.list_channels(connection, owner)}, []
    if isinstance(request, CreateChannel):
        grants.create_channel(connection, request.name, owner, now_ms)
        return {"channel": request.name, "owner": owner}, []
    channel = request.channel
    grants.require_channel(connection, channel, owner, _VERBS[type(request)])
    if isinstance(request, ShowChannel):
        return {
            "channel": channel,
            "owner": owner,
            "members": [_plain(member) for member in grants.list_members(connection, channel)],
            "invitations": grants.list_invitations(connection, channel, now_ms),
            "damage": grants.list_damage(connection, channel),
        }, []
    if isinstance(request, Invite):
        return _invite(connection, request, now_ms), []
    if isinstance(request, CloseInvitations):
        return {"channel": channel, "closed": grants.close_invitations(connection, channel)}, []
    if isinstance(request, DeleteChannel):
        return {"channel": channel, "deleted": True}, grants.delete_channel(connection, channel)
    grant = grants.resolve_member(connection, channel, request.node)
    if isinstance(request, RemoveNode):
        grants.remove_member(connection, grant, now_ms)
        return {"channel": channel, "node": grant.node_id, "removed": True}, [grant.node_id]
    named = parse_permissions(request.permissions)
    if not named:
        raise InvalidArgument(what="Name at least one permission, or all.")
    none: frozenset[Permission] = frozenset()
    if isinstance(request, GrantPermissions):
        return _standing(grants.change_granted(connection, grant, named, none, now_ms)), []
    return _standing(grants.change_granted(connection, grant, none, named, now_ms)), [grant.node_id]


def _invite(connection: Connection, request: Invite, now_ms: int) -> dict[str, Any]:
    permissions = parse_permissions(request.permissions)
    if not 0 < request.days <= INVITATION_DAYS_MAX:
        raise InvalidArgument(what=f"An invitation holds for up to {INVITATION_DAYS_MAX:g} days, not {request.days:g}.")
    if request.uses is not None and not 1 <= request.uses <= INVITATION_USES_MAX:
        raise InvalidArgument(what=f"An invitation has 1 to {INVITATION_USES_MAX} uses, not {request.uses}.")
    expires = now_ms + int(request.days * _DAY_MS)
    code = grants.create_invitation(connection, request.channel, permissions, request.uses, expires, now_ms)
    return {"channel": request.channel, "code": code, "permissions": _names(permissions), "uses": request.uses,
            "expires": expires}


def _standing(grant: Grant) -> dict[str, Any]:
    return {"channel": grant.channel, "node": grant.node_id, "requested": _names(grant.requested),
            "granted": _names(grant.granted), "permissions": _names(grant.permissions)}


def _plain(member: grants.MemberRecord) -> dict[str, Any]:
    standing = _standing(member.grant)
    del standing["channel"]
    return {**standing, "owner": member.grant.owner_id, "label": member.label, "version": member.version,
            "lastSeen": member.last_seen}


def _names(permissions: frozenset[Permission]) -> list[str]:
    return sorted(permission.value for permission in permissions)


_VERBS: dict[type, str] = {
    ShowChannel: "see the members",
    GrantPermissions: "grant permissions",
    RevokePermissions: "revoke permissions",
    Invite: "invite",
    CloseInvitations: "close invitations",
    RemoveNode: "remove nodes",
    DeleteChannel: "delete it",
}
