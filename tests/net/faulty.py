"""An HTTP server that does what a test tells it, byte by byte, on real sockets."""

from __future__ import annotations

import socket
import ssl
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

Step = Callable[[socket.socket, bytes], bool]
"""Answers one request (whose head it is given); returns whether the connection stays open."""


class FaultyServer:
    """Serves ``steps``, one for each request in the order of arrival; further requests get the last one."""

    def __init__(self, *steps: Step, tls: ssl.SSLContext | None = None) -> None:
        self._steps = list(steps)
        self._tls = tls
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self.heads: list[bytes] = []
        self.connections = 0
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self._listener.getsockname()[1]}"
        self._start(self._accept)

    def __enter__(self) -> FaultyServer:
        return self

    def __exit__(self, *_exception: object) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for sock in self._sockets:
                with suppress(OSError):
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)
        self.join()

    def join(self) -> None:
        """Wait until every step has run to its end and the clients have closed."""
        with self._lock:
            threads = list(self._threads)
        for thread in threads[1:] + threads[:1]:
            if thread is not self._threads[0] or self._listener.fileno() < 0:
                thread.join(20)
                assert not thread.is_alive()

    def _start(self, work: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        with self._lock:  # who joins sees none that has not begun
            self._threads.append(thread)
            thread.start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._start(self._converse, sock)

    def _converse(self, sock: socket.socket) -> None:
        try:
            if self._tls is not None:
                sock = self._tls.wrap_socket(sock, server_side=True)
            with self._lock:
                self._sockets.append(sock)
            with sock:
                while True:
                    head = read_head(sock)
                    if not head:
                        return
                    with self._lock:
                        self.heads.append(head)
                        step = self._steps.pop(0) if len(self._steps) > 1 else self._steps[0]
                    if not step(sock, head):
                        return
        except OSError:
            return


def read_head(sock: socket.socket) -> bytes:
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = sock.recv(1)
        if not byte:
            return b""
        head += byte
    return head


def field(head: bytes, name: str) -> str:
    for line in head.decode().split("\r\n")[1:]:
        key, _, value = line.partition(":")
        if key.lower() == name.lower():
            return value.strip()
    return ""


def read_body(sock: socket.socket, head: bytes) -> bytes:
    body = b""
    length = int(field(head, "content-length") or 0)
    while len(body) < length:
        data = sock.recv(min(1 << 20, length - len(body)))
        if not data:
            raise ConnectionResetError
        body += data
    return body


def message(status: int, body: bytes = b"", **headers: str) -> bytes:
    fields = {"content-length": str(len(body)), **{name.replace("_", "-"): text for name, text in headers.items()}}
    lines = [f"HTTP/1.1 {status} Because", *(f"{name}: {text}" for name, text in fields.items() if text), "", ""]
    return "\r\n".join(lines).encode() + body


def reset(sock: socket.socket) -> None:
    """Make the coming close a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def answer(status: int, body: bytes = b"", *, keep: bool = True, **headers: str) -> Step:
    """Read the request's body, then answer."""
    def step(sock: socket.socket, head: bytes) -> bool:
        read_body(sock, head)
        sock.sendall(message(status, body, **headers))
        return keep
    return step


def serve(data: bytes) -> Step:
    """Serve ``data`` as a good server does, ranges included."""
    def step(sock: socket.socket, head: bytes) -> bool:
        wanted = field(head, "range")
        if wanted:
            first, last = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
            sock.sendall(message(206, data[first:last + 1], content_range=f"bytes {first}-{last}/{len(data)}"))
        else:
            sock.sendall(message(200, data))
        return True
    return step


def part_of(data: bytes, count: int, ending: str = "close") -> Step:
    """Announce the rest of ``data`` from where the request asks, send ``count`` bytes, then close, reset or hang."""
    def step(sock: socket.socket, head: bytes) -> bool:
        wanted = field(head, "range")
        first = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        rest = data[first:]
        whole = (message(206, rest, content_range=f"bytes {first}-{len(data) - 1}/{len(data)}") if wanted
                 else message(200, rest))
        sock.sendall(whole[:len(whole) - len(rest) + count])
        if ending == "reset":
            reset(sock)
        elif ending == "hang":
            sock.recv(1)  # until the client gives up
        return False
    return step


def silent(ending: str = "close") -> Step:
    """Never answer."""
    def step(sock: socket.socket, head: bytes) -> bool:
        if ending == "hang":
            while sock.recv(65536):
                pass
        elif ending == "reset":
            reset(sock)
        return False
    return step
