"""HTTP/1.1 ranges straight into the caller's memory, and parts of files straight to a socket.

``RangeClient`` is the asyncio side: it pools kept-alive connections, bounds the threads that run the exchanges
(``http1``), and guarantees that a coroutine which returned or raised has no thread left that touches its memory.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, TypeVar
from urllib.parse import urlsplit

from ..config import Settings
from ..errors import BucketUnreachable, InvalidArgument
from .http1 import Connection, Progress, StaleConnection
from .plain import Origin, Received, Request, Response, plain_request
from .targets import FileSpan, Target, size_of

__all__ = ["FileSpan", "Meter", "Progress", "RangeClient", "Received", "Response", "Target"]

T = TypeVar("T")

_log = logging.getLogger("kachery_fast.net")
_PORTS = {"http": 80, "https": 443}
_IDLE_SECONDS_MAX = 60.0


class RangeClient:
    """HTTP/1.1 client of one event loop, for objects of any size.

    :param concurrency: bulk transfers (``receive``, ``send``) at once, and as many small exchanges beside them;
        further ones wait. Twice this number bounds the threads and the open connections.
    :param tls: the context for https URLs; the system's certificates when None.
    """

    def __init__(self, settings: Settings, *, concurrency: int, tls: ssl.SSLContext | None = None) -> None:
        self._settings = settings
        self._tls = tls
        self._bulk = asyncio.Semaphore(concurrency)
        self._small = asyncio.Semaphore(concurrency)
        self._connections_max = 2 * concurrency
        self._threads = ThreadPoolExecutor(2 * concurrency, thread_name_prefix="kachery-ranges")
        self._idle: list[Connection] = []
        self._active: set[Connection] = set()
        self._closed = False

    async def receive(self, url: str, target: Target, *, start: int | None = None, total: int | None = None,
                      headers: Mapping[str, str] | None = None, progress: Progress | None = None) -> Received:
        """GET bytes into all of ``target``.

        :param target: memory, or a ``FileSpan`` (on Linux that costs half the CPU time, as no page faults); nobody
            writes to it once the coroutine returned or raised.
        :param start: None: the whole object, which must have exactly the target's size (status 200); else the range
            of that size that begins there (status 206).
        :param total: with ``start``: the size in bytes that the whole object must have, when known.
        :param progress: called from a worker thread with bytes received since its last call.
        :returns: ``Received``; any status but 200 (206) comes back with its small body and 0 bytes received.
            Redirects are not followed.
        :raises PartialTransfer, Stalled, BucketUnreachable: the transfer ended early; ``details["received"]`` is the
            number of bytes that are in the target.
        :raises WrongSize: the object, or its range, is of another size. :raises InvalidArgument: not a usable URL.
        :raises DiskFull, DiskError: the file of a ``FileSpan`` took no more.
        """
        fields = {"accept-encoding": "identity", **(headers or {})}
        if start is not None:
            if not size_of(target):
                raise InvalidArgument(what="An empty range cannot be requested.")
            fields["range"] = f"bytes={start}-{start + size_of(target) - 1}"
        request = _request("GET", url, fields)
        meter = Meter(progress)
        async with self._bulk:
            return await self._exchange(request, lambda connection: connection.receive(
                request, target, start=start, total=total, progress=meter.told), meter)

    async def send(self, url: str, fd: int, offset: int, length: int, *, headers: Mapping[str, str] | None = None,
                   progress: Progress | None = None, fresh: bool = False) -> Response:
        """PUT ``length`` bytes of the open file ``fd`` from byte ``offset`` on; the file's position is not moved.

        An answer that comes before the whole body was sent ends the sending.

        :param fresh: by a connection of its own, and not tried again: on one that was kept, a break may be an old end.
        :raises Stalled, BucketUnreachable: as in ``receive``. :raises FileChanged: the file ends too early.
        """
        request = _request("PUT", url, {**(headers or {}), "content-length": str(length)})
        meter = Meter(progress)
        async with self._bulk:
            return await self._exchange(request, lambda connection: connection.send(
                request, fd, offset, length, meter.told), meter, fresh=fresh)

    async def send_small(self, url: str, data: bytes, *, headers: Mapping[str, str] | None = None,
                         method: str = "PUT", fresh: bool = False) -> Response:
        """PUT (or POST) bytes that are in memory; they do not queue behind bulk transfers. ``fresh``: as of ``send``.

        :raises Stalled, BucketUnreachable: as in ``receive``.
        """
        request = _request(method, url, {**(headers or {}), "content-length": str(len(data))})
        async with self._small:
            return await self._exchange(request, lambda connection: connection.send(
                request, data, 0, len(data), None), Meter(None), fresh=fresh)

    async def head(self, url: str, headers: Mapping[str, str] | None = None) -> Response:
        """HEAD: the status and headers of an object. :raises Stalled, BucketUnreachable:"""
        request = _request("HEAD", url, {"accept-encoding": "identity", **(headers or {})})
        async with self._small:
            return await self._exchange(request, lambda connection: connection.fetch(request, 0), Meter(None))

    async def get_small(self, url: str, limit_bytes: int, headers: Mapping[str, str] | None = None) -> Response:
        """GET a small object; its bytes are the answer's ``body``.

        :raises TooLarge: it has more than ``limit_bytes``. :raises Stalled, BucketUnreachable:
        """
        request = _request("GET", url, {"accept-encoding": "identity", **(headers or {})})
        plain = plain_request(request) if request.origin.scheme == "http" else None
        async with self._small:
            return await self._exchange(
                request, lambda connection: connection.fetch(request, limit_bytes), Meter(None),
                None if plain is None else lambda connection: connection.fetch_on_loop(
                    request, plain, limit_bytes, lambda work: self._in_thread(connection, work)))

    async def close(self) -> None:
        """Break off what is under way (its callers get an error), close every connection, end the threads."""
        self._closed = True
        for connection in self._idle:
            connection.close()
        self._idle.clear()
        for connection in self._active:
            connection.abort()
        await asyncio.get_running_loop().run_in_executor(None, self._threads.shutdown)

    # --- connections

    async def _exchange(self, request: Request, work: Callable[[Connection], T], meter: Meter,
                        work_on_loop: Callable[[Connection], Awaitable[T]] | None = None, *,
                        fresh: bool = False) -> T:
        """Run ``work`` in a thread, or ``work_on_loop`` where a connection was kept: each hand-over to a thread takes a
        tenth of a small exchange."""
        connection = None if fresh else self._take(request.origin)
        if connection is not None:
            try:
                with self._using(connection):
                    if work_on_loop is not None:
                        return await work_on_loop(connection)
                    return await self._in_thread(connection, lambda: work(connection))
            except StaleConnection:
                _log.debug("%s closed an idle connection; taking a fresh one", request.origin.host)
                meter.undo()
        addresses = await self._addresses(request)
        made = Connection(request.origin, stall_seconds=self._settings.stall_seconds,
                          span_bytes=self._settings.small_read_size_bytes)

        def connect_and_work() -> T:
            tls = self._context() if request.origin.scheme == "https" else None
            seconds = self._settings.connect_timeout_seconds
            try:
                made.open(addresses, connect_timeout_seconds=seconds, tls=tls)
            except TimeoutError as error:
                why = f"no connection within {seconds:g} s"
                raise BucketUnreachable(object=request.name, why=why, attempts=1, received=0) from error
            except OSError as error:
                why = error.strerror or str(error)
                raise BucketUnreachable(object=request.name, why=why, attempts=1, received=0) from error
            return work(made)

        with self._using(made):
            return await self._in_thread(made, connect_and_work)

    @contextmanager
    def _using(self, connection: Connection) -> Iterator[None]:
        """Have ``close`` reach the connection meanwhile, and keep it afterwards if it can be used again."""
        self._active.add(connection)
        try:
            yield
        finally:
            self._active.discard(connection)
            self._give_back(connection)

    async def _in_thread(self, connection: Connection, work: Callable[[], T]) -> T:
        """Run ``work`` in a thread; on cancellation end its system call and wait for it before raising."""
        if self._closed:
            raise BucketUnreachable(object=connection.origin.host, why="this client is closed", attempts=0)
        thread = asyncio.wrap_future(self._threads.submit(work))
        try:
            return await asyncio.shield(thread)
        except asyncio.CancelledError:
            connection.abort()
            while not thread.done():
                with suppress(asyncio.CancelledError):
                    await asyncio.wait([thread])
            if not thread.cancelled():
                thread.exception()  # collected: the cancellation is what the caller hears of
            raise

    def _take(self, origin: Origin) -> Connection | None:
        now = asyncio.get_running_loop().time()
        for connection in reversed(self._idle):  # the youngest first
            if connection.origin == origin:
                self._idle.remove(connection)
                if now - connection.idle_since < _IDLE_SECONDS_MAX and not connection.went_away():
                    connection.reusable = False
                    return connection
                connection.close()
                return self._take(origin)
        return None

    def _give_back(self, connection: Connection) -> None:
        if self._closed or not connection.reusable:
            connection.close()
            return
        connection.idle_since = asyncio.get_running_loop().time()
        self._idle.append(connection)
        while len(self._idle) > self._connections_max or (
                connection.idle_since - self._idle[0].idle_since > _IDLE_SECONDS_MAX):
            self._idle.pop(0).close()

    async def _addresses(self, request: Request) -> list[Any]:
        loop = asyncio.get_running_loop()
        seconds = self._settings.connect_timeout_seconds
        try:
            return await asyncio.wait_for(
                loop.getaddrinfo(request.origin.host, request.origin.port, type=socket.SOCK_STREAM), seconds)
        except asyncio.TimeoutError as error:
            why = f"the name {request.origin.host} was not resolved within {seconds:g} s"
            raise BucketUnreachable(object=request.name, why=why, attempts=1, received=0) from error
        except (OSError, UnicodeError) as error:
            why = f"the name {request.origin.host} is not known: {getattr(error, 'strerror', None) or error}"
            raise BucketUnreachable(object=request.name, why=why, attempts=1, received=0) from error

    def _context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = ssl.create_default_context()
        return self._tls


class Meter:
    """Passes progress on (``told``), and takes it back when the same bytes are moved again."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._sum = 0
        self.told: Progress | None = None if progress is None else self._tell

    def _tell(self, count: int) -> None:
        self._sum += count
        if self._progress is not None:
            self._progress(count)

    def undo(self) -> None:
        """Report all that was told so far as not moved."""
        if self._sum:
            self._tell(-self._sum)


def _request(method: str, url: str, headers: Mapping[str, str]) -> Request:
    try:
        parts = urlsplit(url)
        port = parts.port or _PORTS.get(parts.scheme, 0)
    except ValueError as error:
        raise InvalidArgument(what=f"{url!r} is not a URL: {error}") from error
    if parts.scheme not in _PORTS or not parts.hostname or parts.username is not None:
        raise InvalidArgument(what=f"{url!r} is not an http:// or https:// URL of a bucket.")
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Request(method, Origin(parts.scheme, parts.hostname, port), target, headers,
                   f"{parts.scheme}://{parts.netloc}{parts.path}")


