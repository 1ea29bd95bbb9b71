"""Receiving into a part of a file instead of memory."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kachery_fast.config import load_settings
from kachery_fast.errors import DiskError, DiskFull, KacheryError, WrongSize
from kachery_fast.net.bucket import HttpBucket
from kachery_fast.net.memory import MemoryBucket
from kachery_fast.net.ranges import FileSpan, RangeClient
from tests.net.faulty import FaultyServer, answer, message, part_of, serve
from tests.network import LOOPS, run_on

DATA = b"".join(hashlib.sha256(b"%d" % n).digest() for n in range(3 * 32 * 1024))  # 3 MiB
NAME = "ch1/sha1/02/5b/46/025b4666424a0116c45970c27af4e2f90177af69"
SIZE = len(DATA) + 3000

pytestmark = pytest.mark.parametrize("loop_kind", LOOPS)


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    """A file of zeros, 1000 bytes longer on the left and 2000 on the right than ``DATA``."""
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.truncate(fd, SIZE)
    yield fd
    os.close(fd)


def content(fd: int) -> bytes:
    return os.pread(fd, SIZE + 1, 0)


def with_bucket(loop_kind: str, server: FaultyServer, work: Callable[[HttpBucket, RangeClient], Any]) -> Any:
    settings = load_settings({}, stall_seconds=0.5, retry_base_seconds=0)

    async def main() -> Any:
        client = RangeClient(settings, concurrency=2)
        try:
            return await work(HttpBucket(server.url, client, settings), client)
        except KacheryError as error:
            return error
        finally:
            await client.close()
    return run_on(loop_kind, main())


@pytest.mark.parametrize("ending", ["", "close", "hang"])
def test_an_object_lands_in_its_part_of_the_file(loop_kind: str, fd: int, ending: str) -> None:
    broken = [part_of(DATA, 1_000_000, ending), part_of(DATA, 77, ending)] if ending else []
    counts: list[int] = []
    with FaultyServer(*broken, serve(DATA)) as server:
        assert with_bucket(loop_kind, server, lambda bucket, _client: bucket.get_into(
            NAME, FileSpan(fd, 1000, len(DATA)), progress=counts.append)) is None
    assert content(fd) == bytes(1000) + DATA + bytes(2000)
    assert sum(counts) == len(DATA)


def test_a_range_lands_in_its_part_of_the_file(loop_kind: str, fd: int) -> None:
    with FaultyServer(serve(DATA)) as server:
        received = with_bucket(loop_kind, server, lambda _bucket, client: client.receive(
            f"{server.url}/x", FileSpan(fd, 10, 2_000_000), start=5, total=len(DATA)))
    assert received.received_bytes == 2_000_000
    assert content(fd) == bytes(10) + DATA[5:2_000_005] + bytes(SIZE - 2_000_010)


@pytest.mark.parametrize("step", [answer(200, DATA + b"x"), answer(200, DATA[:-1])])
def test_an_object_of_another_size_leaves_the_file_alone(loop_kind: str, fd: int, step: Any) -> None:
    with FaultyServer(step) as server:
        raised = with_bucket(loop_kind, server,
                             lambda bucket, _client: bucket.get_into(NAME, FileSpan(fd, 0, len(DATA))))
    assert type(raised) is WrongSize
    assert content(fd) == bytes(SIZE)


@pytest.mark.parametrize(("path", "flags", "error"), [("/dev/full", os.O_RDWR, DiskFull),
                                                      ("/dev/null", os.O_RDONLY, DiskError)])
def test_a_disk_that_refuses_is_an_error_of_the_disk(loop_kind: str, path: str, flags: int,
                                                     error: type[KacheryError]) -> None:
    fd = os.open(path, flags)
    try:
        with FaultyServer(serve(DATA)) as server:
            raised = with_bucket(loop_kind, server,
                                 lambda bucket, _client: bucket.get_into(NAME, FileSpan(fd, 0, len(DATA))))
            assert len(server.heads) == 1  # the bucket is not asked again for what the disk does not take
    finally:
        os.close(fd)
    assert type(raised) is error


def test_nothing_writes_to_the_file_after_a_cancellation(loop_kind: str, fd: int) -> None:
    half = len(DATA) // 2
    cancelled = threading.Event()

    def step(sock: socket.socket, head: bytes) -> bool:
        sock.sendall(message(200, DATA)[:-half])
        assert cancelled.wait(20)
        sock.sendall(DATA[-half:])
        return False
    with FaultyServer(step) as server:
        async def work(_bucket: HttpBucket, client: RangeClient) -> bytes:
            arrived = asyncio.Event()
            loop = asyncio.get_running_loop()

            def progress(_count: int) -> None:
                loop.call_soon_threadsafe(arrived.set)

            span = FileSpan(fd, 1000, len(DATA))
            task = asyncio.ensure_future(client.receive(f"{server.url}/x", span, progress=progress))
            await arrived.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            snapshot = content(fd)
            cancelled.set()
            await asyncio.to_thread(server.join)
            return snapshot
        snapshot = with_bucket(loop_kind, server, work)
    assert content(fd) == snapshot
    assert snapshot[1000:1000 + (1 << 20)] == DATA[:1 << 20]
    assert snapshot[-half:] == bytes(half)


def test_the_bucket_in_memory_writes_to_files_too(loop_kind: str, fd: int) -> None:
    async def main() -> None:
        bucket = MemoryBucket()
        bucket.objects[NAME] = DATA
        await bucket.get_into(NAME, FileSpan(fd, 1000, len(DATA)))
    run_on(loop_kind, main())
    assert content(fd) == bytes(1000) + DATA + bytes(2000)
