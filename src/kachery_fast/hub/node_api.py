"""``POST /api/node``: what nodes ask of the hub.

Every request passes the same gates in this order: signature, freshness, registration, grant, rate. A grant is read
from the registry for each request and decided on by ``protocol.access``; nothing is cached, so what an owner takes
away is gone with the next request.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

from ..config import Settings
from ..errors import BadMessage, InvalidArgument, NotOnHub, NotPermitted, StaleMessage, TooLarge
from ..protocol.access import Action, Deny, Grant, band_capability, decide, parse_permissions
from ..protocol.hub_bodies import (
    AskApproval,
    ChannelInfo,
    ClaimTask,
    FindApproval,
    FindTask,
    FinishTask,
    GetNodeConfig,
    GetPubsubToken,
    HubBody,
    JoinChannel,
    KeepTasks,
    LeaveChannel,
    Member,
    NodeConfig,
    ReportBadResult,
    ReportCorrupt,
    SignDownloads,
    SignedUploads,
    SignFeedUploads,
    SignTaskResult,
    SignUploads,
)
from ..protocol.messages import decode_hub_request
from ..protocol.names import check_channel_name
from ..protocol.signing import FreshnessGuard, check_age
from . import grants, identity, seen
from .approvals import Approvals
from .buckets import Buckets
from .damage import Damage
from .downloads import Downloads
from .engines import BucketEngine
from .gate import require
from .limits import RateLimiter
from .pubsubs import Pubsubs, find_pubsub
from .quotas import Quotas
from .registry import Registry
from .standing import ChannelPlace, Standing, find_allowance, find_public, find_standing, join_once, list_standings
from .tasks import TaskBody, Tasks
from .uploads import UploadBody, Uploads
from .usage import Place, day_of

__all__ = ["NodeApi"]

_log = logging.getLogger("kachery_fast.hub")

JOIN_FAILURES_PER_MINUTE_MAX = 10
# Of one address, unsigned; a client of 2022 asks before each file that it loads directly.
BUCKET_QUESTIONS_PER_SECOND_MAX = 50
# Seen request ids are kept per registered node, so that none can fill the memory of the others'. They are remembered
# for four minutes; a node that runs tasks at the rate of hub/tasks.py makes 48,000 requests about them in that time.
REQUESTS_REMEMBERED_PER_NODE_MAX = 100_000
SEEN_PRUNE_SECONDS = 30.0
# The longest that a node has to say is a thousand tasks that it keeps, or the receipt of an action: 70 kB. To check a
# signature costs up to 1.3 us a byte, and strangers may ask for that too.
REQUEST_SIZE_BYTES_MAX = 256 * 1024
# What is longer is read in a thread, while the others are answered.
_READ_AT_ONCE_BYTES = 8 * 1024


class _BucketQuestion(msgspec.Struct, rename="camel"):
    channel_name: str


class NodeApi:
    """Answers nodes. One for each hub, used on its event loop.

    :param public_url: returns the hub's address as other machines know it, for links.
    """

    def __init__(
        self, registry: Registry, buckets: Buckets, pubsubs: Pubsubs, quotas: Quotas, settings: Settings,
        clock: Callable[[], float], public_url: Callable[[], str],
    ) -> None:
        self._registry = registry
        self._buckets = buckets
        self._uploads = Uploads(settings, clock)
        self._quotas = quotas
        self._downloads = Downloads(settings, clock)
        self._damage = Damage(registry, settings, clock)
        self._tasks = Tasks(registry, settings, clock)
        self._approvals = Approvals(registry, clock, public_url)
        self._pubsubs = pubsubs
        self._settings = settings
        self._clock = clock
        self._started_ms = int(clock() * 1000)
        self._pruned_at = clock()
        self._fresh: dict[str, FreshnessGuard] = {}
        self._fresh_strangers = FreshnessGuard(settings.message_age_seconds_max)
        self._join_failures = RateLimiter(JOIN_FAILURES_PER_MINUTE_MAX / 60, 60.0)
        self._bucket_questions = RateLimiter(BUCKET_QUESTIONS_PER_SECOND_MAX, 10.0)
        # One thread: several would leave the event loop a smaller share of the processor.
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hub-reader")

    async def start(self) -> None:
        """Take up what was going on when the hub stopped."""
        await self._tasks.start()
        if self._registry.shared:  # which knows what was seen before, or by others
            self._started_ms = await self._registry.call(seen.find_start)

    async def bucket_of(self, data: bytes, address: str) -> tuple[str, bool]:
        """Answer ``{"channelName"}``, asked without a signature: the base of the channel's object URLs, relative to the
        hub if it begins with a slash (WIRE-2022.md, part A), and whether reading there takes signed URLs: it is told
        then too, as clients of 2022 that upload, through a node, ask for it.

        :param address: whom to count the question against.
        :raises InvalidArgument, InvalidName: it is not such a question. :raises NotOnHub: there is no such channel.
        :raises RateLimited: too many in the last seconds.
        """
        self._bucket_questions.spend(
            address, 1, self._clock(), who=f"address {address}",
            limit=f"{BUCKET_QUESTIONS_PER_SECOND_MAX} questions for a channel's bucket a second are allowed")
        try:
            asked = msgspec.json.decode(data, type=_BucketQuestion)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidArgument(what=f"The question for a channel's bucket could not be read: {error}") from None
        found, place = await self._registry.call(
            find_public, check_channel_name(asked.channel_name), self._buckets, self._pubsubs)
        if place.bucket.url_base.startswith("file:"):
            raise NotOnHub(kind="public bucket of the channel", name=asked.channel_name,
                           advice="Its bucket is a folder, which only nodes read: load through a node.")
        return place.bucket.url_base, found.private or place.bucket.signed_reads

    def close(self) -> None:
        """Finish the checks that were begun."""
        self._reader.shutdown()
        self._damage.close()

    async def answer(self, data: bytes, address: str) -> Any:
        """Answer one request; the answer is a struct or dict that becomes JSON.

        :param data: the envelope as it came. :param address: whom to count wrong invitations against.
        :raises KacheryError: the request is refused; the error says why.
        """
        body, node_id = await self._read(data)
        check_age(body.time, self._clock(), self._settings.message_age_seconds_max)
        if not 16 <= len(body.id) <= 64:
            raise InvalidArgument(what="A request's id is 16 to 64 random characters.")
        await self._prune_seen()
        place = Place(body.channel, day_of(self._clock()), node_id)
        standing = await self._registry.call(
            find_standing, place, body, self._buckets, self._pubsubs, shared=self._registry.shared)
        node, grant = standing.node, standing.grant
        # Between this reading of the grant and what is done by it nothing is awaited, so a revocation that is
        # answered has come either before the reading or after the deed.
        self._check_fresh(body, node_id, registered=node is not None)
        if standing.repeated:
            raise self._stale(body, "it was received before")
        if isinstance(body, JoinChannel):
            return await self._join(body, node_id, address)
        if isinstance(body, AskApproval | FindApproval):
            answer = await self._approvals.answer(body, node_id, address)
            if answer is None:
                raise self._stale(body, "it was received before")
            return answer
        action = _action_of(body)
        if node is None:
            raise NotPermitted(who=f"node {node_id[:16]}", channel=body.channel or "(any)",
                               action=action.value if action is not None else "leave",
                               why="it is not registered with this hub; run kachery-fast node join first")
        if isinstance(body, GetNodeConfig):
            return await self._node_config(body, node)
        if isinstance(body, LeaveChannel):
            return await self._leave(body, node_id, grant)
        if isinstance(body, TaskBody):
            return await self._tasks.answer(body, node_id)
        assert action is not None, "every other request is for some action"
        grant = require(grant, node_id, body.channel, action)
        if isinstance(body, UploadBody):
            return await self._sign(body, place, standing, action)
        if isinstance(body, GetPubsubToken):
            assert standing.pubsub is not None, "there is one for each grant"
            return standing.pubsub.token(node_id, band_capability(grant), self._settings.token_life_seconds)
        return await self._perform(body, grant, standing.bucket)

    async def _read(self, data: bytes) -> tuple[HubBody, str]:
        if len(data) > REQUEST_SIZE_BYTES_MAX:
            raise TooLarge(what="A node's request", size=len(data), limit=REQUEST_SIZE_BYTES_MAX,
                           setting="the longest request of a node")
        try:
            if len(data) <= _READ_AT_ONCE_BYTES:
                return decode_hub_request(data)
            return await asyncio.get_running_loop().run_in_executor(self._reader, decode_hub_request, data)
        except RecursionError:
            raise BadMessage(why="it is nested too deeply") from None

    async def _perform(self, body: HubBody, grant: Grant, bucket: BucketEngine | None) -> Any:
        """Do what ``grant`` allows."""
        assert bucket is not None, "it is looked up for every request that is about its objects"
        if isinstance(body, SignDownloads):
            return self._downloads.sign(bucket, body, grant.node_id)
        if isinstance(body, ReportCorrupt):
            return await self._damage.report(bucket, body, grant)
        if isinstance(body, ReportBadResult):
            return await self._damage.report_result(bucket, body, grant)
        raise BadMessage(why=f"this hub cannot answer {type(body).__name__}")

    async def _sign(self, body: UploadBody, place: Place, standing: Standing, action: Action) -> SignedUploads:
        """Sign uploads that the node may make, within the limits of the channel.

        :raises QuotaExceeded: they go beyond, and nothing can make room.
        """
        wanted = self._uploads.check(body, place.node)
        sizes = {item.object_name: item.size_bytes for item in wanted}
        bucket, limits = standing.bucket, standing.limits
        assert bucket is not None, "it is looked up for every upload"
        if limits.any and self._quotas.refusal(bucket, place, limits, sizes) is not None:
            sizes = await self._quotas.without_present(bucket, sizes)
            await self._quotas.make_room(bucket, place, limits, sizes)
            grant, limits, bucket = await self._registry.call(find_allowance, place, self._buckets)
            require(grant, place.node, place.channel, action)
            assert bucket is not None, "there is one for each grant"
            refusal = self._quotas.refusal(bucket, place, limits, sizes)
            if refusal is not None:
                raise refusal
        self._quotas.promise(bucket, place, limits, sizes)
        return self._uploads.sign(bucket, wanted, place.node)

    def _check_fresh(self, body: HubBody, node_id: str, *, registered: bool) -> None:
        now = self._clock()
        # What a node may say before it is registered is remembered where it was seen first.
        guard = self._fresh_strangers
        if registered and not isinstance(body, JoinChannel | AskApproval | FindApproval):
            guard = self._fresh.get(node_id) or FreshnessGuard(
                self._settings.message_age_seconds_max, REQUESTS_REMEMBERED_PER_NODE_MAX,
                signer_entries_max=REQUESTS_REMEMBERED_PER_NODE_MAX)
            self._fresh[node_id] = guard
        guard.check(node_id, body.id, body.time, now)
        if body.time < self._started_ms:
            # The ids seen before a restart are not known any more, so what was signed before it could be a repetition.
            raise self._stale(body, "it was signed before this hub's start")

    def _stale(self, body: HubBody, why: str) -> StaleMessage:
        return StaleMessage(time=body.time, now=int(self._clock() * 1000), why=why,
                            limit=self._settings.message_age_seconds_max)

    async def _prune_seen(self) -> None:
        """Forget, now and then, the requests that are too old to be taken."""
        now = self._clock()
        if self._registry.shared and now - self._pruned_at >= SEEN_PRUNE_SECONDS:
            self._pruned_at = now
            oldest_ms = int((now - 2 * self._settings.message_age_seconds_max) * 1000)
            await self._registry.call(seen.forget, oldest_ms)

    # --- membership

    async def _join(self, body: JoinChannel, node_id: str, address: str) -> ChannelInfo:
        requested = parse_permissions(body.permissions)
        now = self._clock()
        # Taken beforehand, so that many guesses at once are counted too.
        self._join_failures.spend(
            address, 1, now, who=f"address {address}",
            limit=f"{JOIN_FAILURES_PER_MINUTE_MAX} invitations that do not hold are allowed in a minute")
        grant = await self._registry.call(
            join_once, body, node_id, requested, int(now * 1000), shared=self._registry.shared)
        if grant is None:
            raise self._stale(body, "it was received before")
        self._join_failures.refund(address, 1, self._clock())
        _log.info("node %s joined %s", node_id[:16], grant.channel)
        found, place = await self._registry.call(find_public, grant.channel, self._buckets, self._pubsubs)
        return await self._channel_info(grant, found.owner, place, private=found.private)

    async def _leave(self, body: LeaveChannel, node_id: str, grant: Grant | None) -> dict[str, Any]:
        if grant is None:
            raise NotPermitted(who=f"node {node_id[:16]}", action="leave", channel=body.channel,
                               why="the node is not a member of the channel")
        await self._registry.call(grants.leave_channel, grant)
        await self._pubsubs.revoke([await self._registry.call(find_pubsub, body.channel)], (node_id,))
        _log.info("node %s left %s", node_id[:16], body.channel)
        return {"left": body.channel}

    async def _node_config(self, body: GetNodeConfig, node: identity.NodeRecord) -> NodeConfig:
        await self._registry.call(identity.touch_node, node.id, body.label, body.version, int(self._clock() * 1000))
        standings = await self._registry.call(list_standings, node.id, self._buckets, self._pubsubs)
        infos = [await self._channel_info(grant, owner, place, private=private)
                 for grant, owner, private, place in standings]
        return NodeConfig(time=int(self._clock() * 1000), owner=node.owner, channels=infos)

    async def _channel_info(
        self, grant: Grant, channel_owner: str, place: ChannelPlace, *, private: bool
    ) -> ChannelInfo:
        members: list[Member] = []
        if not isinstance(decide(grant, Action.SEE_CHANNEL), Deny):
            records = await self._registry.call(grants.list_members, grant.channel)
            members = [
                Member(node_id=record.grant.node_id, label=record.label, last_seen=record.last_seen,
                       permissions=_names(record.grant))
                for record in records
            ]
        return ChannelInfo(
            name=grant.channel, owner=channel_owner, permissions=_names(grant),
            bucket_url=place.bucket.url_base, pubsub=place.pubsub, members=members,
            private=private or place.bucket.signed_reads, crc32c=place.bucket.crc32c)


_ACTIONS: dict[type, Action] = {
    GetNodeConfig: Action.SEE_CHANNEL,
    GetPubsubToken: Action.CONNECT,
    SignUploads: Action.UPLOAD_FILE,
    SignFeedUploads: Action.UPLOAD_FEED,
    SignTaskResult: Action.UPLOAD_RESULT,
    ReportBadResult: Action.REPORT_RESULT,
    ClaimTask: Action.CLAIM_TASK,
    KeepTasks: Action.CLAIM_TASK,
    FinishTask: Action.CLAIM_TASK,
    FindTask: Action.FIND_TASK,
}


def _action_of(body: HubBody) -> Action | None:
    """What a request is for; None for those by which a node comes and goes."""
    if isinstance(body, ReportCorrupt):
        return Action.REPORT_SEGMENT if body.feed_id or body.subfeed else Action.REPORT_CORRUPT
    if isinstance(body, SignDownloads):
        if body.object_kind == "file":
            return Action.LOOK_FOR_FILE if body.head else Action.READ_FILE
        return {"segment": Action.READ_SEGMENT, "index": Action.READ_INDEX, "result": Action.READ_RESULT}[
            body.object_kind]
    return _ACTIONS.get(type(body))




def _names(grant: Grant) -> list[str]:
    return sorted(permission.value for permission in grant.permissions)
