"""A hub from the outside: a node's signed requests, an owner's requests by token.

A node's clock may be wrong. The hub tells its own time in ``NodeConfig`` and when it refuses a stale request; from then
on requests are signed with the corrected time, and ``HubClient.now_ms`` is what messages on the bands are signed with.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, TypeVar

import aiohttp
import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ..config import Settings
from ..errors import HubError, InvalidArgument, StaleMessage
from ..protocol.hub_bodies import (
    ApprovalAsked,
    ApprovalState,
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
    NodeConfig,
    ObjectSpec,
    PubsubToken,
    ReportBadResult,
    ReportCorrupt,
    SignDownloads,
    SignedDownloads,
    SignedObject,
    SignedUploads,
    SignFeedUploads,
    SignTaskResult,
    SignUploads,
    TaskClaim,
)
from ..protocol.messages import encode_hub_request
from ..protocol.names import ObjectName
from .exchange import Exchange, check_hub_url

__all__ = ["HubClient", "OwnerClient", "check_hub_url", "split_invitation"]

_log = logging.getLogger("kachery_fast.net")
_T = TypeVar("_T")

# Ids in one request: 1,000 of 64 characters are 67 kB.
_KEEP_BATCH_MAX = 1000


def split_invitation(link: str) -> tuple[str, str]:
    """Split an invitation link ``<hub url>/join/<code>`` into the hub's address and the code.

    :raises InvalidArgument: it is not one.
    """
    url, separator, code = link.strip().rpartition("/join/")
    if not separator or not code or not all(c.isascii() and (c.isalnum() or c in "-_") for c in code):
        raise InvalidArgument(
            what=f"{link!r} is not an invitation. It looks like http://hub.example.org:20440/join/CODE")
    return check_hub_url(url), code


class HubClient:
    """A node's side of its talk with one hub.

    :param url: the hub's address. :param key: the node's key, by which every request is signed.
    :param session: an aiohttp session to use; one is made, and closed by ``close``, when None.
    :param clock: this machine's clock, seconds since the epoch. :param new_id: makes request ids.
    :param sleep: waits for a number of seconds. :param uniform: draws the jitter, ``random.uniform``-like.

    Every method raises ``HubUnreachable``, ``HubError`` and ``StaleMessage``, and what it names itself.
    """

    def __init__(
        self, url: str, key: Ed25519PrivateKey, settings: Settings, *,
        session: aiohttp.ClientSession | None = None,
        clock: Callable[[], float] = time.time,
        new_id: Callable[[], str] = lambda: secrets.token_hex(16),
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._exchange = Exchange(url, settings, session, settings.retry_attempts_max, sleep, uniform)
        self.url = self._exchange.url
        self._key = key
        self._clock = clock
        self._new_id = new_id
        self._offset_ms = 0

    def now_ms(self) -> int:
        """The time by the hub's clock, as far as it is known, in milliseconds since the epoch."""
        return int(self._clock() * 1000) + self._offset_ms

    def absolute(self, url: str) -> str:
        """Complete a URL that is relative to the hub (it begins with a slash); others are returned as they are."""
        return self.url + url if url.startswith("/") else url

    async def join(self, invitation: str, label: str = "", permissions: list[str] | None = None) -> ChannelInfo:
        """Become a member of the channel that an invitation's code names; repeating it changes what is asked for.

        :param permissions: what the node's owner asks for; None for all six, so that whatever the channel's owner
            grants, now or later, takes effect.
        :raises NotPermitted: the invitation does not hold. :raises RateLimited: too many did not.
        """
        info = await self._call(JoinChannel, ChannelInfo, invitation=invitation, label=label,
                                permissions=permissions or ["all"])
        info.bucket_url = self.absolute(info.bucket_url)
        return info

    async def ask_approval(
        self, label: str = "", version: str = "", channel: str = "", permissions: list[str] | None = None
    ) -> ApprovalAsked:
        """Return a code by which somebody, signed in at the hub, takes this node for his; the one before is void.

        :param channel: one to be asked for as well, with ``permissions`` on it.
        :raises NotOnHub: there is no such channel. :raises RateLimited: too many ask, or this one too often.
        """
        return await self._call(AskApproval, ApprovalAsked, label=label, version=version, channel=channel,
                                permissions=permissions or [])

    async def find_approval(self, channel: str = "") -> ApprovalState:
        """Return what became of ``ask_approval``, and this node's standing on a channel.

        :raises RateLimited: asked more often than its ``interval``.
        """
        return await self._call(FindApproval, ApprovalState, channel=channel)

    async def leave(self, channel: str) -> None:
        """End the membership. :raises NotPermitted: there is none."""
        await self._call(LeaveChannel, dict, channel=channel)

    async def node_config(self, label: str = "", version: str = "") -> NodeConfig:
        """Return this node's channels, permissions and fellow members, and tell the hub that the node is alive.

        The clock is corrected by the answer. ``bucket_url`` of each channel is made absolute.

        :raises NotPermitted: the node is not registered with this hub.
        """
        before = int(self._clock() * 1000)
        config = await self._call(GetNodeConfig, NodeConfig, label=label, version=version)
        after = int(self._clock() * 1000)
        self._offset_ms = config.time - (before + after) // 2
        for info in config.channels:
            info.bucket_url = self.absolute(info.bucket_url)
        return config

    async def pubsub_token(self, channel: str) -> PubsubToken:
        """Return a token for those bands of a channel that this node may use. :raises NotPermitted: for none."""
        return await self._call(GetPubsubToken, PubsubToken, channel=channel)

    async def sign_uploads(
        self, channel: str, objects: Sequence[tuple[str, int] | tuple[str, int, int | None]]
    ) -> list[SignedObject]:
        """Return where to PUT each of some objects, given as (SHA-1, size in bytes, and, where ``ChannelInfo.crc32c``
        says so, CRC-32C), in their order; absolute URLs.

        :raises NotPermitted: the node may not upload. :raises TooLarge: too many objects, or too long a one.
        :raises RateLimited: too many in the last seconds.
        """
        specs = [ObjectSpec(*item) for item in objects]
        return await self._signed(SignUploads, [spec.sha1 for spec in specs], channel=channel, objects=specs)

    async def sign_feed_uploads(
        self, channel: str, feed_id: str, subfeed: str,
        segments: Sequence[tuple[str, int] | tuple[str, int, int | None]], index_size_bytes: int | None = None,
        index_crc32c: int | None = None,
    ) -> list[SignedObject]:
        """Return where to PUT segments of a subfeed, given as of ``sign_uploads``, in their order; absolute URLs.

        :param index_size_bytes: the size of its ``subfeed.json``, which comes last, with an empty ``sha1``; that one
            replaces the object that is there. None: not asked for. :param index_crc32c: its CRC-32C, where wanted.
        :raises NotPermitted, TooLarge, RateLimited: as of ``sign_uploads``.
        """
        specs = [ObjectSpec(*item) for item in segments]
        expected = [spec.sha1 for spec in specs] + ([] if index_size_bytes is None else [""])
        return await self._signed(SignFeedUploads, expected, channel=channel, feed_id=feed_id, subfeed=subfeed,
                                  segments=specs, index_size_bytes=index_size_bytes, index_crc32c=index_crc32c)

    async def sign_task_result(self, channel: str, result_id: str, size: int, *, replace: bool = False,
                               crc32c: int | None = None) -> SignedObject:
        """Return where to PUT the result of a task; an absolute URL. ``sha1`` of the answer is the result id.

        :param size: the size in bytes of the result's object.
        :param replace: it may take the place of the result that is there; else the PUT finds 412 (it exists).
        :param crc32c: of its bytes, where ``ChannelInfo.crc32c`` says so.
        :raises NotPermitted, TooLarge, RateLimited: as of ``sign_uploads``.
        """
        (signed,) = await self._signed(SignTaskResult, [result_id], channel=channel, result_id=result_id, size=size,
                                       replace=replace, crc32c=crc32c)
        return signed

    async def sign_downloads(self, of: ObjectName, sha1s: list[str], *, head: bool = False) -> SignedDownloads:
        """Return where to GET (with ``head``: to HEAD) objects, in the order of ``sha1s``; absolute URLs.

        :param of: what they have in common; its ``sha1`` does not count.
        :raises NotPermitted: the node may not read such objects. :raises TooLarge, RateLimited: as of ``sign_uploads``.
        """
        answer = await self._call(SignDownloads, SignedDownloads, channel=of.channel, object_kind=of.kind, sha1s=sha1s,
                                  feed_id=of.feed_id, subfeed=of.subfeed, head=head)
        if len(answer.urls) != len(sha1s):
            raise HubError(url=self.url, why="it signed other objects than were asked for")
        answer.urls = [self.absolute(url) for url in answer.urls]
        return answer

    async def report_corrupt(
        self, channel: str, sha1: str, found: str, *, feed_id: str = "", subfeed: str = ""
    ) -> bool:
        """Report an object whose bytes have the SHA-1 ``found``; True when the hub agreed and removed it.

        :param feed_id: with ``subfeed`` (the hash of its name): the object is a segment of that subfeed.
        :raises NotPermitted: the node may not request files (or feeds). :raises RateLimited: too many reports at once.
        """
        answer = await self._call(ReportCorrupt, dict[str, Any], channel=channel, sha1=sha1, found=found,
                                  feed_id=feed_id, subfeed=subfeed)
        return answer.get("removed") is True

    async def report_bad_result(self, channel: str, result_id: str) -> bool:
        """Report a result that was refused (``protocol.tasks.check_result``); True when the hub agreed and removed it.

        :raises NotPermitted: the node may neither request nor provide tasks. :raises RateLimited: as above.
        """
        answer = await self._call(ReportBadResult, dict[str, Any], channel=channel, result_id=result_id)
        return answer.get("removed") is True

    async def claim_task(self, channel: str, task: str, kind: str, function: str, *, idempotent: bool = False,
                         attempt: str = "") -> TaskClaim:
        """Ask for leave to run a task; ``granted`` of the answer is the leave.

        :param attempt: who is told yes and cannot hear it (the answer is lost, and an error is raised here) may ask
            again with the same one, and is told yes again; without it each call counts as an attempt of its own.
        :raises NotPermitted: the node may not provide tasks. :raises RateLimited: too many in the last seconds.
        """
        return await self._call(ClaimTask, TaskClaim, channel=channel, task=task, kind=kind, function=function,
                                idempotent=idempotent, attempt=attempt or self._new_id())

    async def keep_tasks(self, channel: str, tasks: list[str]) -> set[str]:
        """Keep the claims of some tasks alive; return those that this node does not hold any more.

        :raises NotPermitted, RateLimited: as of ``claim_task``.
        """
        lost: set[str] = set()
        for start in range(0, len(tasks), _KEEP_BATCH_MAX):
            batch = tasks[start:start + _KEEP_BATCH_MAX]
            answer = await self._call(KeepTasks, dict[str, list[str]], channel=channel, tasks=batch)
            lost.update(answer.get("lost", []))
        return lost

    async def finish_task(
        self, channel: str, task: str, state: str, receipt: dict[str, Any] | None = None, *, attempt: str = ""
    ) -> TaskClaim:
        """Tell how a task that this node had claimed has ended; return how it stands. May be repeated.

        :param state: ``finished``, ``failed``, ``unknown`` or ``released``.
        :param receipt: of an action that finished or failed (``protocol.tasks.sign_receipt``).
        :param attempt: of the claim of an action that is released; without it nothing is given back.
        :raises NotPermitted: this node does not hold the task, or may not provide tasks.
        :raises InvalidArgument, BadMessage, SignatureInvalid: the receipt is missing, or not this task's and node's.
        """
        return await self._call(FinishTask, TaskClaim, channel=channel, task=task, state=state, receipt=receipt,
                                attempt=attempt)

    async def find_task(self, channel: str, task: str) -> TaskClaim:
        """Return how a task stands. :raises NotPermitted: the node may neither request nor provide tasks."""
        return await self._call(FindTask, TaskClaim, channel=channel, task=task)

    async def close(self) -> None:
        """Close the connections that were made here."""
        await self._exchange.close()

    async def __aenter__(self) -> HubClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _signed(
        self, body_type: Callable[..., HubBody], expected: list[str], **fields: Any
    ) -> list[SignedObject]:
        """Ask for upload URLs; ``expected`` are the names of the objects, in order."""
        answer = await self._call(body_type, SignedUploads, **fields)
        if [item.sha1 for item in answer.uploads] != expected:
            raise HubError(url=self.url, why="it signed other objects than were asked for")
        for item in answer.uploads:
            item.url = self.absolute(item.url)
        return answer.uploads

    async def _call(self, body_type: Callable[..., HubBody], answer_type: type[_T], **fields: Any) -> _T:
        def make_body() -> bytes:
            return encode_hub_request(body_type(time=self.now_ms(), id=self._new_id(), **fields), self._key)

        try:
            data = await self._exchange.post("/api/node", make_body)
        except StaleMessage as error:
            if not self._correct_clock(error):
                raise
            data = await self._exchange.post("/api/node", make_body)
        try:
            return msgspec.json.decode(data, type=answer_type)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise HubError(url=self.url, why=f"its answer cannot be read ({error})") from None

    def _correct_clock(self, error: StaleMessage) -> bool:
        now_ms = error.details.get("now")
        if not isinstance(now_ms, int):
            return False
        self._offset_ms = now_ms - int(self._clock() * 1000)
        _log.info("the clock of the hub %s is %+.1f s from this machine's", self.url, self._offset_ms / 1000)
        return True


class OwnerClient:
    """A channel owner's side: ``await owner.call("createChannel", name="lab")``.

    Nothing is tried twice: a person waits for it, and a channel cannot be made twice.

    :param token: the owner's token. :param session: as of ``HubClient``.
    """

    def __init__(
        self, url: str, token: str, settings: Settings, *, session: aiohttp.ClientSession | None = None
    ) -> None:
        self._exchange = Exchange(url, settings, session, 1, asyncio.sleep, random.uniform)
        self.url = self._exchange.url
        self._token = token

    async def call(self, kind: str, /, **fields: Any) -> dict[str, Any]:
        """Ask one thing of ``hub/owner_api.py``; return its answer.

        :raises OwnerTokenRefused: wrong token. :raises HubUnreachable: :raises HubError:
        :raises KacheryError: the refusal that the hub sent.
        """
        body = msgspec.json.encode({"type": kind, **fields})
        data = await self._exchange.post("/api/owner", lambda: body, {"Authorization": f"Bearer {self._token}"})
        try:
            return msgspec.json.decode(data, type=dict[str, Any])
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise HubError(url=self.url, why=f"its answer cannot be read ({error})") from None

    async def close(self) -> None:
        """Close the connections that were made here."""
        await self._exchange.close()

    async def __aenter__(self) -> OwnerClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
