"""HTTP/1.1 of the embedded bucket: one connection, its requests served one after another in one thread.

What Google Cloud Storage's XML API answers, this answers (https://cloud.google.com/storage/docs/xml-api): its
statuses, its error bodies, its create-only precondition. h11 reads the heads; bodies go by ``sendfile`` to the
socket and by ``splice`` from it.
"""

from __future__ import annotations

import os
import re
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from email.utils import formatdate
from http import HTTPStatus
from typing import NamedTuple, Protocol

import h11

from ..errors import (
    DiskError,
    DiskFull,
    InvalidName,
    KacheryError,
    NotPermitted,
    ObjectExists,
    ObjectMissing,
    UploadRefused,
    UrlExpired,
)
from ..splice import FileReceiver, FileRefused
from .bucket_files import ObjectFiles
from .bucket_names import is_replaceable

__all__ = ["ConnectionLimits", "Observer", "PutLeave", "RateLimit", "RequestHandler", "refuse_busy"]

HEAD_SIZE_BYTES_MAX = 16384
_HEAD_READ_BYTES = 16384
_SPAN_BYTES = 1024 * 1024
_LIMITED_SPAN_BYTES = 256 * 1024  # while a rate is held: small enough to share it evenly
_DRAIN_BYTES_MAX = 65536
_LINGER_SECONDS = 2.0
_RANGE = re.compile(r"bytes=(\d{0,15})-(\d{0,15})")


class ConnectionLimits(NamedTuple):
    """How long a connection may be idle between requests, and without a byte within one, in seconds."""

    idle_seconds: float
    stall_seconds: float


class PutLeave(NamedTuple):
    """What a signed URL allows: an object of so many bytes, also in the place of another one when ``replace``.

    ``node_id``: the node that it was signed for, "" when it names none.
    """

    size_bytes: int
    replace: bool
    node_id: str = ""


class Observer(Protocol):
    """Who is told what moves. Called in the threads that move it, so it must be quick."""

    def arrived(self, object_name: str, node_id: str, size_bytes: int) -> None:
        """An object was uploaded, by a URL that was signed for this node."""

    def found(self, object_name: str) -> None:
        """An object that was to be uploaded was there already."""

    def sent(self, object_name: str, node_id: str, size_bytes: int) -> None:
        """So many bytes of an object were sent in answer to one request, perhaps fewer than were asked for."""


class RateLimit:
    """Holds all users together to a rate in bytes per second; ``take`` waits for its turn. Thread-safe."""

    def __init__(self, bytes_per_second: float, *, clock: Callable[[], float] = time.monotonic,
                 sleep: Callable[[float], None] = time.sleep) -> None:
        self._lock = threading.Lock()
        self._rate = bytes_per_second
        self._clock = clock
        self._sleep = sleep
        self._free_at = clock()

    def take(self, count_bytes: int) -> None:
        """Wait until so many bytes may pass, in bytes a second on the average."""
        with self._lock:
            now = self._clock()
            self._free_at = max(self._free_at, now) + count_bytes / self._rate
            wait = self._free_at - now
        self._sleep(wait)


class _Refusal(Exception):
    """An answer that is not success, as an exception; ``code`` is that of the XML body."""

    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers


#: What an error of ours means on the wire.
_STATUS: Mapping[type[KacheryError], tuple[int, str]] = {
    InvalidName: (400, "InvalidObjectName"),
    ObjectMissing: (404, "NoSuchKey"),
    ObjectExists: (412, "PreconditionFailed"),
    NotPermitted: (403, "AccessDenied"),
    UrlExpired: (403, "ExpiredToken"),
    UploadRefused: (403, "SignatureDoesNotMatch"),
    DiskFull: (507, "InsufficientStorage"),
    DiskError: (500, "InternalError"),
}


class RequestHandler:
    """Serves one accepted socket until it closes.

    :param verify: ``(object name, query) -> what was signed``; raises UrlExpired or UploadRefused.
    :param observer: is told what moves.
    :param check_read: ``(method, object name, query) -> whether it needed a signature``; raises what refuses the read.
        None: everybody may read everything.
    """

    def __init__(self, sock: socket.socket, files: ObjectFiles, verify: Callable[[str, str], PutLeave], *, prefix: str,
                 limits: ConnectionLimits, upload_rate: RateLimit | None, download_rate: RateLimit | None,
                 observer: Observer | None = None,
                 check_read: Callable[[str, str, str], bool] | None = None) -> None:
        self.idle_since: float | None = None  # waiting for a request since then, by time.monotonic
        self._sock = sock
        self._files = files
        self._verify = verify
        self._check_read = check_read
        self._prefix = prefix
        self._limits = limits
        self._upload_rate = upload_rate
        self._download_rate = download_rate
        self._observer = observer
        self._ahead = b""  # received, and not yet used
        self._body_bytes = 0  # of the request's body, not yet read
        self._expecting = False  # the client waits for 100 Continue before it sends the body
        self._keep = True

    def run(self) -> None:
        """Serve requests until the client closes, is idle or silent too long, or must be dropped."""
        with suppress(ConnectionError, TimeoutError), self._sock:
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while self._keep:
                try:
                    request = self._read_head()
                    if request is None:
                        return
                    self._serve(request)
                except _Refusal as refusal:
                    self._refuse(refusal, head_only=False)
            _linger(self._sock)

    # --- requests

    def _read_head(self) -> h11.Request | None:
        """The next request; None when the client is gone."""
        parser = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_SIZE_BYTES_MAX)
        deadline = 0.0
        fed_bytes = len(self._ahead)
        if self._ahead:
            parser.receive_data(self._ahead)
        while True:
            try:
                event = parser.next_event()
            except h11.RemoteProtocolError as error:
                self._keep = False
                raise _Refusal(error.error_status_hint, "InvalidRequest", str(error)) from error
            if isinstance(event, h11.Request):
                self._ahead = parser.trailing_data[0]
                if fed_bytes - len(self._ahead) > HEAD_SIZE_BYTES_MAX:
                    self._keep = False
                    raise _Refusal(431, "InvalidRequest", "The head of the request is too long.")
                return event
            if event is not h11.NEED_DATA:
                return None
            now = time.monotonic()
            if parser.trailing_data[0] and not deadline:
                deadline = now + self._limits.stall_seconds
            self._sock.settimeout(max(0.001, deadline - now) if deadline else self._limits.idle_seconds)
            self.idle_since = None if deadline else now
            data = self._sock.recv(_HEAD_READ_BYTES)
            self.idle_since = None
            fed_bytes += len(data)
            parser.receive_data(data)

    def _serve(self, request: h11.Request) -> None:
        self._sock.settimeout(self._limits.stall_seconds)
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in request.headers}
        method = request.method.decode("latin-1")
        chunked = "transfer-encoding" in headers
        self._body_bytes = int(headers.get("content-length", "0"))
        self._expecting = headers.get("expect", "").lower() == "100-continue"
        if request.http_version != b"1.1" or "close" in headers.get("connection", "").lower() or chunked:
            self._keep = False
        if self._body_bytes and method != "PUT":
            self._keep = False  # nobody reads that body
        try:
            path, _, query = request.target.decode("latin-1").partition("?")
            if not path.startswith(self._prefix):
                self._keep = False
                raise _Refusal(421, "MisdirectedRequest", "Only objects are served on this connection.")
            name = path[len(self._prefix):]
            if method in ("GET", "HEAD"):
                # First of all, so that a refusal does not tell whether there is such an object.
                signed = self._check_read is not None and self._check_read(method, name, query)
                self._get(name, headers, head_only=method == "HEAD", signed=signed)
            elif method == "PUT":
                self._put(name, query, headers, chunked=chunked)
            else:
                raise _Refusal(405, "MethodNotAllowed", f"{method} is not served here.", Allow="GET, HEAD, PUT")
        except KacheryError as error:
            status, code = _STATUS.get(type(error), (500, "InternalError"))
            self._refuse(_Refusal(status, code, error.message), head_only=method == "HEAD")
        except _Refusal as refusal:
            self._refuse(refusal, head_only=method == "HEAD")

    def _get(self, name: str, headers: Mapping[str, str], *, head_only: bool, signed: bool) -> None:
        with self._files.reading(name) as found:
            size = found.size_bytes
            span = None
            if headers.get("if-range", found.etag) == found.etag:
                span = _range(headers.get("range", ""), size)
            fields = {"Content-Type": "application/octet-stream", "X-Content-Type-Options": "nosniff",
                      "Accept-Ranges": "bytes", "ETag": found.etag}
            if signed:
                fields["Cache-Control"] = "private, max-age=0"  # no cache on the way hands it to others
            elif is_replaceable(name):
                fields["Cache-Control"] = "no-cache"
            start, length = span if span is not None else (0, size)
            if span is not None:
                fields["Content-Range"] = f"bytes {start}-{start + length - 1}/{size}"
            self._answer(200 if span is None else 206, fields, length)
            if not head_only:
                self._send_file(name, found.fd, start, length)

    def _put(self, name: str, query: str, headers: Mapping[str, str], *, chunked: bool) -> None:
        size, replace, node_id = self._verify(name, query)
        generation = headers.get("x-goog-if-generation-match")
        if generation != (None if replace else "0"):
            why = "was not signed" if replace else "is missing: 0"
            raise _Refusal(403, "SignatureDoesNotMatch", f"The header x-goog-if-generation-match {why}.")
        if headers.get("x-goog-content-length-range", "").replace(" ", "") != f"{size},{size}":
            raise _Refusal(403, "SignatureDoesNotMatch", "The signed header x-goog-content-length-range is missing.")
        if chunked or "content-length" not in headers:
            raise _Refusal(411, "MissingContentLength", "Send Content-Length, and no Transfer-Encoding.")
        if self._body_bytes != size:
            status, code = (413, "EntityTooLarge") if self._body_bytes > size else (400, "EntityTooSmall")
            raise _Refusal(status, code, f"The URL was signed for {size} bytes.")
        if not replace and self._files.offered(name):
            if self._observer is not None:
                self._observer.found(name)
            raise ObjectExists(object=name)
        incoming = self._files.create(name, size, replace=replace)
        try:
            if self._expecting:
                self._sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            with FileReceiver(self._sock, incoming.fd) as receiver:
                self._receive(receiver, size)
            incoming.commit()
        except FileRefused as error:
            raise incoming.translated(error.error, "writing") from error
        finally:
            incoming.close()
        if self._observer is not None:
            self._observer.arrived(name, node_id, size)
        self._answer(200, {}, 0)

    # --- bytes

    def _receive(self, receiver: FileReceiver, size: int) -> None:
        """The whole body: what came along with the head, then the rest from the socket."""
        early, self._ahead = self._ahead[:size], self._ahead[size:]
        receiver.write(early, 0)
        self._body_bytes -= len(early)
        span = _SPAN_BYTES if self._upload_rate is None else _LIMITED_SPAN_BYTES
        while self._body_bytes:
            count = receiver.move(size - self._body_bytes, min(self._body_bytes, span))
            if not count:
                raise ConnectionResetError
            self._body_bytes -= count
            if self._upload_rate is not None:
                self._upload_rate.take(count)

    def _skip(self) -> None:
        """Read and drop the rest of a body."""
        skipped, self._ahead = self._ahead[:self._body_bytes], self._ahead[self._body_bytes:]
        self._body_bytes -= len(skipped)
        while self._body_bytes:
            data = self._sock.recv(min(self._body_bytes, _DRAIN_BYTES_MAX))
            if not data:
                raise ConnectionResetError
            self._body_bytes -= len(data)

    def _send_file(self, name: str, fd: int, start: int, length: int) -> None:
        offset = start
        try:
            for count in self._send_spans(fd, start, length):
                offset += count
        finally:
            if self._observer is not None:
                self._observer.sent(name, "", offset - start)

    def _send_spans(self, fd: int, offset: int, length: int) -> Iterator[int]:
        poller = select.poll()
        poller.register(self._sock, select.POLLOUT)
        rate = self._download_rate
        end = offset + length
        span = length if rate is None else _LIMITED_SPAN_BYTES
        while offset < end:
            if not poller.poll(self._limits.stall_seconds * 1000):
                raise TimeoutError
            try:
                count = os.sendfile(self._sock.fileno(), fd, offset, min(end - offset, span))
            except BlockingIOError:
                continue
            if not count:  # the file was cut short on the disk: the client must not take this for the whole
                raise ConnectionAbortedError
            offset += count
            yield count
            if rate is not None:
                rate.take(count)

    def _answer(self, status: int, headers: Mapping[str, str], length: int, body: bytes = b"") -> None:
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", f"Date: {formatdate(usegmt=True)}",
                 f"Content-Length: {length}", *(f"{name}: {value}" for name, value in headers.items())]
        if not self._keep:
            lines.append("Connection: close")
        self._sock.sendall("\r\n".join([*lines, "", ""]).encode("latin-1") + body)

    def _refuse(self, refusal: _Refusal, *, head_only: bool) -> None:
        """Answer a refusal. A body that was not read is skipped when small and sure to come; else the connection
        ends."""
        if self._body_bytes > _DRAIN_BYTES_MAX + len(self._ahead) or (self._body_bytes and self._expecting):
            self._keep = False
        text = refusal.message.replace("&", "&amp;").replace("<", "&lt;")
        data = ("<?xml version='1.0' encoding='UTF-8'?>"
                f"<Error><Code>{refusal.code}</Code><Message>{text}</Message></Error>").encode()
        self._answer(refusal.status, {"Content-Type": "application/xml; charset=UTF-8", **refusal.headers}, len(data),
                     b"" if head_only else data)
        if self._keep:
            self._skip()


def refuse_busy(sock: socket.socket) -> None:
    """Answer the first request on a connection with 503, and close."""
    with suppress(ConnectionError, TimeoutError), sock:
        sock.settimeout(_LINGER_SECONDS)
        sock.recv(_HEAD_READ_BYTES)
        sock.sendall(b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\n"
                     b"Connection: close\r\n\r\n")
        _linger(sock)


def _linger(sock: socket.socket) -> None:
    """Let the client read the last answer before the socket closes: closing on unread bytes would reset it."""
    sock.shutdown(socket.SHUT_WR)
    deadline = time.monotonic() + _LINGER_SECONDS
    while (left := deadline - time.monotonic()) > 0:
        sock.settimeout(left)
        if not sock.recv(_DRAIN_BYTES_MAX):
            return


def _range(text: str, size: int) -> tuple[int, int] | None:
    """Read a Range header (RFC 9110 §14.2) to (start, length); None: none, several, or malformed, so send it all.

    :raises _Refusal: 416, it lies beyond the end.
    """
    match = _RANGE.fullmatch(text.replace(" ", ""))
    if match is None or match[0] == "bytes=-":
        return None
    first, last = match[1], match[2]
    if not first:
        start, end = max(0, size - int(last)), size
    else:
        start, end = int(first), min(size, int(last) + 1) if last else size
        if last and int(last) < start:
            return None
    if start >= end:
        raise _Refusal(416, "InvalidRange", "The range lies beyond the object.", **{"Content-Range": f"bytes */{size}"})
    return start, end - start
