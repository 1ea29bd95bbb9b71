"""``POST /api/node``: what nodes ask of the hub.

Every request passes the same gates in this order: signature, freshness, registration, grant, rate. A grant is read
from the registry for each request and decided on by ``protocol.access``; nothing is cached, so what an owner takes
away is gone with the next request.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sqlalchemy.engine import Connection

from ..config import Settings
from ..errors import BadMessage, InvalidArgument, NotPermitted, ObjectMissing, RateLimited, StaleMessage, TooLarge
from ..protocol.access import Action, Deny, Grant, band_capability, decide, parse_permissions
from ..protocol.hub_bodies import (
    ChannelInfo,
    GetNodeConfig,
    GetPubsubToken,
    HubBody,
    JoinChannel,
    LeaveChannel,
    Member,
    NodeConfig,
    ObjectSpec,
    ReportCorrupt,
    SignedObject,
    SignedUploads,
    SignUploads,
)
from ..protocol.manifest import CHUNK_SIZE_BYTES_MAX
from ..protocol.messages import decode_hub_request
from ..protocol.names import object_name
from ..protocol.signing import FreshnessGuard
from . import grants, identity
from .engines import BucketEngine, PubsubEngine
from .limits import RateLimiter
from .registry import Registry

__all__ = ["NodeApi"]

_log = logging.getLogger("kachery_fast.hub")

RATE_WINDOW_SECONDS = 10.0
# Each check reads up to 64 MiB.
CORRUPT_CHECKS_PER_NODE_MAX = 4
JOIN_FAILURES_PER_MINUTE_MAX = 10
# Seen request ids are kept per registered node, so that none can fill the memory of the others'.
REQUESTS_REMEMBERED_PER_NODE_MAX = 50_000


class NodeApi:
    """Answers nodes. One for each hub, used on its event loop."""

    def __init__(
        self, registry: Registry, bucket: BucketEngine, pubsub: PubsubEngine, settings: Settings,
        clock: Callable[[], float],
    ) -> None:
        self._registry = registry
        self._bucket = bucket
        self._pubsub = pubsub
        self._settings = settings
        self._clock = clock
        self._started_ms = int(clock() * 1000)
        self._fresh: dict[str, FreshnessGuard] = {}
        self._fresh_strangers = FreshnessGuard(settings.message_age_seconds_max)
        self._sign_rate = RateLimiter(settings.sign_rate_per_node_max, RATE_WINDOW_SECONDS)
        self._join_failures = RateLimiter(JOIN_FAILURES_PER_MINUTE_MAX / 60, 60.0)
        self._checking: Counter[str] = Counter()
        # One thread: hash and removal of an object are one step, and damaged objects are rare.
        self._checker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hub-checker")

    def close(self) -> None:
        """Finish the checks that were begun."""
        self._checker.shutdown()

    async def answer(self, data: bytes, address: str) -> Any:
        """Answer one request; the answer is a struct or dict that becomes JSON.

        :param data: the envelope as it came. :param address: whom to count wrong invitations against.
        :raises KacheryError: the request is refused; the error says why.
        """
        try:
            body, node_id = decode_hub_request(data)
        except RecursionError:
            raise BadMessage(why="it is nested too deeply") from None
        node, grant = await self._registry.call(_find_standing, node_id, body.channel)
        # Between this reading of the grant and what is done by it nothing is awaited, so a revocation that is
        # answered has come either before the reading or after the deed.
        self._check_fresh(body, node_id, registered=node is not None)
        if isinstance(body, JoinChannel):
            return await self._join(body, node_id, address)
        if node is None:
            raise NotPermitted(who=f"node {node_id[:16]}", action=_ACTIONS[type(body)], channel=body.channel or "(any)",
                               why="it is not registered with this hub; join a channel by an invitation first")
        if isinstance(body, GetNodeConfig):
            return await self._node_config(body, node)
        if isinstance(body, LeaveChannel):
            return await self._leave(body, node_id, grant)
        if isinstance(body, GetPubsubToken):
            grant = _allowed(grant, node_id, body.channel, Action.CONNECT)
            return self._pubsub.token(node_id, band_capability(grant), self._settings.token_life_seconds)
        if isinstance(body, SignUploads):
            _allowed(grant, node_id, body.channel, Action.UPLOAD_FILE)
            return self._sign_uploads(body, node_id)
        if isinstance(body, ReportCorrupt):
            return await self._report_corrupt(body, _allowed(grant, node_id, body.channel, Action.REPORT_CORRUPT))
        raise BadMessage(why=f"this hub cannot answer {type(body).__name__}")

    def _check_fresh(self, body: HubBody, node_id: str, *, registered: bool) -> None:
        now = self._clock()
        if not 16 <= len(body.id) <= 64:
            raise InvalidArgument(what="A request's id is 16 to 64 random characters.")
        # A join is remembered where it was seen first, before its node was registered.
        guard = self._fresh_strangers
        if registered and not isinstance(body, JoinChannel):
            guard = self._fresh.get(node_id) or FreshnessGuard(
                self._settings.message_age_seconds_max, REQUESTS_REMEMBERED_PER_NODE_MAX)
            self._fresh[node_id] = guard
        guard.check(node_id, body.id, body.time, now)
        if body.time < self._started_ms:
            # The ids seen before a restart are not known any more, so what was signed before it could be a repetition.
            raise StaleMessage(time=body.time, now=int(now * 1000), limit=self._settings.message_age_seconds_max,
                               why="it was signed before this hub's start")

    # --- membership

    async def _join(self, body: JoinChannel, node_id: str, address: str) -> ChannelInfo:
        requested = parse_permissions(body.permissions)
        now = self._clock()
        # Taken beforehand, so that many guesses at once are counted too.
        self._join_failures.spend(
            address, 1, now, who=f"address {address}",
            limit=f"{JOIN_FAILURES_PER_MINUTE_MAX} invitations that do not hold are allowed in a minute")
        grant = await self._registry.call(
            grants.join_channel, node_id, body.invitation, body.label, requested, int(now * 1000))
        self._join_failures.refund(address, 1, self._clock())
        _log.info("node %s joined %s", node_id[:16], grant.channel)
        return await self._channel_info(grant, await self._registry.call(grants.find_channel_owner, grant.channel))

    async def _leave(self, body: LeaveChannel, node_id: str, grant: Grant | None) -> dict[str, Any]:
        if grant is None:
            raise NotPermitted(who=f"node {node_id[:16]}", action="leave", channel=body.channel,
                               why="the node is not a member of the channel")
        await self._registry.call(grants.leave_channel, grant)
        await self._pubsub.revoke(node_id)
        _log.info("node %s left %s", node_id[:16], body.channel)
        return {"left": body.channel}

    async def _node_config(self, body: GetNodeConfig, node: identity.NodeRecord) -> NodeConfig:
        await self._registry.call(identity.touch_node, node.id, body.label, body.version, int(self._clock() * 1000))
        standings = await self._registry.call(grants.list_node_grants, node.id)
        infos = [await self._channel_info(grant, owner) for grant, owner in standings]
        return NodeConfig(time=int(self._clock() * 1000), owner=node.owner, channels=infos)

    async def _channel_info(self, grant: Grant, channel_owner: str) -> ChannelInfo:
        members: list[Member] = []
        if not isinstance(decide(grant, Action.SEE_CHANNEL), Deny):
            records = await self._registry.call(grants.list_members, grant.channel)
            members = [
                Member(node_id=record.grant.node_id, label=record.label, last_seen=record.last_seen,
                       permissions=_names(record.grant))
                for record in records
            ]
        return ChannelInfo(
            name=grant.channel, owner=channel_owner, permissions=_names(grant), bucket_url=self._bucket.url_base,
            pubsub=self._pubsub.info(), members=members)

    # --- bands and bucket

    def _sign_uploads(self, body: SignUploads, node_id: str) -> SignedUploads:
        count = len(body.objects)
        if count > self._settings.sign_batch_max:
            raise TooLarge(what="A request for upload URLs", size=count, limit=self._settings.sign_batch_max,
                           setting="sign_batch_max, counted in objects")
        for item in body.objects:
            if item.size > CHUNK_SIZE_BYTES_MAX:
                raise TooLarge(what=f"The object {item.sha1}", size=item.size, limit=CHUNK_SIZE_BYTES_MAX,
                               setting="the longest chunk")
        self._sign_rate.spend(
            node_id, count, self._clock(), who=f"node {node_id[:16]}",
            limit=f"{self._settings.sign_rate_per_node_max:g} upload URLs a second are allowed")
        return SignedUploads(uploads=[self._sign(body.channel, item) for item in body.objects])

    def _sign(self, channel: str, item: ObjectSpec) -> SignedObject:
        name = object_name(channel, item.sha1)
        signed = self._bucket.sign_put(name, item.size, self._settings.url_life_seconds)
        return SignedObject(sha1=item.sha1, object=name, url=signed.url, headers=signed.headers)

    async def _report_corrupt(self, body: ReportCorrupt, grant: Grant) -> dict[str, Any]:
        node_id = grant.node_id
        if self._checking[node_id] >= CORRUPT_CHECKS_PER_NODE_MAX:
            raise RateLimited(who=f"node {node_id[:16]}", retry_seconds=1.0,
                              limit=f"{CORRUPT_CHECKS_PER_NODE_MAX} reports of damage at once are allowed")
        self._checking[node_id] += 1
        try:
            actual, removed = await asyncio.get_running_loop().run_in_executor(
                self._checker, self._check_object, object_name(body.channel, body.sha1), body.sha1)
        finally:
            self._checking[node_id] -= 1
            if not self._checking[node_id]:
                del self._checking[node_id]
        if removed:
            # Only damage that was there is written down, so reports cannot fill the registry.
            await self._registry.call(
                grants.record_damage, grant, body.sha1, body.found, actual, int(self._clock() * 1000))
        return {"removed": removed, "actual": actual}

    def _check_object(self, name: str, sha1: str) -> tuple[str | None, bool]:
        """Believe nobody: the hub hashes the object itself, and removes it only when its bytes are wrong."""
        try:
            actual = self._bucket.sha1(name)
        except ObjectMissing:
            return None, False
        if actual == sha1:
            return actual, False
        _log.warning("object %s is damaged (its bytes have the SHA-1 %s); it is removed", name, actual)
        return actual, self._bucket.remove(name)


_ACTIONS: dict[type, str] = {
    LeaveChannel: "leave",
    GetNodeConfig: Action.SEE_CHANNEL.value,
    GetPubsubToken: Action.CONNECT.value,
    SignUploads: Action.UPLOAD_FILE.value,
    ReportCorrupt: Action.REPORT_CORRUPT.value,
}


def _find_standing(
    connection: Connection, node_id: str, channel: str
) -> tuple[identity.NodeRecord | None, Grant | None]:
    grant = grants.find_grant(connection, node_id, channel) if channel else None
    return identity.find_node(connection, node_id), grant


def _allowed(grant: Grant | None, node_id: str, channel: str, action: Action) -> Grant:
    decision = decide(grant, action)
    if isinstance(decision, Deny):
        raise NotPermitted(who=f"node {node_id[:16]}", action=action.value, channel=channel, why=decision.reason)
    assert grant is not None, "nobody is allowed anything without a grant"
    return grant


def _names(grant: Grant) -> list[str]:
    return sorted(permission.value for permission in grant.permissions)
