"""Uploads in resumable sessions: begun, broken off, asked how far they got, and gone on with; against faults."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from kachery_fast.errors import BucketUnreachable, FileChanged, KacheryError, Stalled, UploadRefused, UrlExpired
from kachery_fast.net.bucket import SignedUpload
from tests.net.faulty import FaultyServer, Step, answer, field, message, read_body, reset
from tests.net.test_bucket import DATA, EXPIRED, NAME, with_bucket
from tests.network import LOOPS

pytestmark = pytest.mark.parametrize("loop_kind", LOOPS)
SIZE = 2_000_000
CONTENT = DATA[1_000_000:1_000_000 + SIZE]
HEADERS = {"x-goog-resumable": "start", "x-goog-content-length-range": f"{SIZE},{SIZE}",
           "x-goog-hash": "crc32c=AAAAAA=="}


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.write_bytes(DATA)
    return path


def begin(server_url: str = "") -> Step:
    """Begin a session, here or at another server."""
    def step(sock: socket.socket, head: bytes) -> bool:
        assert head.startswith(b"POST /bucket/" + NAME.encode() + b"?signature=1 HTTP/1.1")
        assert all(field(head, name) == value for name, value in HEADERS.items())
        assert field(head, "content-length") == "0"
        sock.sendall(message(201, location=f"{server_url or 'http://' + field(head, 'host')}/session?upload_id=7"))
        return True
    return step


def broken_after(count: int) -> Step:
    """Take some bytes, and reset the connection."""
    def step(sock: socket.socket, head: bytes) -> bool:
        left = count
        while left:
            left -= len(sock.recv(min(left, 65536)))
        reset(sock)
        return False
    return step


def reached(count: int) -> Step:
    """Say how far the session got."""
    return answer(308, range=f"bytes=0-{count - 1}" if count else "")


def taking(bodies: list[tuple[str, bytes]], status: int = 200) -> Step:
    def step(sock: socket.socket, head: bytes) -> bool:
        bodies.append((field(head, "content-range"), read_body(sock, head)))
        assert field(head, "x-goog-hash") == HEADERS["x-goog-hash"]
        sock.sendall(message(status))
        return True
    return step


def put(
    loop_kind: str, server: FaultyServer, path: Path, size: int = SIZE, **overrides: Any
) -> tuple[Any, int, list[float]]:
    """Upload a part of the file: the result or error, the bytes reported as progress, the pauses."""
    counts = [0]
    signed = SignedUpload(NAME, f"{server.url}/bucket/{NAME}?signature=1", HEADERS, resumable=True)
    fd = os.open(path, os.O_RDONLY)
    try:
        result, pauses = with_bucket(
            loop_kind, server.url,
            lambda bucket: bucket.put_from(signed, fd, 1_000_000, size, progress=counts.append), **overrides)
    finally:
        os.close(fd)
    return result, sum(counts), pauses


def lines(server: FaultyServer) -> list[str]:
    return [f"{head.split()[0].decode()} {field(head, 'content-range')}".strip() for head in server.heads]


def test_a_session_is_begun_and_takes_all_bytes_at_once(loop_kind: str, data_file: Path) -> None:
    bodies: list[tuple[str, bytes]] = []
    with FaultyServer(begin(), taking(bodies, 201)) as server:
        assert put(loop_kind, server, data_file) == (True, SIZE, [])
    assert bodies == [(f"bytes 0-{SIZE - 1}/{SIZE}", CONTENT)]


def test_bytes_in_memory_go_the_same_way(loop_kind: str) -> None:
    bodies: list[tuple[str, bytes]] = []
    with FaultyServer(begin(), broken_after(300_000), reached(262_144), taking(bodies)) as server:
        signed = SignedUpload(NAME, f"{server.url}/bucket/{NAME}?signature=1", HEADERS, resumable=True)
        assert with_bucket(loop_kind, server.url, lambda bucket: bucket.put_bytes(signed, CONTENT)) == (True, [0.25])
    assert bodies == [(f"bytes 262144-{SIZE - 1}/{SIZE}", CONTENT[262_144:])]


def test_after_a_break_it_goes_on_from_where_the_session_is(loop_kind: str, data_file: Path) -> None:
    bodies: list[tuple[str, bytes]] = []
    with FaultyServer(begin(), broken_after(600_000), reached(524_288), broken_after(300_000), answer(503),
                      reached(786_432), taking(bodies)) as server:
        result, counted, pauses = put(loop_kind, server, data_file, retry_attempts_max=3)
        assert lines(server) == ["POST", f"PUT bytes 0-{SIZE - 1}/{SIZE}", f"PUT bytes */{SIZE}",
                                 f"PUT bytes 524288-{SIZE - 1}/{SIZE}", f"PUT bytes */{SIZE}", f"PUT bytes */{SIZE}",
                                 f"PUT bytes 786432-{SIZE - 1}/{SIZE}"]
    assert (result, counted) == (True, SIZE)
    assert bodies[0][1] == CONTENT[786_432:]
    assert pauses == [0.25, 0.25, 0.5], "what brings something does not count"


def test_a_session_that_had_it_all_is_done(loop_kind: str, data_file: Path) -> None:
    with FaultyServer(begin(), broken_after(SIZE), answer(200)) as server:
        assert put(loop_kind, server, data_file) == (True, SIZE, [0.25])


def test_a_store_that_asks_to_wait_is_waited_for(loop_kind: str, data_file: Path) -> None:
    bodies: list[tuple[str, bytes]] = []
    with FaultyServer(answer(429, retry_after="2"), begin(), answer(503, retry_after="3"), reached(0),
                      taking(bodies)) as server:
        result, counted, pauses = put(loop_kind, server, data_file)
    assert (result, counted, pauses) == (True, SIZE, [2.0, 3.0])


def test_a_session_that_is_lost_is_begun_anew(loop_kind: str, data_file: Path) -> None:
    bodies: list[tuple[str, bytes]] = []
    with FaultyServer(begin(), broken_after(600_000), answer(404), begin(), taking(bodies)) as server:
        result, counted, _ = put(loop_kind, server, data_file)
    assert (result, counted, bodies[0][1]) == (True, SIZE, CONTENT)


@pytest.mark.parametrize("steps", [[answer(412)], [begin(), answer(412)]])
def test_an_object_that_exists_counts_as_uploaded(loop_kind: str, data_file: Path, steps: list[Step]) -> None:
    with FaultyServer(*steps) as server:
        assert put(loop_kind, server, data_file) == (False, 0, [])


@pytest.mark.parametrize(("steps", "error"), [
    ([answer(400, EXPIRED)], UrlExpired), ([answer(403, b"<Code>SignatureDoesNotMatch</Code>")], UploadRefused),
    ([answer(404, b"<Code>NoSuchBucket</Code>")], UploadRefused), ([answer(201)], UploadRefused),
    ([begin(), answer(400, b"<Code>EntityTooLarge</Code>")], UploadRefused),
    ([begin(), reached(262_144), reached(262_144)], BucketUnreachable), ([begin(), answer(404)], AssertionError),
    ([answer(500)], BucketUnreachable),
])
def test_what_it_refuses_is_told_apart(
    loop_kind: str, data_file: Path, steps: list[Step], error: type[Exception]
) -> None:
    if error is AssertionError:  # lost, each time anew
        steps = [begin(), answer(404)] * 3
        error = BucketUnreachable
    with FaultyServer(*steps) as server:
        raised, _, _ = put(loop_kind, server, data_file, retry_attempts_max=3)
    assert type(raised) is error
    assert isinstance(raised, KacheryError)


def test_a_session_elsewhere_gets_nothing(loop_kind: str, data_file: Path) -> None:
    with FaultyServer(answer(200)) as elsewhere, FaultyServer(begin(elsewhere.url)) as server:
        raised, _, _ = put(loop_kind, server, data_file)
        assert elsewhere.connections == 0
    assert isinstance(raised, UploadRefused)


def test_a_store_that_falls_silent_and_a_file_that_ends_are_named(loop_kind: str, data_file: Path) -> None:
    def hanging(sock: socket.socket, head: bytes) -> bool:
        while sock.recv(65536):
            pass
        return False
    with FaultyServer(begin(), hanging) as server:
        assert isinstance(put(loop_kind, server, data_file, retry_attempts_max=2)[0], Stalled)
    with FaultyServer(begin(), answer(200)) as server:
        assert isinstance(put(loop_kind, server, data_file, size=len(DATA))[0], FileChanged)
