"""The part of the local API for feeds. A subfeed is given by its name (a text or a dict) or as ``~`` and its hash. A
channel of null is the one of the node's setting; with ``*local*`` nobody is asked.

    POST /api/feed/create  {"name": str|null}     -> {"feedId", "name", "created"}
    POST /api/feed/find    {"name"}               -> {"feedId"}
    POST /api/feed/list    {}                     -> {"feeds": [FEED]}
    POST /api/feed/info    {"feedId"}             -> FEED: {"feedId", "name", "writable", "subfeeds": [
                                                     {"subfeed", "name", "count", "forkedAt": null|n}]}
    POST /api/feed/delete  {"feedId"}             -> {"deleted": true}
    POST /api/feed/append  {"feedId", "subfeed", "messages": [{…}]}   -> {"first", "end"}, once they are durable
    POST /api/feed/read    {"feedId", "subfeed", "channel": str|null, "position", "waitMsec", "maxMessages": int|null,
                            "signed"}             -> {"messages", "position", "count", "why", "known"}
    POST /api/feed/watch   {"watches": {"w": {"feedId", "subfeed", "channel", "position"}}, "waitMsec", "maxMessages",
                            "signed"}             -> {"messages": {"w": […]}}, those without news absent
    POST /api/feed/forks   {"feedId", "subfeed"}  -> {"forks": [{"number", "first", "second"}]}
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from aiohttp import web

from ..errors import BadMessage, InvalidArgument, NoChannel, TooLarge
from ..protocol.access import Permission
from ..protocol.names import FeedUri, check_feed_id, subfeed_hash
from ..store.feeds import FeedInfo
from .api_parts import Nothing, answer_with, permitted_link, read_body
from .feeds import Reading, Watch

if TYPE_CHECKING:
    from .node import Node

__all__ = [
    "BATCH_MESSAGES_MAX", "LOCAL", "WATCHES_MAX", "FeedApi", "FeedWatch", "contents_of", "limit_of", "read_watches",
]

# In the place of a channel: read what is held here, and ask nobody (WIRE-2022.md, part B).
LOCAL = "*local*"
WATCHES_MAX = 1000
_MESSAGES_MAX = 2**40
# Messages that are appended in one call: a few seconds of signing, in which other appends wait, and 100 MB of memory.
BATCH_MESSAGES_MAX = 100_000

_Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
_WaitMsec = Annotated[float, msgspec.Meta(ge=0, le=24 * 3600 * 1000)]


class _Create(msgspec.Struct, forbid_unknown_fields=True):
    name: str | None = None


class _Find(msgspec.Struct, forbid_unknown_fields=True):
    name: str


class _Feed(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    feed_id: str


class _Subfeed(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    feed_id: str
    subfeed: str | dict[str, Any]


class _Append(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    feed_id: str
    subfeed: str | dict[str, Any]
    messages: list[dict[str, Any]]


class FeedWatch(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    """A subfeed that a client reads from ``position`` on."""

    feed_id: str
    subfeed: str | dict[str, Any]
    channel: str | None = None
    position: _Count = 0


class _Read(FeedWatch, forbid_unknown_fields=True, rename="camel"):
    wait_msec: _WaitMsec = 0
    max_messages: _Count | None = None
    signed: bool = False


class _WatchAll(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    watches: dict[str, FeedWatch]
    wait_msec: _WaitMsec = 0
    max_messages: _Count | None = None
    signed: bool = False


class _Body(msgspec.Struct):
    message: msgspec.Raw


class _SignedMessage(msgspec.Struct):
    body: _Body


_append_decoder = msgspec.json.Decoder(_Append)
_signed_decoder = msgspec.json.Decoder(_SignedMessage)


class FeedApi:
    """Serves the feeds of one node."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._append_size_bytes_max = node.settings.feed_batch_size_bytes_max

    def routes(self) -> list[web.RouteDef]:
        """Return the routes of this part of the API."""
        return [
            web.post("/api/feed/create", self._create),
            web.post("/api/feed/find", self._find),
            web.post("/api/feed/list", self._list),
            web.post("/api/feed/info", self._info),
            web.post("/api/feed/delete", self._delete),
            web.post("/api/feed/append", self._append),
            web.post("/api/feed/read", self._read),
            web.post("/api/feed/watch", self._watch),
            web.post("/api/feed/forks", self._forks),
        ]

    async def _create(self, request: web.Request) -> web.Response:
        asked = await read_body(request, _Create)
        feed_id, created = await self._node.feeds.create(asked.name)
        return answer_with({"feedId": feed_id, "name": asked.name, "created": created})

    async def _find(self, request: web.Request) -> web.Response:
        asked = await read_body(request, _Find)
        return answer_with({"feedId": await self._node.feeds.find(asked.name)})

    async def _list(self, request: web.Request) -> web.Response:
        await read_body(request, Nothing)
        return answer_with({"feeds": [_describe(info) for info in await self._node.feeds.all()]})

    async def _info(self, request: web.Request) -> web.Response:
        asked = await read_body(request, _Feed)
        return answer_with(_describe(await self._node.feeds.info(check_feed_id(asked.feed_id))))

    async def _delete(self, request: web.Request) -> web.Response:
        asked = await read_body(request, _Feed)
        await self._node.feeds.delete(check_feed_id(asked.feed_id))
        return answer_with({"deleted": True})

    async def _append(self, request: web.Request) -> web.Response:
        asked = await self._read_append(request)
        appended = await self._node.feeds.append(check_feed_id(asked.feed_id), subfeed_hash(asked.subfeed),
                                                 asked.messages, asked.subfeed)
        return answer_with({"first": appended.first, "end": appended.tail.count})

    async def _read_append(self, request: web.Request) -> _Append:
        limit, length = self._append_size_bytes_max, request.content_length
        if length is None or length > self._node.settings.api_body_size_bytes_max:
            request = request.clone(client_max_size=limit)
        try:
            if length is not None and length > limit:
                raise web.HTTPRequestEntityTooLarge(limit, length)
            data = await request.read()
        except web.HTTPRequestEntityTooLarge:
            raise TooLarge(what="The batch of messages", size=length or f"more than {limit}", limit=limit,
                           setting="feed_batch_size_bytes_max") from None
        try:
            asked = _append_decoder.decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise BadMessage(why=f"the body of {request.path} is not as documented ({error})") from None
        if len(asked.messages) > BATCH_MESSAGES_MAX:
            raise InvalidArgument(what=f"{len(asked.messages)} messages are too many; append at most "
                                       f"{BATCH_MESSAGES_MAX} in a call.")
        return asked

    async def _read(self, request: web.Request) -> web.Response:
        asked = await read_body(request, _Read)
        (reading,) = await read_watches(self._node, [asked], asked.wait_msec / 1000, limit_of(asked.max_messages))
        return answer_with({
            "messages": contents_of(reading.messages, asked.signed), "count": reading.count,
            "position": asked.position + len(reading.messages), "known": reading.known, "why": reading.why})

    async def _watch(self, request: web.Request) -> web.Response:
        asked = await read_body(request, _WatchAll)
        if len(asked.watches) > WATCHES_MAX:
            raise InvalidArgument(what=f"{len(asked.watches)} subfeeds are too many; watch {WATCHES_MAX} in a call")
        readings = await read_watches(self._node, list(asked.watches.values()), asked.wait_msec / 1000,
                                        limit_of(asked.max_messages))
        return answer_with({"messages": {
            name: contents_of(reading.messages, asked.signed)
            for name, reading in zip(asked.watches, readings, strict=True) if reading.messages}})

    async def _forks(self, request: web.Request) -> web.Response:
        asked = await read_body(request, _Subfeed)
        forks = await self._node.feeds.forks(check_feed_id(asked.feed_id), subfeed_hash(asked.subfeed))
        return answer_with({"forks": [
            {"number": fork.number, "first": msgspec.Raw(fork.first), "second": msgspec.Raw(fork.second)}
            for fork in forks]})


async def read_watches(node: Node, wanted: list[FeedWatch], wait_seconds: float, count_max: int) -> list[Reading]:
    """Return what is here, at once; where nothing is, follow what is another node's, and wait.

    :raises KacheryError: nothing is here, and one of them cannot be followed.
    """
    feeds = node.feeds
    watches = [Watch(check_feed_id(asked.feed_id), subfeed_hash(asked.subfeed), asked.position)
               for asked in wanted]
    readings = await feeds.read(watches, 0.0, count_max)
    if not watches or any(reading.messages for reading in readings):
        return readings
    for number, (watch, asked, reading) in enumerate(zip(watches, wanted, readings, strict=True)):
        if feeds.owns(watch.feed_id) or asked.channel == LOCAL:
            continue
        try:
            link = await permitted_link(
                node, FeedUri(watch.feed_id, None, watch.subfeed), asked.channel, Permission.REQUEST_FEEDS,
                suffices=lambda link: link.providers(Permission.PROVIDE_FEEDS))
        except NoChannel as error:
            if not reading.known:
                raise
            readings[number] = replace(reading, why=error.message)  # a copy, read as far as it goes
            wait_seconds = 0.0
        else:
            following = await feeds.follow(link, watch.feed_id, watch.subfeed)
            watches[number] = watch._replace(following=following)
    found = await feeds.read(watches, wait_seconds, count_max)
    return [replace(after, why=after.why or before.why) if not after.messages else after
            for before, after in zip(readings, found, strict=True)]


def limit_of(max_messages: int | None) -> int:
    """Return how many messages a client takes; 0 and None are all."""
    return max_messages or _MESSAGES_MAX


def contents_of(messages: list[bytes], signed: bool) -> list[msgspec.Raw]:
    """Return what a client is given of signed messages: them, or the messages inside."""
    if signed:
        return [msgspec.Raw(message) for message in messages]
    return [_signed_decoder.decode(message).body.message for message in messages]


def _describe(info: FeedInfo) -> dict[str, Any]:
    return {"feedId": info.feed_id, "name": info.name, "writable": info.writable, "subfeeds": [
        {"subfeed": part.subfeed, "name": part.name, "count": part.count, "forkedAt": part.forked_at}
        for part in info.subfeeds]}
