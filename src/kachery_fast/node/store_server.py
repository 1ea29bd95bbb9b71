"""Files that clients send to the node's store, each on a connection and in a thread of its own.

On the event loop each piece of 64 KiB of a body would be an object, an event and a thread's turn: with the client on
the other core, 1 GiB took 4.5 s so. Here it goes from the socket into the file past this process (``splice``), while
another thread hashes what has arrived. Only the first request of a connection is for this server (``net.port``); a
later one on a kept connection is answered by the loop, and slower.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple

import h11
from aiohttp import web
from multidict import CIMultiDict

from ..errors import BadMessage, InvalidArgument, KacheryError, NodeError
from ..net.port import HEAD_SIZE_BYTES_MAX
from ..splice import FileReceiver, FileRefused
from ..store.files import FileStore, Stored
from .border import Border
from .faults import logged_fault
from .receiving import STORE_2022_PATH, STORE_PATH, tell_store_error, tell_stored

__all__ = ["StoreServer"]

log = logging.getLogger("kachery_fast.node")

_THREADS = 64
# Connections that wait for a thread; further ones are closed.
_WAITING_MAX = 1000
# How long a client that still sends a body is listened to after the answer, and how long a silent one.
_LINGER_SECONDS = 60.0
_LINGER_SILENCE_SECONDS = 2.0
_SPAN_BYTES = 1024 * 1024
_WAKE_BYTES = 256 * 1024
# Up to here a file is hashed and written from memory.
_SMALL_SIZE_BYTES_MAX = 1024 * 1024


class _Head(NamedTuple):
    method: str
    path: str
    headers: Mapping[str, str]
    ahead: bytes


class StoreServer:
    """Serves ``POST /store`` and ``POST /api/store``; ``close`` when the node stops.

    :param stall_seconds: how long a silence of a client may last.
    """

    prefixes: tuple[bytes, ...] = (f"{STORE_2022_PATH} ".encode(), f"{STORE_PATH} ".encode())

    def __init__(self, store: FileStore, border: Border, stall_seconds: float) -> None:
        self._store = store
        self._border = border
        self._stall_seconds = stall_seconds
        self._loop = asyncio.get_running_loop()
        self._threads = ThreadPoolExecutor(_THREADS, "store")
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._closed = False

    def serve(self, sock: socket.socket) -> None:
        """Take over an accepted socket of which nothing was read yet, and return at once."""
        with self._lock:
            if self._closed or len(self._sockets) >= _WAITING_MAX:
                sock.close()
                return
            self._sockets.add(sock)
            self._threads.submit(self._run, sock)

    def close(self) -> None:
        """Break off every connection, and wait for the threads; what had not arrived in full is not stored."""
        with self._lock:
            self._closed = True
            for sock in self._sockets:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        self._threads.shutdown()

    def _run(self, sock: socket.socket) -> None:
        try:
            with suppress(ConnectionError, TimeoutError):
                sock.settimeout(self._stall_seconds)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                head = self._read_head(sock)
                if head is not None:
                    _send(sock, self._answer(sock, head))
                _linger(sock)
        except Exception as error:
            logged_fault(error, "a client's file")
        finally:
            with self._lock:
                self._sockets.discard(sock)
                sock.close()

    def _read_head(self, sock: socket.socket) -> _Head | None:
        """Read the head of the request, which has arrived; None: an answer was sent already, or the client has gone."""
        parser = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_SIZE_BYTES_MAX)
        seen = b""
        try:
            while (event := parser.next_event()) is h11.NEED_DATA:
                data = sock.recv(HEAD_SIZE_BYTES_MAX)
                parser.receive_data(data)
                seen += data
        except h11.RemoteProtocolError as error:
            path = STORE_PATH if seen.partition(b" ")[2].startswith(STORE_PATH.encode()) else STORE_2022_PATH
            _send(sock, self._border.tell(path, BadMessage(why=str(error)), error.error_status_hint))
            return None
        if not isinstance(event, h11.Request):
            return None
        headers = CIMultiDict((name.decode("latin-1"), value.decode("utf-8", "surrogateescape"))  # as aiohttp does
                              for name, value in event.headers)
        return _Head(event.method.decode("latin-1"), event.target.decode("latin-1"), headers,
                     parser.trailing_data[0])

    def _answer(self, sock: socket.socket, head: _Head) -> web.Response:
        """Store the body, and return what the client is told. :raises ConnectionError, TimeoutError: it has gone."""
        try:
            asyncio.run_coroutine_threadsafe(
                self._border.check(head.method, head.path, head.headers), self._loop).result()
            if head.method != "POST":
                unserved = InvalidArgument(what=f"{head.method} {head.path} is not served.")
                return self._border.tell(head.path, unserved, 405)
            length = head.headers.get("Content-Length")
            # Of an empty file the library requests says both, a length of 0 and chunks, and then sends none.
            if length is None or ("Transfer-Encoding" in head.headers and length != "0"):
                return self._border.tell(head.path, InvalidArgument(what="Missing Content-Length in header"),
                                         403 if head.path == STORE_2022_PATH else 411)
        except KacheryError as error:
            return self._border.tell(head.path, error, error.http_status)
        try:
            return tell_stored(head.path, self._receive(sock, head, int(length)))
        except (ConnectionError, TimeoutError):
            raise
        except KacheryError as error:
            told = error
        except Exception as error:
            told = NodeError(what=logged_fault(error, f"POST {head.path}"))
        return tell_store_error(head.path, told) or self._border.tell(head.path, told, told.http_status)

    def _receive(self, sock: socket.socket, head: _Head, size: int) -> Stored:
        early = head.ahead[:size]
        if size > _SMALL_SIZE_BYTES_MAX:
            with self._store.incoming(size) as incoming:
                self._go_on(sock, head)
                with FileReceiver(sock, incoming.fd) as receiver:
                    try:
                        receiver.write(early, 0)
                        position = len(early)
                        while position < size:
                            position += _move(sock, receiver, position, size)
                            incoming.arrived(position)
                    except FileRefused as refused:
                        raise incoming.error_of(refused.error) from refused
                return incoming.commit()
        self._go_on(sock, head)
        data = bytearray(size)
        position = len(early)
        data[:position] = early
        while position < size:
            count = sock.recv_into(memoryview(data)[position:])
            if not count:
                raise ConnectionResetError
            position += count
        return self._store.put_bytes(data)

    def _go_on(self, sock: socket.socket, head: _Head) -> None:
        if head.headers.get("Expect", "").lower() == "100-continue":
            sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")


def _move(sock: socket.socket, receiver: FileReceiver, position: int, size: int) -> int:
    """Move what comes next into the file; return its length. :raises ConnectionResetError: the client has gone."""
    # Old clients write 16 KiB at a time, and to be woken for each costs more than its bytes.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, min(_WAKE_BYTES, size - position))
    limit = min(_SPAN_BYTES, size - position)
    try:
        count = receiver.move(position, limit)
    except TimeoutError:  # a slow client is not a silent one
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
        count = receiver.move(position, limit)
    if not count:
        raise ConnectionResetError
    return count


def _send(sock: socket.socket, answer: web.Response) -> None:
    body = answer.body if isinstance(answer.body, bytes) else b""
    head = (f"HTTP/1.1 {answer.status} {answer.reason}\r\nContent-Type: {answer.content_type}; charset=utf-8\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n")
    sock.sendall(head.encode("ascii") + body)


def _linger(sock: socket.socket) -> None:
    """Let the client read the answer before the socket closes: closing on unread bytes would reset it."""
    sock.shutdown(socket.SHUT_WR)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
    end = time.monotonic() + _LINGER_SECONDS
    while (left := end - time.monotonic()) > 0:
        sock.settimeout(min(left, _LINGER_SILENCE_SECONDS))
        if not sock.recv(_SPAN_BYTES):
            return
