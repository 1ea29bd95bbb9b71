"""A hub from the outside: a node's signed requests, an owner's requests by token.

A node's clock may be wrong. The hub tells its own time in ``NodeConfig`` and when it refuses a stale request; from then
on requests are signed with the corrected time, and ``HubClient.now_ms`` is what messages on the bands are signed with.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import secrets
import time
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ..config import Settings
from ..errors import HubError, HubUnreachable, InvalidArgument, KacheryError, RateLimited, StaleMessage
from ..protocol.hub_bodies import (
    ChannelInfo,
    GetNodeConfig,
    GetPubsubToken,
    HubBody,
    JoinChannel,
    LeaveChannel,
    NodeConfig,
    ObjectSpec,
    PubsubToken,
    ReportCorrupt,
    SignedObject,
    SignedUploads,
    SignUploads,
)
from ..protocol.messages import encode_hub_request

__all__ = ["HubClient", "OwnerClient", "check_hub_url", "split_invitation"]

_log = logging.getLogger("kachery_fast.net")
_T = TypeVar("_T")

# Past 10,000 members a NodeConfig takes about 3 MB.
ANSWER_SIZE_BYTES_MAX = 64 * 1024 * 1024
# A hub that shuts down, or a proxy before it, says so by these; another try may find it back.
_PASSING = frozenset({429, 500, 502, 503, 504})


def check_hub_url(text: str) -> str:
    """Return a hub's address without a slash at its end.

    :raises InvalidArgument: it is not ``http(s)://HOST[:PORT][/PATH]``.
    """
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        usable = False
    if not usable or parts.query or parts.fragment or parts.username is not None:
        raise InvalidArgument(what=f"{text!r} is not a hub's address. It looks like http://hub.example.org:20440")
    return text.rstrip("/")


def split_invitation(link: str) -> tuple[str, str]:
    """Split an invitation link ``<hub url>/join/<code>`` into the hub's address and the code.

    :raises InvalidArgument: it is not one.
    """
    url, separator, code = link.strip().rpartition("/join/")
    if not separator or not code or not all(c.isascii() and (c.isalnum() or c in "-_") for c in code):
        raise InvalidArgument(
            what=f"{link!r} is not an invitation. It looks like http://hub.example.org:20440/join/CODE")
    return check_hub_url(url), code


class _Exchange:
    """POSTs JSON to one hub; translates what goes wrong; tries again what may pass."""

    def __init__(
        self, url: str, settings: Settings, session: aiohttp.ClientSession | None, attempts_max: int,
        sleep: Callable[[float], Awaitable[None]], uniform: Callable[[float, float], float],
    ) -> None:
        self.url = check_hub_url(url)
        self._settings = settings
        self._attempts_max = attempts_max
        self._session = session
        self._own_session = session is None
        self._sleep = sleep
        self._uniform = uniform

    async def post(self, path: str, make_body: Callable[[], bytes], headers: dict[str, str] | None = None) -> bytes:
        """Return the body of a 200 answer. ``make_body`` is called for each try, so each is signed anew.

        :raises HubUnreachable: no connection, or no answer in time, in any of the tries.
        :raises HubError: the hub's answer makes no sense, or it still fails after all tries.
        :raises KacheryError: the refusal that the hub sent.
        """
        attempt = 0
        while True:
            attempt += 1
            pause_seconds = 0.0
            try:
                status, data = await self._post_once(path, make_body(), headers or {})
                if status == 200:
                    return data
                failure = self._failure(status, data)
                if isinstance(failure, RateLimited):
                    pause_seconds = _seconds(failure.details.get("retry_seconds"))
                if status not in _PASSING:
                    raise failure
            except (aiohttp.ClientError, OSError, asyncio.TimeoutError) as error:
                failure = HubUnreachable(url=self.url, why=_reason(error))
            ceiling = min(self._settings.retry_cap_seconds, self._settings.retry_base_seconds * 2 ** (attempt - 1))
            # Asked to wait for longer than we ever do: say so at once rather than fail again.
            if attempt >= self._attempts_max or pause_seconds > self._settings.retry_cap_seconds:
                raise failure
            _log.debug("%s%s, attempt %d: %s", self.url, path, attempt, failure)
            await self._sleep(pause_seconds + self._uniform(0, ceiling))

    async def _post_once(self, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        if self._session is None:
            connect, stall = self._settings.connect_timeout_seconds, self._settings.stall_seconds
            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=connect + stall, sock_connect=connect, sock_read=stall))
        headers = {"Content-Type": "application/json", **headers}
        async with self._session.post(self.url + path, data=body, headers=headers, allow_redirects=False) as response:
            data = bytearray()
            async for piece in response.content.iter_any():
                data += piece
                if len(data) > ANSWER_SIZE_BYTES_MAX:
                    raise HubError(url=self.url, why=f"its answer is longer than {ANSWER_SIZE_BYTES_MAX} bytes")
            return response.status, bytes(data)

    def _failure(self, status: int, data: bytes) -> KacheryError:
        try:
            answer = msgspec.json.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            answer = None
        if not isinstance(answer, dict) or "error" not in answer or status == 500:
            what = answer.get("message") if isinstance(answer, dict) else None
            return HubError(url=self.url, why=str(what) if what else f"HTTP {status}, and not from a kachery-fast hub")
        try:
            return KacheryError.from_dict(answer)
        except TypeError:
            return HubError(url=self.url, why=str(answer.get("message", f"HTTP {status}")))

    async def close(self) -> None:
        if self._own_session and self._session is not None:
            await self._session.close()
            self._session = None


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
        self._exchange = _Exchange(url, settings, session, settings.retry_attempts_max, sleep, uniform)
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

    async def sign_uploads(self, channel: str, objects: list[tuple[str, int]]) -> list[SignedObject]:
        """Return where to PUT each of some objects, given as (SHA-1, size in bytes), in their order; absolute URLs.

        :raises NotPermitted: the node may not upload. :raises TooLarge: too many objects, or too long a one.
        :raises RateLimited: too many in the last seconds.
        """
        specs = [ObjectSpec(sha1, size) for sha1, size in objects]
        answer = await self._call(SignUploads, SignedUploads, channel=channel, objects=specs)
        if [item.sha1 for item in answer.uploads] != [spec.sha1 for spec in specs]:
            raise HubError(url=self.url, why="it signed other objects than were asked for")
        for item in answer.uploads:
            item.url = self.absolute(item.url)
        return answer.uploads

    async def report_corrupt(self, channel: str, sha1: str, found: str) -> bool:
        """Report an object whose bytes have the SHA-1 ``found``; True when the hub agreed and removed it.

        :raises NotPermitted: the node may not request files. :raises RateLimited: too many reports at once.
        """
        answer = await self._call(ReportCorrupt, dict[str, Any], channel=channel, sha1=sha1, found=found)
        return answer.get("removed") is True

    async def close(self) -> None:
        """Close the connections that were made here."""
        await self._exchange.close()

    async def __aenter__(self) -> HubClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

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
        self._exchange = _Exchange(url, settings, session, 1, asyncio.sleep, random.uniform)
        self.url = self._exchange.url
        self._token = token

    async def call(self, kind: str, **fields: Any) -> dict[str, Any]:
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


def _seconds(value: object) -> float:
    return max(0.0, float(value)) if isinstance(value, (int, float)) else 0.0


def _reason(error: BaseException) -> str:
    if isinstance(error, asyncio.TimeoutError):
        return "no answer in time"
    if isinstance(error, aiohttp.ClientConnectorError):
        number = error.os_error.errno
        # asyncio words a refused connection in its own way; the failures of name look-ups have negative numbers.
        return os.strerror(number).lower() if number and number > 0 else str(error.os_error.strerror or error.os_error)
    return str(error) or type(error).__name__
