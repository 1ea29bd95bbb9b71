"""The node's local HTTP API: for clients on this machine who can read the file ``client-auth``.

Loopback by default. A request from a web page is refused: its ``Origin`` is foreign, or its ``Host`` is not an address
of this node (which also stops a rebound name). Errors are ``KacheryError.to_dict`` with the error's status.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from aiohttp import web

from ..errors import (
    InvalidArgument,
    KacheryError,
    LinkInvalid,
    NoChannel,
    NodeError,
    NotInStore,
    TooLarge,
)
from ..net.port import serve_port
from ..protocol.access import Permission
from ..protocol.names import FileUri, parse_file_uri
from ..store.objects import Located
from .admissions import Admissions
from .api_parts import Nothing, fault_of, permitted_link, read_body, tell_work
from .backend_api import BackendApi
from .border import Border
from .failures import Failures
from .feed_api import FeedApi
from .legacy_api import POST_PROBE, LegacyApi
from .link import ChannelLink
from .mutable_api import mutable_routes
from .receiving import STORE_PATH, store_body, stored_spans
from .store_server import StoreServer
from .task_api import TaskApi
from .threads import in_thread
from .uploading import Account
from .why import ask_channel

if TYPE_CHECKING:
    from .node import Node

__all__ = ["LocalApi"]

log = logging.getLogger("kachery_fast.node")

_READ_HEADER = "X-Kachery-Read"
_Position = Annotated[int, msgspec.Meta(ge=0, le=2**62)]

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class _Load(msgspec.Struct, forbid_unknown_fields=True):
    uri: str
    channel: str | None = None


class _Read(msgspec.Struct, forbid_unknown_fields=True):
    uri: str
    channel: str | None = None
    start: _Position = 0
    end: _Position | None = None


class LocalApi:
    """Serves one ``Node``; the node starts and stops it."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._failures = Failures(time.monotonic)
        self._legacy = LegacyApi(node)
        self._border = Border(node.settings.node_host, node.settings.node_names, node.client_auth,
                              Admissions(node.settings, node.client_auth, node.api_threads, time.monotonic),
                              self._legacy.is_open, self._legacy.speaks)
        self._parts = contextlib.AsyncExitStack()  # closed in reverse
        self.port = 0

    async def start(self) -> None:
        """Listen on the configured address; port 0 lets the system choose.

        :raises NodeError: the address is in use, or not this machine's.
        """
        settings = self._node.settings
        app = web.Application(middlewares=[self._pass], client_max_size=settings.api_body_size_bytes_max)
        app.add_routes([
            web.get("/probe", self._probe),
            web.post("/probe", self._probe),
            web.get("/api/info", self._info),
            web.post("/api/load", self._load),
            web.post("/api/upload", self._upload),
            web.post("/api/read", self._read),
            web.get("/api/read-error/{name}", self._read_error),
            web.post(STORE_PATH, partial(store_body, self._node)),
            web.post("/api/why", self._why),
            web.post("/api/reload", self._reload),
            web.post("/api/stop", self._stop),
            *mutable_routes(self._node),
            *FeedApi(self._node).routes(),
            *BackendApi(self._node).routes(),
            *TaskApi(self._node).routes(),
            *self._legacy.routes(),
        ])
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
        self._parts.push_async_callback(self._legacy.close)
        self._parts.push_async_callback(runner.cleanup)
        await runner.setup()
        assert runner.server is not None, "a runner that is set up has a server"
        files = StoreServer(self._node.store, self._border, settings.stall_seconds)
        self._parts.push_async_callback(asyncio.to_thread, files.close)
        try:
            port = await serve_port(settings.node_host, settings.node_port, runner.server, files)
        except InvalidArgument as error:
            await self.stop()
            raise NodeError(what=f"{error.message.rstrip('.')}. Is a node running there already? Another port is "
                                 "chosen by KACHERY_DAEMON_PORT.") from None
        self._parts.push_async_callback(port.close)
        self.port = port.port

    async def stop(self) -> None:
        """Stop listening and break off what clients wait for."""
        await self._parts.aclose()

    # --- the border

    @web.middleware
    async def _pass(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        path = POST_PROBE if (request.method, request.path) == ("POST", "/probe") else request.path
        try:
            await self._border.check(request.method, request.path, request.headers)
            return await handler(request)
        except KacheryError as error:
            return self._border.tell(path, error, error.http_status)
        except web.HTTPRequestEntityTooLarge:
            limit = self._node.settings.api_body_size_bytes_max
            too_large = TooLarge(what="The request", size=request.content_length, limit=limit,
                                 setting="api_body_size_bytes_max")
            return self._border.tell(path, too_large, too_large.http_status)
        except web.HTTPException as answer:
            unusable = InvalidArgument(what=f"{request.method} {request.path}: {answer.reason}")
            told = self._border.tell(path, unusable, answer.status)
            if "Allow" in answer.headers:  # which a 405 needs (RFC 9110, 15.5.6)
                told.headers["Allow"] = answer.headers["Allow"]
            return told
        except (ConnectionError, asyncio.CancelledError):
            raise
        except Exception as error:
            fault = fault_of(request, error)
            return self._border.tell(path, fault, fault.http_status)

    # --- endpoints

    async def _probe(self, request: web.Request) -> web.Response:
        node = self._node
        return web.json_response({"success": True, "daemonVersion": f"kachery-fast-{node.version}",
                                  "nodeId": node.identity.node_id, "kacheryStorageDir": str(node.settings.storage_dir)})

    async def _info(self, request: web.Request) -> web.Response:
        return web.json_response(self._node.describe())

    async def _reload(self, request: web.Request) -> web.Response:
        await read_body(request, Nothing)
        await self._node.reload()
        return web.json_response({})

    async def _stop(self, request: web.Request) -> web.Response:
        await read_body(request, Nothing)
        asyncio.get_running_loop().call_later(0.05, self._node.stopped.set)
        return web.json_response({})

    async def _load(self, request: web.Request) -> web.StreamResponse:
        asked = await read_body(request, _Load)
        uri = parse_file_uri(asked.uri)
        loop = asyncio.get_running_loop()
        begun = loop.time()
        located = await self._find(uri, asked.channel)

        def done(found: Located) -> dict[str, Any]:
            return {"path": str(found.path), "size": found.size, "sha1": found.sha1,
                    "source": "store" if found is located else "channel", "seconds": round(loop.time() - begun, 6)}

        if located is not None:
            return web.Response(text=json.dumps({"type": "done", **done(located)}) + "\n",
                                content_type="application/x-ndjson")
        link = await self._requesting_link(uri, asked.channel)
        return await tell_work(request, self._node.transfers.load(uri, link), partial(self._progress, uri), done)

    def _progress(self, uri: FileUri) -> dict[str, Any]:
        transfer = self._node.transfers.active(uri.sha1)
        if transfer is None:
            return {"received": 0, "total": None, "waiting": "waiting for a turn"}
        return {"received": transfer.received, "total": transfer.total, "waiting": transfer.waiting}

    async def _upload(self, request: web.Request) -> web.StreamResponse:
        asked = await read_body(request, _Load)
        uri = parse_file_uri(asked.uri)
        await in_thread(self._node.api_threads, self._node.store.find, uri.sha1)
        link = await permitted_link(self._node, uri, asked.channel, Permission.PROVIDE_FILES)
        account = Account()
        return await tell_work(
            request, self._node.uploader(link).put_file(uri, account),
            lambda: {"received": account.done_bytes, "total": account.total_bytes,
                     "waiting": "" if account.total_bytes else "looking at the file"},
            lambda found: {"uri": str(found), "size": account.total_bytes})

    async def _read(self, request: web.Request) -> web.StreamResponse:
        asked = await read_body(request, _Read)
        uri = parse_file_uri(asked.uri)
        if asked.end is not None and asked.end < asked.start:
            raise InvalidArgument(what=f"bytes {asked.start} to {asked.end} are not a range")
        located = await self._find(uri, asked.channel)
        if located is not None:
            end = located.size if asked.end is None else min(asked.end, located.size)
            length, spans = max(0, end - asked.start), stored_spans(self._node, uri.sha1, asked.start, end)
        else:
            link = await self._requesting_link(uri, asked.channel)
            length, spans = await self._node.transfers.read(uri, link, asked.start, asked.end)
        name = self._failures.make_name()
        response = web.StreamResponse(headers={"Content-Type": "application/octet-stream",
                                               "Content-Length": str(length), _READ_HEADER: name})
        await response.prepare(request)
        sent = 0
        try:
            async with contextlib.aclosing(spans):
                async for span in spans:
                    await response.write(span)
                    sent += len(span)
        except ConnectionError:
            raise
        except KacheryError as error:
            log.warning("a read of %s broke off: %s", uri, error)
            self._failures.keep(name, error)
        except Exception as error:
            self._failures.keep(name, fault_of(request, error))
        if sent != length and request.transport is not None:
            # The head is out: break the body off, so that nobody waits for the rest or takes this for the whole.
            request.transport.abort()
        return response

    async def _read_error(self, request: web.Request) -> web.Response:
        error = self._failures.find(request.match_info["name"])
        return web.json_response({} if error is None else error.to_dict())

    async def _why(self, request: web.Request) -> web.Response:
        asked = await read_body(request, _Load)
        uri = parse_file_uri(asked.uri)
        try:
            located = await in_thread(self._node.api_threads, self._node.store.find, uri.sha1)
            store = f"has it: {located.path} ({located.size} bytes{', linked' if located.linked else ''})"
        except KacheryError as error:
            store = error.message
        name = asked.channel or self._node.settings.channel
        links = [self._node.link_for(uri, name)] if name else self._node.links()
        channels = await asyncio.gather(*(self._ask(uri, link) for link in links))
        return web.json_response({"uri": str(uri), "store": store, "channels": channels,
                                  "verdict": _verdict(store, channels)})

    async def _ask(self, uri: FileUri, link: ChannelLink) -> dict[str, Any]:
        refusal = link.refusal(Permission.REQUEST_FILES)
        if refusal is not None:
            return {"channel": link.name, "bucket": "not looked at", "rounds": 0, "asked": [], "answers": [],
                    "text": refusal.message}
        inquiry, text = await ask_channel(uri, link, self._node.settings.offer_wait_seconds)
        return {**inquiry.to_dict(), "text": text}

    # --- small parts

    async def _find(self, uri: FileUri, channel: str | None) -> Located | None:
        try:
            return await in_thread(self._node.api_threads, self._node.store.find, uri.sha1)
        except NotInStore:
            return None
        except LinkInvalid:
            if self._node.settings.channel if channel is None else channel:
                return None  # the channel may have what the linked file no longer is
            raise

    async def _requesting_link(self, uri: FileUri, channel: str | None) -> ChannelLink:
        """Return the channel to ask on; None: the node's own default, empty: none, by the client's choice."""
        if channel == "":
            raise NoChannel(uri=str(uri))
        return await permitted_link(self._node, uri, channel, Permission.REQUEST_FILES, suffices=ChannelLink.providers)


def _verdict(store: str, channels: list[dict[str, Any]]) -> str:
    if store.startswith("has it"):
        return "It is in the local store."
    for channel in channels:
        if any(str(answer["answer"]).startswith("has it") for answer in channel["answers"]):
            return f"It can be loaded from the channel {channel['channel']!r}: a node offers it."
        if channel["bucket"].startswith("has it"):
            return f"It can be loaded from the channel {channel['channel']!r}: the bucket has it."
    return "It cannot be loaded now." if channels else "It is not here, and this node is on no channel."
