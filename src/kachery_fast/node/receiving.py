"""Bytes between a client of the local API and the store: a file that comes in, and a stored one that goes out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator
from functools import partial
from typing import TYPE_CHECKING

from aiohttp import web

from ..errors import FileChanged, KacheryError
from ..store.objects import Stored
from .ending import end_tasks
from .faults import logged_fault
from .threads import in_thread

if TYPE_CHECKING:
    from .node import Node

__all__ = [
    "STORE_2022_PATH", "STORE_PATH", "send_stored", "store_body", "stored_spans", "tell_store_error", "tell_stored",
]

STORE_PATH, STORE_2022_PATH = "/api/store", "/store"


log = logging.getLogger("kachery_fast.node")

_SPAN_BYTES = 4 * 1024 * 1024


async def store_body(node: Node, request: web.Request) -> web.Response:
    """Serve a store on a kept connection. :raises KacheryError: nothing was stored, and the path is not of 2022."""
    try:
        return tell_stored(request.path, await _receive(node, request))
    except KacheryError as error:
        told = tell_store_error(request.path, error)
        if told is None:
            raise
        return told


def tell_stored(path: str, stored: Stored) -> web.Response:
    """Return the answer to a store at one of the two paths."""
    if path == STORE_2022_PATH:
        return web.json_response({"success": True, "error": None, "sha1": stored.sha1,
                                  "manifestSha1": stored.manifest_sha1})
    return web.json_response({"sha1": stored.sha1, "size": stored.size, "manifestSha1": stored.manifest_sha1})


def tell_store_error(path: str, error: KacheryError) -> web.Response | None:
    """Return the answer to a store at the path of 2022 that failed; None at the other, where errors are told as ever.

    The client of 2022 shows an error of an answer with status 200, and hides that of any other.
    """
    if path != STORE_2022_PATH:
        return None
    log.warning("a file could not be stored: %s", error)
    return web.json_response({"success": False, "error": error.message, "sha1": None, "manifestSha1": None})


async def _receive(node: Node, request: web.Request) -> Stored:
    """Store the body of a request.

    :raises DiskFull, DiskError: nothing was stored. :raises ConnectionError: the client has gone; likewise.
    """
    threads = node.api_threads
    begin = partial(node.store.stream_writer, expected_size_bytes=request.content_length or 0)
    writer = await in_thread(threads, begin, undo=lambda begun: begun.abort())
    # What comes in is small, and a thread's turn is not: what came while the thread was at work is its next span.
    writing: asyncio.Task[None] | None = None
    pieces: list[bytes] = []
    size_bytes = 0
    try:
        async for piece in _pieces(request, node.settings.stall_seconds):
            pieces.append(piece)
            size_bytes += len(piece)
            if writing is not None and (writing.done() or size_bytes >= _SPAN_BYTES):
                await writing
                writing = None
            if writing is None:
                writing = asyncio.ensure_future(in_thread(threads, writer.write, b"".join(pieces)))
                pieces, size_bytes = [], 0
        if writing is not None:
            await writing
        if pieces:
            await in_thread(threads, writer.write, b"".join(pieces))
        return await in_thread(threads, writer.commit)
    finally:
        if writing is not None:
            await end_tasks([writing])
        await in_thread(threads, writer.abort)


async def _pieces(request: web.Request, stall_seconds: float) -> AsyncGenerator[bytes, None]:
    """Yield a body as it comes in; the connection of a client that falls silent is broken off, which ends the call."""
    loop, transport = asyncio.get_running_loop(), request.transport
    while transport is not None:
        alarm = loop.call_later(stall_seconds, transport.abort)
        try:
            piece = await request.content.readany()
        finally:
            alarm.cancel()
        if not piece:
            return
        yield piece
    raise ConnectionResetError


async def send_stored(node: Node, request: web.Request, sha1: str, start: int, end: int,
                      content_type: str) -> web.StreamResponse:
    """Answer with the bytes ``start`` to ``end`` of a stored file; where they end early, the connection does too."""
    response = web.StreamResponse(headers={"Content-Type": content_type, "Content-Length": str(end - start)})
    await response.prepare(request)
    try:
        async with contextlib.aclosing(stored_spans(node, sha1, start, end)) as spans:
            async for span in spans:
                await response.write(span)
    except ConnectionError:
        raise
    except Exception as error:  # the head is out: nobody must take this for the whole, nor wait for the rest
        log.warning("a download of sha1://%s broke off: %s", sha1,
                    error if isinstance(error, KacheryError) else logged_fault(error, request.path))
        if request.transport is not None:
            request.transport.abort()
    return response


async def stored_spans(node: Node, sha1: str, start: int, end: int) -> AsyncGenerator[bytes, None]:
    """Yield the bytes ``start`` to ``end`` of a stored file.

    :raises FileChanged: it ends before that. :raises KacheryError: it cannot be read.
    """
    threads = node.api_threads
    file = await in_thread(threads, node.store.open, sha1, undo=lambda opened: opened.close())
    with file:
        file.seek(start)
        while start < end:
            span = await in_thread(threads, file.read, min(_SPAN_BYTES, end - start))
            if not span:
                raise FileChanged(path=f"sha1://{sha1}", why=f"it ends at byte {start}")
            start += len(span)
            yield span
