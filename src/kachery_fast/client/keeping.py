"""Connections to the node that are kept between small requests.

A durable append of one message takes the disk about 0.3 ms. A request over a new connection and the general HTTP client
of the standard library took 0.50 ms more, one through this module 0.17 ms (p50 against a handler that does nothing, on
two busy cores), so it speaks just as much HTTP/1.1 (RFC 9112) as the node does: answers whose length is in their head.

A request is sent once. A kept connection that its other side has closed meanwhile is found out before anything is
sent; if it breaks afterwards, nobody can know whether the node acted, and the caller is told so instead of the
request being repeated.
"""

from __future__ import annotations

import os
import re
import select
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

__all__ = ["KeptConnections", "NoAnswer", "NotHttp", "Reply", "Withdrawal", "watch_other_side"]

# An idle connection is not used again after this; the node closes its side after more than a minute.
_IDLE_SECONDS_MAX = 20.0
_IDLE_CONNECTIONS_MAX = 8
_SPAN_SIZE_BYTES = 256 * 1024
_HEAD_SIZE_BYTES_MAX = 64 * 1024
_LENGTH = re.compile(r"[0-9]{1,18}")
_STATUS = re.compile(r"HTTP/1\.[01] ([1-5][0-9][0-9])(?: .*)?")


class NoAnswer(Exception):
    """The connection ended before the answer was there; whether the node acted on the request is not known."""


class NotHttp(Exception):
    """What answered does not speak HTTP as a node does."""


class Reply(NamedTuple):
    """A whole answer: the status, and the body."""

    status: int
    body: bytes


class Withdrawal:
    """Lets another thread take a request back while its own thread waits for the answer."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._withdrawn = False

    @property
    def withdrawn(self) -> bool:
        """Whether ``withdraw`` was called."""
        return self._withdrawn

    def withdraw(self) -> None:
        """Break the connection off; the thread that waits gets NoAnswer at once. Any thread may call."""
        with self._lock:
            self._withdrawn = True
            if self._socket is not None:
                with suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)

    def watch(self, connection: socket.socket | None) -> None:
        """Take ``connection`` as the one to break off; None: none any more.

        :raises NoAnswer: it was withdrawn already.
        """
        with self._lock:
            self._socket = connection
            if connection is not None and self._withdrawn:
                raise NoAnswer("the request was withdrawn")


class KeptConnections:
    """Connections to one address, each used by one thread at a time; any number of threads may call.

    :param connect: makes a new connection; what it raises goes to the caller. :param host: the address, as the
        ``Host`` header wants it.
    """

    def __init__(self, connect: Callable[[], socket.socket], host: str) -> None:
        self._connect = connect
        self._host = host.encode("idna" if not host.isascii() else "ascii")
        # No lock, which a fork could copy while it is held: operations on a deque are whole.
        self._idle: deque[tuple[socket.socket, float]] = deque()
        self._pid = os.getpid()
        weakref.finalize(self, _close_all, self._idle)

    def close(self) -> None:
        """Close what is idle; a later exchange opens anew."""
        _close_all(self._idle)

    def exchange(self, path: str, code: str, body: bytes, *, timeout_seconds: float, answer_size_bytes_max: int,
                 withdrawal: Withdrawal | None = None) -> Reply:
        """POST a JSON body and return the answer.

        :param path: the path, of ASCII letters. :param code: the client code. :param timeout_seconds: how long the
            node may be silent. :param withdrawal: what takes the request back.
        :raises TimeoutError: the node was silent for too long. :raises NoAnswer: the connection broke off.
        :raises NotHttp: the answer is not one of a node, or longer than ``answer_size_bytes_max``.
        """
        connection = self._take()
        keep = False
        try:
            if withdrawal is not None:
                withdrawal.watch(connection)
            connection.settimeout(timeout_seconds)
            head = (f"POST {path} HTTP/1.1\r\nKACHERY-CLIENT-AUTH-CODE: {code}\r\nContent-Type: application/json\r\n"
                    f"Content-Length: {len(body)}\r\nHost: ").encode("ascii") + self._host + b"\r\n\r\n"
            try:
                _send(connection, head, body)
                reply, keep = _receive(connection, answer_size_bytes_max)
            except ConnectionError as error:
                raise NoAnswer(error.strerror or "it closed the connection without an answer") from error
            return reply
        finally:
            if withdrawal is not None:
                withdrawal.watch(None)
                keep = keep and not withdrawal.withdrawn
            if keep and len(self._idle) < _IDLE_CONNECTIONS_MAX:
                self._idle.append((connection, time.monotonic()))
            else:
                connection.close()

    def _take(self) -> socket.socket:
        if self._pid != os.getpid():
            # A fork copied the connections; the answers on them are for the parent.
            self.close()
            self._pid = os.getpid()
        now = time.monotonic()
        while True:
            try:
                connection, since = self._idle.pop()
            except IndexError:
                return self._connect()
            if now - since < _IDLE_SECONDS_MAX and not _spoken_on(connection):
                return connection
            connection.close()


def watch_other_side(sock: socket.socket, seconds: float) -> None:
    """Have the system find out within ``seconds`` that a machine at the other end of a silent connection is gone."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", seconds / 2), ("TCP_KEEPINTVL", seconds / 6), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):  # elsewhere the system's own, of hours
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), min(max(1, int(value)), 32767))


def _send(connection: socket.socket, head: bytes, body: bytes) -> None:
    try:
        if len(body) < _SPAN_SIZE_BYTES:
            connection.sendall(head + body)
        else:
            connection.sendall(head)
            connection.sendall(body)
    except (BrokenPipeError, ConnectionResetError):
        # A node that refuses a body answers before it has read all of it: look for that answer.
        pass


def _receive(connection: socket.socket, size_bytes_max: int) -> tuple[Reply, bool]:
    """Return the answer, and whether the connection can be used again."""
    data = bytearray()
    end = -1
    while end < 0:
        piece = connection.recv(_SPAN_SIZE_BYTES)
        if not piece:
            if data:
                raise NotHttp(f"its answer broke off in its head, after {len(data)} bytes")
            raise ConnectionResetError
        data += piece
        if not data.startswith(b"HTTP/1."[:len(data)]):
            raise NotHttp(f"its answer is not HTTP: {bytes(data[:40])!r}")
        end = data.find(b"\r\n\r\n", 0, _HEAD_SIZE_BYTES_MAX)
        if end < 0 and len(data) > _HEAD_SIZE_BYTES_MAX:
            raise NotHttp("the head of its answer is too long")
    status, length, keep = _read_head(bytes(data[:end]))
    if length > size_bytes_max:
        raise NotHttp(f"its answer is longer than {size_bytes_max} bytes")
    begin, end = end + 4, end + 4 + length
    while len(data) < end:
        piece = connection.recv(min(end - len(data), 4 * _SPAN_SIZE_BYTES))
        if not piece:
            raise NotHttp(f"its answer broke off, {end - len(data)} bytes before its end")
        data += piece
    return Reply(status, bytes(memoryview(data)[begin:end])), keep and len(data) == end


def _read_head(head: bytes) -> tuple[int, int, bool]:
    """Return the status, the length of the body, and whether the connection stays open."""
    first, *lines = head.decode("latin-1").split("\r\n")
    status = _STATUS.fullmatch(first)
    length = -1
    keep = first.startswith("HTTP/1.1")
    for line in lines:
        name, _, value = line.partition(":")
        name = name.lower()
        if name == "content-length":
            length = int(value) if _LENGTH.fullmatch(value.strip()) else -1
        elif name == "connection" and "close" in value.lower():
            keep = False
    if status is None or length < 0:
        raise NotHttp(f"its answer has no status, or does not tell its length: {first[:100]!r}")
    return int(status[1]), length, keep


def _spoken_on(connection: socket.socket) -> bool:
    """Whether the other side has closed an idle connection, or said something unasked."""
    poller = select.poll()
    poller.register(connection, select.POLLIN)
    return bool(poller.poll(0))


def _close_all(idle: deque[tuple[socket.socket, float]]) -> None:
    while True:
        try:
            connection, _ = idle.pop()
        except IndexError:
            return
        connection.close()
