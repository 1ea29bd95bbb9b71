"""One HTTP/1.1 exchange at a time on one socket, run in a thread; a small one also on an event loop.

The page faults of a mapping and the reads of a disk would block an event loop, so bulk data moves in threads; the
interpreter lock is released in each system call. h11 reads the heads and the small bodies; a large body goes past
it, from the socket into the caller's memory, or by ``sendfile`` from a file to the socket. The stall watchdog is
the socket's own time-out: a system call that moves no byte for ``stall_seconds`` ends the exchange.
"""

from __future__ import annotations

import os
import re
import select
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import h11

from ..errors import BucketUnreachable, FileChanged, InvalidArgument, PartialTransfer, Stalled, TooLarge, WrongSize
from ..splice import FileRefused
from .plain import PLAIN_SIZE_BYTES_MAX, NotPlain, Origin, Received, Request, Response, plain_answer
from .targets import Sink, Target, disk_error, open_sink, size_of
from .waiting import poll, readable

__all__ = ["Connection", "Progress", "StaleConnection"]

#: Called from the worker thread with the number of bytes moved since the last call.
Progress = Callable[[int], None]

ERROR_BODY_SIZE_BYTES_MAX = 65536
_HEAD_READ_BYTES = 65536
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


class StaleConnection(Exception):
    """A kept-alive connection was closed by the server before it answered: take a fresh one."""


class Connection:
    """A connection to an origin, used by one thread at a time; ``abort`` alone may be called from any thread."""

    def __init__(self, origin: Origin, *, stall_seconds: float, span_bytes: int) -> None:
        self.origin = origin
        self.reusable = False
        self.idle_since = 0.0
        self._stall_seconds = stall_seconds
        self._span_bytes = span_bytes
        self._lock = threading.Lock()
        self._aborted = False
        self._socket: socket.socket | None = None
        self._used = False
        self._request = Request("", origin, "", {}, "")
        self._parser = h11.Connection(h11.CLIENT)
        self._heard = self._body_begun = False
        self._moved = self._told = 0
        self._progress: Progress | None = None

    def open(self, addresses: list[Any], *, connect_timeout_seconds: float, tls: ssl.SSLContext | None) -> None:
        """Connect to the first of ``addresses`` (rows of ``getaddrinfo``) that answers.

        :raises OSError: none does, or the TLS handshake fails.
        """
        failure: OSError = OSError("the name has no address")
        for family, kind, protocol, _name, address in addresses:
            sock = socket.socket(family, kind, protocol)
            try:
                self._attach(sock)
                sock.settimeout(connect_timeout_seconds)
                sock.connect(address)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if tls is not None:
                    # The handshake runs after the wrapped socket is attached, so that abort() reaches it.
                    sock = tls.wrap_socket(sock, server_hostname=self.origin.host, do_handshake_on_connect=False)
                    self._attach(sock)
                    sock.do_handshake()
                sock.settimeout(self._stall_seconds)
            except OSError as error:
                failure = error
                self.close()
                sock.close()
                if self._aborted:
                    break
            else:
                return
        raise failure

    def abort(self) -> None:
        """End whatever the connection's thread waits for; its system call returns at once. Any thread may call."""
        with self._lock:
            self._aborted = True
            if self._socket is not None:
                with suppress(OSError):
                    # Past SSLSocket.shutdown, which would drop the TLS state under the thread that reads.
                    socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket; no-op when closed."""
        with self._lock:
            self.reusable = False
            if self._socket is not None:
                self._socket.close()
                self._socket = None

    def went_away(self) -> bool:
        """Whether an idle connection was closed, or spoken on, by the server meanwhile."""
        return self._socket is None or bool(poll(self._socket, select.POLLIN, 0.0))

    def receive(self, request: Request, target: Target, *, start: int | None, total: int | None,
                progress: Progress | None) -> Received:
        """Send a GET and receive its body into all of ``target``; see ``RangeClient.receive``."""
        length = size_of(target)
        try:
            with self._exchange(request, length, progress):
                head = self._ask()
                status, headers = head.status_code, _headers(head)
                if status != (200 if start is None else 206):
                    return Received(self._small_answer(head, ERROR_BODY_SIZE_BYTES_MAX), 0, None)
                size = _object_size(request, head, headers, length, start, total)
                self._body_begun = True
                with open_sink(target, self._sock) as sink:
                    self._fill(sink, length)
                self.reusable = _keeps_alive(head, headers) and not self._parser.trailing_data[0]
                return Received(Response(status, headers), self._moved, size)
        except FileRefused as error:
            raise disk_error(error, target, request.name) from error

    def _fill(self, sink: Sink, length: int) -> None:
        """First what came along with the head, by way of h11; then from the socket straight to where it belongs."""
        copying = True
        while self._moved < length:
            event = self._parser.next_event() if copying else h11.NEED_DATA
            if isinstance(event, h11.Data):
                sink.write(event.data, self._moved)
                self._moved += len(event.data)
            else:
                copying = False
                count = sink.move(self._moved, min(self._span_bytes, length - self._moved))
                if not count:
                    raise ConnectionResetError("the server closed the connection")
                self._moved += count
            self._tell(self._span_bytes if self._moved < length else 1)

    def fetch(self, request: Request, limit_bytes: int) -> Response:
        """Send a GET or HEAD and return its answer, body included.

        :raises TooLarge: the body of a 200 answer is longer than ``limit_bytes``.
        """
        with self._exchange(request, None, None):
            self._sock.sendall(self._head_bytes())
            return self._fetched(limit_bytes)

    async def fetch_on_loop(self, request: Request, data: bytes, limit_bytes: int,
                            in_thread: Callable[[Callable[[], Response]], Awaitable[Response]]) -> Response:
        """As ``fetch``, over a kept connection without TLS; an answer that is not plain, or long, is read in a thread.

        :param data: the ``plain_request``.
        """
        with self._exchange(request, None, None):
            self._sock.settimeout(0)
            self._sock.sendall(data)
            answer, begun = await self._plain_answer()
            self._sock.settimeout(self._stall_seconds)
            if answer is not None and len(answer.body) <= limit_bytes:
                self.reusable = True
                return answer
            self._head_bytes()  # for the parser, which has to know what is answered
            if begun:
                self._feed(begun)
            return await in_thread(lambda: self._fetched(limit_bytes))

    async def _plain_answer(self) -> tuple[Response | None, bytes]:
        """Wait for an answer, and return it, or what there is of it when it is not plain."""
        data = b""
        with suppress(NotPlain):
            while True:
                await readable(self._sock, self._stall_seconds)
                with suppress(BlockingIOError):
                    piece = self._sock.recv(PLAIN_SIZE_BYTES_MAX)
                    data += piece
                    self._heard = self._heard or bool(piece)
                    answer = plain_answer(data)
                    if answer is not None or not piece:
                        return answer, data
        return None, data

    def _fetched(self, limit_bytes: int) -> Response:
        head, request = self._read_head(), self._request
        length = _headers(head).get("content-length", "0")
        if head.status_code != 200:
            return self._small_answer(head, ERROR_BODY_SIZE_BYTES_MAX)
        answer = self._small_answer(head, limit_bytes + 1)
        size = max(len(answer.body), int(length) if request.method == "GET" else 0)
        if size > limit_bytes:
            raise TooLarge(what=request.name, size=size, limit=limit_bytes, setting="the reader's limit")
        return answer

    def send(self, request: Request, source: int | bytes, offset: int, length: int, progress: Progress | None
             ) -> Response:
        """Send ``length`` bytes of the file, or the bytes, ``source`` from ``offset`` on as the request's body; see
        ``RangeClient.send``. An answer that comes early ends the sending."""
        with self._exchange(request, length, progress):
            self._sock.sendall(self._parser.send(_h11_request(request)) or b"")
            early: h11.Response | None = None
            try:
                while self._moved < length and early is None:
                    events = poll(self._sock, select.POLLIN | select.POLLOUT, self._stall_seconds)
                    if not events:
                        raise TimeoutError
                    if events & ~select.POLLOUT:
                        early = self._early_answer()
                    if events & select.POLLOUT and early is None:
                        self._send_span(source, offset + self._moved, min(self._span_bytes, length - self._moved))
                    self._tell(self._span_bytes if self._moved < length else 1)
            except ConnectionError:
                # A server that refuses and closes resets what was still on its way; its answer may have arrived.
                with suppress(OSError, h11.RemoteProtocolError):
                    return self._small_answer(self._read_head(), ERROR_BODY_SIZE_BYTES_MAX, keep=False)
                raise
            answer = self._read_head() if early is None else early
            return self._small_answer(answer, ERROR_BODY_SIZE_BYTES_MAX, keep=early is None)

    # --- within an exchange

    @property
    def _sock(self) -> socket.socket:
        if self._socket is None:
            raise ConnectionResetError("the connection is closed")
        return self._socket

    def _attach(self, sock: socket.socket) -> None:
        with self._lock:
            self._socket = sock
            if self._aborted:
                raise ConnectionAbortedError("cancelled")

    def _begin(self, request: Request, progress: Progress | None) -> None:
        self._request = request
        self._parser = h11.Connection(h11.CLIENT, max_incomplete_event_size=ERROR_BODY_SIZE_BYTES_MAX)
        self._heard = self._body_begun = False
        self._moved = self._told = 0
        self._progress = progress
        self.reusable = False

    def _tell(self, at_least_bytes: int) -> None:
        if self._progress is not None and self._moved - self._told >= at_least_bytes:
            self._progress(self._moved - self._told)
            self._told = self._moved

    @contextmanager
    def _exchange(self, request: Request, expected_bytes: int | None, progress: Progress | None) -> Iterator[None]:
        """Translate what sockets and h11 raise into errors of ours, once; ``details['received']`` counts bytes."""
        self._begin(request, progress)
        name, used, self._used = request.name, self._used, True
        try:
            yield
        except TimeoutError as error:
            raise Stalled(what=f"{request.method} of {name}", seconds=self._stall_seconds, object=name,
                          received=self._moved) from error
        except (OSError, h11.RemoteProtocolError) as error:
            if used and not self._heard and isinstance(error, ConnectionError):
                raise StaleConnection from error
            if self._body_begun:
                raise PartialTransfer(object=name, received=self._moved, expected=expected_bytes) from error
            why = f"{error.strerror or error}" if isinstance(error, OSError) else f"not HTTP: {error}"
            raise BucketUnreachable(object=name, why=why, attempts=1, received=0) from error
        except h11.LocalProtocolError as error:
            raise InvalidArgument(what=f"{request.target!r} cannot be requested: {error}") from error
        finally:
            if not self.reusable:
                self.close()
            if not self._aborted:
                self._tell(1)  # what came before a failure is there too

    def _ask(self) -> h11.Response:
        self._sock.sendall(self._head_bytes())
        return self._read_head()

    def _head_bytes(self) -> bytes:
        """The whole of a request that has no body."""
        return (self._parser.send(_h11_request(self._request)) or b"") + (self._parser.send(h11.EndOfMessage()) or b"")

    def _read_head(self) -> h11.Response:
        while True:
            event = self._parser.next_event()
            if event is h11.NEED_DATA:
                self._feed(self._sock.recv(_HEAD_READ_BYTES))
            elif isinstance(event, h11.Response):
                return event
            elif not isinstance(event, h11.InformationalResponse):
                raise ConnectionResetError("the server closed the connection")

    def _feed(self, data: bytes) -> None:
        if not data and not self._heard:
            raise ConnectionResetError("the server closed the connection without an answer")
        self._heard = True
        self._parser.receive_data(data)

    def _early_answer(self) -> h11.Response | None:
        """Read what came while sending. None: not an answer (100 Continue, a TLS session ticket, half a head)."""
        self._sock.settimeout(0)
        try:
            self._feed(self._sock.recv(_HEAD_READ_BYTES))
        except (ssl.SSLWantReadError, BlockingIOError):
            return None
        finally:
            self._sock.settimeout(self._stall_seconds)
        while True:
            event = self._parser.next_event()
            if event is h11.NEED_DATA:
                return None
            if isinstance(event, h11.Response):
                return event
            if not isinstance(event, h11.InformationalResponse):
                raise ConnectionResetError("the server closed the connection")

    def _send_span(self, source: int | bytes, offset: int, length: int) -> None:
        if isinstance(source, bytes):
            count = self._sock.send(memoryview(source)[offset:offset + length])
        elif isinstance(self._sock, ssl.SSLSocket):
            data = os.pread(source, length, offset)
            self._sock.sendall(data)
            count = len(data)
        else:
            try:
                count = os.sendfile(self._sock.fileno(), source, offset, length)
            except BlockingIOError:
                return
        if not count:
            raise FileChanged(path="the file being sent", why=f"it ends at byte {offset}")
        self._moved += count

    def _small_answer(self, head: h11.Response, limit_bytes: int, *, keep: bool = True) -> Response:
        """Read the body of an answer up to ``limit_bytes``; a longer one is cut off and ends the connection."""
        body = bytearray()
        ended = False
        while not ended and len(body) < limit_bytes:
            event = self._parser.next_event()
            if event is h11.NEED_DATA:
                self._parser.receive_data(self._sock.recv(_HEAD_READ_BYTES))
            elif isinstance(event, h11.Data):
                body += event.data
            else:
                ended = True
        headers = _headers(head)
        self.reusable = keep and ended and _keeps_alive(head, headers) and not self._parser.trailing_data[0]
        return Response(head.status_code, headers, bytes(body[:limit_bytes]))


def _h11_request(request: Request) -> h11.Request:
    headers = [("host", request.origin.authority), *request.headers.items()]
    return h11.Request(method=request.method, target=request.target, headers=headers)


def _headers(head: h11.Response) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in head.headers}


def _keeps_alive(head: h11.Response, headers: Mapping[str, str]) -> bool:
    return head.http_version == b"1.1" and "close" not in headers.get("connection", "").lower()


def _object_size(request: Request, head: h11.Response, headers: Mapping[str, str], length: int,
                 start: int | None, total: int | None) -> int | None:
    """Check that the answer's body is exactly what fits; returns the whole object's size where it is told.

    :raises WrongSize: the object is of another size. :raises BucketUnreachable: the framing makes no sense.
    """
    declared = headers.get("content-length")
    if declared is None or headers.get("content-encoding", "identity") != "identity":
        raise BucketUnreachable(object=request.name, attempts=1, received=0,
                                why="its answer is encoded, or does not tell its length")
    size: int | None = int(declared)
    if start is not None:
        match = _CONTENT_RANGE.fullmatch(headers.get("content-range", ""))
        if match is None or (int(match[1]), int(match[2])) != (start, start + int(declared) - 1):
            raise BucketUnreachable(object=request.name, attempts=1, received=0, why="it answered another range")
        size = None if match[3] == "*" else int(match[3])
    expected = length if start is None else total
    if size is not None and expected is not None and size != expected:
        raise WrongSize(object=request.name, found=size, expected=expected)
    if int(declared) != length:
        raise WrongSize(object=request.name, found=(start or 0) + int(declared), expected=(start or 0) + length)
    return size
