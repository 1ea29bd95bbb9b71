"""The local API of 2022 for feeds and mutables. A subfeed is named by the SHA-1 of its name; bodies as in
docs/formats.md.

    POST /feed/createFeed            {"feedName"}                     -> {"success", "feedId"}
    POST /feed/deleteFeed            {"feedId"}                       -> {"success"}
    POST /feed/getFeedId             {"feedName"}                     -> {"success", "feedId"}
    POST /feed/getFeedInfo           {"feedId"}                       -> {"success", "isWriteable"}
    POST /feed/getNumLocalMessages   {"feedId", "subfeedHash"}        -> {"success", "numMessages"}
    POST /feed/appendMessages        {"feedId", "subfeedHash", "messages": [{…}]}  -> {"success"}
    POST /feed/watchForNewMessages   {"subfeedWatches": {"w": {"feedId", "subfeedHash", "channelName", "position"}},
                                      "waitMsec", "signed", "maxNumMessages"}   -> {"success", "messages": {"w": […]}}
    POST /mutable/set                {"key", "value", "update"}       -> {"success"}
    POST /mutable/get                {"key"}                          -> {"success", "found", "value"}
    POST /mutable/delete             {"key"}                          -> {"success"}
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from aiohttp import web

from ..errors import FeedForked, FeedNotWritable, FeedUnknown, InvalidArgument, KacheryError
from ..protocol.names import check_feed_id, check_sha1
from .faults import logged_fault
from .feed_api import BATCH_MESSAGES_MAX, LOCAL, WATCHES_MAX, FeedWatch, contents_of, limit_of, read_watches
from .feeds import Reading
from .legacy_parts import answer_success, read_legacy_body, tell_in_text, wait_seconds_of
from .mutable_api import MutableKey, MutableSet, check_mutable_key, on_mutables

if TYPE_CHECKING:
    from .node import Node

__all__ = ["LegacyFeeds"]

log = logging.getLogger("kachery_fast.node")

_Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
_WaitMsec = Annotated[float, msgspec.Meta(ge=0)]


class _Name(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    feed_name: str


class _Create(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    feed_name: str | None = None


class _Feed(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    feed_id: str


class _Subfeed(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    feed_id: str
    subfeed_hash: str


class _Append(_Subfeed, forbid_unknown_fields=True, rename="camel"):
    messages: list[dict[str, Any]]


class _Watch(_Subfeed, forbid_unknown_fields=True, rename="camel"):
    position: _Count
    channel_name: str = LOCAL


class _WatchAll(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    subfeed_watches: dict[str, _Watch]
    wait_msec: _WaitMsec
    signed: bool = False
    max_num_messages: _Count = 0


class LegacyFeeds:
    """The routes for one ``Node``."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._body_size_bytes_max = node.settings.api_body_size_bytes_max
        self._batch_size_bytes_max = node.settings.feed_batch_size_bytes_max

    def routes(self) -> list[web.RouteDef]:
        """Return what is to be served."""
        return [
            web.post("/feed/createFeed", self._create),
            web.post("/feed/deleteFeed", self._delete),
            web.post("/feed/getFeedId", self._get_feed_id),
            web.post("/feed/getFeedInfo", self._get_feed_info),
            web.post("/feed/getNumLocalMessages", self._count),
            web.post("/feed/appendMessages", self._append),
            web.post("/feed/watchForNewMessages", self._watch),
            web.post("/mutable/set", self._set_mutable),
            web.post("/mutable/get", self._get_mutable),
            web.post("/mutable/delete", self._delete_mutable),
        ]

    async def _read(self, request: web.Request, kind: type[Any]) -> Any:
        return await read_legacy_body(request, kind, self._body_size_bytes_max)

    # --- feeds

    async def _create(self, request: web.Request) -> web.Response:
        asked = await self._read(request, _Create)
        feed_id, _ = await self._node.feeds.create(asked.feed_name)
        return answer_success(feedId=feed_id)

    async def _delete(self, request: web.Request) -> web.Response:
        asked = await self._read(request, _Feed)
        await self._node.feeds.delete(check_feed_id(asked.feed_id))
        return answer_success()

    async def _get_feed_id(self, request: web.Request) -> web.Response:
        asked = await self._read(request, _Name)
        try:
            return answer_success(feedId=await self._node.feeds.find(asked.feed_name))
        except FeedUnknown:
            return web.json_response({"success": False, "feedId": None})

    async def _get_feed_info(self, request: web.Request) -> web.Response:
        asked = await self._read(request, _Feed)
        return answer_success(isWriteable=self._node.feeds.owns(check_feed_id(asked.feed_id)))

    async def _count(self, request: web.Request) -> web.Response:
        asked = await self._read(request, _Subfeed)
        return answer_success(numMessages=await self._node.feeds.count(
            check_feed_id(asked.feed_id), check_sha1(asked.subfeed_hash)))

    async def _append(self, request: web.Request) -> web.Response:
        asked = await read_legacy_body(request, _Append, self._batch_size_bytes_max)
        if len(asked.messages) > BATCH_MESSAGES_MAX:
            raise InvalidArgument(what=f"{len(asked.messages)} messages are too many; append at most "
                                       f"{BATCH_MESSAGES_MAX} in a call.")
        try:
            await self._node.feeds.append(check_feed_id(asked.feed_id), check_sha1(asked.subfeed_hash),
                                          asked.messages, None)
        except (FeedNotWritable, FeedUnknown) as error:
            return tell_in_text(f"Subfeed is not writeable: {asked.feed_id} {asked.subfeed_hash}", error.http_status)
        return answer_success()

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        asked = await self._read(request, _WatchAll)
        watches: dict[str, _Watch] = asked.subfeed_watches
        if len(watches) > WATCHES_MAX:
            raise InvalidArgument(what=f"{len(watches)} subfeeds are too many; watch {WATCHES_MAX} in a call")
        wanted = [FeedWatch(watch.feed_id, f"~{check_sha1(watch.subfeed_hash)}", watch.channel_name, watch.position)
                  for watch in watches.values()]
        readings = await read_watches(self._node, wanted, wait_seconds_of(asked.wait_msec),
                                      limit_of(asked.max_num_messages))
        if any(reading.messages for reading in readings):
            return await self._send_news(request, asked, readings)
        # As in 2022: who waited in vain gets an empty list of each, else those without news are absent.
        return answer_success(messages={name: [] for name in watches} if asked.wait_msec > 0 else {})

    async def _send_news(self, request: web.Request, asked: _WatchAll, readings: list[Reading]) -> web.StreamResponse:
        """Answer with all that is here of each subfeed. A client of 2022 asks once, and takes a part for the whole."""
        response = web.StreamResponse(headers={"Content-Type": "application/json; charset=utf-8"})
        await response.prepare(request)
        try:
            await response.write(b'{"success":true,"messages":{')
            separator = b""
            for (name, watch), reading in zip(asked.subfeed_watches.items(), readings, strict=True):
                begin = separator + msgspec.json.encode(name) + b":["
                async with contextlib.aclosing(self._news(watch, reading, asked.max_num_messages)) as parts:
                    async for messages in parts:
                        await response.write(begin + b",".join(map(bytes, contents_of(messages, asked.signed))))
                        begin, separator = b",", b"],"
            await response.write(b"]}}")
        except ConnectionError:
            raise
        except Exception as error:  # the head is out: nobody must take this for the whole
            log.warning("an answer to %s broke off: %s", request.path,
                        error if isinstance(error, KacheryError) else logged_fault(error, request.path))
            if request.transport is not None:
                request.transport.abort()
        return response

    async def _news(self, watch: _Watch, reading: Reading, max_messages: int) -> AsyncGenerator[list[bytes], None]:
        """Yield the messages of a subfeed up to where it ended when it was looked at first, a few MiB at a time."""
        position, messages = watch.position, reading.messages
        end = min(max(reading.count, position + len(messages)), position + limit_of(max_messages))
        while position < end:
            if not messages:
                try:
                    messages = await self._node.feeds.held(watch.feed_id, watch.subfeed_hash, position, end - position)
                except FeedForked:
                    return
            if not messages:
                return  # the rest is on its way to this node
            yield messages
            position += len(messages)
            messages = []

    # --- mutables

    async def _set_mutable(self, request: web.Request) -> web.Response:
        # The longest value, and its key.
        asked = await read_legacy_body(request, MutableSet, self._body_size_bytes_max)
        check_mutable_key(asked.key)
        changed = await on_mutables(self._node, lambda mutables: mutables.set(asked.key, asked.value,
                                                                              update=asked.update))
        return web.json_response({"success": changed})

    async def _get_mutable(self, request: web.Request) -> web.Response:
        asked = await self._read(request, MutableKey)
        check_mutable_key(asked.key)
        found, value = await on_mutables(self._node, lambda mutables: mutables.get(asked.key))
        return web.json_response({"success": True, "found": found, "value": value if found else ""})

    async def _delete_mutable(self, request: web.Request) -> web.Response:
        asked = await self._read(request, MutableKey)
        check_mutable_key(asked.key)
        deleted = await on_mutables(self._node, lambda mutables: mutables.delete(asked.key))
        return web.json_response({"success": deleted})
