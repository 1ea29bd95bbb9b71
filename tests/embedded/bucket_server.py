"""A bucket on a loopback port without any event loop, and a client that says exactly what it is told."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from kachery_fast.config import load_settings
from kachery_fast.embedded.bucket import BucketServer, SignedPut, UploadSigner

NAME = "ch1/sha1/02/5b/46/025b4666424a0116c45970c27af4e2f90177af69"
SECRET = b"a secret of the hub, for tests"


class Clock:
    """The time of day, set by hand."""

    def __init__(self) -> None:
        self.now = 1_795_175_000.0

    def __call__(self) -> float:
        return self.now


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes
    rest: bytes


class Bucket(NamedTuple):
    server: BucketServer
    signer: UploadSigner
    clock: Clock
    root: Path
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/bucket"

    def sign(self, name: str, size: int, *, replace: bool = False, node_id: str = "") -> SignedPut:
        return self.signer.sign(name, size, 300, self.url, replace=replace, node_id=node_id)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), 20)

    def talk(self, request: bytes, *, head_only: bool = False) -> Answer:
        """Send ``request``, read everything until the server closes, and take the first answer apart."""
        with self.connect() as sock:
            with contextlib.suppress(ConnectionError):
                sock.sendall(request)
                sock.shutdown(socket.SHUT_WR)
            return take_apart(read_all(sock), head_only=head_only)

    def put(self, name: str, data: bytes, *, replace: bool = False) -> Answer:
        return self.talk(put_request(self.sign(name, len(data), replace=replace), data))

    def files(self) -> list[str]:
        """Every file below the root, temporary ones included."""
        return sorted(os.path.relpath(os.path.join(folder, file), self.root)
                      for folder, _, files in os.walk(self.root) for file in files)


def put_request(signed: SignedPut, body: bytes, *, method: str = "PUT", replace: tuple[str, str] = ("", ""),
                **headers: str | None) -> bytes:
    """The bytes of an upload; ``headers`` replace (or, when None, remove) the usual ones, ``_`` stands for ``-``."""
    target = "/" + signed.url.split("/", 3)[3].replace(*replace)
    fields: dict[str, str | None] = {"host": "x", "content-length": str(len(body)), **signed.headers,
                                     **{name.replace("_", "-"): value for name, value in headers.items()}}
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()
                                              if value is not None), "", ""]
    return "\r\n".join(lines).encode() + body


def get_request(target: str, *, method: str = "GET", close: bool = True, **headers: str) -> bytes:
    fields = (f"{name.replace('_', '-')}: {value}" for name, value in headers.items())
    lines = [f"{method} {target} HTTP/1.1", "host: x", *fields]
    return "\r\n".join([*lines, *(["connection: close"] if close else []), "", ""]).encode()


def wait_until(condition: Callable[[], object]) -> None:
    """Wait, at most 20 s, for what another thread is about to do."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def read_all(sock: socket.socket) -> bytes:
    data = b""
    with contextlib.suppress(ConnectionError):
        while piece := sock.recv(1 << 20):
            data += piece
    return data


def take_apart(data: bytes, *, head_only: bool = False) -> Answer:
    head, _, rest = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    length = 0 if head_only else int(headers.get("content-length", "0"))
    return Answer(int(first.split()[1]), headers, rest[:length], rest[length:])


@contextlib.contextmanager
def running_bucket(root: Path, **options: Any) -> Iterator[Bucket]:
    """Serve ``root``; ``options`` are settings, or those of ``BucketServer`` that are named below."""
    clock = Clock()
    signer = UploadSigner(SECRET, clock=clock)
    more = {name: options.pop(name) for name in ("gate", "rate_limit_bytes_per_second", "fsync", "observer")
            if name in options}
    server = BucketServer(root, signer, load_settings({}, **{"stall_seconds": 10.0, **options}), clock=clock, **more)
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                server.serve(listener.accept()[0])
    thread = threading.Thread(target=accept)
    thread.start()
    try:
        yield Bucket(server, signer, clock, root, listener.getsockname()[1])
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        listener.close()
        server.close()
